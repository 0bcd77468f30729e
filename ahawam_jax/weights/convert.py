"""Foreign checkpoints <-> our parameter trees: one generic converter over tables of names.

A table row is (foreign name, our path joined with '/', kind), with {i} in the foreign name for the layer: ours are
stacked on a leading axis. How a tensor is laid out there (torch), and here:

  linear  [out, in], ours [in, *out]           heads   [out, N*H], ours [N, H, out]
  flat    one long axis, ours any shape        lead    our shape with one (lead1) or two (lead2) leading 1-axes
  patch   [D, c, 1, 2, 2], ours [c*4, D]       trail   the same with two (trail2) or three (trail3) behind
  conv    [out, in, *size], ours [*size, in, out]      same    as ours

Foreign tensors are anything with shape, dtype and __array__: numpy arrays, or `Tensor`s that still lie in a file.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax
import jax
import numpy as np

from ahawam_jax.models.config import PATCH
from ahawam_jax.weights.tensors import WeightsError

Table = Sequence[tuple[str, str, str]]
Progress = Callable[[str, int], None]  # a name, and the bytes it had
BLOCK = 2**24  # entries tested at once for being finite
ALIGNMENT = 64  # of host buffers, so that a CPU backend takes them over without a copy


@dataclass(frozen=True)
class Row:
    """One foreign tensor and its place in our tree."""

    name: str
    path: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]  # ours, of one layer

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Shape in the foreign file."""
        shape = self.shape
        if self.kind == "linear":
            return (math.prod(shape[1:]), shape[0])
        if self.kind == "heads":
            return (shape[2], shape[0] * shape[1])
        if self.kind == "flat":
            return (math.prod(shape),)
        if self.kind == "patch":
            return (shape[1], shape[0] // PATCH**2, 1, PATCH, PATCH)
        if self.kind == "conv":
            return (shape[-1], shape[-2], *shape[:-2])
        if self.kind in ("trail2", "trail3"):
            return shape + (1,) * int(self.kind[-1])
        return {"lead1": (1,), "lead2": (1, 1), "same": ()}[self.kind] + shape

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """The foreign array in our layout, a view."""
        if self.kind == "conv":
            return np.moveaxis(x, (0, 1), (-1, -2))
        if self.kind in ("linear", "heads", "patch"):
            x = x.reshape(x.shape[0], -1).T
        return x.reshape(self.shape)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our array in the foreign layout, a view where that is possible."""
        shape = self.foreign_shape
        if self.kind == "conv":
            return np.moveaxis(x, (-1, -2), (0, 1))
        if self.kind in ("linear", "heads", "patch"):
            x = x.reshape(math.prod(shape[1:]), shape[0]).T
        return x.reshape(shape)


def rows(table: Table, tree: Any) -> Iterator[Row]:
    """A row for every foreign tensor of a tree shaped like `tree` (arrays or abstract ones), in the table's order."""
    leaves = flatten(tree)
    for name, path, kind in table:
        shape = leaves[path].shape
        if "{i}" in name:
            for layer in range(shape[0]):
                yield Row(name.format(i=layer), path, layer, kind, tuple(shape[1:]))
        else:
            yield Row(name, path, None, kind, tuple(shape))


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path joined with '/', without the boxes that carry logical axes."""
    return flax.traverse_util.flatten_dict(flax.linen.unbox(tree), sep="/")


def misfits(tensors: Mapping[str, Any], table: Table, tree: Any) -> list[str]:
    """A line for every missing, surplus and misshapen tensor of a foreign checkpoint."""
    return differences(shapes(tensors), {row.name: row.foreign_shape for row in rows(table, tree)})


def shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every array, by name."""
    return {name: tuple(x.shape) for name, x in arrays.items()}


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for every name that is missing, surplus or has another shape than expected."""
    lines = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    lines += [f"surplus: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    lines += [
        f"misshapen: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return lines


def summarize(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The lines of `differences`, with the same problem in several layers told once, and at most `shown` of them."""
    layers: dict[str, list[int]] = {}
    for line in problems:
        number = re.search(r"\.(\d+)\.", line)
        layers.setdefault(re.sub(r"\.\d+\.", ".{}.", line, count=1), []).append(int(number[1]) if number else 0)
    lines = [
        line.replace("{}", str(found[0]) if len(found) == 1 else f"{{{min(found)}..{max(found)}}}", 1)
        for line, found in layers.items()
    ]
    return lines[:shown] + ([f"and {len(lines) - shown} more like these"] if len(lines) > shown else [])


def check_names(tensors: Mapping[str, Any], table: Table, tree: Any) -> None:
    """Raises one WeightsError that lists every missing, surplus and misshapen tensor."""
    problems = misfits(tensors, table, tree)
    if problems:
        raise WeightsError(
            f"{len(problems)} tensors do not fit the model's configuration; check that it has the checkpoint's sizes:"
            "\n  " + "\n  ".join(summarize(problems))
        )


def load(tensors: Mapping[str, Any], table: Table, like: Any, progress: Progress | None = None) -> Any:
    """Foreign tensors -> a tree like `like`, whose leaves are ShapeDtypeStructs with the wanted dtype and sharding.

    Every process reads only what its devices hold, one stacked leaf at a time, straight from the mapped files into
    the buffer of the shard. A leaf without a sharding becomes a numpy array. Raises WeightsError for names and shapes
    that do not fit and for tensors with NaN or infinity.
    """
    check_names(tensors, table, like)
    sources: dict[str, list[Row]] = {}
    for row in rows(table, like):
        sources.setdefault(row.path, []).append(row)
    loaded = {}
    for path, leaf in flatten(like).items():
        def shard(index: tuple[slice, ...], path: str = path, leaf: Any = leaf) -> np.ndarray:
            return _assemble(tensors, sources[path], leaf.shape, leaf.dtype, index)

        if getattr(leaf, "sharding", None) is None:
            loaded[path] = shard((slice(None),) * len(leaf.shape))
        else:
            loaded[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)
            loaded[path].block_until_ready()
        if progress is not None:
            progress(path, loaded[path].nbytes)
    return flax.traverse_util.unflatten_dict(loaded, sep="/")


def _assemble(
    tensors: Mapping[str, Any], sources: list[Row], shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of one leaf, from the tensors of its layers."""
    out = _aligned([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    if sources[0].layer is None:
        _fill(out, tensors, sources[0], index)
    else:
        for place, row in zip(out, sources[index[0]], strict=True):
            _fill(place, tensors, row, index[1:])
    return out


def _fill(out: np.ndarray, tensors: Mapping[str, Any], row: Row, index: tuple[slice, ...]) -> None:
    out[...] = row.to_ours(np.asarray(tensors[row.name]))[index]
    if not is_finite(out):
        raise WeightsError(
            f"{row.name} in {getattr(tensors[row.name], 'file', 'the checkpoint')} holds NaN or infinity; the file is "
            "damaged or its training diverged, use another one."
        )


def is_finite(x: np.ndarray) -> bool:
    """Whether nothing in a contiguous array is NaN or infinite; block by block, to need little memory."""
    flat = x.reshape(-1)
    return all(np.isfinite(flat[i : i + BLOCK]).all() for i in range(0, flat.size, BLOCK))


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Stored:
    """A foreign tensor made from a leaf of ours when it is asked for."""

    row: Row
    dtype: np.dtype
    leaf: Callable[[str], np.ndarray]  # path -> our whole leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.foreign_shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        x = self.leaf(self.row.path)
        x = self.row.to_theirs(x if self.row.layer is None else x[self.row.layer])
        return x.astype(dtype or self.dtype, copy=False)


def store(tree: Any, table: Table, leaf: Callable[[str], np.ndarray], dtype: Any = None) -> dict[str, Stored]:
    """Foreign tensors of a tree shaped like `tree`; `leaf` hands out our arrays by path, dtype None keeps theirs.

    They come grouped by leaf, so that a `leaf` which remembers its last answer reads each leaf once.
    """
    dtypes = {path: np.dtype(dtype or x.dtype) for path, x in flatten(tree).items()}
    return {row.name: Stored(row, dtypes[row.path], leaf) for row in rows(table, tree)}


def digest(params: Any) -> str:
    """Hash of every entry, dtype and shape of the arrays of a tree; one array at a time is brought to the host."""
    weights = hashlib.sha256()
    for x in map(np.ascontiguousarray, jax.tree.leaves(params)):
        weights.update(f"{x.dtype} {x.shape}".encode())
        weights.update(x.reshape(-1).view(np.uint8).data)
    return weights.hexdigest()
