"""The policy: when it plans, what it remembers, and that it computes what the model's parts compute."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.inference.continuing import Continued, Guidance, prefix_weights
from ahawam_jax.inference.policy import Policy, PolicyConfig
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.sampling import denoise
from ahawam_jax.towers.stand_ins import BlockTransform, HashedWords
from data_pipelines.normalization import Normalization
from tests.tiny_config import get_config
from tests.tiny_model import random_params

CONFIG = get_config()
MODEL = AhaWam(ModelConfig.create(CONFIG.model))
EPISODES = 2
HOW = Normalization(state="0=quantile", action="2=min-max")
# Whatever the rule, a state is normalised by (x - place) / 2 and an action by (x - place) / 0.5.
STATISTICS = {
    "state": {
        "mean": np.array([70.0, 1, 2, 3, 4]), "std": np.array([9.0, 2, 2, 2, 2]),
        "min": np.full(5, -9.0), "max": np.full(5, 9.0), "q01": np.full(5, -2.0), "q99": np.full(5, 2.0),
    } | HOW.of("state", (), 5),
    "action": {
        "mean": np.array([0, 1, -30.0]), "std": np.array([0.5, 0.5, 9]),
        "min": np.full(3, 1.5), "max": np.full(3, 2.5), "q01": np.zeros(3), "q99": np.ones(3),
    } | HOW.of("action", (), 3),
}  # fmt: skip
PARAMS = random_params(MODEL.config)


def policy(**settings: Any) -> Policy:
    return Policy(MODEL, PARAMS, CONFIG, STATISTICS, PolicyConfig(**{"steps": 2, "execute": 4, **settings}))


@pytest.fixture(scope="module")
def default() -> Policy:
    return policy(refresh_every=2)


def observation(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Views at the canvas's own sizes and a robot state."""
    rng = np.random.default_rng(seed)
    sizes = {"cam_high": (64, 64), "cam_left_wrist": (32, 32), "cam_right_wrist": (32, 32)}
    images = {name: rng.integers(0, 256, (EPISODES, *size, 3), dtype=np.uint8) for name, size in sizes.items()}
    return images, rng.normal(size=(EPISODES, 5)).astype(np.float32)


INSTRUCTIONS = ["open the drawer", "close the drawer"]


def test_first_chunk_is_plan_route_denoise_by_hand(default: Policy) -> None:
    images, robot_state = observation(0)
    actions, state = default(images, robot_state, default.start(INSTRUCTIONS))
    assert actions.shape == (EPISODES, 4, 3) and actions.dtype == np.float32

    wrists = np.concatenate([images["cam_left_wrist"], images["cam_right_wrist"]], 2)
    canvas = np.concatenate([images["cam_high"], wrists], 1)
    latents = BlockTransform().encode(jnp.asarray(canvas[:, None] / np.float32(127.5) - 1))
    words = HashedWords(MODEL.config.text_dim, CONFIG.towers.text_length)
    text, mask = (jnp.stack(x) for x in zip(*map(words.tokens, INSTRUCTIONS), strict=True))
    zeros = jnp.zeros((EPISODES, 1))
    variables = {"params": PARAMS}
    planned = MODEL.apply(variables, latents, zeros, zeros, text, mask, method="plan")
    routed = MODEL.apply(variables, planned.context, latents[:, None], method="route")
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(CONFIG.seed), 0), (EPISODES, 1, 4, 3))
    states = (robot_state - np.arange(5)) / 2
    sampled = denoise(
        MODEL, PARAMS, noise, jnp.arange(4)[None], text, mask, states[:, None], routed, 2, CONFIG.objective.shift
    )[:, 0]
    np.testing.assert_allclose(actions, sampled * 0.5 + np.arange(3), rtol=2e-4, atol=2e-4)  # fused differently
    assert (state.calls, state.elapsed, state.planned_at) == (1, 4, 0)
    assert state.memory.valid.tolist() == [[True, False, False]] * EPISODES


def test_planner_runs_every_second_call_and_remembers(default: Policy) -> None:
    state = default.start(INSTRUCTIONS)
    contexts, valid = [], []
    for call in range(5):
        _, state = default(*observation(call), state)
        contexts.append(np.asarray(state.context.k))
        valid.append(int(state.memory.valid[0].sum()))
    assert valid == [1, 1, 2, 2, 3]  # two that the plan looks back on, and its own
    same = [np.array_equal(a, b) for a, b in zip(contexts, contexts[1:], strict=False)]
    assert same == [True, False, True, False]
    np.testing.assert_array_equal(np.stack(state.memory.k)[:, :, 2:], contexts[-1])


