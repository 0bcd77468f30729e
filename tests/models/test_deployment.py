"""The deployment form computes what the training form does, and holds no more."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.flow_matching import Guide, euler_times, noise_levels
from ahawam_jax.models import deployment
from ahawam_jax.models.aha_wam import AhaWam, empty_memory, resident_params
from ahawam_jax.models.attention import ABSENT_GPU, attention_of
from ahawam_jax.models.config import PREDICTIONS
from ahawam_jax.models.deployment import Words, abstract_deployed, by_layer, deploy, give, with_state
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.sampling import Committed, denoise, denoise_deployed
from ahawam_jax.weights.convert import flatten
from tests.tiny_model import BATCH, CONFIG, HEIGHT, TOKENS, WIDTH, assert_close, normal, random_batch, random_params

STEPS, SHIFT = 3, 5.0
TIMES = euler_times(noise_levels(STEPS, SHIFT))
TEXT = {name: random_batch()[name] for name in ("context", "context_mask")}


def read(config: Any, deployed: Any) -> Words:
    kv = AhaWam(config, deployed=True).apply({"params": deployed.params}, TEXT["context"], method="read")
    return Words(*(by_layer(*x) for x in kv), TEXT["context_mask"])


@pytest.mark.parametrize("anchor", [False, True])
def test_refresh(anchor: bool) -> None:
    """Until the ring of three and one has gone round."""
    config = dataclasses.replace(CONFIG, memory_anchor=anchor)
    params = random_params()
    deployed = deploy(config, params, TIMES)
    words = read(config, deployed)

    @jax.jit
    def stacked(*inputs: Any) -> Any:
        return AhaWam(config).apply({"params": params}, *inputs, method="refresh")

    @jax.jit
    def unstacked(latents: jax.Array, position: jax.Array, text: Any, mask: jax.Array, memory: Any) -> Any:
        inputs = latents, position, None, mask, memory, give(deployed.planner_rows[0], words.planner)
        return AhaWam(config, deployed=True).apply({"params": deployed.params}, *inputs, method="refresh")

    memories = [empty_memory(config, BATCH, TOKENS)] * 2
    for i in range(CONFIG.memory_frames + 3):
        frame = normal(i, BATCH, CONFIG.latent_channels, 1, HEIGHT, WIDTH), np.array([7 * i, 700 + i])
        (want, memories[0]), (got, memories[1]) = (
            run(*frame, *TEXT.values(), memory) for run, memory in zip((stacked, unstacked), memories, strict=True)
        )
        assert_close((got, memories[1]), (want, memories[0]), 1e-6)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_chunk_as_gpus_run_it(batch: int) -> None:
    """With keys and values placed and products made as for them."""
    deployed = deploy(CONFIG, random_params(), TIMES)
    shape = (CONFIG.num_layers, batch, 1, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    routed = PlannerContext(normal(0, *shape), normal(1, *shape))
    noise, states = normal(2, batch, 1, CONFIG.chunk, CONFIG.action_dim), normal(3, batch, 1, CONFIG.state_dim)
    words = jax.tree.map(lambda x: x[:batch], read(CONFIG, deployed))
    positions, made = 4 + np.arange(CONFIG.chunk)[None], []
    for backend in ("cpu", ABSENT_GPU):
        with attention_of(backend):
            made.append(jax.jit(lambda noise: denoise_deployed(
                AhaWam(CONFIG, deployed=True), deployed, noise, positions, words, states, routed, SHIFT
            ))(noise))  # fmt: skip
    assert_close(made[1], made[0], 2e-6)  # three passes of two layers


@pytest.mark.parametrize("committed", [None, np.int32([[1], [0]])])
@pytest.mark.parametrize("present", [True, np.array([True, False, True])])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_chunk(prediction: str, present: Any, committed: np.ndarray | None) -> None:
    config = dataclasses.replace(CONFIG, prediction=prediction)
    params = random_params()
    deployed = deploy(config, params, TIMES, committed=committed is not None)
    shape = (CONFIG.num_layers, BATCH, 1, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    routed = PlannerContext(normal(0, *shape), normal(1, *shape))
    noise, states = normal(2, BATCH, 1, CONFIG.chunk, CONFIG.action_dim), normal(3, BATCH, 1, CONFIG.state_dim)
    positions = 4 + np.arange(CONFIG.chunk)[None]
    given = None if committed is None else Committed(normal(4, *noise.shape), committed)
    want = jax.jit(lambda noise: denoise(
        AhaWam(config), params, noise, positions, *TEXT.values(), states, routed, STEPS, SHIFT, present, given
    ))(noise)  # fmt: skip
    got = jax.jit(lambda noise: denoise_deployed(
        AhaWam(config, deployed=True), deployed, noise, positions, read(config, deployed), states, routed, SHIFT,
        present, given,
    ))(noise)  # fmt: skip
    assert_close(got, want, 2e-6)  # three passes of two layers


def test_the_state_stands_behind_the_text() -> None:
    """In a length that GPUs' products like, of which nothing but text and state is seen."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    kv = [normal(i, BATCH, 11, config.num_heads, config.head_dim) for i in range(2)]
    state = [normal(i, 1, BATCH, 1, config.num_heads, config.head_dim) for i in (2, 3)]
    seen = np.random.default_rng(0).random((BATCH, 11)) < 0.5
    ((k, v),), mask = with_state(Words([], [tuple(kv)], seen), state)
    np.testing.assert_array_equal(mask, np.concatenate([seen, [[True] + 4 * [False]] * BATCH], 1))
    for got, text, own in zip((k, v), kv, state, strict=True):
        np.testing.assert_array_equal(got[:, :12], np.concatenate([text, own[0]], 1))
        assert got.shape[1] == 16 and not got[:, 12:].any()


