"""The executor's distillation: goals and loss against a plain rollout, who learns, and what does not fit."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import save_params
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import PREDICTIONS
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training.distillation import (
    EXECUTOR,
    Distillation,
    Start,
    distillation_loss,
    executor_of,
    make_teacher_distances,
    objective_of,
    read_teacher,
    sample_start,
)
from ahawam_jax.training.objective import ObjectiveConfig, history_of
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.step import TrainState, make_train_step
from configs import demo, demo_flash
from tests.tiny_model import (
    BATCH,
    CONFIG,
    assert_close,
    differs,
    narrowed,
    normal,
    random_batch,
    random_params,
)

SHIFT, STEPS, ANCHORS, DRAWS = 3.0, 5, (0, 1, 3, 5), 2
CFG = Distillation(teacher_steps=STEPS, anchors=ANCHORS, draws=DRAWS, shift=SHIFT)
CHUNKS, HORIZON = DRAWS * CONFIG.num_chunks, CONFIG.horizon
PARAMS, OTHER, DATA = random_params(), random_params(seed=5), random_batch()
STUDENT = PARAMS | executor_of(OTHER)
ANCHOR = np.random.default_rng(0).integers(0, len(ANCHORS) - 1, (BATCH, CHUNKS)).astype(np.int32)
START = Start(normal(7, BATCH, CHUNKS, CONFIG.chunk, CONFIG.action_dim), ANCHOR)
METHODS = ("teacher", "self")
FREEZE = demo_flash.get_config().optimizer.freeze


def settings(method: str) -> Distillation:
    return dataclasses.replace(CFG, method=method)


def level(u: Any) -> Any:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def repeated(x: Any, axis: int) -> np.ndarray:
    return np.concatenate([x] * DRAWS, axis)


def recorded(name: str) -> np.ndarray:
    """Actions or their padding of the batch, the offset cut off, by chunks, once for every draw."""
    rows = zip(DATA[name], DATA["action_offset"], strict=True)
    cut = np.stack([x[at : at + HORIZON] for x, at in rows])
    return repeated(cut.reshape(BATCH, CONFIG.num_chunks, CONFIG.chunk, *cut.shape[2:]), 1)


class Plain:
    """The executor chunk by chunk, for a model and its parameters, called from numpy."""

    def __init__(self, prediction: str, params: Any):
        model = AhaWam(dataclasses.replace(CONFIG, prediction=prediction))
        self._prediction = prediction

        def apply(method: str, *inputs: Any, **options: Any) -> Any:
            return model.apply({"params": params}, *inputs, **options, method=method)

        text = DATA["context"], DATA["context_mask"]
        clip, positions = DATA["input_latents"], DATA["video_temporal_position_ids"]
        # Over the whole clip, as the release plans it: the first frame sees no later one.
        plan = jax.jit(lambda: apply("plan", clip, jnp.zeros(positions.shape), positions, *text,
                                     history=history_of(DATA)))()  # fmt: skip
        routed = jax.jit(lambda: apply("route", plan.context.frame(0), DATA["obs_latents"]))()
        routed = jax.tree.map(lambda x: repeated(x, 2), routed)
        rows = zip(DATA["proprio"], DATA["action_offset"], strict=True)
        states = repeated(np.stack([x[at : at + HORIZON : CONFIG.chunk] for x, at in rows]), 1)
        places = repeated(np.arange(HORIZON).reshape(CONFIG.num_chunks, CONFIG.chunk), 0)
        self._act = jax.jit(lambda x, times: apply("act", x, times, places, *text, states, routed))

    def step(self, x: np.ndarray, now: Any, after: Any) -> np.ndarray:
        """One Euler step; now and after broadcast to [B, C]."""
        now, after = (np.broadcast_to(np.float32(s), (BATCH, CHUNKS)) for s in (now, after))
        out = np.asarray(self._act(np.float32(x), 1000 * now))
        now, after = now[..., None, None], after[..., None, None]
        velocity = out if self._prediction == "velocity" else (x - out) / now
        return x + velocity * (after - now)


def expected(method: str, prediction: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the student of PARAMS and OTHER ends, and its goal."""
    student, reference = Plain(prediction, STUDENT), Plain(prediction, PARAMS)
    share = 1 - np.array(ANCHORS)[ANCHOR] / STEPS
    if method == "teacher":
        states = [np.asarray(START.noise)]
        for i in range(STEPS):
            states.append(reference.step(states[-1], level(1 - i / STEPS), level(1 - (i + 1) / STEPS)))
        at = np.array(ANCHORS)[ANCHOR]
        x = np.stack([[states[at[b, c]][b, c] for c in range(CHUNKS)] for b in range(BATCH)])
        goal = states[-1]
    else:
        noise, actions = np.asarray(START.noise), recorded("action")
        x = actions + level(share)[..., None, None] * (noise - actions)
        half = reference.step(x, level(share), level(share / 2))
        goal = reference.step(half, level(share / 2), 0)
        last = ANCHOR == len(ANCHORS) - 2
        assert last.any() and not last.all()
        goal[last] = actions[last]
    return student.step(x, level(share), 0), goal


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_goal_and_loss_are_those_of_a_plain_rollout(method: str, prediction: str) -> None:
    """Every chunk from an anchor of its own; padding does not count."""
    pad = np.zeros_like(DATA["action_is_pad"])
    pad[0, 3:] = True
    model = AhaWam(dataclasses.replace(CONFIG, prediction=prediction))
    batch, reference = DATA | {"action_is_pad": pad}, executor_of(PARAMS)
    with jax.default_matmul_precision("highest"):
        loss, parts = jax.jit(
            lambda params: distillation_loss(model, params, reference, batch, START, settings(method))
        )(STUDENT)
        reached, goal = expected(method, prediction)
    assert_close(parts["goal"], goal)
    assert_close(parts["reached"], reached)
    kept = np.ones((BATCH, HORIZON), bool)
    kept[0, 3:] = False  # offset 0 of the first sample
    kept = repeated(kept.reshape(BATCH, CONFIG.num_chunks, CONFIG.chunk), 1)
    error = np.square(np.float64(reached) - goal).mean(3)
    np.testing.assert_allclose(loss, np.mean([error[b][kept[b]].mean() for b in range(BATCH)]), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_only_the_executor(method: str) -> None:
    def loss(params: Any, reference: Any) -> jax.Array:
        return distillation_loss(AhaWam(CONFIG), params, reference, DATA, START, settings(method))[0]

    gradient, of_reference = jax.jit(jax.grad(loss, (0, 1)))(STUDENT, executor_of(PARAMS))
    for name, part in gradient.items():
        largest = [float(np.abs(x).max()) for x in jax.tree.leaves(part)]
        assert (max(largest) > 0) == (name in EXECUTOR), name
    assert not any(np.any(x) for x in jax.tree.leaves(of_reference))


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_a_robot_lacks_change_nothing(method: str) -> None:
    """As a narrower model's, whatever noise and records say of them."""
    keep = np.array([True, False, True])
    params, wide = {"executor": STUDENT["executor"]}, AhaWam(CONFIG)
    narrow, cut = AhaWam(dataclasses.replace(CONFIG, action_dim=2)), narrowed(params, keep)
    batch = DATA | {"action_present": np.tile(keep, (BATCH, 1)), "action": DATA["action"] + 50 * ~keep}

    def loss(model: AhaWam, params: Any, batch: Any, noise: np.ndarray) -> float:
        of = jax.jit(lambda params, noise: distillation_loss(
            model, params, executor_of(params), batch, START.replace(noise=noise), settings(method)
        )[0])  # fmt: skip
        return float(of(params, noise))

    got = loss(wide, STUDENT, batch, START.noise + 9 * ~keep)
    want = loss(narrow, STUDENT | cut, DATA | {"action": DATA["action"][..., keep]}, START.noise[..., keep])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_starts() -> None:
    """Pure noise so many times as often as any other anchor, and every chunk and draw on its own."""
    model, batch = AhaWam(CONFIG), {"obs_latents": np.zeros((4000, 2, 1))}
    for weight in (1.0, 3.0):
        cfg = dataclasses.replace(CFG, noise_weight=weight)
        start = sample_start(jax.random.key(0), batch, model, cfg)
        assert start.noise.shape == (4000, 4, CONFIG.chunk, CONFIG.action_dim)
        counts = np.bincount(np.ravel(start.anchor), minlength=3)
        want = start.anchor.size * np.array([weight, 1, 1]) / (weight + 2)
        assert len(counts) == 3 and np.all(np.abs(counts - want) < 5 * np.sqrt(want)), counts
        assert len(np.unique(start.noise)) > 0.9 * start.noise.size
        assert (start.anchor[:, 0] == start.anchor[:, 1]).mean() < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_frozen_arrays_keep_their_bits(method: str) -> None:
    """Through weight decay and averaging, in what is trained and in what is deployed; the executor learns."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1, ema_decay=0.99, freeze=FREEZE)
    tx, model = make_optimizer(optimizer, 100), AhaWam(CONFIG)
    step = jax.jit(make_train_step(model, tx, settings(method), optimizer))
    state = TrainState(jnp.zeros((), jnp.int32), PARAMS, tx.init(PARAMS), PARAMS, executor_of(PARAMS))
    for _ in range(3):
        state, metrics = step(state, DATA, BlockTransform(), jax.random.key(0))
    assert float(metrics["skipped"]) == 0 and float(metrics["gradient_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, state.teacher, executor_of(PARAMS))
    for params in (state.params, state.deploy):
        for name, part in PARAMS.items():
            if name in EXECUTOR:
                assert differs(jax.tree.leaves(params[name])[0], jax.tree.leaves(part)[0]), name
            else:
                jax.tree.map(np.testing.assert_array_equal, params[name], part)


def test_reference_of_each_method() -> None:
    """The teacher's executor or the average decides the goal, as the method says, and nothing else of the two."""
    tx, model = make_optimizer(OptimizerConfig(freeze=FREEZE), 100), AhaWam(CONFIG)

    def loss(method: str, teacher: Any, average: Any) -> float:
        optimizer = OptimizerConfig(ema_decay=0.9, freeze=FREEZE)
        state = TrainState(jnp.zeros((), jnp.int32), PARAMS, tx.init(PARAMS), average, executor_of(teacher))
        step = jax.jit(make_train_step(model, tx, settings(method), optimizer))
        return float(step(state, DATA, BlockTransform(), jax.random.key(0))[1]["loss"])

    for method, teacher, average in (("teacher", STUDENT, PARAMS), ("self", PARAMS, STUDENT)):
        plain = loss(method, PARAMS, PARAMS)
        assert loss(method, average, teacher) == plain  # the other one of them changed
        assert abs(loss(method, teacher, average) - plain) > 1e-3 * plain


def test_one_step_comes_closer_to_the_teacher() -> None:
    cfg = Distillation(teacher_steps=4, anchors=(0, 2, 4), shift=SHIFT)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, freeze=FREEZE)
    tx, model = make_optimizer(optimizer, 60), AhaWam(CONFIG)
    step = jax.jit(make_train_step(model, tx, cfg, optimizer))
    state = TrainState(jnp.zeros((), jnp.int32), PARAMS, tx.init(PARAMS), None, executor_of(PARAMS))
    for _ in range(60):
        state, _ = step(state, DATA, BlockTransform(), jax.random.key(0))
    distances = jax.jit(make_teacher_distances(model, cfg))(
        state.deploy, state.teacher, DATA, BlockTransform(), jax.random.key(1)
    )
    assert distances[0, 0] < 0.5 * distances[1, 0], distances


