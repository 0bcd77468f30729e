"""What `Synthetic` writes is what it says, as the reader of LeRobot datasets finds it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.readers.lerobot import open_lerobot
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines.synthetic_robocoin import (
    GRIPPERS,
    KEYS,
    LEAD,
    SCHEMAS,
    SUBTASKS,
    UNSEEN,
    Synthetic,
    census,
    other_side,
    twice,
)


def column(root: Path, name: str, episode: int = 0) -> np.ndarray:
    return np.array(pq.read_table(root / f"data/chunk-000/episode_{episode:06d}.parquet")[name].to_pylist())


def test_every_record_is_written_as_it_is_named(shared_dir: Path, tmp_path: Path) -> None:
    records = census(shared_dir)
    assert tuple(record["schema"] for record in records) == SCHEMAS
    assert not {tuple(record["state_names"]) for record in records} & {
        tuple(record["state_names"]) for name, record in UNSEEN.items() if name not in ("first_person", "single_view")
    }
    for record in [*records, *UNSEEN.values()]:
        made = Synthetic(record, (60, 50))
        root = made.write(tmp_path / record["schema"])
        dataset = open_lerobot(root)
        assert (dataset.robot, dataset.fps) == (record["robot_type_in_info"], record["fps"] or 30)
        assert dataset.lengths.tolist() == [60, 50] and list(dataset.cameras) == record["cameras"]
        features = json.loads((root / "meta/info.json").read_text())["features"]
        for kind, read in (("state", dataset.states), ("action", dataset.actions)):
            assert features[KEYS[kind]]["names"] == record[f"{kind}_names"]
            for episode in range(2):
                np.testing.assert_array_equal(read(episode), made.rows(kind, episode), strict=True)
        assert made.rows("state", 0).shape == (60, record["state_width"])
        assert made.rows("action", 0).shape == (60, record["action_width"])


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_pictures_say_which_they_are(tmp_path: Path, codec: str) -> None:
    made = Synthetic(UNSEEN["right_first"] | {"codec": codec, "resolution": "720x1280"}, (60, 50), depth=("cam_deep",))
    for pictures in ("shared", "distinct"):
        dataset = open_lerobot(made.write(tmp_path / pictures, pictures))
        assert dataset.cameras == dict.fromkeys(made.record["cameras"], (32, 56)) and "cam_deep" in dataset.unusable
        seen = set()
        for episode, length in enumerate(made.lengths):
            for camera in dataset.cameras:
                numbers = [tiny.number_of(image) for image in dataset.frames(episode, camera, range(length))]
                assert numbers == [made.shown(pictures, camera, episode, row) for row in range(length)]
                seen.add(numbers[7])
        assert len(seen) == (1 if pictures == "shared" else 6)


def test_numbers_can_be_told_apart_and_move_smoothly() -> None:
    made = Synthetic(UNSEEN["body_between"])
    rows = np.concatenate([made.rows("state", episode)[:90] for episode in range(2)], 1)
    assert np.abs(rows).max() <= 2 and np.abs(np.diff(rows, axis=0)).max() < 0.4
    apart = np.abs(rows[:, :, None] - rows[:, None]).max(0) + np.eye(rows.shape[1])
    assert apart.min() > 0.05
    np.testing.assert_allclose(made.rows("action", 0)[:-LEAD], made.rows("state", 0)[LEAD:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", [(0.0, 1.0), (0.0, 100.0), (1.0, 0.0), ((0.1, 0.2), (1.4, -1.1))])
def test_grippers_open_and_close(unit: tuple) -> None:
    made = Synthetic(UNSEEN["right_first"], state_gripper=unit, action_gripper=(0, 10))
    closed, opened = (np.broadcast_to(end, 2) for end in unit)
    for place, (side, name) in enumerate(zip(("left", "right"), GRIPPERS, strict=True)):
        values, opening = made.value(name, "state", 1), made.opening(side, "state", 1)
        assert opening.min() == 0 and opening.max() == 1
        assert {np.float32(closed[place]), np.float32(opened[place])} == {values.min(), values.max()}
        np.testing.assert_array_equal(values == np.float32(opened[place]), opening == 1)
        assert made.value(name, "action", 1).max() == 10


def test_faults(tmp_path: Path) -> None:
    record = UNSEEN["right_first"]
    names = record["state_names"]
    labels = {"state": twice(names, names[2]), "action": other_side(names)}
    bad = {1: [(20, 25, "Abnormal"), (40, 50, "Discard.")]}
    made = Synthetic(record, (60, 50), still_tail=12, action_is_state=True, bad=bad, labels=labels)
    root = made.write(tmp_path / "set", None)
    dataset = open_lerobot(root)
    assert not (root / "videos").exists()
    assert dataset.state_names[2] == dataset.state_names[3] == names[2] and dataset.action_names[0] == _left(names[0])
    for episode in range(2):
        np.testing.assert_array_equal(dataset.states(episode), dataset.actions(episode))
        np.testing.assert_array_equal(np.ptp(dataset.states(episode)[-12:], axis=0), 0)
        assert (np.diff(dataset.states(episode)[-14:-11], axis=0) != 0).any(1).all()
    lines = (root / "annotations/subtask_annotations.jsonl").read_text().splitlines()
    assert [json.loads(line)["subtask"] for line in lines] == list(SUBTASKS)
    found = column(root, "subtask_annotation", 1)
    assert found.shape == (50, 5)
    for text, rows in (("Abnormal", range(20, 25)), ("Discard.", range(40, 50))):
        assert np.flatnonzero((found == SUBTASKS.index(text)).any(1)).tolist() == list(rows)


def _left(name: str) -> str:
    return name.replace("right_", "left_")


def test_other_features_and_many_episodes(shared_dir: Path, tmp_path: Path) -> None:
    record = next(record for record in census(shared_dir) if record["schema"] == "2")
    made = Synthetic(record, (60,) * 20, state_gripper=(0, 10), repeat=4)
    root = made.write(tmp_path / "set", None)
    scale, gripper = column(root, "gripper_open_scale_state", 5)[:, 1], column(root, "observation.state", 1)[:, 19]
    np.testing.assert_allclose(scale * 10, gripper, rtol=1.2e-7)  # each rounded once to float32
    assert column(root, "gripper_mode_action").shape == (60, 2) and column(root, "scene_annotation").shape == (60,)
    dataset = open_lerobot(root)
    np.testing.assert_array_equal(dataset.states(2), dataset.states(18))
    assert not np.array_equal(dataset.states(2), dataset.states(3))
    told = [json.loads(line) for line in (root / "meta/episodes_stats.jsonl").read_text().splitlines()]
    for episode in range(20):
        stats = told[episode]["stats"]["action"]
        assert told[episode]["episode_index"] == episode and stats["count"] == [60]
        np.testing.assert_array_equal(stats["max"], dataset.actions(episode).max(0))


def test_the_same_fields_write_the_same_files(tmp_path: Path) -> None:
    one, other = (Synthetic(UNSEEN["one_arm"]).write(tmp_path / name) for name in ("one", "other"))
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert files and all((one / path).read_bytes() == (other / path).read_bytes() for path in files)
