"""Norms, rotary embeddings, time embedding and attention against float64 numpy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.models.attention import (
    ABSENT_GPU,
    attention,
    attention_of,
    behind,
    fused_attention,
    has_kernel,
    own_tokens,
    phase,
    plain_attention,
    rms_norm,
    rotary_angles_1d,
    rotary_angles_3d,
    rotary_rates,
    rotate,
    turn,
)
from ahawam_jax.models.dit import sinusoid
from tests.tiny_model import assert_close, normal

B, Q, K, N, H = 2, 5, 7, 3, 8
FAR = np.concatenate([np.arange(0, 10001, 7), [699, 700, 4095, 4096, 9999, 10000]])


def attention_loop(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        allowed = np.flatnonzero(mask[b, i])
        if not len(allowed):
            continue
        scores = np.array([q[b, i, n] @ k[b, j, n] for j in allowed]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = (weights / weights.sum()) @ v[b, allowed, n]
    return out


@pytest.fixture(scope="module")
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(0, B, Q, N, H), normal(1, B, K, N, H), normal(2, B, K, N, H)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    mask = np.random.default_rng(3).random((B, Q, K)) < 0.5
    mask[0, 2] = False
    mask[1, 4] = np.arange(K) == 6
    return mask


def test_attention_matches_a_loop(qkv, mask) -> None:
    assert_close(attention(*qkv, mask), attention_loop(*qkv, mask), 2e-6)
    assert_close(attention(*qkv), attention_loop(*qkv, np.ones((B, Q, K), bool)), 2e-6)


def test_one_sequence_where_it_lies(qkv, mask) -> None:
    """For GPUs' products, and a mask that hides all from one query; XLA's CPUs do it, too."""
    one = [x[:1] for x in qkv]
    with attention_of(ABSENT_GPU):
        for seen in (mask[:1], np.ones((1, Q, K), bool)):
            assert_close(jax.jit(attention)(*one, seen), attention_loop(*one, seen), 2e-6)
        traced = [str(jax.make_jaxpr(attention)(*x)) for x in (one, qkv)]
    assert ["layout_constraint" in text for text in traced] == [True, False]


@pytest.mark.parametrize("backend", ["cpu", ABSENT_GPU])
@pytest.mark.parametrize("batch", [1, B])
def test_what_lies_behind_the_queries_is_left_out(backend: str, batch: int, qkv, mask) -> None:
    (q, k, v), more = (x[:batch] for x in qkv), normal(9, batch, 3, N, H)
    with attention_of(backend):
        for seen in (None, mask[:batch]):
            got = jax.jit(partial(attention, queries=Q))(np.concatenate([q, more], 1), k, v, seen)
            assert_close(got, jax.jit(attention)(q, k, v, seen), 1e-6)  # a product of other rows may sum otherwise


@pytest.mark.parametrize(("backend", "marked"), [("cpu", False), (ABSENT_GPU, True)])
def test_own_keys_behind_those_before(backend: str, marked: bool) -> None:
    old, new = normal(0, B, 1, K, N, H).astype(jnp.bfloat16), normal(1, B, 1, Q, N, H)
    with attention_of(backend):
        own = own_tokens(K, Q)
    assert (own is not None) == marked
    np.testing.assert_array_equal(jax.jit(behind)(old, new, own), np.concatenate([old.astype(np.float32), new], 2))


def test_fully_masked_query_gives_zero_and_zero_gradient(qkv, mask) -> None:
    assert not mask[0, 2].any()
    out, gradient = jax.jit(jax.value_and_grad(lambda q, k, v: attention(q, k, v, mask)[0, 2].sum(), (0, 1, 2)))(*qkv)
    assert out == 0
    for part in gradient:
        np.testing.assert_array_equal(part, 0.0)
    whole = jax.jit(jax.grad(lambda q, k, v: jnp.square(attention(q, k, v, mask)).sum(), (0, 1, 2)))(*qkv)
    assert all(np.isfinite(part).all() for part in whole)
    assert np.abs(whole[0][1, 0]).max() > 0


SHAPES = {  # leading axes of q, of k and v; shape of the mask
    "planner, frames joined": ((B,), (B,), (B, Q, K)),
    "executor, a chunk and its context": ((B, 4), (B, 4), None),
    "planner, text": ((B, 4), (B, 1), (B, 1, 1, K)),
    "executor, text and own state": ((B, 4), (B, 1), (B, 4, 1, K)),
    "router, tokens read queries": ((B, 1), (B, 4), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_fused_form_is_the_plain_one(name: str) -> None:
    """Shapes and masks as JAX's own function wants them: its form for all backends, in float32, with gradients."""
    q_lead, k_lead, mask_shape = SHAPES[name]
    inputs = normal(4, *q_lead, Q, N, H), normal(5, *k_lead, K, N, H), normal(6, *k_lead, K, N, H)
    mask = None
    if mask_shape:
        mask = np.random.default_rng(7).random(mask_shape) < 0.5
        mask[0, ..., 0, :] = False

    def run(function: Callable[..., jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(*inputs, mask)
            return jnp.sin(out).sum(), out

        # Without the sum itself, whose terms cancel: its order decides on the sixth digit.
        (_, out), gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return out, gradient

    # 2e-6: some roundings of 2^-24, of sums in another order.
    assert_close(run(partial(fused_attention, implementation="xla")), run(plain_attention), 2e-6)


def test_kernel_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch, qkv, mask) -> None:
    assert has_kernel("gpu", jnp.bfloat16, 128) and has_kernel("gpu", jnp.float16, 24)
    for backend, dtype, head_dim in (
        ("cpu", jnp.bfloat16, 128), ("tpu", jnp.bfloat16, 128), ("gpu", jnp.float32, 128), ("gpu", jnp.bfloat16, 20),
        ("gpu", jnp.bfloat16, 256),
    ):  # fmt: skip
        assert not has_kernel(backend, dtype, head_dim)
    assert has_kernel("gpu", jnp.bfloat16, 128, (360, 1080)) and not has_kernel("gpu", jnp.bfloat16, 128, (4, 21))
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, **options: asked.append(options["implementation"]) or q
    )
    half = [x.astype(jnp.bfloat16) for x in qkv]
    attention(*half)
    with attention_of("gpu"):
        attention(*qkv)
        attention(*half, mask)  # five queries, seven keys
        assert not asked
        attention(*half)
        attention(half[0][:, :4], half[1][:, :6], half[2][:, :6], mask[:, :4, :6])
        with attention_of("cpu"):
            attention(*half)
    assert asked == ["cudnn", "cudnn"]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_is_the_plain_form(name: str) -> None:
    """On a GPU, in bfloat16: as far from float64 as the plain form is, with gradients."""
    q_lead, k_lead, mask_shape = SHAPES[name]
    inputs = normal(4, *q_lead, 120, N, 128), normal(5, *k_lead, 136, N, 128), normal(6, *k_lead, 136, N, 128)
    mask = None
    if mask_shape:
        mask = np.random.default_rng(7).random((*mask_shape[:-2], 120 if mask_shape[-2] > 1 else 1, 136)) < 0.5
        mask[0, ..., 0, :] = False

    def run(dtype: Any, function: Callable[..., jax.Array]) -> Any:
        def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(*(x.astype(dtype) for x in inputs), mask).astype(jnp.float32)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)

    with jax.default_matmul_precision("float32"):
        want = run(jnp.float32, plain_attention)
    # 2e-2: products of bfloat16, 2^-9 each.
    assert_close(run(jnp.bfloat16, partial(fused_attention, implementation="cudnn")), want, 2e-2)


