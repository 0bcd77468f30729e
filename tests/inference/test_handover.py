"""Hand-overs: which rows are run, what the executor is asked, and what is refused."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ahawam_jax.inference.continuing import Continued, Guidance, condition, expected_state, prefix_weights, state_after
from ahawam_jax.inference.handover import HAND_OVERS, GuidedChunking, default_hand_over
from data_pipelines.embodiment import Embodiment, Vector
from tests.inference.test_policy import MODEL, STATISTICS

CHUNK, WIDTH = 16, 3
REST = np.arange(8 * WIDTH, dtype=np.float32).reshape(1, 8, WIDTH)  # half a chunk is left
NEW = 1000 + np.arange(CHUNK * WIDTH, dtype=np.float32).reshape(1, CHUNK, WIDTH)
ROBOT = Embodiment.as_recorded(WIDTH, WIDTH)


def policy(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = dict(
        config=SimpleNamespace(execute=8), sizes=SimpleNamespace(chunk=CHUNK), max_delay=8, can_guide=True,
        embodiment=ROBOT,
    )  # fmt: skip
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize("passed", [0, 2, 3, 5])
@pytest.mark.parametrize("name", HAND_OVERS)
def test_rows_keep_their_time(name: str, passed: int) -> None:
    """With a delay of three rows: who moves runs at every row what was meant for it, and no row twice."""
    way, delay = HAND_OVERS[name], 3
    begins = delay if name == "roll-forward" else 0  # row of the chunk's first action
    rows = way.join(REST, NEW, delay, passed)
    if not way.moves:
        np.testing.assert_array_equal(rows, NEW)
        return
    meant = {row: REST[0, row] for row in range(begins)}  # by row after the observation
    meant |= {begins + i: NEW[0, i] for i in range(CHUNK)}
    want = [meant[row] for row in range(passed, max(meant) + 1)]
    np.testing.assert_array_equal(rows[0], want)


def test_what_the_executor_is_asked() -> None:
    asked = {name: way.ask(REST, 3) for name, way in HAND_OVERS.items()}
    assert [name for name, continued in asked.items() if continued is None] == ["wait", "skip"]
    assert all(continued.committed == 3 for continued in asked.values() if continued is not None)
    for name in ("trained", "roll-forward"):
        np.testing.assert_array_equal(asked[name].actions, REST[:, :3])
        assert asked[name].guidance is None and asked[name].forward == (name == "roll-forward")
    for name in ("guided", "jacobian-free"):
        np.testing.assert_array_equal(asked[name].actions, REST)
        assert asked[name].guidance == Guidance(5.0, name == "guided") and not asked[name].forward


@pytest.mark.parametrize(
    "name, delay, changes, message",
    [
        ("trained", 4, dict(max_delay=3), "4 committed actions .* trained with at most 3 .config.objective.max_delay"),
        ("trained", 1, dict(max_delay=0), "trained without any.*another hand-over: guided, skip or wait"),
        ("guided", 1, dict(can_guide=False), "guided changes the Euler steps, which are fixed in what was exported"),
        ("jacobian-free", 1, dict(can_guide=False), "jacobian-free changes the Euler steps"),
        ("skip", 9, {}, "comes 9 rows late .* policy.execute 8 of 16 actions, delays go up to 8"),
        ("skip", 5, dict(config=SimpleNamespace(execute=12)), "delays go up to 4"),
        ("wait", -1, {}, "A delay of -1 rows"),
        ("roll-forward", 1, dict(embodiment=Embodiment.as_recorded(4, 3)), "4 numbers of a state, 3 of an action"),
    ],
)
def test_what_cannot_be_done_is_refused(name: str, delay: int, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HAND_OVERS[name].check(policy(**changes), delay)


def test_what_can_be_done() -> None:
    for way in HAND_OVERS.values():
        way.check(policy(), 8)
    HAND_OVERS["wait"].check(policy(), 40)
    HAND_OVERS["skip"].check(policy(max_delay=0, can_guide=False, embodiment=Embodiment.as_recorded(4, 3)), 8)
    assert default_hand_over(policy()).name == "trained" and default_hand_over(policy(max_delay=0)).name == "skip"


# ------------------------------------------------------------------------------------------------------------- states
def vector(names: tuple[str, ...], places: tuple[int, ...], one: tuple[float, ...]) -> Vector:
    return Vector(names, places, (0.0,) * len(places), one)


def test_a_state_moves_as_far_as_its_target_in_its_own_units() -> None:
    """The gripper is commanded 0 to 100 and measured 0 to 0.08; the state has a number more, in another order. The
    elbow hangs 0.02 below its target, and still does afterwards."""
    robot = Embodiment(
        vector(("current", "gripper", "elbow"), (2, 1, -1), (1.0, 0.08, 1.0)),
        vector(("elbow", "gripper"), (0, 1, -1), (1.0, 100.0, 1.0)),
    )
    rest, now = np.float32([[[0.1, 0], [0.5, 25], [0.9, 99]]]), np.float32([[7, 0.01, 0.08]])
    got = state_after(robot, rest[:, :2], now)
    np.testing.assert_allclose(got, [[7, 0.03, 0.48]], rtol=1e-6)
    HAND_OVERS["roll-forward"].check(policy(embodiment=robot), 1)
    expected, ahead = expected_state(Continued(rest, 2, forward=True), robot, now)
    np.testing.assert_array_equal(expected, got)
    assert ahead == 2
    for delay, name in ((0, "roll-forward"), (2, "trained")):
        expected, ahead = expected_state(HAND_OVERS[name].ask(rest, delay), robot, now)
        assert expected is now and ahead == 0
    assert not condition(HAND_OVERS["roll-forward"].ask(rest, 2), robot, {}, 1, 4, 2).count.any()


@pytest.mark.parametrize(
    "action, message",
    [
        (vector(("elbow", "wrist"), (0, 1), (1.0, 1.0)), "gripper against wrist"),
        (vector(("elbow", "gripper"), (0, -1), (1.0, 1.0)), "gripper against none"),
    ],
)
def test_robots_whose_actions_say_no_state(action: Vector, message: str) -> None:
    robot = Embodiment(vector(("elbow", "gripper"), (0, 1), (1.0, 1.0)), action)
    with pytest.raises(ValueError, match=message):
        HAND_OVERS["roll-forward"].check(policy(embodiment=robot), 1)


# -------------------------------------------------------------------------------------------------------- conditions
def test_prefix_weights_as_the_authors_say_them() -> None:
    """Their example, start 2, end 6, total 10, is 1 1 4/5 3/5 2/5 1/5 0 0 0 0 before the exponential form."""
    c = np.array([1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0, 0])
    np.testing.assert_allclose(prefix_weights(2, 6, 10), c * (np.exp(c) - 1) / (np.e - 1), rtol=1e-6)
    np.testing.assert_array_equal(prefix_weights(4, 4, 6), [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(prefix_weights(0, 0, 3), [0, 0, 0])


def test_conditions_are_normalised_rows() -> None:
    """STATISTICS normalise an action by (x - place) / 0.5."""
    robot = Embodiment.as_recorded(5, 3)
    own = np.arange(2 * 6 * 3, dtype=np.float32).reshape(2, 6, 3) / 40
    want = np.zeros((2, 1, 4, 3))
    want[:, 0, :3] = ((own - np.arange(3)) / 0.5)[:, :3]
    asked = HAND_OVERS["trained"].ask(own, 3)
    sizes = (robot, STATISTICS["action"], 2, MODEL.config.chunk)
    got = condition(asked, *sizes, 3)
    np.testing.assert_allclose(got.actions, want, atol=1e-6)
    assert got.count.tolist() == [[3], [3]]
    guided = condition(GuidedChunking(Guidance(7.0)).ask(own[:, :3], 1), *sizes, 0)
    np.testing.assert_allclose(guided.target, want, atol=1e-6)
    np.testing.assert_array_equal(guided.weight[:, 0], prefix_weights(1, 3, 4))
    assert guided.limit == 7 and guided.jacobian
    assert condition(None, *sizes, 0) is None
    nothing = condition(None, *sizes, 3)
    assert nothing.actions.shape == (2, 1, 4, 3) and not nothing.count.any()


def test_conditions_that_do_not_fit_are_sentences() -> None:
    robot, own = Embodiment.as_recorded(5, 3), np.zeros((2, 6, 3), np.float32)
    trained = HAND_OVERS["trained"].ask(own, 3)

    def made(continued: Any, max_delay: int = 3) -> None:
        condition(continued, robot, STATISTICS["action"], 2, 4, max_delay)

    made(trained)
    with pytest.raises(ValueError, match="3 committed actions was asked for, .* trained with at most 2"):
        made(trained, 2)
    with pytest.raises(ValueError, match=r"have shape \(1, 6, 3\); expected \(2, rows, 3\)"):
        made(dataclasses.replace(trained, actions=own[:1]))
    with pytest.raises(ValueError, match="3 actions are committed, but 2 of the chunk before are left"):
        made(dataclasses.replace(trained, actions=own[:, :2]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        made(dataclasses.replace(trained, actions=own * np.nan))
