"""What the doctor says of robots, on datasets whose numbers are known."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.inspection.doctor import diagnose
from data_pipelines.inspection.robot_page import gripper_ranges
from data_pipelines.readers.subset import open_datasets
from data_pipelines.statistics import compute_by_robot
from tests.data_pipelines import synthetic_robocoin as coin

LENGTHS = (130, 90, 100)
TWO_ARMS = coin.UNSEEN["first_person"]  # six joints and a gripper on either side


def page_of(
    capsys: pytest.CaptureFixture, folder: Path, tables: list[dict[str, Any]], head: str = 'layout = "two_arms"'
) -> tuple[int, str]:
    """Exit status and output of the doctor on a subset file. tables: of each dataset what it does not share."""
    common = {"weight": 1, "robot": "bot"}
    texts = ["".join(f"{key} = {_toml(value)}\n" for key, value in (common | table).items()) for table in tables]
    (folder / "subset.toml").write_text(head + "\n" + "".join(f"[[dataset]]\n{text}" for text in texts))
    status = diagnose(folder / "subset.toml", "three", fast=True, full=False)
    return status, capsys.readouterr().out


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(x)}" for key, x in value.items()) + " }"
    return json.dumps(value)


def warnings_of(capsys: pytest.CaptureFixture, folder: Path, record: coin.Record = TWO_ARMS, **how: Any) -> list[str]:
    """Of one dataset; unit: of its grippers by the subset file."""
    unit = {"gripper": how.pop("unit")} if "unit" in how else {}
    coin.Synthetic(record, LENGTHS, **how).write(folder / "set", pictures=None)
    status, page = page_of(capsys, folder, [{"name": "set", "path": "set", **unit}])
    assert status == 0
    return re.findall("^warning: set: (.*)$", page, re.MULTILINE)


# ---------------------------------------------------------------- the page
def test_page(tmp_path: Path, capsys: pytest.CaptureFixture, shared_dir: Path) -> None:
    """18 numbers of which 16 have names, a state that is recorded the other way round, a wrist that has no camera."""
    (record,) = (record for record in coin.census(shared_dir) if record["schema"] == "14")
    record = record | {"cameras": record["cameras"][:3]}
    bad = {1: [(20, 40, "Abnormal")], 2: [(0, 100, "Discard.")]}
    made = coin.Synthetic(record, LENGTHS, state_gripper=(100, 0), action_gripper=(0, 2), still_tail=60, bad=bad)
    made.write(tmp_path / "set", pictures=None)
    unit = {"state": {"closed": 100.0, "open": 0.0}, "action": {"closed": 0.0, "open": 1.0}}
    _, page = page_of(capsys, tmp_path, [{"name": "set", "path": "set", "gripper": unit, "still_tail": 0.5}])
    lines = page[page.index("state         16 of") :].splitlines()
    kept = sum(part.dataset.lengths.sum() for part in open_datasets(tmp_path / "subset.toml"))
    assert 60 < kept < 110  # of 220 in episodes 0 and 1 about 45 + 45 at rest and 20 + 20 are left out
    assert lines[:6] == [
        "state         16 of the layout's 16 numbers",
        "action        16 of the layout's 16 numbers; 2 of 18 recorded numbers are not used",
        "held          2 numbers of the action are not driven: #16, #17",
        "views         1 of 3 views is absent, black: cam_right_wrist",
        f"left out      {320 - kept} of 320 rows: all of episode 2, parts of episodes 0, 1; 120 rows are marked as "
        "bad; 2 pieces are left, of 2 episodes",
        "grippers                  recorded           1% .. 99%  0 closed .. 1 open   unit, by the subset file",
    ]
    spans = [re.findall(r"\S+ to \S+", line) for line in lines[6:10]]
    assert spans == [["0 to 100", "0 to 100", "0 to 1"], ["0 to 2"] * 3] * 2
    assert lines[6].endswith("left_gripper_open, closed 100, open 0") and lines[6].startswith("  left state ")


def test_a_unit_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture, shared_dir: Path) -> None:
    record = next(record for record in coin.census(shared_dir) if record["schema"] == "4")
    coin.Synthetic(record, LENGTHS, (0, 100), (0, 100)).write(tmp_path / "set", pictures=None)
    _, page = page_of(capsys, tmp_path, [{"name": "set", "path": "set"}])
    assert "unit, by the table of robots" in page and page.count("0 to 1   left_gripper_open, closed 0, open 100") == 2


def test_numbers_that_a_robot_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They are in the tables, and nothing is said of them."""
    coin.Synthetic(TWO_ARMS, LENGTHS).write(tmp_path / "set", pictures=None)
    status, page = page_of(capsys, tmp_path, [{"name": "set", "path": "set"}])
    absent = re.findall("^ ?[0-9]+ (.*)  the robot has none$", page, re.MULTILINE)
    assert [name.strip() for name in absent] == ["left_arm_joint_7_rad", "right_arm_joint_7_rad"] * 2
    assert status == 0 and "warning" not in page.replace("no warnings", "")


