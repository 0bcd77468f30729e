"""One interface for every format: recognised on disk, opened again in other processes, cached and cut into windows."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.caches.frame_cache import open_frames
from data_pipelines.canvas import CAMERAS, Canvas
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers.base import Reader, Rows
from data_pipelines.readers.lerobot import LeRobotV21, LeRobotV30
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robotwin import RobotwinClassic, RobotwinXPolicyLab
from data_pipelines.statistics import compute_statistics
from data_pipelines.windows import WindowConfig, Windows
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines.readers import test_robotwin as robotwin

FORMATS = {
    LeRobotV21: lambda root: tiny.write_dataset(root, "v2.1"),
    LeRobotV30: lambda root: tiny.write_dataset(root, "v3.0"),
    RobotwinClassic: robotwin.write_classic,
    RobotwinXPolicyLab: robotwin.write_xpolicylab,
}
HEAD = (32, 48)


@pytest.fixture(scope="module", params=FORMATS, ids=lambda kind: kind.__name__)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type, Episodes]:
    return request.param, open_episodes(str(FORMATS[request.param](tmp_path_factory.mktemp("data"))))


def test_format_is_recognised(opened: tuple[type, Episodes]) -> None:
    kind, dataset = opened
    assert type(dataset) is kind


def test_interface_is_complete(opened: tuple[type, Episodes]) -> None:
    _, dataset = opened
    missing = [name for name in Episodes.__annotations__ if not hasattr(dataset, name)]
    assert not missing
    assert set(CAMERAS) == set(dataset.cameras)
    rows = int(dataset.lengths[1])
    assert dataset.states(1).shape == (rows, dataset.state_dim) and dataset.states(1).dtype == np.float32
    assert dataset.actions(1).shape == (rows, dataset.action_dim) and dataset.actions(1).dtype == np.float32
    assert dataset.timestamps(1).shape == (rows,) and dataset.timestamps(1).dtype == np.float32
    assert dataset.instruction(1) == dataset.instructions[dataset.instruction_index(1)]
    assert len(set(dataset.instructions)) == len(dataset.instructions)
    frame = dataset.frames(1, "cam_high", [rows - 1])
    assert frame.shape == (1, *dataset.cameras["cam_high"], 3)
    with pytest.raises(IndexError, match=f"indices 0..{rows} asked for, the episode has rows 0..{rows - 1}"):
        dataset.frames(1, "cam_high", [0, rows])


def test_cache_is_built_by_other_processes(opened: tuple[type, Episodes], tmp_path: Path) -> None:
    """A worker is told the folder alone, and opens it in the right format."""
    kind, dataset = opened
    frames = open_frames(dataset, Canvas(HEAD), tmp_path, processes=2 if kind is RobotwinClassic else 1)
    for episode in range(len(dataset.lengths)):
        rows = range(dataset.lengths[episode])
        views = {camera: dataset.frames(episode, camera, rows) for camera in CAMERAS}
        here = slice(dataset.starts[episode], dataset.starts[episode] + len(rows))
        np.testing.assert_array_equal(frames[here], Canvas(HEAD).compose(views))


def test_cache_notices_a_changed_recording(tmp_path: Path) -> None:
    root = robotwin.write_xpolicylab(tmp_path / "data")
    open_frames(open_episodes(root), Canvas(HEAD), tmp_path / "cache")
    with robotwin.h5py.File(robotwin.episode_path(root, 1), "a") as file:
        file["note"] = np.zeros(1000)
    open_frames(open_episodes(root), Canvas(HEAD), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("frames-*/key.json"))) == 2


def test_statistics_and_windows(opened: tuple[type, Episodes]) -> None:
    _, dataset = opened
    stats = compute_statistics(dataset)
    states = np.concatenate([dataset.states(e) for e in range(len(dataset.lengths))]).astype(np.float64)
    np.testing.assert_allclose(stats["state"]["mean"], states.mean(0), atol=1e-6)
    frames = np.zeros((int(dataset.lengths.sum()), 2, 2, 3), np.uint8)
    windows = Windows(dataset, frames, WindowConfig(horizon=8, chunk=4, video_ratio=2, history_frames=1), stats)
    sample = windows.gather(np.array([int(dataset.lengths[0])]), np.array([0]))
    expected = (dataset.actions(1)[:8] - stats["action"]["mean"]) / stats["action"]["std"]
    np.testing.assert_allclose(sample["action"][0], expected, rtol=1e-4, atol=1e-5)
    assert sample["instruction"] == dataset.instruction_index(1)


@pytest.mark.parametrize("there", [True, False])
def test_folder_without_a_dataset(tmp_path: Path, there: bool) -> None:
    message = f"{'is no dataset' if there else 'is not a folder'}: looked for meta/info.json .LeRobot v2.1, v3.0., for"
    with pytest.raises(DatasetError, match=message):
        open_episodes(tmp_path if there else tmp_path / "absent")


# ---------------------------------------------------------------- what every reader checks
class Fake(Reader):
    """One episode at 10 rows per second, its rows as given."""

    def __init__(self, lengths: tuple[int, ...] = (4,), **changes: object) -> None:
        self.root, self.fps, self.cameras = Path("fake"), 10.0, {"cam_high": (1, 1)}
        self.state_names, self.action_names, self.reads = ("x", "y"), (), 0
        self._set_lengths(lengths)
        times = np.arange(4, dtype=np.float32) / 10
        values = {"state": np.zeros((4, 2)), "action": np.zeros((4, 3)), "timestamp": times} | changes
        self._given = Rows(Path("file"), instruction=0, **values)

    def _read_rows(self, episode: int) -> Rows:
        self.reads += 1
        return self._given

    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        assert (np.diff(rows) > 0).all()
        out[:] = rows[:, None, None, None]


def test_rows_are_read_and_checked_once() -> None:
    dataset = Fake()
    dataset.states(0), dataset.actions(0), dataset.timestamps(0), dataset.instruction_index(0)
    assert dataset.reads == 1


def test_frames_in_the_order_asked_for() -> None:
    frames = Fake().frames(0, "cam_high", [2, 0, 2, 3])
    assert frames[:, 0, 0, 0].tolist() == [2, 0, 2, 3]


@pytest.mark.parametrize("lengths", [(), (3, 0), (-1,)])
def test_every_episode_has_rows(lengths: tuple[int, ...]) -> None:
    with pytest.raises(DatasetError, match="holds no episode|has 0 rows|has -1 rows"):
        Fake(lengths)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_are_finite(value: float) -> None:
    spoilt = np.zeros((4, 3))
    spoilt[2, 1] = value
    with pytest.raises(DatasetError, match=f"file: the action of episode 0 is {value} in row 2, dimension 1; remove"):
        Fake(action=spoilt).states(0)
    with pytest.raises(DatasetError, match=rf"the state of episode 0 is {value} in row 2, dimension 1 \(y\); remove"):
        Fake(state=spoilt[:, :2]).states(0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 0.1, 0.1, 0.3], r"do not rise from row 1 \(0.1 s\) to row 2 \(0.1 s\)"),
        ([0, 0.2, 0.1, 0.3], "do not rise from row 1"),
        ([0, 0.1, np.nan, 0.3], r"do not rise from row 1 \(0.1 s\) to row 2 \(nan s\)"),
        ([0, 0.1, 0.26, 0.3], "row 2 of episode 0 has timestamp 0.26 s, expected 0.2 s at 10 rows per second; rows"),
        ([0.1, 0.2, 0.3, 0.5], "row 3 of episode 0 has timestamp 0.5 s, expected 0.4 s"),
        ([0, 0.05, 0.1, 0.15], "row 2 of .* expected 0.2 s .*; all rows are spaced as at 20 per second: correct fps"),
        ([0, 0.1, 0.3, 0.4], "row 2 of .* rows were lost there or the clock jumped: split the episode"),
        ([1.7e9, 1.7e9 + 0.1, 1.7e9 + 0.2, 1.7e9 + 0.3],
         r"row 0 \(1700000000 s\) to row 1 \(1700000000 s\); stored as float32 they count in steps of 128 s at this"),
    ],
)
def test_timestamps_lie_on_the_grid(times: list[float], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        Fake(timestamp=np.array(times, np.float32)).states(0)


def test_timestamps_may_jitter() -> None:
    """Each still lies nearest to its own row; the doctor tells by how much they are off."""
    times = np.array([0, 0.1205, 0.18, 0.345], np.float32)
    np.testing.assert_array_equal(Fake(timestamp=times).timestamps(0), times)


def test_timestamps_of_a_clock() -> None:
    """Seconds since 1970, or since the recorder was started, count from the episode's first row."""
    for start in (0.1, 12.3, 1.7e9):
        times = Fake(timestamp=start + np.array([0, 0.1, 0.22, 0.3])).timestamps(0)
        assert times.dtype == np.float32
        np.testing.assert_allclose(times, [0, 0.1, 0.22, 0.3], atol=1e-6)
