import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from ahawam_jax.commands import record as command
from data_pipelines.disk import DiskError
from data_pipelines.processes import WorkerError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.recording import record as recording
from data_pipelines.recording.encoded_video import encode_video
from data_pipelines.recording.lerobot_writer import LeRobotWriter
from data_pipelines.recording.record import Episode, disturbance, record, record_episode
from data_pipelines.simulation.env import IMAGE_SIZES, AlohaSim
from data_pipelines.simulation.expert import plan
from data_pipelines.simulation.rendering import check_rendering
from tests.full_disk import files_end_at

FPS, NAMES = 25, ("left_joint", "left_gripper", "right_joint")
CAMERAS = {"observation.images.cam_high": (48, 64), "observation.images.cam_left_wrist": (32, 32)}
LENGTHS, INSTRUCTIONS = (7, 12, 5), ("lift", "put down", "lift")


@pytest.fixture
def drawing() -> None:
    if problem := check_rendering():
        pytest.skip(problem)


def episode(number: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """States, actions and frames whose brightness and colour say which episode, frame and camera they are of."""
    rng, length = np.random.default_rng(number), LENGTHS[number]
    states, actions = rng.normal(size=(2, length, len(NAMES))).astype(np.float32)
    images = {}
    for c, (key, size) in enumerate(CAMERAS.items()):
        images[key] = np.empty((length, *size, 3), np.uint8)
        images[key][..., 0] = 10 * np.arange(length)[:, None, None] + 60
        images[key][..., 1] = 60 * number + 40
        images[key][..., 2] = 100 * c + 60
    return states, actions, images


def writer(root: Path, **options: int) -> LeRobotWriter:
    return LeRobotWriter(root, FPS, NAMES, CAMERAS, robot_type="aloha", **options)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    with writer(root, episodes_per_file=2) as out:
        for number, instruction in enumerate(INSTRUCTIONS):
            states, actions, images = episode(number)
            if number == 1:  # as another process would hand it over
                images = {key: encode_video(frames, FPS) for key, frames in images.items()}
            out.add_episode(states, actions, images, instruction)
        assert not root.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    return root


def test_reader_returns_what_was_written(dataset: Path) -> None:
    read = open_episodes(dataset)
    assert read.fps == FPS and read.lengths.tolist() == list(LENGTHS)
    for number, length in enumerate(LENGTHS):
        states, actions, images = episode(number)
        np.testing.assert_array_equal(read.states(number), states)
        np.testing.assert_array_equal(read.actions(number), actions)
        np.testing.assert_allclose(read.timestamps(number), np.arange(length) / FPS, atol=1e-6)
        assert read.instruction(number) == INSTRUCTIONS[number]
        for key, frames in images.items():
            seen = read.frames(number, key.removeprefix("observation.images."), np.arange(length))
            # A neighbouring frame would be 10 levels away.
            assert np.abs(seen.astype(int) - frames).max() < 5


def test_layout_is_that_of_version_3(dataset: Path) -> None:
    files = sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file())
    assert files == sorted(
        ["meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"]
        + [f"data/chunk-000/file-00{i}.parquet" for i in range(2)]
        + [f"videos/{key}/chunk-000/file-00{i}.mp4" for key in CAMERAS for i in range(2)]
    )
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["splits"] == {"train": "0:3"}
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 24, 2)
    rows = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    key = "videos/observation.images.cam_high"
    assert rows["data/file_index"] == rows[f"{key}/file_index"] == [0, 0, 1]
    assert rows["dataset_from_index"] == [0, 7, 19] and rows["dataset_to_index"] == [7, 19, 24]
    np.testing.assert_allclose(rows[f"{key}/from_timestamp"], [0, 7 / FPS, 0])
    np.testing.assert_allclose(rows[f"{key}/to_timestamp"], [7 / FPS, 19 / FPS, 5 / FPS])
    data = pq.read_table(dataset / "data/chunk-000/file-001.parquet").to_pydict()
    assert data["index"] == [19, 20, 21, 22, 23] and data["frame_index"] == [0, 1, 2, 3, 4]
    assert set(data["episode_index"]) == {2} and set(data["task_index"]) == {0}


