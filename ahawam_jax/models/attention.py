"""RMSNorm, rotary embeddings and masked attention, shared by planner, router and executor.

Axis letters: B batch, S tokens, N heads, H head width. Norms, angles and softmax are float32 whatever the inputs.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

ABSENT_GPU = "absent gpu"  # for `attention_of`: cuDNN's kernel cannot be compiled for one
ROTARY_BASE = 10000.0
_backend: ContextVar[str | None] = ContextVar("backend", default=None)
MASKED = -1e30  # finite, so that a fully masked row has finite gradients


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axes: int | tuple[int, ...] = (-2, -1)) -> jax.Array:
    """Root-mean-square norm over all heads at once. x [..., N, H], scale [N, H] -> [..., N, H], dtype of x.

    axes: those of the heads, -1 where they lie in one.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def standardize(x: jax.Array, eps: float) -> jax.Array:
    """Zero mean and unit variance over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)


def phase(x: jax.Array, rates: np.ndarray) -> jax.Array:
    """Angle x * rate in radians, reduced to one turn. x [...] float or int below 2e4, rates [R] -> [..., R] float32.

    A float32 product would be off by 6e-8 * x * rate radians, 4e-5 at frame 700. In turns, with the rate split
    into a coarse part whose product with an integer is exact and a remainder, the error stays near 1e-6.
    """
    turns = np.asarray(rates, np.float64) / (2 * math.pi)
    coarse = np.round(turns * 4096) / 4096
    rest = jnp.asarray(turns - coarse, jnp.float32)
    coarse = jnp.asarray(coarse, jnp.float32)
    x = jnp.asarray(x, jnp.float32)[..., None]
    whole = jnp.floor(x)
    exact = whole * coarse
    return 2 * math.pi * ((exact - jnp.floor(exact)) + (x - whole) * coarse + x * rest)


def rotary_rates(width: int) -> np.ndarray:
    """Radians per position of a rotary embedding over `width` features, float64 [width / 2]."""
    return ROTARY_BASE ** (-np.arange(0, width, 2) / width)


def rotary_angles_1d(positions: jax.Array, head_dim: int) -> jax.Array:
    """Angles of action tokens. positions [..., T] -> [..., T, H/2] float32 radians."""
    return phase(positions, rotary_rates(head_dim))


def rotary_angles_3d(frames: jax.Array, rows: int, columns: int, head_dim: int) -> jax.Array:
    """Angles of video tokens; rows and columns get floor(H/3) features each, time the rest.

    frames [B, F] latent-frame positions -> [B, F, rows * columns, H/2] float32 radians.
    """
    side = head_dim // 3
    time = phase(frames, rotary_rates(head_dim - 2 * side))[:, :, None, None]
    row = phase(jnp.arange(rows), rotary_rates(side))[None, None, :, None]
    column = phase(jnp.arange(columns), rotary_rates(side))[None, None, None]
    grid = (*frames.shape, rows, columns)
    angles = jnp.concatenate([jnp.broadcast_to(a, (*grid, a.shape[-1])) for a in (time, row, column)], -1)
    return angles.reshape(*frames.shape, rows * columns, head_dim // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns neighbouring feature pairs (2i, 2i+1) of every head. x [..., S, N, H], angles [..., S, H/2]."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def turn(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`rotate` as a product with a matrix for every pair: x [..., S, N, H], angles [..., S, H/2].

    Of such sums and of a norm before them XLA (JAX 0.10.2) makes one kernel on GPUs; pairs that are taken apart and
    put together again are one by themselves.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turns = jnp.stack([cos, -sin, sin, cos], -1).reshape(*angles.shape, 2, 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 1, 2)
    return jnp.sum(pairs * turns[..., None, :, :, :], -1).reshape(x.shape).astype(x.dtype)


def own_tokens(before: int, tokens: int) -> jax.Array | None:
    """`own` of `behind` for so many tokens, where this process's devices gain by it."""
    if not _on_gpu():
        return None
    return jax.lax.optimization_barrier(jnp.arange(before + tokens) >= before)  # no constant


def behind(old: jax.Array, new: jax.Array, own: jax.Array | None = None) -> jax.Array:
    """old [..., M, N, H] and new [..., S, N, H] behind it, -> [..., M + S, N, H] in the dtype of new.

    own: bool [M + S], False for old and True for new. Of keys and values that read such an array together XLA (JAX
    0.10.2) makes one kernel on GPUs; concatenated each is one.
    """
    if own is None:
        return jnp.concatenate([old.astype(new.dtype), new], -3)
    lead, both = [(0, 0)] * (new.ndim - 3), [(0, 0)] * 2
    first = jnp.pad(old.astype(new.dtype), [*lead, (0, new.shape[-3]), *both])
    return jnp.where(own[:, None, None], jnp.pad(new, [*lead, (old.shape[-3], 0), *both]), first)


