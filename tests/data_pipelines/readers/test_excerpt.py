"""A recording without some of its rows: what is left, in which order, and that nothing else changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers import excerpt as module
from data_pipelines.readers.excerpt import STILL, Excerpt, excerpt, still_rows
from data_pipelines.readers.robocoin import Mapped, open_robocoin, subtasks
from data_pipelines.windows import WindowConfig, Windows
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin

KEPT = [(0, 2, 9), (1, 0, 4), (1, 10, 20)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin.write_robocoin(tmp_path_factory.mktemp("coin") / "set")


@pytest.fixture
def source(root: Path) -> Episodes:
    return open_robocoin(root)


def test_every_row_is_the_source_s(source: Episodes) -> None:
    left = Excerpt(source, KEPT)
    assert left.lengths.tolist() == [7, 4, 10] and left.starts.tolist() == [0, 7, 11]
    assert left.origin.tolist() == [0, 1, 1]
    for e, (of, a, b) in enumerate(KEPT):
        np.testing.assert_array_equal(left.states(e), source.states(of)[a:b])
        np.testing.assert_array_equal(left.actions(e), source.actions(of)[a:b])
        np.testing.assert_allclose(left.timestamps(e), np.arange(b - a) / source.fps, atol=1e-6)  # float32 seconds
        assert subtasks(left, e) == subtasks(source, of)[a:b] and left.instruction(e) == source.instruction(of)
        camera = coin.CAMERAS["cam_high"]
        shown = [tiny.number_of(frame) for frame in left.frames(e, camera, [b - a - 1, 0])]
        assert shown == [tiny.frame_number("cam_high", of, row) for row in (b - 1, a)]
    assert len({left.picture_file(e, coin.CAMERAS["cam_high"]) for e in range(3)}) == 3
    with pytest.raises(IndexError, match="what is left of it has rows 0..3"):
        left.frames(1, coin.CAMERAS["cam_high"], [4])


def test_no_window_holds_a_row_that_is_left_out(source: Episodes) -> None:
    """Not as action, video, observation or history."""
    left = Excerpt(Mapped(source, None, "bot"), KEPT)
    config = WindowConfig(horizon=8, chunk=4, video_ratio=1, history_frames=2, history_stride=3)
    windows = Windows(left, DecodingFrames(left, Canvas((16, 24), True)), config)
    batch = windows.gather(np.arange(len(windows)), np.zeros(len(windows), int))
    seen = {tiny.number_of(x) for x in batch["video"].reshape(-1, 16, 24, 3)}
    seen |= {tiny.number_of(x) for x in batch["observations"].reshape(-1, 16, 24, 3)}
    valid = batch["video_history_valid_len"][:, None] > np.arange(2)[::-1]
    seen |= {tiny.number_of(x) for x in batch["history"][valid]}
    assert seen == {tiny.frame_number("cam_high", of, row) for of, a, b in KEPT for row in range(a, b)}
    assert len(windows) == 21


@pytest.fixture
def marked(root: Path, tmp_path: Path) -> Episodes:
    """Every fourth row, from row 1 on, is marked as bad."""
    copy = shutil.copytree(root, tmp_path / "set")
    path = copy / "annotations/subtask_annotations.jsonl"
    path.write_text(path.read_text().replace("Pull", "Abnormal"))
    return open_robocoin(copy)


def test_rows_marked_as_bad(marked: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST", 3)
    left = excerpt(marked, without=[0])
    bad = np.arange(tiny.LENGTHS[1]) % 4 == 1
    rows = np.concatenate([left.states(e) for e in np.flatnonzero(left.origin == 1)])
    rest = [row for row in np.flatnonzero(~bad) if 1 < row < 22]  # the others are too short
    np.testing.assert_array_equal(rows, marked.states(1)[rest])
    assert 0 not in left.origin
    monkeypatch.setattr(module, "SHORTEST", 4)
    with pytest.raises(DatasetError, match="no row is left to learn from"):
        excerpt(marked)


def test_nothing_to_leave_out(source: Episodes) -> None:
    assert excerpt(source) is source
    with pytest.raises(DatasetError, match="has the episodes 0 to 2, without names 3, 7; correct the subset file"):
        excerpt(source, without=[7, 1, 3])


class Still(Episodes):
    """Two numbers; the state rests from row 30 of 50 on, the action moves by less than what counts."""

    root, robot, fps, cameras, instructions = Path("memory"), "", 10.0, {}, ["lift"]
    state_dim = action_dim = 2
    state_names = action_names = ()
    state_present = action_present = np.ones(2, bool)
    lengths, starts = np.array([50]), np.array([0])

    def states(self, episode: int) -> np.ndarray:
        return np.minimum(np.arange(50), 30)[:, None] * np.float32([[0.1, 0]])

    def actions(self, episode: int) -> np.ndarray:
        return np.linspace(0, 0.9 * STILL, 50)[:, None] * np.float32([[1, 0]])


def test_still_tails() -> None:
    assert still_rows(Still(), 0) == 19
    assert excerpt(Still(), still_tail=0.5).lengths.tolist() == [36]
    assert excerpt(Still(), still_tail=3).lengths.tolist() == [50]
    assert excerpt(Still(), still_tail=0.5, fps=20).lengths.tolist() == [41]