def test_a_state_that_was_refreshed_is_refused_but_a_copy_goes_on(default: Policy) -> None:
    first = default.start(INSTRUCTIONS)
    kept = jax.tree.map(jnp.copy, first)
    want, _ = default(*observation(0), first)
    with pytest.raises(ValueError, match="The memory of this state, of call 0, was written over by a refresh"):
        default(*observation(0), first)
    got, _ = default(*observation(0), kept)
    np.testing.assert_array_equal(got, want)


def test_the_first_frame_stays_in_memory_and_a_new_episode_has_its_own() -> None:
    """A refresh at every call; the first plan stays in its slot, until `start`; newer ones take turns."""
    anchored = AhaWam(dataclasses.replace(MODEL.config, memory_anchor=True))
    settings = PolicyConfig(steps=1, execute=4, refresh_every=1)
    policy = Policy(anchored, PARAMS, CONFIG, STATISTICS, settings)
    firsts = []
    for episode in range(2):
        state, plans = policy.start(INSTRUCTIONS), []
        for call in range(4):
            _, state = policy(*observation(10 * episode + call), state)
            plans.append(np.asarray(state.context.k[:, :, 0]))
            held = np.stack(state.memory.k)
            assert state.memory.valid.sum(1).tolist() == [min(len(plans), 3)] * EPISODES
            np.testing.assert_array_equal(held[:, :, 0], plans[0])
            np.testing.assert_array_equal(held[:, :, (0, 1, 2, 1)[call]], plans[-1])
        firsts.append(plans[0])
    assert np.abs(firsts[0] - firsts[1]).max() > 1e-4


def run(policy: Policy, calls: int = 3) -> list[np.ndarray]:
    state, out = policy.start(INSTRUCTIONS), []
    for call in range(calls):
        actions, state = policy(*observation(call), state)
        out.append(actions)
    return out


def delayed(**settings: Any) -> Policy:
    """A policy of a checkpoint that says of itself that it was trained with up to two committed actions."""
    config = get_config()
    config.objective.max_delay = 2
    return Policy(MODEL, PARAMS, config, STATISTICS, PolicyConfig(**{"steps": 2, "execute": 2, **settings}))


def test_a_chunk_goes_on_from_committed_actions(default: Policy) -> None:
    """They stand at its beginning as they are run; what follows depends on them, and on no row behind them."""
    policy, rest = delayed(), np.random.default_rng(1).normal(size=(EPISODES, 3, 3)).astype(np.float32)

    def chunk(committed: int | None, rest: np.ndarray, policy: Policy = policy) -> np.ndarray:
        state = policy.start(INSTRUCTIONS)
        seen = policy.encode(*observation(0), EPISODES)
        continued = None if committed is None else Continued(rest, committed)
        return policy.act(seen, policy.refresh(seen, state), continued)[0]

    first, free = chunk(2, rest), chunk(0, rest)
    np.testing.assert_allclose(first[:, :2], rest[:, :2], atol=1e-6)
    np.testing.assert_array_equal(free, chunk(None, rest))
    np.testing.assert_allclose(free, chunk(None, rest, default), rtol=2e-5, atol=2e-5)  # the program without them
    later, earlier = rest.copy(), rest.copy()
    later[:, 2] += 1
    earlier[:, 1] += 1
    np.testing.assert_array_equal(chunk(2, later), first)
    assert (np.abs(chunk(2, earlier) - first)[:, 2:].max((1, 2)) > 1e-3).all()
    with pytest.raises(ValueError, match="3 committed actions was asked for, .* at most 2 .config.objective"):
        chunk(3, rest)
    with pytest.raises(ValueError, match="trained without any"):
        chunk(1, rest, default)


