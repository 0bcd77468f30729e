"""A build that is stopped, whatever stops it, says so in a sentence and is gone on with."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.caches import frame_cache
from data_pipelines.caches.frame_cache import DecodingFrames, open_frames
from data_pipelines.canvas import Canvas
from data_pipelines.disk import DiskError
from data_pipelines.episodes import DatasetError
from data_pipelines.processes import WorkerError
from data_pipelines.readers.lerobot import LeRobotV21
from data_pipelines.readers.opening import open_episodes
from tests.data_pipelines import tiny_dataset as tiny
from tests.full_disk import files_end_at

CANVAS = Canvas((16, 16))
EPISODE = tiny.LENGTHS[0] * 16 * 24 * 3  # bytes of the first episode; its canvas is half as high again as the head
SAFE = "The episodes before are kept in .*partial; the same command goes on from there"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"), "v2.1")


@pytest.fixture
def goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Builds the cache in this process, compares every row, and returns the episodes that were still to be written."""

    def build() -> list[int]:
        dataset, written, write = open_episodes(root), [], frame_cache._write_episode
        rows = np.arange(dataset.lengths.sum())
        with monkeypatch.context() as patch:
            patch.setattr(frame_cache, "_write_episode", lambda *a: (written.append(a[-1]), write(*a))[1])
            frames = open_frames(dataset, CANVAS, tmp_path)
        np.testing.assert_array_equal(frames[rows], DecodingFrames(dataset, CANVAS)[rows])
        assert not list(tmp_path.glob("*.partial"))
        return written

    return build


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(root: Path, tmp_path: Path, goes_on: Callable[[], list[int]], processes: int) -> None:
    words = f"frames-.* cannot be written: files may not grow further here; .*{SAFE}"
    with files_end_at(EPISODE + 100), pytest.raises(DiskError, match=words):
        open_frames(open_episodes(root), CANVAS, tmp_path, processes)
    assert not list(tmp_path.glob("frames-*/key.json"))
    assert goes_on() == [1, 2] or processes == 2  # then a later episode may have failed before the first was done


def test_the_room_is_asked_for_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": EPISODE})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="needs 0.1 MB more, 0.0 MB are free; make room, choose another folder, or do"):
        open_frames(open_episodes(root), CANVAS, tmp_path)


class Deadly(LeRobotV21):
    """A dataset whose last episode kills who decodes it."""

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        if episode == len(self.lengths) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().frames(episode, camera, indices)


def test_a_killed_worker(root: Path, tmp_path: Path, goes_on: Callable[[], list[int]]) -> None:
    dataset = open_episodes(root)
    with pytest.raises(WorkerError, match=f"A worker process was killed by SIGKILL.*{SAFE}"):
        open_frames(Deadly(root, dataset._info), CANVAS, tmp_path, 2)
    assert 2 in goes_on()


def test_a_stopped_build_goes_on(root: Path, tmp_path: Path, goes_on: Callable[[], list[int]]) -> None:
    """Also where its note of the episodes was cut off in the midst of one."""
    assert goes_on() == [0, 1, 2]
    (whole,) = tmp_path.glob("frames-*")
    partial = whole.rename(whole.with_suffix(".partial"))
    (partial / "key.json").unlink()
    (partial / "episodes.txt").write_text("\n0;\n2")
    assert goes_on() == [1, 2]


def test_nothing_is_kept_of_a_damaged_dataset(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mended, it has another key, and nobody would come back for the half."""

    def damaged(*_: object) -> None:
        raise DatasetError("episode 1 is damaged")

    monkeypatch.setattr(frame_cache, "_write_episode", damaged)
    with pytest.raises(DatasetError, match="episode 1 is damaged"):
        open_frames(open_episodes(root), CANVAS, tmp_path)
    assert not list(tmp_path.glob("frames-*"))


def test_a_dataset_that_changes_meanwhile(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter(["before", "after"])
    monkeypatch.setattr(frame_cache, "pictures_key", lambda *_: next(keys))
    with pytest.raises(DatasetError, match="changed while its pictures were decoded; start again"):
        open_frames(open_episodes(root), CANVAS, tmp_path)
    assert not list(tmp_path.glob("frames-*"))
