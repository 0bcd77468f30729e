"""The LeRobot readers: right rows and frames."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers import base as reader
from data_pipelines.readers.lerobot import open_lerobot
from data_pipelines.readers.opening import open_episodes
from tests.data_pipelines import tiny_dataset as tiny

# Decoders may round differently when they turn YUV into RGB; a neighbouring frame is off by far more.
DECODER_LEVELS, NEIGHBOUR_LEVELS = 4, 50
RENAMED = {"observation.state": "observation.state.default", "action": "action.default"}


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture
def changed(root: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to change."""
    return shutil.copytree(root, tmp_path / "changed")


# ---------------------------------------------------------------- what lerobot's own reader returned
@pytest.mark.parametrize("name", ["v2.1_h264", "v3.0_h264", "v3.0_av1"])
def test_agrees_with_lerobot(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "datasets" / f"lerobot_{name}"
    dataset, expected = open_lerobot(folder), np.load(folder / "expected.npz")
    assert dataset.robot == "aloha" and dataset.fps == 25 and dataset.lengths.tolist() == [155] * 5
    assert dataset.state_names == dataset.action_names and dataset.state_names[6] == "left_gripper"
    for i, (e, row) in enumerate(zip(expected["episode_index"], expected["frame_index"], strict=True)):
        np.testing.assert_array_equal(dataset.states(e)[row], expected["observation.state"][i])
        np.testing.assert_array_equal(dataset.actions(e)[row], expected["action"][i])
        assert dataset.timestamps(e)[row] == expected["timestamp"][i]
        assert dataset.instruction(e) == expected["task"][i]
        assert dataset.starts[e] + row == expected["index"][i]
        around = [near for near in (row - 1, row + 1) if 0 <= near < 155]
        for camera in dataset.cameras:
            reference = expected[f"observation.images.{camera}"][i].transpose(1, 2, 0)
            frames = dataset.frames(e, camera, [row, *around]).astype(int)
            off = np.abs(frames - reference).max((1, 2, 3))
            assert off[0] <= DECODER_LEVELS, (e, row, camera)
            if camera != "cam_high":  # the wrists always move, the room may stand still
                assert off[1:].min() > NEIGHBOUR_LEVELS, (e, row, camera)


# ---------------------------------------------------------------- rows and frames
def test_describes_the_dataset(root: Path) -> None:
    dataset = open_lerobot(root)
    assert dataset.root == root and dataset.robot == "tiny"
    assert dataset.fps == tiny.FPS and dataset.cameras == tiny.CAMERAS
    assert (dataset.state_dim, dataset.action_dim) == (tiny.STATE_DIM, tiny.ACTION_DIM)
    assert (dataset.state_names, dataset.action_names) == (tuple(tiny.STATE_NAMES), ())
    assert dataset.lengths.tolist() == list(tiny.LENGTHS) and dataset.lengths.dtype == np.int64
    assert dataset.starts.tolist() == [0, 40, 63]
    assert dataset.instructions == list(tiny.INSTRUCTIONS)
    assert [dataset.instruction(e) for e in range(3)] == [tiny.INSTRUCTIONS[t] for t in tiny.TASKS]
    for e, length in enumerate(tiny.LENGTHS):
        assert dataset.states(e).shape == (length, tiny.STATE_DIM) and dataset.states(e).dtype == np.float32
        assert dataset.actions(e).shape == (length, tiny.ACTION_DIM)
        np.testing.assert_allclose(dataset.timestamps(e), np.arange(length) / tiny.FPS, rtol=1e-6)


def test_both_versions_hold_the_same_rows(tmp_path: Path) -> None:
    one, other = (open_lerobot(tiny.write_dataset(tmp_path / v, v)) for v in ("v2.1", "v3.0"))
    for e in range(len(tiny.LENGTHS)):
        np.testing.assert_array_equal(one.states(e), other.states(e))
        np.testing.assert_array_equal(one.actions(e), other.actions(e))


def test_every_frame_alone_is_the_right_one(root: Path) -> None:
    """Seeking lands on key frames and B-frames are stored out of order: each row must still be itself."""
    dataset = open_lerobot(root)
    for e, length in enumerate(tiny.LENGTHS):
        for camera in tiny.CAMERAS:
            for row in range(length):
                number = tiny.number_of(dataset.frames(e, camera, [row])[0])
                assert number == tiny.frame_number(camera, e, row), (e, camera, row)


def test_frames_keep_the_order_asked_for(root: Path) -> None:
    indices = [22, 3, 3, 0, 21, 4]  # unsorted, repeated, and with a gap long enough for a second seek
    frames = open_lerobot(root).frames(1, "cam_high", indices)
    assert frames.dtype == np.uint8 and frames.shape == (6, *tiny.CAMERAS["cam_high"], 3)
    assert [tiny.number_of(f) for f in frames] == [tiny.frame_number("cam_high", 1, i) for i in indices]
    assert open_lerobot(root).frames(1, "cam_high", []).shape == (0, *tiny.CAMERAS["cam_high"], 3)


@pytest.mark.parametrize("row", [-1, 23])
def test_frame_outside_the_episode(root: Path, row: int) -> None:
    with pytest.raises(IndexError, match="rows 0..22"):
        open_lerobot(root).frames(1, "cam_high", [row])


def test_keys_of_the_fastwam_conversion(changed: Path) -> None:
    """observation.state.default and action.default are the state and the action; both spellings at once are not."""
    expected = open_lerobot(changed).states(1)
    info = json.loads((changed / "meta/info.json").read_text())
    features = {RENAMED.get(key, key): feature for key, feature in info["features"].items()}
    tiny.change_info(changed, features=features)
    for e in range(3):
        path = tiny.data_path(changed, e)
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([RENAMED.get(name, name) for name in table.column_names]), path)
    dataset = open_lerobot(changed)
    np.testing.assert_array_equal(dataset.states(1), expected)
    assert dataset.action_dim == tiny.ACTION_DIM
    tiny.change_info(changed, features=features | {"action": features["action.default"]})
    with pytest.raises(DatasetError, match="info.json: expected exactly one of the features action and action.def"):
        open_lerobot(changed)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y", "z"], ("x", "y", "z")),
        ({"motors": ["x", "y", "z"]}, ("x", "y", "z")),
        ([["x", "y", "z"]], ("x", "y", "z")),
        (["action"], ()),  # of the axis
        (["x", "y", 3], ()),
        ({"x": 0, "y": 1, "z": 2}, ()),
    ],
)
def test_names_of_the_numbers(tmp_path: Path, names: object, expected: tuple[str, ...]) -> None:
    root = tiny.write_dataset(tmp_path, "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = names
    tiny.change_info(root, features=info["features"])
    assert open_lerobot(root).action_names == expected


def test_rows_may_be_lists_of_any_kind(changed: Path) -> None:
    """Writers differ: lists of free length, of doubles."""
    expected = open_lerobot(changed).states(1)
    path = tiny.data_path(changed, 1)
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64())):
        tiny.change_column(path, "observation.state", lambda values, kind=kind: pa.array(values, kind))
        np.testing.assert_array_equal(open_lerobot(changed).states(1), expected)


