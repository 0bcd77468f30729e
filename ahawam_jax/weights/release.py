"""The release's parameter names <-> our tree, as one table.

A release name is '<payload section>/<name>' with {i} for the layer; our path is joined with '/'. Layers are
stacked on a leading axis in our tree. How a tensor is laid out in the release:

  linear  [out, in], ours [in, *out]           heads   [out, N*H], ours [N, H, out]
  flat    one axis, ours any shape             lead    our shape with one (lead1) or two (lead2) leading 1-axes
  patch   [D, c, 1, 2, 2], ours [c*4, D]       same    as ours
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import PATCH, ModelConfig


def _linear(release: str, ours: str, kind: str = "linear") -> Iterator[tuple[str, str, str]]:
    yield f"{release}.weight".removeprefix("."), f"{ours}/kernel", kind
    yield f"{release}.bias".removeprefix("."), f"{ours}/bias", "flat"


def _norm(release: str, ours: str) -> Iterator[tuple[str, str, str]]:
    yield f"{release}.weight", f"{ours}/scale", "flat"
    yield f"{release}.bias", f"{ours}/bias", "flat"


def _small_net(release: str, ours: str) -> Iterator[tuple[str, str, str]]:
    yield from _norm(f"{release}0", f"{ours}/norm")
    yield from _linear(f"{release}1", f"{ours}/hidden")
    yield from _linear(f"{release}3", f"{ours}/out")


def _transformer(release: str, ours: str) -> Iterator[tuple[str, str, str]]:
    yield from _linear(f"{release}text_embedding.0", f"{ours}/text_embedding/hidden")
    yield from _linear(f"{release}text_embedding.2", f"{ours}/text_embedding/out")
    yield from _linear(f"{release}time_embedding.0", f"{ours}/time_embedding/hidden")
    yield from _linear(f"{release}time_embedding.2", f"{ours}/time_embedding/out")
    yield from _linear(f"{release}time_projection.1", f"{ours}/time_embedding/modulation")
    block, blocks = f"{release}blocks.{{i}}.", f"{ours}/blocks/"
    yield f"{block}modulation", f"{blocks}modulation", "lead1"
    for attention, prefix in (("self_attn", ""), ("cross_attn", "cross_")):
        for name in "qkv":
            yield from _linear(f"{block}{attention}.{name}", f"{blocks}{prefix}{name}")
        yield from _linear(f"{block}{attention}.o", f"{blocks}{prefix}o", "heads")
        for name in "qk":
            yield f"{block}{attention}.norm_{name}.weight", f"{blocks}{prefix}{name}_norm", "flat"
    yield from _norm(f"{block}norm3", f"{blocks}cross_norm")
    yield from _linear(f"{block}ffn.0", f"{blocks}ffn_in")
    yield from _linear(f"{block}ffn.2", f"{blocks}ffn_out")


def _table() -> Iterator[tuple[str, str, str]]:
    video, action, editor = "mot/mixtures.video.", "mot/mixtures.action.", "mot/chunk_kv_cache_editor."
    yield from _linear(f"{video}patch_embedding", "planner/patch_embedding", "patch")
    yield from _transformer(video, "planner")
    yield f"{video}head.modulation", "planner/head/modulation", "lead1"
    yield from _linear(f"{video}head.head", "planner/head/out")
    yield "mot/action_branch_embedding", "branch_embedding", "same"
    yield from _linear(f"{action}action_encoder", "executor/action_encoder")
    yield from _transformer(action, "executor")
    yield from _linear(f"{action}head", "executor/head")
    yield f"{editor}delta_gate", "router/layers/gate", "same"
    yield from _norm(f"{editor}layer_query_proj.{{i}}.0", "router/layers/query_norm")
    yield from _linear(f"{editor}layer_query_proj.{{i}}.1", "router/layers/query")
    yield from _small_net(f"{editor}layer_delta_proj.{{i}}.", "router/layers/delta")
    yield "proprio_encoder/weight", "state_encoder/kernel", "linear"
    yield "proprio_encoder/bias", "state_encoder/bias", "flat"
    yield from _small_net("action_obs_visual_proj/", "observation_queries/projection")
    encoder, ours = "chunk_obs_query_encoder/", "observation_queries/encoder"
    yield f"{encoder}base_queries", f"{ours}/base_queries", "lead2"
    yield from _norm(f"{encoder}obs_key_proj.0", f"{ours}/key_norm")
    yield from _linear(f"{encoder}obs_key_proj.1", f"{ours}/key")
    yield from _small_net(f"{encoder}obs_value_proj.", f"{ours}/value")
    yield from _small_net(f"{encoder}query_proj.", f"{ours}/query")


TABLE = tuple(_table())


def _release_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "linear":
        return (math.prod(shape[1:]), shape[0])
    if kind == "heads":
        return (shape[2], shape[0] * shape[1])
    if kind == "flat":
        return (math.prod(shape),)
    if kind == "patch":
        return (shape[1], shape[0] // PATCH**2, 1, PATCH, PATCH)
    return {"lead1": (1,), "lead2": (1, 1), "same": ()}[kind] + shape


def _to_ours(kind: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if kind in ("linear", "heads", "patch"):
        x = x.reshape(x.shape[0], -1).T
    return x.reshape(shape)


def _to_theirs(kind: str, x: np.ndarray) -> np.ndarray:
    shape = _release_shape(kind, x.shape)
    if kind in ("linear", "heads", "patch"):
        x = x.reshape(math.prod(shape[1:]), shape[0]).T
    return x.reshape(shape)


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, int | None, str, tuple[int, ...]]]:
    """(release name, our path, layer or None, kind, our shape of one layer) for every release tensor."""
    ours = flax.traverse_util.flatten_dict(flax.linen.unbox(abstract_params(config)), sep="/")
    for name, path, kind in TABLE:
        shape = ours[path].shape
        if "{i}" in name:
            for layer in range(config.num_layers):
                yield name.format(i=layer), path, layer, kind, shape[1:]
        else:
            yield name, path, None, kind, shape


def release_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the release payload at these sizes, in the table's order."""
    return {name: _release_shape(kind, shape) for name, _, _, kind, shape in _rows(config)}


def check_names(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises one ValueError that lists every missing, surplus and misshapen tensor."""
    expected = release_shapes(config)
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
    problems += [f"surplus: {name} {list(shape)}" for name, shape in shapes.items() if name not in expected]
    problems += [
        f"misshapen: {name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not fit the model's configuration; check that config.model has the "
            "checkpoint's sizes:\n  " + "\n  ".join(problems)
        )


def from_release(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Release tensors by '<section>/<name>' -> our parameter tree of numpy arrays, dtypes kept."""
    check_names({name: tuple(x.shape) for name, x in tensors.items()}, config)
    flat: dict[str, Any] = {}
    for name, path, layer, kind, shape in _rows(config):
        value = _to_ours(kind, np.asarray(tensors[name]), shape)
        if layer is None:
            flat[path] = value
        else:
            flat.setdefault(path, []).append(value)
    flat = {path: np.stack(value) if isinstance(value, list) else value for path, value in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_release(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameter tree (or anything shaped like it, such as gradients) -> release tensors."""
    flat = {
        path: np.asarray(jax.device_get(x))
        for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    return {
        name: _to_theirs(kind, flat[path] if layer is None else flat[path][layer])
        for name, path, layer, kind, _ in _rows(config)
    }
