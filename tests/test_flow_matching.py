"""Noise schedules, time laws, loss weight and the Euler sampler against float64 numpy and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax import flow_matching as fm
from tests.tiny_model import assert_close, normal

SHIFT = 5.0
DRAWS = 40_000
SHARES = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
NORMAL_QUANTILES = np.array([-2.326348, -1.281552, -0.674490, 0.0, 0.674490, 1.281552, 2.326348])


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_noise_levels(steps: int) -> None:
    u = [1 - i / steps for i in range(steps + 1)]
    want = [SHIFT * x / (1 + (SHIFT - 1) * x) for x in u]
    got = fm.noise_levels(steps, SHIFT)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)
    assert got[0] == 1 and got[-1] == 0
    np.testing.assert_allclose(fm.noise_levels(steps, 1.0), u, atol=1e-15)


def times_of(law: str, seed: int = 0) -> np.ndarray:
    return np.asarray(fm.sample_times(jax.random.key(seed), (DRAWS,), law, SHIFT), np.float64)


@pytest.mark.parametrize("law", fm.TIME_LAWS)
def test_times_follow_their_law(law: str) -> None:
    times = times_of(law)
    assert times.min() > 0 and times.max() <= 1000
    if law == "shifted_uniform":
        quantiles = SHIFT * SHARES / (1 + (SHIFT - 1) * SHARES)
    else:
        quantiles = 1 / (1 + np.exp(-NORMAL_QUANTILES))
    # The share of draws below an exact quantile is binomial; four standard deviations hold for a fixed seed.
    below = (times[:, None] <= 1000 * quantiles).mean(0)
    np.testing.assert_array_less(np.abs(below - SHARES), 4 * np.sqrt(SHARES * (1 - SHARES) / DRAWS))


def test_times_are_a_function_of_the_key() -> None:
    np.testing.assert_array_equal(times_of("logit_normal", 3), times_of("logit_normal", 3))
    assert (times_of("logit_normal", 3) != times_of("logit_normal", 4)).any()


def test_unknown_law_and_weight_are_errors() -> None:
    with pytest.raises(ValueError, match="'uniform'.*shifted_uniform, logit_normal"):
        fm.sample_times(jax.random.key(0), (1,), "uniform", SHIFT)
    with pytest.raises(ValueError, match="'flat'.*bell, uniform"):
        fm.loss_weight(jnp.ones(1), SHIFT, "flat")


def test_mix_is_linear_in_the_level() -> None:
    data, noise, times = normal(0, 2, 3, 4), normal(1, 2, 3, 4), np.array([[0, 250, 1000]] * 2, np.float32)
    got = fm.mix(data, noise, times)
    np.testing.assert_array_equal(got[:, 0], data[:, 0])
    assert_close(got[:, 1], 0.75 * data[:, 1] + 0.25 * noise[:, 1], 1e-6)
    np.testing.assert_array_equal(got[:, 2], noise[:, 2])


@pytest.mark.parametrize("shift", [1.0, 3.0, SHIFT])
def test_bell_weight(shift: float) -> None:
    grid = 1000 * fm.noise_levels(1000, shift)[:-1]
    heights = np.exp(-2 * ((grid - 500) / 1000) ** 2)
    want = (heights - heights.min()) / (heights - heights.min()).mean()
    got = np.asarray(jax.jit(lambda t: fm.loss_weight(t, shift))(grid), np.float64)
    assert_close(got, want, 1e-6)
    assert math.isclose(got.mean(), 1, abs_tol=1e-5)
    edges = np.concatenate([np.linspace(0, 2, 500), np.linspace(998, 1000, 500), grid]).astype(np.float32)
    weights = jax.jit(lambda t: fm.loss_weight(t, SHIFT))(edges)
    assert weights.min() >= 0, (edges[weights.argmin()], weights.min())


def test_uniform_weight_is_one() -> None:
    np.testing.assert_array_equal(fm.loss_weight(jnp.array([1.0, 500.0, 1000.0]), SHIFT, "uniform"), 1)


def test_to_velocity_inverts_mix() -> None:
    sample, noise = normal(2, 3, 4), normal(3, 3, 4)
    times = np.array([1.0, 400.0, 1000.0], np.float32)
    x = fm.mix(sample, noise, times)
    assert_close(fm.to_velocity(sample, x, times[:, None] / 1000, "sample"), noise - sample, 1e-4)
    assert fm.to_velocity(sample, x, times[:, None] / 1000, "velocity") is sample


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("kind", ["velocity", "sample"])
def test_euler_with_the_exact_prediction_returns_the_sample(kind: str, steps: int) -> None:
    sample, noise = normal(4, 2, 5, 3), normal(5, 2, 5, 3)
    levels = fm.noise_levels(steps, SHIFT)

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
        assert x.shape == noise.shape and time.shape == ()
        return (x - sample) / (time / 1000) if kind == "velocity" else jnp.asarray(sample)

    x, (before, velocity) = jax.jit(lambda start: fm.euler(predict, start, levels, kind))(noise)
    assert_close(x, sample, 3e-6)
    want = [(1 - level) * sample + level * noise for level in levels[:-1]]
    assert_close(before, np.stack(want), 3e-6)
    assert_close(velocity, np.broadcast_to(noise - sample, velocity.shape), 3e-5)


def test_euler_steps_down_the_levels() -> None:
    """dx/dt = x + time has no straight solution, so every step must use its own level and width."""
    levels = fm.noise_levels(4, SHIFT)
    x = np.array([2.0])
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        x = x + (x + 1000 * now) * (after - now)
    assert_close(fm.euler(lambda x, time: x + time, jnp.array([2.0]), levels, "velocity")[0], x, 1e-6)


# ------------------------------------------------------------------------------------------------------------ guidance
ROWS = 6  # actions of a chunk, each a number
_GAUSS = np.random.default_rng(3).standard_normal((ROWS, ROWS))
COVARIANCE = _GAUSS @ _GAUSS.T / ROWS + 0.1 * np.eye(ROWS)  # of data whose mean is MEAN
MEAN = np.linspace(-1, 1, ROWS)
TARGET, HELD = np.linspace(2, -1, ROWS), np.array([1, 1, 0.4, 0.1, 0, 0])


def gain(level: float, covariance: np.ndarray) -> np.ndarray:
    """E[data | x] = MEAN + gain (x - (1 - level) MEAN) for x = (1 - level) data + level noise, float64."""
    signal = 1 - level
    return signal * covariance @ np.linalg.inv(signal**2 * covariance + level**2 * np.eye(len(covariance)))


def gaussian(kind: str, level: float, covariance: np.ndarray):
    """What a perfect model of that data predicts of x."""
    matrix, mean = jnp.float32(gain(level, covariance)), jnp.float32(MEAN)

    def predict(x: jax.Array) -> jax.Array:
        clean = mean + matrix @ (x - np.float32(1 - level) * mean)
        return clean if kind == "sample" else (x - clean) / np.float32(level)

    return predict


@pytest.mark.parametrize("limit", [1e9, 5.0])
@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("kind", ["velocity", "sample"])
def test_guided_steps_as_the_authors_take_them(kind: str, jacobian: bool, limit: float) -> None:
    """Their step in float64, with t = 1 - level and their velocity, with the Gaussian's Jacobian written down."""
    levels = fm.noise_levels(5, SHIFT)
    x = np.random.default_rng(4).standard_normal(ROWS)
    guide = fm.Guide(jnp.float32(TARGET), jnp.float32(HELD), jnp.float32(limit), jacobian)
    for level, after in zip(levels[1:-1], levels[2:], strict=True):
        step = (jnp.float32(x), jnp.float32(level), jnp.float32(after - level), kind, guide)
        got = fm.guided_step(gaussian(kind, level, COVARIANCE), *step)
        t, matrix = 1 - level, gain(level, COVARIANCE)
        x1 = MEAN + matrix @ (x - t * MEAN)
        error = (TARGET - x1) * HELD
        correction = matrix.T @ error if jacobian else error
        inverse_r2 = (t**2 + (1 - t) ** 2) / (1 - t) ** 2
        weight = min((1 - t) / t * inverse_r2, limit)
        velocity = (x1 - x) / (1 - t)  # theirs runs from noise to data
        x = x + (level - after) * (velocity + weight * correction)
        assert_close(got, x, 1e-5)  # a product of six and a difference, in 2^-24 parts, times a weight up to 20


