"""The sum of an array's bits, by which a checkpoint is known again, computed where the array lies."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def describe(tree: Any) -> dict[str, list[Any]]:
    """Of every array, by path joined with '/': shape, dtype and the sum of its bits, JSON-ready."""
    leaves = named(tree)
    return {
        name: [list(x.shape), str(x.dtype), found]
        for (name, x), found in zip(leaves.items(), sums(list(leaves.values())), strict=True)
    }


def sums(arrays: Sequence[Any]) -> list[int]:
    """The words of each array added up, modulo 2^32, which no sharding changes. All processes call it together.

    Arrays on devices are added up there: no byte of them comes to the host.
    """
    away = [x for x in arrays if not _at_hand(x)]
    found = iter(_everywhere(_device_sums, away) if away else ())
    return [_sum(np.asarray(x)) if _at_hand(x) else int(next(found)) for x in arrays]


def find_not_finite(tree: Any) -> str | None:
    """The first array of JAX, by path, with a value that is not finite. All processes call it together."""
    arrays = {name: x for name, x in named(tree).items() if isinstance(x, jax.Array)}
    leaves = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    away = [x for x in leaves.values() if not _at_hand(x)]
    found = iter(_everywhere(_all_finite, away) if away else ())
    finite = [np.isfinite(np.asarray(x)).all() if _at_hand(x) else next(found) for x in leaves.values()]
    return next((name for name, fine in zip(leaves, finite, strict=True) if not fine), None)


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path joined with '/'."""
    return {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: tuple[Any, ...]) -> str:
    """Tree path as 'params/planner/...', whether its containers are structs, dicts, tuples or their JSON form."""
    parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path)
    return "/".join(str(part) for part in parts)


def _at_hand(x: Any) -> bool:
    """Whether the host has the array's numbers in its own memory, so that there is nothing to compile for them."""
    return not isinstance(x, jax.Array) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.sharding.device_set)
    )


def _everywhere(compute: Any, arrays: list[jax.Array]) -> np.ndarray:
    """What a function of arrays computes on their devices, on every process."""
    place = arrays[0].sharding
    out = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None
    return np.asarray(jax.jit(compute, out_shardings=out)(arrays))


def _device_sums(arrays: list[jax.Array]) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return words.sum(dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays])


def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def _sum(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return int(words.sum(dtype=np.uint32))
