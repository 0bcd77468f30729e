"""What names and rows tell of a robot, on datasets whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.embodiment import Vector
from data_pipelines.inspection.robot_checks import (
    LAGS,
    Gripper,
    Opening,
    Range,
    RowChecks,
    RowFindings,
    check_names,
    check_rows,
    vector_by_name,
)
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.naming import Gripper as Unit
from data_pipelines.readers.naming import Reading
from data_pipelines.readers.robocoin import Mapped, open_robocoin
from tests.data_pipelines import synthetic_robocoin as coin

SIX = [f"left_arm_joint_{n}_rad" for n in range(1, 7)], [f"right_arm_joint_{n}_rad" for n in range(1, 7)]
LEFT, RIGHT = "left_gripper_open", "right_gripper_open"
NUMBERS = LAYOUTS["two_arms"].names


# ---------------------------------------------------------------- names
def misplaced(names: list[str]) -> tuple[str, ...]:
    return check_names({"state": names, "action": []}).misplaced["state"]


def test_no_published_name_is_suspected(shared_dir: Path) -> None:
    for record in [*coin.census(shared_dir), *coin.UNSEEN.values()]:
        names = {kind: record[f"{kind}_names"] for kind in ("state", "action")}
        found = check_names(names)
        assert not any(found.twice.values()) and not any(found.misplaced.values()) and not found.opposite, record


def test_names_on_the_wrong_side() -> None:
    left, right = SIX
    assert misplaced([*left, RIGHT, *right, LEFT]) == ("left_gripper_open_scale",)
    assert misplaced([*left, LEFT, *right[:3], left[3], *right[4:], RIGHT]) == (left[3],)
    assert misplaced([*right[:3], "waist_joint_1_rad", LEFT, *right[3:], RIGHT, *left]) == ("left_gripper_open_scale",)


@pytest.mark.parametrize(
    "names",
    [
        [*SIX[0], *SIX[1], LEFT, RIGHT],
        [RIGHT, LEFT, *SIX[0], *SIX[1]],
        [LEFT, *SIX[0], RIGHT, *SIX[1]],
        [name for pair in zip(*SIX, strict=True) for name in pair],
    ],
)
def test_other_orders_are_right(names: list[str]) -> None:
    assert misplaced(names) == ()


def test_names_twice_none_and_opposite() -> None:
    left, right = SIX
    state, action = [*left, *right, LEFT, "", ""], [*right, *left[:2], left[1], *left[3:], LEFT, RIGHT]
    found = check_names({"state": state, "action": action})
    assert found.unnamed == {"state": (13, 14), "action": ()}
    assert found.twice == {"state": {}, "action": {left[1]: (7, 8)}}
    assert found.opposite == (*range(8), 9, 10, 11)  # at 8 the state has joint 3, the action joint 2


# ---------------------------------------------------------------- values
def found_in(tmp_path: Path, **how: Any) -> RowFindings:
    """In a dataset, by default of two arms of six joints and grippers of 0..1."""
    record = how.pop("record", coin.UNSEEN["first_person"])
    recorded = open_robocoin(coin.Synthetic(record, **how).write(tmp_path / "set", pictures=None))
    vectors = (vector_by_name(names) for names in (recorded.state_names, recorded.action_names))
    return check_rows(recorded, *vectors, NUMBERS, range(len(recorded.lengths)))


def test_ranges_in_both_units(tmp_path: Path) -> None:
    """The right state is recorded the other way round."""
    made = coin.Synthetic(
        coin.UNSEEN["right_first"], (200, 150), state_gripper=([0, 80], [100, -20]), action_gripper=(0, 1)
    )
    recorded = open_robocoin(made.write(tmp_path / "set", pictures=None))
    said = {"state": {"closed": [0, 80], "open": [100, -20]}, "action": {"closed": 0.0, "open": 1.0}}
    mapped = Mapped(recorded, None, "bot", Reading(gripper=Unit.parse(said, "test")))
    e = mapped.embodiment
    found = check_rows(recorded, e.state, e.action, mapped.state_names, range(2))
    for gripper in found.grippers:
        for kind, opening in gripper.openings.items():
            assert opening.name == f"{gripper.side}_gripper_open"
            rows = np.concatenate([made.rows(kind, episode) for episode in range(2)])[:, opening.place]
            least, greatest, *tails = rows.min(), rows.max(), *np.quantile(rows, [0.01, 0.99])
            std = pytest.approx(rows.std(dtype=np.float64))
            assert opening.recorded == Range(least, greatest, *tails, std)
            unit = np.concatenate([made.opening(gripper.side, kind, episode) for episode in range(2)])
            expected = [unit.min(), unit.max(), *np.quantile(unit, [0.01, 0.99])]
            common = opening.common
            np.testing.assert_allclose(
                [common.least, common.greatest, common.q01, common.q99], expected, atol=1e-6
            )  # float32 of numbers up to 100, in hundredths
        assert gripper.together > 0.9 and abs(gripper.ratio - 1) < 0.1


def test_state_and_action_of_different_direction_and_scale(tmp_path: Path) -> None:
    found = found_in(tmp_path, state_gripper=([0, 0], [1, 1]), action_gripper=([0, 50], [50, 0]))
    left, right = found.grippers
    assert left.together > 0.9 and right.together < -0.9
    assert left.ratio == pytest.approx(50) and right.ratio == pytest.approx(50)


def test_noise_about_one_place_is_no_opening() -> None:
    """However large; a gripper that is open for 5% of the time is one that opens."""
    noise = np.random.default_rng(0).normal(0.05, 0.01, 1000)
    assert not Range.of(noise).moves and not Range.of(1000 * noise).moves
    assert Range.of(np.float64(np.arange(1000) % 20 == 0)).moves


def test_a_gripper_that_rests_tells_no_direction(tmp_path: Path) -> None:
    (gripper, _) = found_in(tmp_path, state_gripper=(0.5, 0.5 + 1e-4)).grippers
    assert gripper.together is None and gripper.ratio is None
    assert not gripper.state.recorded.moves and gripper.action.recorded.moves


@pytest.mark.parametrize("side", ["rises", "falls"])
def test_relation_to_the_scale_feature(tmp_path: Path, shared_dir: Path, side: str) -> None:
    """Some datasets repeat their grippers from 0 closed to 1 open."""
    record = next(record for record in coin.census(shared_dir) if record["schema"] == "7a")
    unit = (0.0, 100.0) if side == "rises" else (100.0, 0.0)
    found = found_in(tmp_path, record=record, state_gripper=unit)
    for gripper in found.grippers:
        assert (gripper.state.scale > 0.99) is (side == "rises") and abs(gripper.state.scale) > 0.99
        assert gripper.action.scale > 0.99


def test_a_scale_that_is_promised_and_not_there(tmp_path: Path, shared_dir: Path) -> None:
    """By info.json alone, with no names; and in some files only."""
    record = next(record for record in coin.census(shared_dir) if record["schema"] == "9")
    assert "gripper_open_scale_state" in coin.Synthetic(record)._features()
    found = found_in(tmp_path / "none", record=record)
    assert all(opening.scale is None for gripper in found.grippers for opening in gripper.openings.values())

    record = next(record for record in coin.census(shared_dir) if record["schema"] == "7a")
    root = coin.Synthetic(record).write(tmp_path / "some", pictures=None)
    path = root / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["gripper_open_scale_state"]), path)
    recorded = open_robocoin(root)
    vectors = (vector_by_name(names) for names in (recorded.state_names, recorded.action_names))
    (gripper, _) = check_rows(recorded, *vectors, NUMBERS, range(2)).grippers
    assert gripper.state.scale is None and gripper.action.scale > 0.99


def test_one_scale_for_both_grippers(tmp_path: Path) -> None:
    """A single column is compared with each of them."""
    root = coin.Synthetic(coin.UNSEEN["first_person"]).write(tmp_path / "set", pictures=None)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["gripper_open_scale_state"] = {"dtype": "float32", "shape": [1], "names": []}
    (root / "meta/info.json").write_text(json.dumps(info))
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        right = np.stack(table["observation.state"].to_numpy())[:, -1]
        pq.write_table(table.append_column("gripper_open_scale_state", [right]), path)
    recorded = open_robocoin(root)
    vectors = (vector_by_name(names) for names in (recorded.state_names, recorded.action_names))
    left, right = check_rows(recorded, *vectors, NUMBERS, range(2)).grippers
    assert right.state.scale > 0.99 and abs(left.state.scale) < 0.9


def test_tails_and_bad_rows(tmp_path: Path) -> None:
    found = found_in(
        tmp_path, lengths=(120, 90, 100), still_tail=30, bad={1: [(10, 15, "Abnormal"), (20, 22, "Discard.")]}
    )
    assert found.episodes == (0, 1, 2) and found.rows == (120, 90, 100) and found.bad == (0, 7, 0)
    assert all(30 - 3 <= still <= 30 + 3 for still in found.still)  # the paths are slow where they end
    assert found_in(tmp_path / "moving").still[0] < 5


def test_actions_that_are_states(tmp_path: Path) -> None:
    found = found_in(tmp_path / "a", action_is_state=True)
    assert (found.equal_driven, found.equal) == (2, 2)
    assert (lambda f: (f.equal_driven, f.equal))(found_in(tmp_path / "b")) == (0, 0)


def test_arms_that_are_crossed(tmp_path: Path) -> None:
    """The action's names are swapped; then its left arm goes where the state's right arm is."""
    record = coin.UNSEEN["first_person"]
    found = found_in(tmp_path / "a")
    assert not found.crossed and found.own < 0.01 < found.other  # of a lag that fits, up to float32
    swapped = found_in(tmp_path / "b", labels={"action": coin.other_side(record["action_names"])})
    assert swapped.crossed and swapped.other == pytest.approx(found.own, abs=1e-6)
    assert LAGS[2] == coin.LEAD


@pytest.mark.parametrize("what", ["rest", "steps"])
def test_arms_that_cannot_be_told_apart(what: str) -> None:
    """At rest in poses that differ by noise, each action nearer to the other arm's; or actions that name steps."""
    rng = np.random.default_rng(0)
    states, actions = np.cumsum(rng.normal(0, 0.01, (200, 12)), 0), rng.normal(0, 0.001, (200, 12))
    if what == "rest":
        pose = np.repeat([0, 0.01], 6)
        states, actions = np.tile(pose, (200, 1)), np.tile(pose[::-1], (200, 1))
    vector = vector_by_name([*SIX[0], *SIX[1]])
    checks = RowChecks(vector, vector, NUMBERS)
    checks.add(0, states.astype(np.float32), actions.astype(np.float32), np.zeros(200, bool), {})
    assert not checks.finish().crossed


def test_one_arm() -> None:
    vector = Vector(tuple(SIX[0]), (*range(6), *[-1] * 10), (0.0,) * 16, (1.0,) * 16)
    checks = RowChecks(vector, vector, NUMBERS)
    rows = np.linspace(0, 1, 50)[:, None] * np.ones(6, np.float32)
    checks.add(3, rows, rows, np.zeros(50, bool), {})
    found = checks.finish()
    assert found == RowFindings((3,), (50,), (0,), (0,), 1, 1, None, None, ()) and not found.crossed


def test_range() -> None:
    assert Range.of(np.arange(101)[::-1]) == Range(0, 100, 1, 99, pytest.approx(850**0.5))  # (101^2 - 1) / 12
    opening = Opening(0, "x", (100.0, 0.0), Range(-5, 100, 0, 90, 30))
    assert opening.common == Range(0, 1.05, pytest.approx(0.1), 1, 0.3)
    assert Gripper("left", opening, None, None).openings == {"state": opening}
