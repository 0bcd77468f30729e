"""RoboCOIN: joints and cameras found by name, subtasks as text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers import robocoin
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robocoin import (
    LAYOUTS,
    Mapped,
    UnmappableError,
    find_cameras,
    open_robocoin,
    subtasks,
)
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin

SIX, SEVEN = LAYOUTS["two_6dof_arms"], LAYOUTS["two_7dof_arms"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin.write_robocoin(tmp_path_factory.mktemp("coin") / "set")


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root, tmp_path / "broken")


# ---------------------------------------------------------------- vectors
def test_layouts_and_units() -> None:
    assert len(SIX.names) == 14 and len(SEVEN.names) == 16
    assert SIX.names[0] == "left_arm_joint_1_rad" and SIX.names[6] == "left_gripper_open_scale"
    assert SEVEN.names[8] == "right_arm_joint_1_rad" and SEVEN.names[15] == "right_gripper_open_scale"
    assert SIX.units == ("rad",) * 6 + ("0 closed .. 1 open",) + ("rad",) * 6 + ("0 closed .. 1 open",)


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


@pytest.mark.parametrize(
    ("layout", "names", "message"),
    [
        (SEVEN, SIX.names, "the state lacks left_arm_joint_7_rad, right_arm_joint_7_rad; its names are left_arm"),
        (SIX, SEVEN.names, "the state has beyond the layout left_arm_joint_7_rad, right_arm_joint_7_rad"),
        (SIX, (*SIX.names, SIX.names[3]), "the state names twice left_arm_joint_4_rad"),
        (SIX, (), "lacks .* its names are not recorded"),
    ],
)
def test_robot_that_does_not_fit(layout: robocoin.Layout, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnmappableError, match=message):
        layout.places(names, "set (robot 'bot'): the state")


def test_action_is_mapped_by_its_own_names(broken: Path) -> None:
    info = json.loads((broken / "meta/info.json").read_text())
    info["features"]["action"]["names"][0] = "left_arm_joint_one"
    tiny.change_info(broken, features=info["features"])
    with pytest.raises(UnmappableError, match=f"{broken} .robot 'bot'.: the action lacks left_arm_joint_1_rad"):
        Mapped(open_robocoin(broken), SIX, "bot")


# ---------------------------------------------------------------- cameras
@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (["cam_left_wrist_rgb", "cam_right_wrist_rgb"], "has no known camera for cam_high among its cameras cam_left"),
        (["cam_high_rgb", "cam_head_left_rgb"], "has cam_high_rgb and cam_head_left_rgb for cam_high"),
        (["cam_high_rgb", "cam_right_wrist_rgb"], 'for cam_left_wrist .*cameras = { cam_left_wrist = "..." }'),
        ([], r"its cameras \(none\)"),
    ],
)
def test_cameras_that_are_not_clear(recorded: list[str], message: str) -> None:
    with pytest.raises(UnmappableError, match=message):
        find_cameras(recorded, "set")


def test_every_known_head_camera_serves() -> None:
    wrists = ["cam_left_wrist_rgb", "cam_right_wrist_rgb"]
    for head in ("cam_high_rgb", "cam_head_left_rgb", "cam_front_head_rgb"):
        found = find_cameras([*wrists, "cam_head_right_rgb", head, "cam_high_depth"], "set")
        assert found == {"cam_high": head, "cam_left_wrist": wrists[0], "cam_right_wrist": wrists[1]}


def test_cameras_named_outright(root: Path) -> None:
    """Only these are used; one that is not recorded is an error that no subset file skips."""
    mapped = Mapped(open_robocoin(root), SIX, "bot", {"cam_high": "cam_right_wrist_rgb"})
    assert mapped.cameras == {"cam_high": tiny.CAMERAS["cam_right_wrist"]}
    assert tiny.number_of(mapped.frames(0, "cam_high", [3])[0]) == tiny.frame_number("cam_right_wrist", 0, 3)
    with pytest.raises(DatasetError, match="has no camera cam_top") as error:
        Mapped(open_robocoin(root), SIX, "bot", {"cam_high": "cam_top"})
    assert not isinstance(error.value, UnmappableError)


# ---------------------------------------------------------------- subtasks
def test_subtasks_as_text(root: Path) -> None:
    for dataset in (open_robocoin(root), Mapped(open_robocoin(root), SIX, "bot")):
        for e, length in enumerate(tiny.LENGTHS):
            assert subtasks(dataset, e) == [coin.TEXTS[row % 4] for row in range(length)]


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
    with pytest.raises(DatasetError, match="episode_000001.parquet: every row of subtask_annotation .*KeyError"):
        open_robocoin(broken).subtasks(1)
    path = tiny.data_path(broken, 2)
    pq.write_table(pq.read_table(path).drop_columns("subtask_annotation"), path)
    with pytest.raises(DatasetError, match="episode_000002.parquet: every row of subtask_annotation"):
        open_robocoin(broken).subtasks(2)