@pytest.mark.parametrize("limit", [0.5, 1.2])
@pytest.mark.parametrize("jacobian", [True, False])
def test_a_chunk_is_guided_by_the_rest_of_the_one_before(jacobian: bool, limit: float) -> None:
    """Of an executor that says one clean chunk whatever it sees, whose Jacobian is 0, the last of two steps is left:

    from level 5/6 to 0, that chunk and 5/6 * limit * weight of the way to the rest.
    """
    head = {"kernel": np.zeros_like(PARAMS["executor"]["head"]["kernel"]), "bias": np.float32([0.1, 0.2, 0.3])}
    params = {**PARAMS, "executor": {**PARAMS["executor"], "head": head}}
    one = Policy(MODEL, params, CONFIG, STATISTICS, PolicyConfig(steps=2, execute=2))
    seen = one.encode(*observation(0), EPISODES)
    state = one.refresh(seen, one.start(INSTRUCTIONS))
    free, _ = one.act(seen, state)
    guided, _ = one.act(seen, state, Continued(free[:, :2] + 0.3, 1, Guidance(limit, jacobian)))
    moved = 0.3 * 5 / 6 * limit * prefix_weights(1, 2, 4)[:, None] * (not jacobian)
    np.testing.assert_allclose(guided, free + moved, atol=1e-5)


def test_memory_and_routing_are_switches(default: Policy) -> None:
    full, forgetful, unrouted = run(default), run(policy(memory=False)), run(policy(routing=False))
    # Without memory the first plan is the same, the second one, at call 2, is not.
    np.testing.assert_array_equal(full[:2], forgetful[:2])
    assert np.abs(full[2] - forgetful[2]).max() > 1e-4
    assert np.abs(full[0] - unrouted[0]).max() > 1e-4


def test_episodes_do_not_see_each_other(default: Policy) -> None:
    images, robot_state = observation(0)
    actions, _ = default(images, robot_state, default.start(INSTRUCTIONS))
    changed = {name: view.copy() for name, view in images.items()}
    changed["cam_high"][1] = 0
    again, _ = default(changed, robot_state, default.start(INSTRUCTIONS))
    np.testing.assert_array_equal(actions[0], again[0])
    assert np.abs(actions[1] - again[1]).max() > 1e-4


def test_an_observation_stays_what_it_was_when_its_arrays_take_the_next_one(default: Policy) -> None:
    """A camera driver writes every frame into the same memory; two streams still use the last one then."""
    images, robot_state = observation(0)
    want, _ = default(images, robot_state, default.start(INSTRUCTIONS))
    taken = default.encode(images, robot_state, EPISODES)
    for array in (*images.values(), robot_state):
        array[...] = 3
    actions, _ = default.act(taken, default.refresh(taken, default.start(INSTRUCTIONS)))
    np.testing.assert_array_equal(actions, want)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(refresh_every=3), "reaches 8 actions beyond the planner's frame, but training covered 8"),
        (dict(refresh_every=0), "refresh more often"),
        (dict(execute=5), "policy.execute is 5; expected 1 to 4"),
        (dict(steps=0), "at least one Euler step"),
    ],
)
def test_settings_outside_training_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**settings)


def test_bad_observations_are_sentences(default: Policy) -> None:
    images, robot_state = observation(0)
    state = default.start(INSTRUCTIONS)
    with pytest.raises(ValueError, match=r"robot_state has shape \(2, 4\); expected \(2, 5\)"):
        default(images, robot_state[:, :4], state)
    with pytest.raises(ValueError, match="finite"):
        default(images, np.full_like(robot_state, np.nan), state)
    single = {name: view[0] for name, view in images.items()}
    first = default.start(INSTRUCTIONS[:1])
    for views, numbers, message in (
        (single, robot_state[:1], r"of cam_high have shape \(64, 64, 3\); expected \(1, height, .*image\[None\]"),
        (images, robot_state[:1], r"shape \(2, 64, 64, 3\); expected \(1, height, width, 3\), one image per episode"),
        (single, robot_state[0], r"robot_state has shape \(5,\); expected \(1, 5\).*robot_state\[None\]"),
        (images, robot_state, r"robot_state has shape \(2, 5\); expected \(1, 5\)"),
        (images | {"cam_high": [[0]]}, robot_state[:1], "cam_high: expected a numpy array .* got list"),
        (images | {"cam_high": images["cam_high"] / 255}, robot_state[:1], "cam_high: expected uint8 .* got float64"),
        (images | {"cam_high": images["cam_high"][:1]}, robot_state[:1], "cam_left_wrist: expected as many images as"),
    ):
        with pytest.raises(ValueError, match=message):
            default(views, numbers, first)
    for instructions in ("open the drawer", []):
        with pytest.raises(ValueError, match="start takes a list of instructions, one per episode; got"):
            default.start(instructions)
    del images["cam_left_wrist"]
    with pytest.raises(ValueError, match="cam_left_wrist"):
        default(images, robot_state, state)
