"""`denoise` and `imagine` against the same steps written out."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import PREDICTIONS
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.sampling import Committed, denoise, imagine
from tests.tiny_model import (
    BATCH,
    CONFIG,
    FRAMES,
    HEIGHT,
    TOKENS,
    WIDTH,
    assert_close,
    narrowed,
    normal,
    random_batch,
    random_params,
)

STEPS, SHIFT = 3, 5.0


@pytest.mark.parametrize("committed", [None, np.int32([[1, 0], [0, 1]])])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_takes_euler_steps(prediction: str, committed: np.ndarray | None) -> None:
    """From noise; committed actions, one of two in some chunks, stand where they were given in every step."""
    model, params, batch = AhaWam(dataclasses.replace(CONFIG, prediction=prediction)), random_params(), random_batch()
    shape = (CONFIG.num_layers, BATCH, CONFIG.num_chunks, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    routed = PlannerContext(normal(0, *shape), normal(1, *shape))
    noise = normal(2, BATCH, CONFIG.num_chunks, CONFIG.chunk, CONFIG.action_dim)
    positions = np.arange(CONFIG.horizon).reshape(CONFIG.num_chunks, CONFIG.chunk)
    text, text_mask = batch["context"], batch["context_mask"]
    states = normal(3, BATCH, CONFIG.num_chunks, CONFIG.state_dim)

    @jax.jit
    def act(x: jax.Array, times: jax.Array) -> jax.Array:
        inputs = x, times, positions, text, text_mask, states, routed, committed
        return model.apply({"params": params}, *inputs, method="act")

    given, x, fixed = normal(4, *noise.shape), noise.copy(), np.zeros(noise.shape[:3], bool)
    if committed is not None:
        fixed[:, :, 0] = committed > 0
    x[fixed] = given[fixed]
    u = np.linspace(1, 0, STEPS + 1)
    levels = SHIFT * u / (1 + (SHIFT - 1) * u)
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        out = np.asarray(act(x, np.full((BATCH, CONFIG.num_chunks), 1000 * now, np.float32)))
        velocity = out if prediction == "velocity" else (x - out) / np.float32(now)
        x = np.where(fixed[..., None], x, x + velocity * np.float32(after - now))
    got = jax.jit(lambda noise: denoise(
        model, params, noise, positions, text, text_mask, states, routed, STEPS, SHIFT,
        committed=None if committed is None else Committed(given, committed),
    ))(noise)  # fmt: skip
    assert_close(got, x)
    np.testing.assert_array_equal(np.asarray(got)[fixed], given[fixed])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_numbers_that_a_robot_lacks_are_0_at_every_step(prediction: str) -> None:
    """As a narrower model's, whatever noise they get; of a robot that has all of them, nothing changes."""
    keep, config = np.array([True, False, True]), dataclasses.replace(CONFIG, prediction=prediction)
    params, batch = random_params(), random_batch()
    shape = (CONFIG.num_layers, BATCH, CONFIG.num_chunks, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    routed = PlannerContext(normal(0, *shape), normal(1, *shape))
    noise = normal(2, BATCH, CONFIG.num_chunks, CONFIG.chunk, CONFIG.action_dim)
    positions = np.arange(CONFIG.horizon).reshape(CONFIG.num_chunks, CONFIG.chunk)
    states = normal(3, BATCH, CONFIG.num_chunks, CONFIG.state_dim)

    def run(width: int, params: Any, noise: np.ndarray, **settings: Any) -> np.ndarray:
        model = AhaWam(dataclasses.replace(config, action_dim=width))
        return np.asarray(jax.jit(lambda params, noise: denoise(
            model, params, noise, positions, batch["context"], batch["context_mask"], states, routed, STEPS, SHIFT,
            **settings,
        ))(params, noise))  # fmt: skip

    got = run(3, params, noise, present=keep)
    assert not got[..., ~keep].any()
    narrow = narrowed({"executor": params["executor"]}, keep)
    assert_close(got[..., keep], run(2, params | narrow, noise[..., keep]))
    # 2e-6: two programs, in which the same operations may be fused otherwise and round at 2^-24 each.
    assert_close(run(3, params, noise, present=np.ones(3, bool)), run(3, params, noise), 2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_imagine_keeps_the_current_frame_and_takes_euler_steps(causal: bool) -> None:
    model, params, batch = AhaWam(CONFIG), random_params(), random_batch()
    text, text_mask = batch["context"], batch["context_mask"]
    first = normal(0, BATCH, CONFIG.latent_channels, 1, HEIGHT, WIDTH)
    noise = normal(1, BATCH, CONFIG.latent_channels, FRAMES - 1, HEIGHT, WIDTH)
    # As windows count them for training, four video frames a latent; plain Wan2.2 counts latents.
    positions = np.broadcast_to(np.arange(FRAMES) * (4 if causal else 1), (BATCH, FRAMES))

    @jax.jit
    def plan(x: jax.Array, times: jax.Array) -> jax.Array:
        return model.apply(
            {"params": params}, x, times, positions, text, text_mask, causal, method="plan"
        ).velocity

    x = np.concatenate([first, noise], 2)
    u = np.linspace(1, 0, STEPS + 1)
    levels = SHIFT * u / (1 + (SHIFT - 1) * u)
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        times = np.float32([[0, 1000 * now, 1000 * now]] * BATCH)
        x[:, :, 1:] += np.asarray(plan(x, times))[:, :, 1:] * np.float32(after - now)
    got = jax.jit(lambda noise: imagine(model, params, first, noise, text, text_mask, STEPS, SHIFT, causal))(noise)
    np.testing.assert_array_equal(got[:, :, :1], first)
    assert_close(got, x)