@pytest.mark.parametrize("jacobian", [True, False])
def test_guided_chunk(jacobian: bool) -> None:
    """Against the training form's Jacobian, with the steps of `flow_matching.guided_step` written out."""
    params, limit = random_params(), 5.0
    deployed = deploy(CONFIG, params, TIMES)
    shape = (CONFIG.num_layers, BATCH, 1, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    routed = PlannerContext(normal(0, *shape), normal(1, *shape))
    noise, states = normal(2, BATCH, 1, CONFIG.chunk, CONFIG.action_dim), normal(3, BATCH, 1, CONFIG.state_dim)
    positions, target = 4 + np.arange(CONFIG.chunk)[None], normal(4, *noise.shape)
    present, held = np.array([True, False, True]), np.float32([1, 0.4])[:, None]
    guide = Guide(target * present, held, np.float32(limit), jacobian)
    got = jax.jit(lambda noise: denoise_deployed(
        AhaWam(CONFIG, deployed=True), deployed, noise, positions, read(CONFIG, deployed), states, routed, SHIFT,
        present, guide,
    ))(noise)  # fmt: skip

    @jax.jit
    def estimate(x: jax.Array, level: jax.Array) -> jax.Array:
        times = jnp.full((BATCH, 1), 1000 * level)
        inputs = x, times, positions, *TEXT.values(), states, routed
        return x - level * jnp.where(present, AhaWam(CONFIG).apply({"params": params}, *inputs, method="act"), 0)

    x, levels = noise * present, noise_levels(STEPS, SHIFT)
    for level, after in zip(np.float32(levels[:-1]), np.float32(levels[1:]), strict=True):
        clean, pull = jax.vjp(lambda x, level=level: estimate(x, level), x)
        error = (target * present - clean) * held
        change = pull(error)[0] if jacobian else error
        factor = min((level**2 + (1 - level) ** 2) / max(level * (1 - level), 1e-9), limit)
        x = (x + ((x - clean) / level - factor * change) * (after - level)) * present
    assert_close(got, x, 1e-5)  # three passes of two layers, forth and back
    assert not np.asarray(got)[..., 1].any()


def test_what_is_held() -> None:
    """The shapes that are promised; every number of the training form once, but what inference never reads."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    held = deploy(config, random_params(), TIMES)
    promised = abstract_deployed(config, STEPS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(lambda x: (x.shape, x.dtype), promised)
    left_out = ("time_embedding", "planner/head", "/modulation")
    whole = flatten(resident_params(config))
    read = [x for name, x in whole.items() if not any(part in name for part in left_out)]
    for dtype in (jnp.bfloat16, jnp.float32):
        sizes = [sum(x.size for x in of if x.dtype == dtype) for of in (read, jax.tree.leaves(held.params))]
        assert sizes[0] == sizes[1]


def test_donated_arrays_are_gone() -> None:
    params = jax.tree.map(jnp.asarray, random_params())
    deployed = deploy(CONFIG, params, TIMES, donate=True)
    kept = {id(x) for x in jax.tree.leaves(deployed)}
    for x in jax.tree.leaves(params):
        assert x.is_deleted() != (id(x) in kept)
    jax.tree.map(np.testing.assert_array_equal, deployed, deploy(CONFIG, random_params(), TIMES))


def test_the_host_lays_out_what_a_gpu_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, rounding to bfloat16 included."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    on_host = deploy(config, random_params(), TIMES)
    monkeypatch.setattr(deployment, "_part_on_host", deployment._compiled_part)
    jax.tree.map(np.testing.assert_array_equal, on_host, deploy(config, random_params(), TIMES))
