"""RoboCOIN: joints and cameras found by name, subtasks as text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.naming import Gripper, Reading, UnmappableError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robocoin import Mapped, bad_rows, open_robocoin, subtasks
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin

SIX, ALL = LAYOUTS["two_6dof_arms"], LAYOUTS["two_arms"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin.write_robocoin(tmp_path_factory.mktemp("coin") / "set")


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root, tmp_path / "broken")


# ---------------------------------------------------------------- vectors
@pytest.mark.parametrize("names", [coin.GRIPPERS_LAST, SIX.names[::-1], (*SIX.names[7:], *SIX.names[:7])])
def test_numbers_are_found_by_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    mapped = Mapped(open_robocoin(coin.write_robocoin(tmp_path / "set", names)), SIX, "tiny_bot")
    assert mapped.state_names == mapped.action_names == SIX.names
    assert mapped.state_dim == mapped.action_dim == 14 and mapped.robot == "tiny_bot"
    for e, length in enumerate(tiny.LENGTHS):
        for key, rows in (("observation.state", mapped.states(e)), ("action", mapped.actions(e))):
            assert rows.dtype == np.float32
            wanted = np.stack([coin.value(name, e, length, key) for name in SIX.names], 1)
            np.testing.assert_array_equal(rows, wanted)


def test_all_else_is_the_source(root: Path) -> None:
    source, mapped = open_episodes(root), Mapped(open_episodes(root), SIX, "bot")
    assert mapped.cameras == tiny.CAMERAS and list(mapped.cameras) == list(coin.CAMERAS)
    assert (mapped.root, mapped.fps, mapped.instructions) == (source.root, source.fps, source.instructions)
    np.testing.assert_array_equal(mapped.lengths, source.lengths)
    np.testing.assert_array_equal(mapped.starts, source.starts)
    np.testing.assert_array_equal(mapped.timestamps(1), source.timestamps(1))
    assert mapped.instruction(1) == source.instruction(1) == mapped.instructions[mapped.instruction_index(1)]
    for view, camera in coin.CAMERAS.items():
        frames = mapped.frames(1, view, [5, 2])
        np.testing.assert_array_equal(frames, source.frames(1, camera, [5, 2]))
        assert [tiny.number_of(f) for f in frames] == [tiny.frame_number(view, 1, row) for row in (5, 2)]
    with pytest.raises(DatasetError, match="is mapped without cam_head_left_rgb; it has: cam_high"):
        mapped.frames(0, "cam_head_left_rgb", [0])


def test_action_is_mapped_by_its_own_names(broken: Path) -> None:
    info = json.loads((broken / "meta/info.json").read_text())
    info["features"]["action"]["names"][0] = "left_arm_joint_one"
    tiny.change_info(broken, features=info["features"])
    with pytest.raises(UnmappableError, match=f"{broken} .robot 'bot'.: the action lacks left_arm_joint_1_rad"):
        Mapped(open_robocoin(broken), SIX, "bot")


def test_six_joints_in_the_layout_of_all(root: Path) -> None:
    """Absent numbers are 0 and said; the default of such a robot is its own layout."""
    source = open_robocoin(root)
    six, wide = Mapped(source, None, "bot"), Mapped(source, ALL, "bot")
    assert six.layout is SIX and six.action_present.all()
    assert np.flatnonzero(~wide.action_present).tolist() == [6, 14]
    np.testing.assert_array_equal(wide.actions(1)[:, wide.action_present], six.actions(1))
    assert not wide.states(1)[:, ~wide.state_present].any()


def test_units_of_the_gripper(root: Path) -> None:
    """0..100 and inverted in the state, [left, right] apart; the action as it is named."""
    source = open_robocoin(root)
    unit = Gripper.parse(
        {"state": {"closed": [0, 1], "open": [100, 0]}, "action": {"closed": 0, "open": 1}}, "gripper"
    )
    plain, mapped = Mapped(source, SIX, "bot"), Mapped(source, SIX, "bot", Reading(gripper=unit))
    expected = plain.states(1).astype(np.float64)
    expected[:, 6], expected[:, 13] = expected[:, 6] / 100, 1 - expected[:, 13]
    np.testing.assert_array_equal(mapped.states(1), expected.astype(np.float32))
    np.testing.assert_array_equal(mapped.actions(1), plain.actions(1))


def test_actions_that_are_due_later(root: Path) -> None:
    plain, later = (Mapped(open_robocoin(root), SIX, "bot", Reading(lead=lead)) for lead in (0, 2))
    expected = np.concatenate([plain.actions(1)[2:], plain.actions(1)[[-1, -1]]])
    np.testing.assert_array_equal(later.actions(1), expected)
    np.testing.assert_array_equal(later.states(1), plain.states(1))


def test_direction_that_must_be_said(broken: Path) -> None:
    tiny.change_info(broken, robot_type="ruantong_a2d")
    source = open_robocoin(broken)
    with pytest.raises(UnmappableError, match="AgiBot documents 0 as open .* gripper = { closed = 1.0, open = 0.0 }"):
        Mapped(source, SIX, "bot")
    said = Reading(gripper=Gripper.parse({"closed": 1, "open": 0}, "gripper"))
    np.testing.assert_array_equal(
        Mapped(source, SIX, "bot", said).states(0)[:, 6],
        1 - coin.value("left_gripper_open_scale", 0, tiny.LENGTHS[0], "observation.state"),
    )


# ---------------------------------------------------------------- cameras
def test_cameras_named_outright(root: Path) -> None:
    """The other views are black; a camera that is not recorded is an error that no subset file skips."""
    mapped = Mapped(open_robocoin(root), SIX, "bot", Reading({"cam_high": "cam_right_wrist_rgb"}))
    assert mapped.cameras["cam_high"] == tiny.CAMERAS["cam_right_wrist"]
    assert mapped.embodiment.absent == ("cam_left_wrist", "cam_right_wrist")
    assert tiny.number_of(mapped.frames(0, "cam_high", [3])[0]) == tiny.frame_number("cam_right_wrist", 0, 3)
    black = mapped.frames(0, "cam_left_wrist", [3, 4])
    assert black.shape == (2, *mapped.cameras["cam_left_wrist"], 3) and not black.any()
    with pytest.raises(DatasetError, match="has no camera cam_top") as error:
        Mapped(open_robocoin(root), SIX, "bot", Reading({"cam_high": "cam_top"}))
    assert not isinstance(error.value, UnmappableError)


# ---------------------------------------------------------------- subtasks
def test_subtasks_as_text(root: Path) -> None:
    for dataset in (open_robocoin(root), Mapped(open_robocoin(root), SIX, "bot")):
        for e, length in enumerate(tiny.LENGTHS):
            assert subtasks(dataset, e) == [coin.TEXTS[row % 4] for row in range(length)]


@pytest.mark.parametrize("word", ["null", "End", "end", "Static"])
def test_words_that_mean_no_subtask(broken: Path, word: str) -> None:
    path = broken / "annotations/subtask_annotations.jsonl"
    path.write_text(path.read_text().replace("null", word))
    assert subtasks(open_robocoin(broken), 1) == [coin.TEXTS[row % 4] for row in range(23)]


@pytest.mark.parametrize("word", ["Abnormal", "abnormal", "Discard."])
def test_words_that_mark_bad_rows(broken: Path, word: str) -> None:
    """As many of a row's as there are; none where nothing is marked."""
    path = broken / "annotations/subtask_annotations.jsonl"
    assert not bad_rows(open_robocoin(broken), 1).any() and not bad_rows(open_episodes(broken), 1).any()
    path.write_text(path.read_text().replace("Pull", word))
    for dataset in (open_robocoin(broken), Mapped(open_robocoin(broken), SIX, "bot")):
        assert np.flatnonzero(bad_rows(dataset, 1)).tolist() == [1, 5, 9, 13, 17, 21]