def test_distances_to_the_teacher() -> None:
    """0 where the sampler is the teacher's own, and of an undistilled executor the same in both rows."""
    cfg = dataclasses.replace(CFG, teacher_steps=4, anchors=(0, 4))
    distances = jax.jit(make_teacher_distances(AhaWam(CONFIG), cfg))
    inputs = DATA, BlockTransform(), jax.random.key(0)
    got = np.asarray(distances(PARAMS, executor_of(PARAMS), *inputs))
    np.testing.assert_array_equal(got[0], got[1])
    assert got[0, 2] == 0 and np.all(got[:, :2] > 1e-3)
    other = np.asarray(distances(STUDENT, executor_of(PARAMS), *inputs))
    np.testing.assert_array_equal(other[1], got[1])
    assert np.all(other[0] > 1e-2)


# ---------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    "values, message",
    [
        (dict(method="both"), "method is 'both'; expected teacher or self"),
        (dict(anchors=(0, 2, 1, 16)), "anchors are .0, 2, 1, 16.; they must rise from 0 to teacher_steps, which"),
        (dict(anchors=(1, 16)), "must rise from 0"),
        (dict(anchors=(0, 8)), "which is 16"),
        (dict(noise_weight=0.0), "noise_weight is 0 and draws 1; expected a weight above 0"),
        (dict(draws=0), "draws 0"),
    ],
)
def test_settings_that_do_not_fit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**values)