def test_schemas_are_those_of_the_lerobot_package(tmp_path: Path, shared_dir: Path) -> None:
    sample = shared_dir / "datasets" / "lerobot_v3.0_h264"
    information = json.loads((sample / "meta/info.json").read_text())
    features = information["features"]
    cameras = {key: tuple(f["shape"][:2]) for key, f in features.items() if f["dtype"] == "video"}
    names = features["action"]["names"]
    root = tmp_path / "set"
    with LeRobotWriter(root, FPS, names, cameras, robot_type="aloha") as out:
        vectors = np.zeros((4, len(names)), np.float32)
        images = {key: np.zeros((4, *size, 3), np.uint8) for key, size in cameras.items()}
        out.add_episode(vectors, vectors, images, "wait")
    for file in ("meta/tasks", "meta/episodes/chunk-000/file-000", "data/chunk-000/file-000"):
        ours, theirs = pq.read_schema(root / f"{file}.parquet"), pq.read_schema(sample / f"{file}.parquet")
        assert ours.equals(theirs), f"{file}: {ours} is not {theirs}"
        assert set(ours.metadata or ()) == set(theirs.metadata or ())
    written = json.loads((root / "meta/info.json").read_text())
    assert list(written) == list(information) and written["features"] == features
    shapes = []
    for folder in (root, sample):
        stats = json.loads((folder / "meta/stats.json").read_text())
        shapes.append({name: {k: np.shape(v) for k, v in of.items()} for name, of in stats.items()})
    assert shapes[0] == shapes[1]


def test_statistics_are_exact(dataset: Path) -> None:
    stats = json.loads((dataset / "meta/stats.json").read_text())
    episodes = [episode(number) for number in range(3)]
    actions = np.concatenate([e[1] for e in episodes]).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0))
    np.testing.assert_allclose(stats["action"]["q10"], np.quantile(actions, 0.1, axis=0))
    assert stats["action"]["count"] == [24]
    for key in CAMERAS:
        pixels = np.concatenate([e[2][key].reshape(-1, 3) for e in episodes]) / 255
        for name, value in {
            "min": pixels.min(axis=0),
            "max": pixels.max(axis=0),
            "mean": pixels.mean(axis=0),
            "std": pixels.std(axis=0),
            "q90": np.quantile(pixels, 0.9, axis=0, method="inverted_cdf"),
        }.items():
            np.testing.assert_allclose(np.squeeze(stats[key][name]), value, atol=1e-9, err_msg=f"{key} {name}")
    rows = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    np.testing.assert_allclose(rows["stats/action/max"][2], episodes[2][1].max(axis=0))
    np.testing.assert_allclose(np.squeeze(rows["stats/observation.images.cam_high/mean"][1])[1], 100 / 255, atol=1e-9)


def test_video_has_a_key_frame_at_least_every_second_frame(dataset: Path) -> None:
    with av.open(str(dataset / "videos/observation.images.cam_high/chunk-000/file-000.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert len(packets) == LENGTHS[0] + LENGTHS[1]
    keys = [packet.is_keyframe for packet in packets]
    assert keys[0] and keys[LENGTHS[0]] and all(a or b for a, b in zip(keys, keys[1:], strict=False))
    steps = [float(packet.pts * packet.time_base) for packet in packets]
    np.testing.assert_allclose(steps, np.arange(len(packets)) / FPS, atol=1e-6)


def test_disturbance_settles_at_its_standard_deviation() -> None:
    noise = np.stack([disturbance(155, 0.02, seed) for seed in range(100)])
    assert (noise[:, 0] == 0).all() and (noise[..., [6, 13]] == 0).all()
    joints = np.delete(noise[:, 40:], [6, 13], axis=-1)
    assert joints.std() == pytest.approx(0.02, rel=0.05)
    neighbours = np.corrcoef(joints[:, 1:].ravel(), joints[:, :-1].ravel())[0, 1]
    assert neighbours == pytest.approx(0.85, abs=0.03)
    assert not disturbance(155, 0.0, 1).any()
    np.testing.assert_array_equal(disturbance(155, 0.02, 5), noise[5])


@pytest.mark.parametrize("task", ["transfer_cube", "remember", "react"])
def test_recorded_actions_are_the_undisturbed_ones(task: str, drawing: None) -> None:
    sim = AlohaSim(task)
    sim.reset(1000)
    clean, disturbed = record_episode(task, 1000, 0.0), record_episode(task, 1000, 0.01)
    expected = plan(sim)
    np.testing.assert_array_equal(clean.actions, expected)
    np.testing.assert_array_equal(disturbed.actions, expected)
    np.testing.assert_array_equal(clean.states[0], sim.state())
    deviation = np.abs(disturbed.states - clean.states)
    assert deviation[-1].max() > 1e-3 and deviation[0].max() == 0
    for row, (action, noise) in enumerate(zip(expected, disturbance(len(expected), 0.01, 1000), strict=True)):
        np.testing.assert_array_equal(disturbed.states[row], sim.state())
        sim.step(action + noise)
    assert sim.held
    assert record_episode(task, 1000, 0.5) is None  # far too much: nothing is held at the end


def test_recording_does_not_depend_on_the_number_of_processes(tmp_path: Path, drawing: None) -> None:
    contents = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        record("transfer_cube", episodes=2, out=root, processes=processes, noise=0.01, seed0=1000)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(root)): path.read_bytes() for path in files})
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    read = open_episodes(root)
    assert read.lengths.tolist() == [155] * 2
    sim = AlohaSim("transfer_cube")
    sim.reset(1000)
    np.testing.assert_array_equal(read.actions(0), plan(sim))
    for executed in read.actions(0)[:60] + disturbance(155, 0.01, 1000)[:60]:
        sim.step(executed)
    np.testing.assert_array_equal(read.states(0)[60], sim.state())
    for camera, image in sim.images().items():
        off = [np.abs(read.frames(0, camera, [step])[0].astype(int) - image).mean() for step in (56, 60, 64)]
        assert off[1] < 3 and off[1] == min(off), (camera, off)


