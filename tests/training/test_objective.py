"""Noise, windows and masks of the joint objective."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training.objective import Noise, ObjectiveConfig, joint_loss, masked_mean, sample_noise, window
from ahawam_jax.training.validation import make_open_loop_error
from tests.tiny_model import (
    BATCH,
    CONFIG,
    assert_close,
    narrowed,
    normal,
    random_batch,
    random_noise,
    random_params,
)

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


def test_loss_of_several_draws_is_their_mean() -> None:
    params, batch, noise = random_params(), random_batch(), random_noise(draws=DRAWS)

    def run(noise: Noise) -> tuple[Any, dict[str, Any]]:
        return jax.jit(lambda: joint_loss(AhaWam(CONFIG), params, batch, noise, ObjectiveConfig()))()

    together, parts = run(noise)
    alone = [run(noise.replace(action=noise.action[i, None], action_times=noise.action_times[i, None]))
             for i in range(DRAWS)]  # fmt: skip
    # 2e-6: roundings of 2^-24, in products of other shapes.
    assert_close(together, np.mean([loss for loss, _ in alone]), 2e-6)
    assert_close(parts["pred_action"], np.concatenate([parts["pred_action"] for _, parts in alone]), 2e-6)
    assert_close(parts["samples"].action, np.mean([parts["samples"].action for _, parts in alone], 0), 2e-6)


# ------------------------------------------------------------------------------- robots that lack numbers of an action
MASKS = np.array([[True, True, False], [False, True, True]])
MODEL = AhaWam(CONFIG)


@jax.jit
def gradient(params: Any, batch: dict[str, np.ndarray], noise: Noise) -> Any:
    """Loss and gradient."""
    return jax.value_and_grad(lambda params: joint_loss(MODEL, params, batch, noise, ObjectiveConfig())[0])(params)


def sample(number: int, batch: dict[str, np.ndarray], noise: Noise) -> tuple[dict[str, np.ndarray], Noise]:
    """One sample of a batch and its noise."""
    only = slice(number, number + 1)
    return {name: x[only] for name, x in batch.items()}, Noise(
        noise.video[only], noise.video_times[only], noise.action[:, only], noise.action_times[:, only]
    )


def spoilt(batch: dict[str, np.ndarray], noise: Noise, seed: int) -> tuple[dict[str, np.ndarray], Noise]:
    """The same with large numbers in the actions, and in their noise, that the robots do not have."""
    absent = ~batch["action_present"][:, None]
    action = np.where(absent, 100 * normal(seed, *batch["action"].shape), batch["action"])
    drawn = np.where(absent[:, None], 100 * normal(seed + 1, *noise.action.shape), noise.action)
    return batch | {"action": action}, noise.replace(action=drawn)


def test_all_numbers_present_is_the_loss_without_a_mask() -> None:
    params, batch, noise = random_params(), random_batch(), random_noise()
    loss = jax.jit(lambda batch: joint_loss(MODEL, params, batch, noise, ObjectiveConfig())[0])
    # 2e-6 as above: two programs, one of which is given the mask and the other knows it while it is compiled.
    assert_close(loss(batch | {"action_present": np.ones_like(MASKS)}), loss(batch), 2e-6)


def test_numbers_that_a_robot_lacks_do_not_matter() -> None:
    params, noise = random_params(), random_noise()
    batch = random_batch() | {"action_present": MASKS}
    want = gradient(params, batch, noise)
    jax.tree.map(np.testing.assert_array_equal, gradient(params, *spoilt(batch, noise, 30)), want)


def test_a_robot_learns_the_same_beside_any_other() -> None:
    """A mixture's gradient is the mean over its samples', each of which knows its own mask alone."""
    params, noise = random_params(), random_noise()
    for mask in (MASKS[1], ~MASKS[1]):
        batch = random_batch() | {"action_present": np.stack([MASKS[0], mask])}
        batch, noise = spoilt(batch, noise, 40)
        each = [gradient(params, *sample(number, batch, noise)) for number in range(BATCH)]
        assert_close(gradient(params, batch, noise), jax.tree.map(lambda *x: np.mean(x, 0), *each))


def test_absent_numbers_are_as_if_the_model_had_none() -> None:
    """Two arms of six joints and a gripper, as 14 numbers and as 16 of which each arm's seventh joint is absent."""
    keep = np.tile([True] * 6 + [False, True], 2)
    wide, narrow = (dataclasses.replace(CONFIG, action_dim=n, state_dim=n) for n in (16, 14))
    rows = random_batch()["action"].shape[:2]
    vectors = {"action": normal(50, *rows, 16), "proprio": normal(51, *rows, 16) * keep}
    batch, drawn = random_batch() | vectors, normal(52, 1, BATCH, CONFIG.num_chunks, CONFIG.chunk, 16)
    noise = random_noise()

    def of(config: ModelConfig, params: Any, batch: dict[str, np.ndarray], action: np.ndarray) -> Any:
        def loss(params: Any) -> jax.Array:
            return joint_loss(AhaWam(config), params, batch, noise.replace(action=action), ObjectiveConfig())[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    params = random_params(wide)
    got = of(wide, params, batch | {"action_present": np.tile(keep, (BATCH, 1))}, drawn)
    vectors = {name: x[..., keep] for name, x in vectors.items()}
    want = of(narrow, narrowed(params, keep), batch | vectors, drawn[..., keep])
    assert not np.asarray(got[1]["executor"]["head"]["kernel"])[:, ~keep].any()
    assert not np.asarray(got[1]["executor"]["action_encoder"]["kernel"])[~keep].any()
    assert_close((got[0], narrowed(got[1], keep)), want)


def test_open_loop_error_is_of_present_numbers() -> None:
    """A model that says 0 errs by what is recorded, of the numbers that each robot has; garbage is none of them."""
    params, batch = random_params(), random_batch() | {"action_present": MASKS}
    head = {"kernel": np.zeros((CONFIG.executor_dim, 3), np.float32), "bias": np.zeros(3, np.float32)}
    params["executor"]["head"] = head
    error = make_open_loop_error(AhaWam(dataclasses.replace(CONFIG, prediction="sample")), 2, 5.0)
    batch, _ = spoilt(batch, random_noise(), 60)
    starts = batch["action_offset"]
    trained = [rows[at : at + CONFIG.horizon] for rows, at in zip(batch["action"], starts, strict=True)]
    want = np.mean([np.abs(rows[:, mask]).mean(1) for rows, mask in zip(trained, MASKS, strict=True)])
    np.testing.assert_allclose(error(params, batch, BlockTransform(), jax.random.key(0)), want, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- committed actions
DELAYS = ObjectiveConfig(max_delay=1, action_draws=DRAWS)


def with_committed(*count: int) -> Noise:
    """Noise of DRAWS draws, the same number of committed actions in every chunk of a draw."""
    committed = np.broadcast_to(np.int32(count)[:, None, None], CHUNK_SHAPE)
    return random_noise(draws=DRAWS).replace(committed=committed)


def test_delays_are_drawn_from_none_to_the_most_and_change_no_other_draw() -> None:
    config, batch = dataclasses.replace(CONFIG, chunk=4, horizon=8), random_batch()
    model, cfg = AhaWam(config), ObjectiveConfig(max_delay=3, action_draws=100)
    noise = sample_noise(jax.random.key(0), batch, model, cfg)
    without = sample_noise(jax.random.key(0), batch, model, dataclasses.replace(cfg, max_delay=0))
    assert noise.committed.shape == noise.action_times.shape and without.committed is None
    counts = np.bincount(np.asarray(noise.committed).ravel())
    # 400 draws: each of four values 100 times, with a standard deviation of 8.7.
    assert len(counts) == 4 and np.abs(counts - 100).max() < 5 * 8.7
    jax.tree.map(np.testing.assert_array_equal, noise.replace(committed=None), without)


def test_committed_actions_enter_clean_at_time_0_and_carry_no_loss() -> None:
    """Of three draws, the first has no committed action, the others one of two. The loss by hand, of the others."""
    params, batch, noise = random_params(), random_batch(), with_committed(0, 1, 1)
    batch["action_is_pad"][0, -3:] = True
    loss = jax.jit(lambda params, noise: joint_loss(MODEL, params, batch, noise, DELAYS))
    _, parts = loss(params, noise)
    recorded = np.stack([rows[at : at + 4] for rows, at in zip(batch["action"], batch["action_offset"], strict=True)])
    error = np.square(parts["pred_action"] - (noise.action - recorded.reshape(1, BATCH, 2, 2, 3))).mean(-1)
    padded = np.stack([x[at : at + 4] for x, at in zip(batch["action_is_pad"], batch["action_offset"], strict=True)])
    keep = np.tile(~padded.reshape(1, BATCH, 2, 2), (DRAWS, 1, 1, 1))
    keep[1:, :, :, 0] = False
    shifted = 1000 * 5 * (u := np.linspace(1, 0, 1001)[:-1]) / (1 + 4 * u)
    bell = np.exp(-2 * np.square((shifted - 500) / 1000))
    weight = (np.exp(-2 * np.square((noise.action_times - 500) / 1000)) - bell.min()) / (bell - bell.min()).mean()
    weighted = (error * weight[..., None] * keep).sum((2, 3)) / keep.sum((2, 3))
    np.testing.assert_allclose(parts["loss_action"], weighted.mean(), rtol=1e-5)
    np.testing.assert_array_equal(parts["samples"].action_kept, keep.any(-1))

    # What a committed action's noise or its chunk's target there would be matters nowhere.
    first = np.zeros_like(noise.action)
    first[1:, :, :, 0] = 1
    _, again = loss(params, noise.replace(action=noise.action + 100 * first))
    np.testing.assert_array_equal(again["pred_action"], parts["pred_action"])
    np.testing.assert_array_equal(again["loss_action"], parts["loss_action"])


def test_a_chunk_without_committed_actions_is_as_if_there_were_none() -> None:
    """And where all of a chunk is at time 0, committing some of it changes nothing."""
    params, batch, noise = random_params(), random_batch(), random_noise(draws=DRAWS)

    def predicted(noise: Noise) -> Any:
        return jax.jit(lambda: joint_loss(MODEL, params, batch, noise, DELAYS)[1]["pred_action"])()

    assert_close(predicted(with_committed(0, 0, 0)), predicted(noise), 1e-6)  # the same sums, perhaps fused otherwise
    clean = jax.tree.map(lambda x: x * 0, noise)  # times 0: x is the recorded chunk
    assert_close(predicted(clean.replace(committed=with_committed(0, 1, 1).committed)), predicted(clean), 1e-6)
    assert np.abs(predicted(with_committed(1, 1, 1)) - predicted(noise)).max() > 1e-2


def switched(params: Any, batch: dict[str, np.ndarray], noise: Noise, **switches: bool) -> Any:
    """Loss and gradient of an objective without some part."""
    objective = ObjectiveConfig(**switches)
    loss = jax.jit(jax.value_and_grad(lambda params: joint_loss(MODEL, params, batch, noise, objective)[0]))
    return loss(params)


def test_without_routing_is_with_gates_that_are_shut() -> None:
    """The released maths with a gate of 0 in every layer; router and observations then learn nothing."""
    params, batch, noise = random_params(), random_batch(), random_noise()
    loss, gradient = switched(params, batch, noise, routing=False)
    shut = {**params, "router": {"layers": params["router"]["layers"] | {
        "gate": np.full_like(params["router"]["layers"]["gate"], -1e9)
    }}}  # fmt: skip
    want, with_gates = switched(shut, batch, noise)
    assert_close(loss, want)
    own = ("planner", "executor", "state_encoder", "branch_embedding")
    assert_close({name: gradient[name] for name in own}, {name: with_gates[name] for name in own})
    assert sorted(gradient) == sorted((*own, "router", "observation_queries"))
    for part in ("router", "observation_queries"):
        assert not any(np.any(x) for x in jax.tree.leaves(gradient[part])), part
    assert abs(loss - switched(params, batch, noise)[0]) > 1e-4


def test_without_memory_is_with_a_history_of_no_frame() -> None:
    params, batch, noise = random_params(), random_batch(), random_noise()
    names = {"history_latents", "video_history_frame_indices"}
    without = {name: x for name, x in batch.items() if name not in names}
    none = batch | {"video_history_valid_len": np.zeros(BATCH, np.int32)}
    assert_close(switched(params, without, noise), switched(params, none, noise))
    assert abs(switched(params, none, noise)[0] - switched(params, batch, noise)[0]) > 1e-5


def test_a_policy_is_run_with_what_was_trained() -> None:
    for part in ("memory", "routing"):
        ObjectiveConfig().check_policy({"memory": False, "routing": False})
        with pytest.raises(ValueError, match=f"policy.{part} is set, but config.objective.{part} is not"):
            ObjectiveConfig(**{part: False}).check_policy({"memory": True, "routing": True})