@pytest.mark.parametrize("width", [128, 44, 12])
def test_phase_is_exact_far_out(width: int) -> None:
    rates = rotary_rates(width)
    np.testing.assert_allclose(rates, [10000.0 ** (-2 * i / width) for i in range(width // 2)], rtol=1e-12)
    got = np.asarray(jax.jit(lambda x: phase(x, rates))(FAR), np.float64)
    want = FAR[:, None].astype(np.float64) * rates
    assert np.abs(np.exp(1j * got) - np.exp(1j * want)).max() <= 2e-6


def test_rotary_angles_3d_matches_a_loop() -> None:
    frames, rows, columns, head_dim = np.array([[0, 3], [700, 9000]]), 3, 4, 20
    side = head_dim // 3  # 6, 6 and 8 features for row, column and time
    got = np.asarray(rotary_angles_3d(frames, rows, columns, head_dim), np.float64)
    assert got.shape == (2, 2, rows * columns, head_dim // 2)
    for b, f, y, x in np.ndindex(2, 2, rows, columns):
        angles = [frames[b, f] * 1e4 ** (-2 * i / (head_dim - 2 * side)) for i in range((head_dim - 2 * side) // 2)]
        angles += [at * 1e4 ** (-2 * i / side) for at in (y, x) for i in range(side // 2)]
        assert np.abs(np.exp(1j * got[b, f, y * columns + x]) - np.exp(1j * np.array(angles))).max() <= 2e-6


@pytest.mark.parametrize("rotate", [rotate, turn])
def test_rotation_is_the_complex_product(rotate: Callable[..., jax.Array]) -> None:
    x, angles = normal(4, 2, 5, N, H), rotary_angles_1d(np.array([[0, 1, 16, 700, 9999]] * 2), H)
    turned = rotate(x, angles)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.asarray(angles, np.float64))[:, :, None]
    assert_close(turned, np.stack([z.real, z.imag], -1).reshape(x.shape), 2e-6)
    assert_close(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), 2e-6)


def test_products_depend_on_relative_position_only() -> None:
    q, k = normal(5, 1, N, H), normal(6, 1, N, H)

    def product(at_q: int, at_k: int) -> jax.Array:
        q_turned, k_turned = (rotate(x, rotary_angles_1d(np.array([at]), H)) for x, at in ((q, at_q), (k, at_k)))
        return (q_turned * k_turned).sum(-1)

    near = product(5, 2)
    assert_close(product(9003, 9000), near, 1e-5)
    assert np.abs(product(6, 2) - near).max() > 1e-2


def test_rms_norm_spans_all_heads() -> None:
    x, scale = normal(7, 2, N, H), normal(8, N, H)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean((-2, -1), keepdims=True) + 1e-2) * scale
    assert_close(rms_norm(x, scale, 1e-2), want, 1e-6)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), scale, 1e-2)
    assert half.dtype == jnp.bfloat16
    assert_close(half, want, 2e-2)


def test_sinusoid_is_cosines_then_sines() -> None:
    times, width = np.array([0.0, 1e-3, 0.5, 88.5, 731.25, 999.9, 1000.0], np.float32), 256
    angles = times.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    want = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    assert np.abs(np.asarray(jax.jit(sinusoid, static_argnums=1)(times, width)) - want).max() <= 2e-6
