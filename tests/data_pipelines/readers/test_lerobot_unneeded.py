"""Only what is used must be right: what else lies in a LeRobot dataset, or is broken in it, is read past."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.lerobot import open_lerobot
from tests.data_pipelines import tiny_dataset as tiny

CAMERA = "observation.images.cam_left_wrist"


@pytest.fixture(params=["v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "set", request.param)


@pytest.fixture
def root_v30(tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "set", "v3.0")


def check(root: Path) -> None:
    """All rows are there, and frames of the head."""
    dataset = open_lerobot(root)
    dataset.require_cameras(["cam_high"])
    for episode, length in enumerate(tiny.LENGTHS):
        assert len(dataset.states(episode)) == len(dataset.actions(episode)) == length
        assert dataset.instruction(episode) == tiny.INSTRUCTIONS[tiny.TASKS[episode]]
        number = tiny.number_of(dataset.frames(episode, "cam_high", [length - 1])[0])
        assert number == tiny.frame_number("cam_high", episode, length - 1)


def add_features(root: Path, features: dict) -> None:
    now = json.loads((root / "meta/info.json").read_text())["features"]
    tiny.change_info(root, features=now | features)


def add_columns(root: Path, make: Callable[[int], dict[str, pa.Array]]) -> None:
    """To every file of rows, columns of so many rows."""
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        for name, column in make(len(table)).items():
            table = table.append_column(name, column)
        pq.write_table(table, path)


# ---------------------------------------------------------------- what newer versions write
def test_features_of_newer_versions(root: Path) -> None:
    """Depth maps, language, tools, and whatever comes: as lerobot 0.6 writes them."""
    texts = pa.list_(pa.string())
    rows = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", texts)]))
    add_features(
        root,
        {
            "language_persistent": {"dtype": "language", "shape": [1], "names": None},
            "observation.images.depth": {
                "dtype": "video", "shape": [48, 64, 1], "names": ["height", "width", "channels"],
                "info": {"is_depth_map": True, "depth_unit": "mm"},
            },
            "observation.images.raw_depth": {"dtype": "image", "shape": [1, 48, 64], "names": None},
            "observation.images.empty": {}, "observation.tactile": {"dtype": "uint12", "shape": [3, 16, 16]},
            "action.eef": "of a kind that is not known",
        },
    )  # fmt: skip
    add_columns(
        root,
        lambda n: {
            "language_persistent": pa.array([[{"role": "user", "content": None, "tool_calls": []}]] * n, rows),
            "observation": pa.array([{"state": [np.nan], "effort": 1.0}] * n),
            "next.reward": pa.array([np.nan] * n), "next.done": pa.nulls(n), "blob": pa.array([b"\xff"] * n),
        },
    )  # fmt: skip
    tiny.change_info(root, tools=[{"name": "say"}], splits=None, total_tasks="two", data_files_size_in_mb=[])
    check(root)
    with pytest.raises(DatasetError, match="raw_depth must have dtype 'video'"):
        open_lerobot(root).require_cameras(["raw_depth"])


@pytest.mark.parametrize(
    ("version", "known"), [("v2.0", "v2.1"), ("v2.2", "v2.1"), ("v3.1", "v3.0"), ("3.0.2", "v3.0")]
)
def test_neighbouring_versions(tmp_path: Path, version: str, known: str) -> None:
    root = tiny.write_dataset(tmp_path / "set", known)
    tiny.change_info(root, codebase_version=version)
    check(root)


def test_metadata_that_nothing_is_read_from(root: Path) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    for name in ("robot_type", "total_episodes", "total_frames"):
        del info[name]
    (root / "meta/info.json").write_text(json.dumps(info))
    for name in ("stats.json", "episodes_stats.jsonl", "._info.json", "modality.json"):
        (root / "meta" / name).write_bytes(b"\x00\x05\x16\x07")
    (root / "meta/episodes/chunk-000").mkdir(parents=True, exist_ok=True)
    for place in ("meta/episodes/chunk-000", "data/chunk-000", "videos"):
        (root / place / "._file-000.parquet").write_bytes(b"\x00\x05\x16\x07")  # macOS' notes beside every file
    check(root)


def test_columns_of_the_listings(root_v30: Path) -> None:
    """Subtasks and the like beside the instructions; nested notes beside the episodes."""
    path = root_v30 / "meta/tasks.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("category", pa.array(["pick", "place"])), path)
    path = root_v30 / "meta/episodes/chunk-000/file-000.parquet"
    notes = pa.array([{"quality": [1, 2]}, None, {"quality": []}])
    pq.write_table(pq.read_table(path).append_column("notes", notes), path)
    check(root_v30)


# ---------------------------------------------------------------- what is broken and not used
def test_a_camera_nobody_asks_for(root: Path) -> None:
    for episode in range(3):
        tiny.video_path(root, "cam_left_wrist", episode).write_bytes(b"no video")
    tiny.video_path(root, "cam_right_wrist", 2).unlink()
    check(root)


@pytest.mark.parametrize("column", ["from_timestamp", "file_index"])
def test_places_of_a_camera_nobody_asks_for(root_v30: Path, column: str) -> None:
    path, name = root_v30 / "meta/episodes/chunk-000/file-000.parquet", f"videos/{CAMERA}/{column}"
    whole = pq.read_table(path)
    without = whole.drop_columns(name)
    for table, says in (
        (without, f"episode 0 lacks {name} or holds the wrong kind .no {name}"),
        (without.append_column(name, pa.array([None, 0, 0])), f"{name} = None"),
        (without.append_column(name, pa.array(["a", "b", "c"])), "= 'a'"),
    ):
        pq.write_table(table, path)
        check(root_v30)
        with pytest.raises(DatasetError, match=f"meta/episodes: .*{says}"):
            open_lerobot(root_v30).frames(0, "cam_left_wrist", [0])


def write_tasks(root: Path, tasks: dict[int, str | None]) -> None:
    if (root / "meta/tasks.jsonl").exists():
        lines = [json.dumps({"task_index": number, "task": text}) for number, text in tasks.items()]
        (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    else:
        table = {"task_index": list(tasks), "__index_level_0__": pa.array(list(tasks.values()), pa.string())}
        pq.write_table(pa.table(table), root / "meta/tasks.parquet")


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_tasks_that_say_nothing(root: Path, text: str | None) -> None:
    """A task without words is a fault of the episodes that have it, if any."""
    one, other = tiny.INSTRUCTIONS
    write_tasks(root, {0: one, 1: other, 2: text, 7: "never used"})
    check(root)
    assert open_lerobot(root).instructions == [one, other, "never used"]
    write_tasks(root, {5: text, 1: other, 0: text})
    dataset = open_lerobot(root)
    assert dataset.instruction(0) == dataset.instruction(2) == other and dataset.instructions == [other]
    with pytest.raises(DatasetError, match=r"episode 1 has task_index \[0\], whose instruction in .*meta/tasks.* is .*"
                                           "expected words; write there what the robot was told"):  # fmt: skip
        dataset.states(1)
    write_tasks(root, {1: other})
    with pytest.raises(DatasetError, match=r"episode 1 has task_index \[0\], expected one of the 1 tasks in"):
        open_lerobot(root).states(1)


# ---------------------------------------------------------------- other forms of the same
def test_vectors_of_one_number(root: Path) -> None:
    """lerobot keeps them as plain numbers."""
    expected = [open_lerobot(root).actions(episode)[:, :1] for episode in range(3)]
    features = json.loads((root / "meta/info.json").read_text())["features"]
    tiny.change_info(root, features=features | {"action": {"dtype": "float32", "shape": [1], "names": ["gripper"]}})
    for path in (root / "data").rglob("*.parquet"):
        tiny.change_column(path, "action", lambda rows: pa.array([row[0] for row in rows], pa.float32()))
    dataset = open_lerobot(root)
    for episode in range(3):
        np.testing.assert_array_equal(dataset.actions(episode), expected[episode])


def test_time_stamps_of_a_clock(root: Path) -> None:
    for path in (root / "data").rglob("*.parquet"):
        tiny.change_column(path, "timestamp", lambda t: pa.array(1.7e9 + np.array(t), pa.float64()))
    check(root)
    np.testing.assert_allclose(open_lerobot(root).timestamps(1), np.arange(23) / tiny.FPS, atol=1e-5)