def test_what_is_trained_is_said_by_the_config() -> None:
    assert objective_of(demo.get_config()) == ObjectiveConfig(**demo.get_config().objective)
    config = demo_flash.get_config()
    assert objective_of(config) == Distillation(draws=2)
    config.objective.max_delay = 4
    with pytest.raises(ValueError, match="max_delay is 4, but a distillation knows no committed actions"):
        objective_of(config)
    config.objective.max_delay = 0
    for freeze, trained in (("planner", "branch_embedding, executor, observation_queries"), ("", "planner, router")):
        config.optimizer.freeze = freeze
        with pytest.raises(ValueError, match=f"freeze is '{freeze}', which trains .*{trained}.*the executor is dist"):
            objective_of(config)


@pytest.mark.parametrize("name", ["demo_flash", "robotwin_flash"])
def test_flash_configs_are_those_of_the_paper(name: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config()
    cfg = objective_of(config)
    assert (cfg.teacher_steps, cfg.anchors, cfg.method) == (16, (0, 1, 2, 4, 8, 12, 16), "teacher")
    assert config.model.prediction == "velocity" and config.policy.steps == 2


def test_a_policy_that_cannot_be_distilled(tmp_path: Path) -> None:
    config = demo_flash.get_config()
    config.init = ""
    with pytest.raises(ValueError, match="config.init is empty; a distillation starts from the policy to distil"):
        read_teacher(config)
    config.init = str(tmp_path)
    run: dict[str, Any] = {"config": config.to_dict()}
    save_params(tmp_path, {"kernel": jnp.zeros(2)}, run)
    with pytest.raises(ValueError, match="has no statistics of states and actions, so it is no policy"):
        read_teacher(config)


def test_another_model_than_the_policy(tmp_path: Path) -> None:
    config = demo_flash.get_config()
    config.init = str(tmp_path)
    there = ConfigDict(config.to_dict())
    there.model.update(prediction="sample", remat="full")
    del there.model.initial_gate  # as in records from before there was one
    save_params(tmp_path, {"kernel": jnp.zeros(2)}, {"config": there.to_dict(), "statistics": {"a": {}}})
    with pytest.raises(ValueError, match=r"another model .*\n  model.prediction: sample there, velocity now$"):
        read_teacher(config)
    config.model.prediction = "sample"
    assert read_teacher(config)["statistics"] == {"a": {}}