# ---------------------------------------------------------------- rows in memory
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_rows_kept_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The episode used last stays, the one not used for longest goes and is read again."""
    monkeypatch.setattr(reader, "_USED", reader._Used())
    row = 4 * (tiny.STATE_DIM + tiny.ACTION_DIM)
    monkeypatch.setattr(reader, "BYTES_KEPT", row * (tiny.LENGTHS[0] + tiny.LENGTHS[2]))
    dataset = open_episodes(tiny.write_dataset(tmp_path / "set", version))
    read = []
    original = type(dataset)._read_rows
    monkeypatch.setattr(type(dataset), "_read_rows", lambda self, e: (read.append(e), original(self, e))[1])
    for episode in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, not 0
        assert len(dataset.states(episode)) == tiny.LENGTHS[episode]
    assert read == [0, 1, 2, 1]
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(dataset.states, [0, 1, 2] * 40))
    for place, rows in enumerate(states):
        np.testing.assert_array_equal(rows, states[place % 3])


def test_readers_share_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of many datasets is bounded as one is, and what a reader has kept goes with it."""
    used = reader._Used()
    monkeypatch.setattr(reader, "_USED", used)
    roots = [tiny.write_dataset(tmp_path / name, "v2.1") for name in "ab"]
    datasets = [open_episodes(root) for root in roots]
    row = 4 * (tiny.STATE_DIM + tiny.ACTION_DIM)
    monkeypatch.setattr(reader, "BYTES_KEPT", row * sum(tiny.LENGTHS))
    for dataset in datasets:
        for episode in range(3):
            dataset.states(episode)
    assert used._bytes == row * sum(tiny.LENGTHS) and len(used._rows) == 3  # of the second alone
    datasets[0].states(1)
    assert len(used._rows) == 3
    copy = pickle.loads(pickle.dumps(datasets[1]))
    copy.states(1)
    del datasets, dataset
    assert used._bytes == row * tiny.LENGTHS[1]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_dataset_goes_to_another_process(tmp_path: Path, version: str) -> None:
    dataset = open_episodes(tiny.write_dataset(tmp_path / "set", version))
    dataset.states(1)
    content = pickle.dumps(dataset)
    assert len(content) < 5000  # no rows
    copy = pickle.loads(content)
    np.testing.assert_array_equal(copy.actions(1), dataset.actions(1))
    np.testing.assert_array_equal(copy.frames(2, "cam_high", [3]), dataset.frames(2, "cam_high", [3]))
