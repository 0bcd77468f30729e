"""Noise and windows of the joint objective."""

import jax
import numpy as np
import pytest

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.training.objective import ObjectiveConfig, masked_mean, sample_noise, window
from tests.tiny_model import BATCH, CONFIG, normal, random_batch

DRAWS = 3
CHUNK_SHAPE = (DRAWS, BATCH, CONFIG.num_chunks)


def drawn(action_times: str, seed: int = 0):
    config = ObjectiveConfig(action_times=action_times, action_draws=DRAWS)
    return sample_noise(jax.random.key(seed), random_batch(), AhaWam(CONFIG), config)


def test_noise_shapes_and_independence() -> None:
    noise, batch = drawn("per_chunk"), random_batch()
    assert noise.video.shape == batch["input_latents"].shape
    assert noise.video_times.shape == (BATCH,)
    assert noise.action.shape == (*CHUNK_SHAPE, CONFIG.chunk, CONFIG.action_dim)
    numbers = np.concatenate([x.ravel() for x in (noise.video, noise.action)])
    assert len(np.unique(numbers)) == len(numbers)
    again, other = drawn("per_chunk"), drawn("per_chunk", 1)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), noise, again)))
    assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).any()), noise, other)))


def test_each_chunk_has_its_own_time() -> None:
    times = np.asarray(drawn("per_chunk").action_times)
    assert times.shape == CHUNK_SHAPE
    assert len(np.unique(times)) == times.size


def test_shared_time_is_one_for_the_horizon() -> None:
    times = np.asarray(drawn("shared").action_times)
    assert times.shape == CHUNK_SHAPE
    np.testing.assert_array_equal(times, times[:, :, :1].repeat(CONFIG.num_chunks, 2))
    assert len(np.unique(times)) == DRAWS * BATCH


@pytest.mark.parametrize("tail", [(), (3,)])
def test_window_is_slicing(tail: tuple[int, ...]) -> None:
    x, start, length = normal(0, 3, 9, *tail), np.array([0, 2, 5]), 4
    want = np.stack([row[at : at + length] for row, at in zip(x, start, strict=True)])
    np.testing.assert_array_equal(window(x, start, length), want)


def test_masked_mean_of_nothing_is_zero() -> None:
    x, keep = np.array([[1.0, 3.0, 8.0], [np.nan, np.inf, 1.0]]), np.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(masked_mean(x, keep), [2.0, 0.0])


@pytest.mark.parametrize("field", ["time_law", "action_time_law", "action_times", "loss_weight", "action_loss_weight"])
def test_unknown_choice_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"objective.{field} is 'other'; expected one of"):
        ObjectiveConfig(**{field: "other"})