def change(path: Path, names: dict[str, str], still: bool = False) -> None:
    """The columns of an episode become those of other names, or all rows of them the first one."""
    table = pq.read_table(path)
    for name, source in names.items():
        rows = np.stack(table[source].to_numpy())
        rows = np.repeat(rows[:1], len(rows), 0) if still else rows
        column = pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)


def test_a_robot_at_rest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All numbers that it has stand still in one episode."""
    root = coin.Synthetic(TWO_ARMS, LENGTHS).write(tmp_path / "set", pictures=None)
    change(root / "data/chunk-000/episode_000001.parquet", {x: x for x in ("observation.state", "action")}, still=True)
    _, page = page_of(capsys, tmp_path, [{"name": "set", "path": "set"}])
    found = re.findall("^warning: set: (.*)$", page, re.MULTILINE)
    for kind in ("state", "action"):
        assert f"The {kind} never changes in episode 1; remove what shows a robot at rest." in found
    assert not any("dimensions that stand still" in text for text in found)


@pytest.mark.parametrize("lead", [0, 1])
def test_an_episode_whose_actions_are_states(tmp_path: Path, capsys: pytest.CaptureFixture, lead: int) -> None:
    """Which are those of the next row where the subset file says so."""
    root = coin.Synthetic(TWO_ARMS, LENGTHS).write(tmp_path / "set", pictures=None)
    change(root / "data/chunk-000/episode_000001.parquet", {"action": "observation.state"})
    _, page = page_of(capsys, tmp_path, [{"name": "set", "path": "set", "lead": lead}])
    assert ("In 1 of 3 episodes every action equals the state of its row: the policy would" in page) is (lead == 0)
    assert ("lead          the action of a row is the one recorded 1 row later" in page) is (lead == 1)


def test_actions_without_a_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A gripper that is commanded and not felt lies outside of no range."""
    record = TWO_ARMS | {"state_names": TWO_ARMS["state_names"][:-1], "state_width": 13}
    assert warnings_of(capsys, tmp_path, record) == []


@pytest.mark.parametrize("schema", coin.SCHEMAS)
def test_a_healthy_robot_is_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, shared_dir: Path, schema: str
) -> None:
    """But for names that are too few."""
    record = next(record for record in coin.census(shared_dir) if record["schema"] == schema)
    unit = {"unit": {"closed": 0.0, "open": 100.0}} if any("gripper" in x for x in record["state_names"]) else {}
    found = warnings_of(capsys, tmp_path, record, state_gripper=(0, 100), action_gripper=(0, 100), **unit)
    few = {"10": 2, "14": 1}.get(schema, 0)
    assert len(found) == few and all("nobody drives" in text for text in found)


# ---------------------------------------------------------------- warnings
def test_grippers_outside_of_0_to_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = warnings_of(capsys, tmp_path, state_gripper=(0, 100), action_gripper=(0, 100))
    assert len(found) == 4
    assert found[0] == (
        "The left gripper's state goes from 0 to 100 where 0 is closed and 1 open (1% of the rows below and above), "
        "recorded from 0 to 100; its unit, closed 0 and open 1, is by its name: write what it records as gripper = { "
        "closed = .., open = .. } in the subset file."
    )


@pytest.mark.parametrize(("unit", "count"), [((-0.04, 1.04), 0), ((-0.06, 1), 4), ((0, 1.06), 4)])
def test_grippers_a_little_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture, unit: tuple[float, float], count: int
) -> None:
    assert len(warnings_of(capsys, tmp_path, state_gripper=unit, action_gripper=unit)) == count


