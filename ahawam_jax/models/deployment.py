"""The deployment form of the parameters: every weight once, as inference reads it.

Blocks have arrays of their own, since a weight that is one of a stack is copied out of it before every product; linear
layers of one input are one product; what depends on nothing but the diffusion time, the modulation, is a table; and
what inference does not use is left out. `AhaWam(config, deployed=True)` runs on it.
"""

import functools
import re
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ahawam_jax.models.aha_wam import AhaWam, empty_memory, resident_dtype
from ahawam_jax.models.attention import attention_of
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.models.dit import KV, Given, TimeEmbedding, committed_rows

ALIGNED = 8  # to which GPUs' products of half precision pad lengths of keys, if nobody has before them
FUSED = {"qkv": ("q", "k", "v"), "qk_norm": ("q_norm", "k_norm"), "cross_kv": ("cross_k", "cross_v")}


@flax.struct.dataclass
class Deployed:
    """What a policy holds of a checkpoint."""

    params: Any  # of AhaWam(config, deployed=True)
    planner_rows: jax.Array  # [1, L, 6, D] float32, modulation of every block at time 0
    executor_rows: jax.Array  # [n, L, 6, D] float32, and at the times of n Euler steps
    clean_rows: jax.Array | None = None  # [1, L, 6, D] float32, the executor's at time 0: of committed actions


@flax.struct.dataclass
class Words:
    """Instructions of a batch of episodes, as cross-attention reads them: k, v [B, K, N, H] by layer."""

    planner: list[KV]
    executor: list[KV]
    mask: jax.Array  # [B, K] bool