def test_datasets_without_subtasks(broken: Path) -> None:
    (broken / "annotations/subtask_annotations.jsonl").unlink()
    assert subtasks(open_robocoin(broken), 1) == [""] * 23


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"subtask_index": 0, "subtask": "a"}\n{"subtask_index": 0, "subtask": "b"}', "line 2, must be .*once"),
        ('\n{"subtask_index": 0}', "line 2, must be"),
        ('{"subtask_index": "0", "subtask": "a"}', "line 1, must be"),
        ("[0]", "line 1, holds .*expected a JSON object"),
        ('{"subtask_index": 0, "subtask": "a"}\n{', "line 2, is not valid JSON"),
    ],
)
def test_broken_list_of_subtasks(broken: Path, text: str, message: str) -> None:
    (broken / "annotations/subtask_annotations.jsonl").write_text(text)
    dataset = open_robocoin(broken)
    assert len(dataset.states(1)) == 23  # training needs no subtasks
    with pytest.raises(DatasetError, match=f"subtask_annotations.jsonl, {message}"):
        subtasks(dataset, 1)


def test_subtask_that_is_not_listed(broken: Path) -> None:
    (broken / "annotations/subtask_annotations.jsonl").write_text('{"subtask_index": 0, "subtask": "a"}')
    with pytest.raises(DatasetError, match="episode_000001.parquet: every row of subtask_annotation .*found 1, 2"):
        open_robocoin(broken).subtasks(1)
    path = tiny.data_path(broken, 2)
    pq.write_table(pq.read_table(path).drop_columns("subtask_annotation"), path)
    with pytest.raises(DatasetError, match="episode_000002.parquet: every row of subtask_annotation"):
        open_robocoin(broken).subtasks(2)