def test_state_and_action_at_odds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The left one in direction, the right one in scale."""
    found = warnings_of(capsys, tmp_path, action_gripper=([1, 0], [0, 0.2]))
    assert len(found) == 2
    assert found[0].startswith("The left gripper closes in the action where it opens in the state (correlation -0.9")
    assert found[1].startswith(
        "The right gripper is recorded from 0 to 1 in the state and from 0 to 0.2 in the action"
    )
    assert "in the common unit 5 times as far in one as in the other" in found[1]
    left, right, *_ = warnings_of(capsys, tmp_path / "other", state_gripper=(0, 0.2))
    assert "from 0 to 0.2 in the state and from 0 to 1 in the action" in left and "common unit 5 times" in right


def test_gripper_open_scale(tmp_path: Path, capsys: pytest.CaptureFixture, shared_dir: Path) -> None:
    record = next(record for record in coin.census(shared_dir) if record["schema"] == "7a")
    found = warnings_of(capsys, tmp_path, record, state_gripper=(1, 0), action_gripper=(1, 0))
    assert [text.partition(":")[0] for text in found] == [
        f"gripper_open_scale_{kind} opens where the {kind}'s gripper closes (correlation left -1.00, right -1.00)"
        for kind in ("state", "action")
    ]
    inverted = {"unit": {"closed": 1.0, "open": 0.0}}
    assert (
        warnings_of(capsys, tmp_path / "said", record, state_gripper=(1, 0), action_gripper=(1, 0), **inverted) == []
    )


def test_arms_that_are_crossed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Exchanged in the names of the action."""
    found, *_ = warnings_of(capsys, tmp_path, labels={"action": coin.other_side(TWO_ARMS["action_names"])})
    assert found.startswith("The actions of each arm follow the states of the other: they are 1.")


def test_another_order_of_the_action_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Right first: at every place the other side, and by its rows each arm follows itself."""
    record = TWO_ARMS | {"action_names": [*TWO_ARMS["action_names"][7:], *TWO_ARMS["action_names"][:7]]}
    assert warnings_of(capsys, tmp_path, record) == []


@pytest.mark.parametrize("kinds", [("action",), ("state", "action")])
def test_grippers_exchanged(tmp_path: Path, capsys: pytest.CaptureFixture, kinds: tuple[str, ...]) -> None:
    """The arms' rows tell nothing of them."""
    names = list(TWO_ARMS["action_names"])
    names[6], names[13] = names[13], names[6]
    found = warnings_of(capsys, tmp_path, labels=dict.fromkeys(kinds, names))
    misplaced = [f"The {kind} has left_gripper_open_scale among the joints of the other arm" for kind in kinds]
    assert [text.partition(";")[0] for text in found[: len(kinds)]] == misplaced
    told = "State and action name opposite sides at places 6, 13, as left_gripper_open and right_gripper_open, and the"
    assert any(text.startswith(told) for text in found) is (len(kinds) == 1)


def test_names_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = coin.UNSEEN["body_between"]
    labels = {"action": coin.twice(record["action_names"], "left_eef_pos_x_m")}
    (found,) = warnings_of(capsys, tmp_path, record, labels=labels)
    assert found == "The action calls 2 numbers left_eef_pos_x_m, at places 7, 8; one of them is another."


def test_tails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (found,) = warnings_of(capsys, tmp_path, still_tail=40)
    assert found.startswith("3 of 3 episodes end with more than 1 s in which nothing moves, ")
    assert "episodes 0, 1, 2. Where the task is done, cut them by still_tail = 1 in the subset file." in found


def test_actions_that_are_states(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (found,) = warnings_of(capsys, tmp_path, action_is_state=True)
    assert found == "Every action equals the state of its own row: the policy would learn to stand still."


# ---------------------------------------------------------------- subset files
def test_grippers_of_two_units_and_what_is_excluded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    coin.Synthetic(TWO_ARMS, LENGTHS).write(tmp_path / "one", pictures=None)
    coin.Synthetic(TWO_ARMS, LENGTHS, state_gripper=(0, 100), action_gripper=(0, 100)).write(
        tmp_path / "hundred", pictures=None
    )
    tables = [{"name": name, "path": name} for name in ("one", "hundred")]
    status, page = page_of(capsys, tmp_path, tables)
    with pytest.raises(DatasetError) as stopped:
        compute_by_robot([part.dataset for part in open_datasets(tmp_path / "subset.toml")])
    grippers = [f"{side}_gripper_open_scale ({kind})" for kind in ("state", "action") for side in ("left", "right")]
    assert list(gripper_ranges(open_datasets(tmp_path / "subset.toml")[1].dataset, [0])) == grippers
    problems = re.findall("^problem: (.*)$", page, re.MULTILINE)
    assert status == 1 and len(problems) == 4 and str(stopped.value) in problems
    left = [{"name": name, "path": "nowhere", "exclude": "its grippers are torn"} for name in ("x", "y")]
    tables[1] |= {"robot": "other", "gripper": {"closed": 0.0, "open": 100.0}}
    status, page = page_of(capsys, tmp_path, [*tables, *left])
    assert status == 0
    totals = [line.split() for line in page.splitlines()[-9:]]
    rows, hours = sum(LENGTHS), f"{sum(LENGTHS) / 30 / 3600:.2f}"
    assert ["bot", "1", "3", f"{rows}", hours, "30"] in totals and ["all", "2", "6", f"{2 * rows}"] in [
        x[:4] for x in totals
    ]
    assert "excluded: 2 of 4 datasets, which were not opened\n  2 datasets, x, y: its grippers are torn\n" in page