@functools.lru_cache(maxsize=8)  # tracing takes seconds
def deployed_shapes(config: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters of AhaWam(config, deployed=True). Not to be changed."""

    def touch(model: AhaWam) -> None:
        tokens, text, mask = 1, jnp.zeros((1, 1, config.text_dim)), jnp.ones((1, 1), bool)
        latents = jnp.zeros((1, config.latent_channels, 1, PATCH, PATCH))
        actions = jnp.zeros((1, 1, config.chunk, config.action_dim))
        planner, executor = (by_layer(*kv) for kv in model.read(text))
        model.read_state(jnp.zeros((1, 1, config.state_dim)))
        memory = empty_memory(config, 1, tokens)
        dims = (config.planner_dim, config.executor_dim)
        rows = [jnp.zeros((config.num_layers, 6, dim)) for dim in dims]
        context, _ = model.refresh(latents, jnp.zeros(1), None, mask, memory, give(rows[0], planner))
        routed = model.route(context, latents[:, None])
        seen = by_layer(routed.k, routed.v)
        model.step(actions, jnp.zeros((1, config.chunk)), mask, seen, give(rows[1], executor))

    model = AhaWam(config, deployed=True)
    with attention_of("cpu"):
        shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), method=touch)["params"]))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, resident_dtype(config, path)), shapes
    )


def deploy(
    config: ModelConfig, params: Any, times: np.ndarray, donate: bool = False, committed: bool = False
) -> Deployed:
    """Parameters of the training form, any dtype -> the deployment form, for Euler steps at `times` [n].

    committed: a chunk may begin with committed actions, at time 0.
    donate: arrays are deleted as they are taken apart, so that never more than one of them exists in both forms.
    """
    stacked = flatten_dict(params, sep="/")
    clean = np.zeros(1)
    rows = [
        modulation(params[name], getattr(config, f"{name}_dim"), config.freq_dim, np.float32(at))
        for name, at in (("planner", clean), ("executor", times), *[("executor", clean)] * committed)
    ]
    sources: dict[tuple[str, ...], list[str]] = {}  # in the training form, of places in the deployment form
    shapes = flatten_dict(deployed_shapes(config), sep="/")
    for path in shapes:
        sources.setdefault(_sources(path), []).append(path)
    held = {}
    for names, paths in sources.items():
        parts = [jnp.asarray(stacked.pop(name)) for name in names]
        on_host = [device.platform for device in parts[0].devices()] == ["cpu"]
        make = _part_on_host if on_host else _compiled_part
        for path in paths:
            layer = re.search(r"/blocks_(\d+)/", path)
            index = None if layer is None else np.int32(layer[1])
            like = shapes[path]
            if donate and index is None and [(x.shape, x.dtype) for x in parts] == [(like.shape, like.dtype)]:
                held[path] = parts[0]  # a program that hands it on would hold 2 MiB
            else:
                held[path] = make(parts, index, like.shape, like.dtype)
        jax.block_until_ready([held[path] for path in paths])
        if donate:
            kept = [held[path] for path in paths]
            for x in parts:
                if not any(x is y for y in kept):
                    x.delete()
    if donate:
        for x in stacked.values():
            x.delete()
    return Deployed(unflatten_dict(held, sep="/"), *rows)


def abstract_deployed(config: ModelConfig, steps: int, committed: bool = False) -> Deployed:
    """Shapes and dtypes of what `deploy` makes for so many Euler steps."""
    rows = [
        jax.ShapeDtypeStruct((n, config.num_layers, 6, dim), jnp.float32)
        for n, dim in ((1, config.planner_dim), (steps, config.executor_dim), *[(1, config.executor_dim)] * committed)
    ]
    return Deployed(deployed_shapes(config), *rows)


def _sources(path: str) -> tuple[str, ...]:
    """Where an array of the deployment form lies in the training form: several, where layers are fused."""
    first, *rest = path.split("/")
    if rest and rest[0].startswith(("blocks_", "text_context")):
        rest[0] = "blocks"
    for i, name in enumerate(rest):
        if name in FUSED:
            return tuple("/".join([first, *rest[:i], part, *rest[i + 1 :]]) for part in FUSED[name])
    return ("/".join([first, *rest]),)


def _part(numpy: Any, parts: list[Any], index: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of the deployment form, of what it is made of in the training form; numpy: or jax.numpy."""
    if index is not None:
        parts = [x[index] for x in parts]
    fused = parts[0] if len(parts) == 1 else numpy.stack(parts, -3)
    return fused.reshape(shape).astype(dtype)


_compiled_part = jax.jit(functools.partial(_part, jnp), static_argnames=("shape", "dtype"))


def _part_on_host(parts: list[jax.Array], index: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Of arrays that lie on one CPU device, where programs for all shapes would take longer to compile than to run."""
    return jax.device_put(_part(np, [np.asarray(x) for x in parts], index, shape, dtype), parts[0].sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def modulation(params: Any, dim: int, freq_dim: int, times: np.ndarray) -> jax.Array:
    """The modulation rows of all blocks of a component at diffusion times [n]. [n, L, 6, D] float32."""
    rows = TimeEmbedding(dim, freq_dim).apply({"params": params["time_embedding"]}, times[None])[1]
    return rows[0][:, None] + params["blocks"]["modulation"]


def by_layer(k: jax.Array, v: jax.Array) -> list[KV]:
    """k, v [L, ...] -> a pair for each layer."""
    return list(zip(k, v, strict=True))


def give(rows: jax.Array, text: list[KV]) -> list[Given]:
    """rows [L, 6, D] of one diffusion time, k, v [B, K, N, H] by layer -> what every block is given."""
    return [Given(rows[i][None, None], *kv) for i, kv in enumerate(text)]


def give_committed(given: list[Given], clean: jax.Array, committed: jax.Array, tokens: int) -> list[Given]:
    """What blocks are given for chunks of T tokens whose first are clean.

    clean [L, 6, D] rows of time 0, committed int [B, C].
    """
    return [
        own.replace(rows=committed_rows(own.rows, clean[i][None, None], committed, tokens))
        for i, own in enumerate(given)
    ]


def with_state(words: Words, state: KV) -> tuple[list[KV], jax.Array]:
    """What the executor's cross-attention reads: k, v [B, M, N, H] by layer, and which of them, [B, M] bool.

    The text, behind it the token of the robot's state, k, v [L, B, 1, N, H], and masked zeros up to a multiple of
    ALIGNED.
    """
    length = words.mask.shape[1] + 1
    empty = [(0, 0), (0, -length % ALIGNED)]

    def joined(text: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.pad(jnp.concatenate([text, own], 1), [*empty, (0, 0), (0, 0)])

    of_layer = zip(words.executor, by_layer(*state), strict=True)
    kv = [tuple(joined(*parts) for parts in zip(text, own, strict=True)) for text, own in of_layer]
    mask = jnp.pad(words.mask, [(0, 0), (0, 1)], constant_values=True)
    return kv, jnp.pad(mask, empty)
