"""The loss by noise level and robot, gradients by component: against plain loops, and beside the step."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import step as steps
from ahawam_jax.training.breakdown import LEVELS, SampleLosses, batch_sums, names
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.step import TrainState, create_state, make_train_step
from tests.tiny_model import CONFIG, random_batch

ROBOTS = ["a", "b", "c"]
MODEL = AhaWam(CONFIG)


def test_sums_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    draws, size, chunks = 2, 7, 3
    losses = SampleLosses(
        *rng.random((3, size)), rng.random(size) < 0.7, rng.random((draws, size, chunks)),
        rng.random((size, chunks)) < 0.7,
    )  # fmt: skip
    video_times, action_times = rng.uniform(0, 1000, size), rng.uniform(0, 1000, (draws, size, chunks))
    video_times[:3] = 0, 250, 1000  # each belongs above, 1000 to the last
    batch = {"robot": rng.integers(2, size=size), "video_history_valid_len": rng.integers(4, size=size)}
    expected: dict[str, list[float]] = {name: [] for name in names(ROBOTS)[: 2 * LEVELS + 2 * len(ROBOTS) + 1]}
    spans = ["0-25", "25-50", "50-75", "75-100"]
    for b in range(size):
        if losses.video_kept[b]:
            expected[f"video_error/noise_{spans[min(3, int(video_times[b] / 250))]}"] += [losses.video_error[b]]
        for c in range(chunks):
            for draw in range(draws):
                span = spans[int(action_times[draw, b, c] / 250)]
                if losses.action_kept[b, c]:
                    expected[f"action_error/noise_{span}"] += [losses.action_error[draw, b, c]]
        expected[f"loss_video/{ROBOTS[batch['robot'][b]]}"] += [losses.video[b]]
        expected[f"loss_action/{ROBOTS[batch['robot'][b]]}"] += [losses.action[b]]
        expected["history_frames"] += [batch["video_history_valid_len"][b]]
    got = batch_sums(jax.tree.map(np.asarray, losses), video_times, action_times, batch, len(ROBOTS))
    wanted = [[sum(values) for values in expected.values()], [len(values) for values in expected.values()]]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)  # float32
    assert not expected["loss_video/c"]


def run(accumulate: int, batch: dict[str, Any], robots: list[str]) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Two steps."""
    optimizer = OptimizerConfig(warmup_steps=0, accumulate=accumulate)
    tx, key = make_optimizer(optimizer, 10), jax.random.key(0)
    state = nn.unbox(create_state(MODEL, tx, key, False))
    step = jax.jit(make_train_step(MODEL, tx, ObjectiveConfig(), optimizer, robots))
    for _ in range(2):
        state, metrics = step(state, batch, BlockTransform(), key)
    return jax.device_get((state, metrics))


def check(metrics: dict[str, np.ndarray]) -> None:
    """Parts make up the whole."""
    parts = dict(zip(names(ROBOTS), metrics["parts"].tolist(), strict=True))
    for kind in ("video", "action"):  # a sample of each robot, none of the last
        losses = [parts[f"loss_{kind}/{robot}"] for robot in ROBOTS]
        np.testing.assert_allclose(np.mean(losses[:2]), metrics[f"loss_{kind}"], rtol=1e-5)  # float32
        assert losses[0] != losses[1] and np.isnan(losses[2])
    norms = [parts[f"gradient_norm/{component}"] for component in ("planner", "router", "executor")]
    np.testing.assert_allclose(np.sqrt(np.sum(np.square(norms))), metrics["gradient_norm"], rtol=1e-5)
    assert min(norms) > 0 and parts["history_frames"] == 2.5
    assert 0 < parts["gate/min"] <= parts["gate/mean"] <= parts["gate/max"] < 0.1


@pytest.mark.slow
def test_what_is_seen_changes_no_bit_of_what_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch() | {"robot": np.array([0, 1], np.int32)}
    state, metrics = run(1, batch, ROBOTS)
    check(metrics)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "batch_sums", lambda *_: 0.0)
        patch.setattr(steps, "breakdown", lambda *_: 0.0)
        blind, numbers = run(1, batch, ROBOTS)
    jax.tree.map(np.testing.assert_array_equal, state, blind)
    assert all(metrics[name] == numbers[name] for name in ("loss", "loss_video", "loss_action", "gradient_norm"))


@pytest.mark.slow
def test_over_microbatches() -> None:
    check(run(2, random_batch() | {"robot": np.array([0, 1], np.int32)}, ROBOTS)[1])