@contextlib.contextmanager
def attention_of(backend: str) -> Iterator[None]:
    """Inside, `attention` is what this backend has, and no device is looked for; "cpu": `plain_attention`."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, queries: int | None = None
) -> jax.Array:
    """Softmax attention. A query whose mask allows nothing returns 0, with gradient 0.

    q [..., S, N, H], k and v [..., K, N, H], mask broadcastable to [..., S, K], True where allowed
    -> [..., S, N, H] in the dtype of v. One kernel where this process's devices have one, else `plain_attention`.
    queries: S, where something lies behind the queries in q, to which nothing is answered.
    """
    asked = q[..., :queries, :, :]
    backend, lengths = _backend.get() or jax.default_backend(), (asked.shape[-3], k.shape[-3])
    if has_kernel(backend, v.dtype, v.shape[-1], () if mask is None else lengths):
        return fused_attention(asked, k, v, mask, "cudnn")
    if backend == "tpu" and has_splash(v.dtype, v.shape[-1], *lengths):
        from ahawam_jax.models.splash import splash_attention  # JAX calls it experimental: only TPUs depend on it

        return _nothing_of_nothing(splash_attention(asked, k, v, mask), mask)
    return plain_attention(q, k, v, mask, queries, in_place=_on_gpu())


def _on_gpu() -> bool:
    return (_backend.get() or jax.default_backend()) in ("gpu", ABSENT_GPU)


def has_kernel(backend: str, dtype: Any, head_dim: int, masked: tuple[int, ...] = ()) -> bool:
    """Whether JAX has attention in one kernel, without scores in memory: cuDNN's, for half precision on GPUs.

    masked: lengths of queries and keys where there is a mask; that kernel's gradient wants them even.
    """
    fits = head_dim % 8 == 0 and head_dim <= 128 and all(length % 2 == 0 for length in masked)
    return backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and fits


def has_splash(dtype: Any, head_dim: int, queries: int, keys: int) -> bool:
    """Whether TPUs' kernel has such heads, and float32 scores outweigh what it pads, transposes and keeps."""
    return dtype == jnp.bfloat16 and head_dim == 128 and queries >= 64 and keys >= 512


def plain_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, queries: int | None = None,
    in_place: bool = False,
) -> jax.Array:  # fmt: skip
    """The reference form of `attention`, for any backend and dtype; scores and softmax are float32.

    in_place: no product copies q, k and v. GPUs can do so for a single sequence, whose heads are one stride apart;
    what lies behind the queries in q gets scores, too, which the softmax does not read.
    """
    in_place = in_place and math.prod(q.shape[:-3]) == math.prod(k.shape[:-3]) == 1
    if in_place:
        q, k, v = map(_where_it_lies, (q, k, v))
    else:
        q = q[..., :queries, :, :]
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k, preferred_element_type=jnp.float32)[..., :queries, :]
    scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[..., None, :, :], scores, MASKED)
    weights = jax.nn.softmax(scores, -1)
    if in_place and mask is not None:  # `_nothing_of_nothing` within the softmax's kernel
        weights = jnp.where(mask[..., None, :, :], weights, 0.0)
    out = jnp.einsum("...nqk,...knh->...qnh", weights.astype(v.dtype), v)
    return out if in_place else _nothing_of_nothing(out, mask)


def _where_it_lies(x: jax.Array) -> jax.Array:
    """x [..., S, N, H] as it lies in memory, where XLA (JAX 0.10.2) would put heads first for a product."""
    lead, (tokens, heads, width) = range(x.ndim - 3), range(x.ndim - 3, x.ndim)
    heads_first = with_layout_constraint(x.swapaxes(tokens, heads), Layout((*lead, heads, tokens, width)))
    return heads_first.swapaxes(tokens, heads)


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, implementation: Literal["cudnn", "xla"]
) -> jax.Array:
    """The same by `jax.nn.dot_product_attention`, which knows one leading axis and masks [B, N, S, K]."""
    lead = jnp.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    flat = [jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    allowed = None
    if mask is not None:
        allowed = jnp.broadcast_to(mask, (*lead, q.shape[-3], k.shape[-3])).reshape(-1, 1, q.shape[-3], k.shape[-3])
    out = jax.nn.dot_product_attention(*flat, mask=allowed, implementation=implementation)
    return _nothing_of_nothing(out.reshape(*lead, *out.shape[1:]), mask)


def _nothing_of_nothing(out: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax over nothing is no softmax: 0 for queries that may see nothing. out [..., S, N, H]."""
    return out if mask is None else jnp.where(mask.any(-1)[..., None, None], out, 0)