# ---------------------------------------------------------------- interruptions
@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The seeds that were tried; every third attempt fails. Workers are threads."""
    tried = []

    def attempt(task: str, seed: int, noise: float, randomise: bool) -> Episode | None:
        tried.append(seed)
        if seed % 3 == 0:
            return None
        shade = {camera: np.full((4, *size, 3), seed % 200, np.uint8) for camera, size in IMAGE_SIZES.items()}
        videos = {f"observation.images.{camera}": encode_video(frames, FPS) for camera, frames in shade.items()}
        rows = np.full((4, 14), seed, np.float32)
        return Episode(rows, rows + 1, videos)

    monkeypatch.setattr(recording, "record_episode", attempt)
    monkeypatch.setattr(recording, "worker_pool", lambda processes, *_: ThreadPoolExecutor(processes))
    return tried


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_recording_goes_on_where_it_was_stopped(
    attempts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a full disk after some attempts, then by one when the dataset is put together."""
    record("insertion", 5, tmp_path / "whole", 1, 0.0, 100)
    out, full = tmp_path / "set", OSError(errno.ENOSPC, "No space left on device")
    words = "set cannot be written: its disk is full; .* before are kept in .*attempts-.*the same command goes on"

    def fails_from(number: int, function: Callable) -> Callable:
        calls = itertools.count(1)
        return lambda *args: function(*args) if next(calls) < number else throw(full)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match=words):
        patch.setattr(recording, "whole_file", fails_from(5, recording.whole_file))
        record("insertion", 5, out, 1, 0.0, 100)
    kept = {int(path.stem) for path in tmp_path.glob(".set.attempts-*/*.npz")}
    assert kept == {100, 101, 102, 103}  # 102 failed
    attempts.clear()
    with monkeypatch.context() as patch, pytest.raises(DiskError, match=words):
        patch.setattr(LeRobotWriter, "add_episode", fails_from(3, LeRobotWriter.add_episode))
        record("insertion", 5, out, 1, 0.0, 100)
    assert not out.exists() and not kept & set(attempts)
    record("insertion", 5, out, 1, 0.0, 100)
    assert files(out) == files(tmp_path / "whole") and not {*range(100, 107)} & set(attempts[3:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]


def throw(error: Exception) -> None:
    raise error


def test_attempts_of_another_kind_are_not_taken(attempts: list[int], tmp_path: Path) -> None:
    for noise, randomise in ((0.0, False), (0.5, False), (0.5, True)):
        with files_end_at(1), pytest.raises(DiskError):
            record("insertion", 1, tmp_path / "set", 1, noise, 100, randomise)
    assert len(list(tmp_path.glob(".set.attempts-*"))) == 3


def test_a_killed_worker_ends_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real pool: a worker that runs this test's `_attempt` is not there to answer."""
    monkeypatch.setattr(recording, "_attempt", killed)
    words = "A worker process was killed by SIGKILL.*The episodes before are kept in .*the same command goes on"
    with pytest.raises(WorkerError, match=words):
        record("insertion", 1, tmp_path / "set", 2, 0.0, 100)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_command_line() -> None:
    help_ = [sys.executable, "-m", "ahawam_jax", "record", "--help"]
    usage = subprocess.run(help_, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 0 and "--noise" in usage.stdout and "(default: 200)" in usage.stdout


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [("episodes", "0", "1"), ("noise", "nan", "0"), ("noise", "inf", "0"), ("seed0", "-1", "0")],
)
def test_numbers_that_nothing_can_be_recorded_with(
    tmp_path: Path, capsys: pytest.CaptureFixture, flag: str, value: str, least: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--task", "insertion", "--out", str(tmp_path / "x"), f"--{flag}={value}"])
    assert stopped.value.code == 2
    assert f"--{flag} is {value}: expected a number, at least {least}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