def test_the_first_guided_step_has_the_greatest_factor_allowed() -> None:
    """At level 1, c is infinite; nothing of that may reach x."""
    assert fm.guidance(jnp.float32(1), jnp.float32(5)) == 5
    guide = fm.Guide(jnp.float32(TARGET), jnp.float32(HELD), jnp.float32(5))
    got = fm.guided_step(
        gaussian("sample", 1.0, COVARIANCE), jnp.ones(ROWS), jnp.float32(1), jnp.float32(-0.1), "sample", guide
    )
    assert_close(got, np.ones(ROWS) - 0.1 * (1 - MEAN), 1e-6)  # the estimate is the mean, whatever x is: J = 0


@pytest.mark.parametrize("kind", ["velocity", "sample"])
def test_guidance_is_exact_for_independent_data_of_variance_1(kind: str) -> None:
    """Given what data is, x moves along (x - data) / level straight there, for that is what r^2 stands for.

    Numbers that nothing is wanted of go where they would have gone.
    """
    covariance, wanted = np.eye(ROWS), np.float32([1, 1, 1, 0, 0, 0])
    guide = fm.Guide(jnp.float32(TARGET), wanted, jnp.float32(1e9))
    levels, x = fm.noise_levels(5, SHIFT), jnp.linspace(-2, 2, ROWS)
    free = x
    for level, after in list(zip(levels, levels[1:], strict=False))[1:]:
        predict, delta = gaussian(kind, level, covariance), jnp.float32(after - level)
        want = x + (x - TARGET) / level * (after - level)
        x = fm.guided_step(predict, x, jnp.float32(level), delta, kind, guide)
        free, _ = fm.euler_step(predict(free), free, jnp.float32(level), delta, kind)
        assert_close(x[:3], want[:3], 1e-5)
    assert_close(x[:3], TARGET[:3], 1e-5)
    np.testing.assert_allclose(x[3:], free[3:], rtol=1e-6)
