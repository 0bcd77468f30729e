"""What the writer takes reads back the same, in this package and as lerobot reads; all else is refused at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.disk import DiskError
from data_pipelines.episodes import DatasetError
from data_pipelines.ownership import OwnedError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.recording.encoded_video import EncodedVideo, VideoFile, encode_video, frame_rate
from data_pipelines.recording.lerobot_writer import LeRobotWriter, discard_unfinished
from tests.full_disk import files_end_at

NAMES, KEY = ("waist", "gripper"), "observation.images.cam_high"
CAMERAS = {KEY: (32, 48)}
LEROBOT_TOLERANCE = 1e-4  # seconds between a row's time stamp and its frame's: lerobot's own default
LEVELS = 8  # of 255, by which h264 changes pictures of one colour; neighbours differ by 12


def make(root: Path, **changes: object) -> LeRobotWriter:
    arguments = {"fps": 25, "state_names": NAMES, "cameras": CAMERAS, "robot_type": "arm"} | changes
    return LeRobotWriter(root, **arguments)


def episode(
    number: int = 0, length: int = 6, width: int = 2, cameras: dict = CAMERAS
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """States, actions and pictures whose grey tells the row, 12 levels apart, and whose red tells the episode."""
    rng = np.random.default_rng(number)
    states, actions = rng.normal(size=(2, length, width)).astype(np.float32)
    images = {key: np.empty((length, *size, 3), np.uint8) for key, size in cameras.items()}
    for frames in images.values():
        frames[:] = (20 + 12 * np.arange(length) % 216)[:, None, None, None]
        frames[..., 0] = 40 + 30 * (number % 6)
    return states, actions, images


def as_lerobot(root: Path) -> list[dict]:
    """Every row as the `lerobot` package 0.6 reads it: the frame of a row is the one nearest to its time stamp."""
    info = json.loads((root / "meta/info.json").read_text())
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pydict()
    texts = dict(zip(tasks["task_index"], tasks["__index_level_0__"], strict=True))
    places = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    tables = [pq.read_table(path) for path in sorted((root / "data").glob("*/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    decoded = {}
    for row in rows:
        place = places[row["episode_index"]]
        assert place["dataset_from_index"] <= row["index"] < place["dataset_to_index"]
        assert place["tasks"] == [texts[row["task_index"]]]
        row["task"] = texts[row["task_index"]]
        for key in (key for key, feature in info["features"].items() if feature["dtype"] == "video"):
            path = root / info["video_path"].format(
                video_key=key, chunk_index=place[f"videos/{key}/chunk_index"],
                file_index=place[f"videos/{key}/file_index"],
            )  # fmt: skip
            if path not in decoded:
                with av.open(str(path)) as container:
                    frames = list(container.decode(video=0))
                    times = np.array([float(frame.pts * frame.time_base) for frame in frames], np.float32)
                    decoded[path] = times, [frame.to_ndarray(format="rgb24") for frame in frames]
            times, frames = decoded[path]
            off = np.abs(times - np.float32(place[f"videos/{key}/from_timestamp"] + row["timestamp"]))
            assert off.min() < LEROBOT_TOLERANCE
            row[key] = frames[off.argmin()]
        for name, feature in info["features"].items():
            if feature["dtype"] != "video":  # the package casts a vector of one number from a plain number
                assert isinstance(row[name], list) == (feature["shape"] != [1]), name
    assert len(rows) == info["total_frames"] and len(places) == info["total_episodes"]
    return rows


def check(root: Path, written: list[tuple], rate: Fraction) -> None:
    """Both readers give back the episodes (states, actions, images, instruction)."""
    ours, theirs = open_episodes(root), as_lerobot(root)
    assert ours.fps == float(rate) and len(ours.lengths) == len(written)
    for number, (states, actions, images, instruction) in enumerate(written):
        rows = [row for row in theirs if row["episode_index"] == number]
        for name, expected, read in (
            ("observation.state", states, ours.states(number)), ("action", actions, ours.actions(number)),
        ):  # fmt: skip
            np.testing.assert_array_equal(read, expected)
            np.testing.assert_array_equal(np.reshape([row[name] for row in rows], expected.shape), expected)
        assert ours.instruction(number) == instruction and {row["task"] for row in rows} == {instruction}
        np.testing.assert_allclose(ours.timestamps(number), np.arange(len(states)) / float(rate), rtol=1e-6)
        for key, frames in images.items():
            camera = key.removeprefix("observation.images.")
            seen = ours.frames(number, camera, np.arange(len(states)))
            for read in (seen, np.stack([row[key] for row in rows])):
                assert np.abs(read.astype(int) - frames).mean(axis=(1, 2, 3)).max() < LEVELS


# ---------------------------------------------------------------- what is taken
@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (25, 25), (np.int64(25), 25), (np.float32(12.5), Fraction(25, 2)), (Fraction(50, 3), Fraction(50, 3)),
        (250 / 15, Fraction(50, 3)), (29.97, Fraction(2997, 100)), (30000 / 1001, Fraction(30000, 1001)),
        (Fraction(np.int64(30)), 30), (0.01, Fraction(1, 100)), (240, 240), (10_000, 10_000), (12.3456789, None),
    ],
)  # fmt: skip
def test_any_rate(tmp_path: Path, fps: float, rate: Fraction | None) -> None:
    found = frame_rate(fps)
    assert found == rate or (rate is None and abs(found / Fraction(fps) - 1) < 1e-6)
    episodes = [(*episode(n, 5 + n), "lift") for n in range(3)]
    with make(tmp_path / "set", fps=fps, episodes_per_file=2) as out:
        for one in episodes:
            out.add_episode(*one)
    check(tmp_path / "set", episodes, found)
    written = json.loads((tmp_path / "set/meta/info.json").read_text())["fps"]
    assert isinstance(written, int) == (found.denominator == 1)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_taken_reads_back(tmp_path: Path, seed: int) -> None:
    """Random widths, names, cameras, rates, lengths, texts and layouts of the arrays."""
    rng = np.random.default_rng(seed)
    width = (1, 2, 3, 1, 4, 7)[seed]  # lerobot keeps a vector of one number as a number
    names = np.array([f"{'énu 7%{}_'[i % 9]}{i}" for i in range(width)])  # an array, and any signs
    short = rng.permutation(["cam_high", "Kamera 1", "b.c-d", "頭{}"])[: rng.integers(0, 4)]
    cameras = {f"observation.images.{name}": tuple(2 * rng.integers(8, 24, 2)) for name in short}
    texts = rng.permutation(["lift", "lift ", "put it\ndown", "hebe \"das\" Glas", "把杯子拿起来", "\ttab, {x}", "0"])
    fps = (25, 250 / 15, 29.97, np.float64(50), Fraction(15, 2), 30)[seed]
    per_file = np.int32(rng.integers(1, 4))
    episodes = []
    with make(tmp_path / "set", fps=fps, state_names=names, cameras=cameras, episodes_per_file=per_file) as out:
        for number in range(5):
            states, actions, images = episode(number, int(rng.integers(1, 20)), width, cameras)
            states[0] = (np.float32(3e38), np.float32(-1e-45), np.float32(-0.0))[number % 3]
            kept = (states.copy(), actions.copy(), {key: x.copy() for key, x in images.items()}, str(texts[number]))
            handed = [np.asfortranarray(states), actions[::-1].copy()[::-1], images, texts[number]]
            if number % 2:
                handed[2] = {key: encode_video(frames, fps) for key, frames in images.items()}
            else:
                handed[2] = {key: np.asfortranarray(frames)[:, ::-1, ::-1] for key, frames in images.items()}
            out.add_episode(*handed)
            states[:], actions[:] = np.nan, np.nan  # a robot's buffer is used again
            episodes.append(kept)
    check(tmp_path / "set", episodes, frame_rate(fps))
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    for place, name in enumerate(("observation.state", "action")):
        rows = np.concatenate([one[place] for one in episodes])
        np.testing.assert_allclose(stats[name]["mean"], rows.mean(0, dtype=np.float64))


# ---------------------------------------------------------------- what is refused when the writer is made
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0: expected 0.01 to 10000"),
        ({"fps": -25}, "fps is -25: expected"),
        ({"fps": float("nan")}, "fps is nan: expected a number of frames"),
        ({"fps": float("inf")}, "fps is inf: expected"),
        ({"fps": True}, "fps is True: expected"),
        ({"fps": "25"}, "fps is '25': expected"),
        ({"fps": None}, "fps is None: expected"),
        ({"fps": 1e6}, "fps is 1000000.0: expected"),
        ({"state_names": "xyz"}, "state_names is 'xyz': expected a list"),
        ({"state_names": []}, r"state_names is \[\]: expected a list"),
        ({"state_names": 7}, "state_names is 7: expected a list"),
        ({"state_names": ["a", "a"]}, "state_names has 'a' twice"),
        ({"state_names": ["a", 1]}, r"state_names\[1\] is 1: expected words"),
        ({"state_names": ["a", " "]}, r"state_names\[1\] is ' ': expected words"),
        ({"state_names": ["a", "\ud800"]}, r"state_names\[1\] is .*UTF-8"),
        ({"robot_type": None}, "robot_type is None: expected text"),
        ({"robot_type": "\udc80"}, "robot_type is .*UTF-8"),
        ({"episodes_per_file": 0}, "episodes_per_file is 0: expected a whole number, at least 1"),
        ({"episodes_per_file": 1.5}, "episodes_per_file is 1.5"),
        ({"cameras": {"cam_high": (32, 48)}}, "is 'cam_high': expected observation.images.<name>"),
        ({"cameras": {"observation.images.": (32, 48)}}, "expected observation.images.<name>"),
        ({"cameras": {"observation.images.a/b": (32, 48)}}, "no '/' in it"),
        ({"cameras": {"observation.images.a\n": (32, 48)}}, "expected observation.images.<name>"),
        ({"cameras": {3: (32, 48)}}, "The key of a camera is 3"),
        ({"cameras": {"observation.images." + "x" * 250: (32, 48)}}, "is 269 bytes long, at most 255"),
        ({"cameras": {KEY: (32, 47)}}, "The size of .*cam_high is 32x47: h264 needs an even height and width"),
        ({"cameras": {KEY: (0, 48)}}, "The size of .*cam_high is 0"),
        ({"cameras": {KEY: (32.0, 48.0)}}, "The size of .*cam_high is 32.0"),
        ({"cameras": {KEY: (32, 48, 3)}}, "cam_high is .32, 48, 3.: expected .height, width."),
        ({"cameras": {KEY: 32}}, "cam_high is 32: expected .height, width."),
        ({"cameras": {KEY: (2, 40000)}}, "h264 cannot hold pictures of 2x40000"),
    ],
)
def test_mistakes_at_the_start(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "set", **changes)
    assert not list(tmp_path.iterdir())


def test_sizes_of_any_integer(tmp_path: Path) -> None:
    with make(tmp_path / "set", cameras={KEY: np.array([32, 48])}) as out:
        out.add_episode(*episode(), "lift")
    assert open_episodes(tmp_path / "set").cameras == {"cam_high": (32, 48)}


# ---------------------------------------------------------------- what is refused with an episode
def states(change: Callable[[np.ndarray], object]) -> Callable[..., tuple]:
    return lambda s, a, i, text: (change(s), a, i, text)


def images(change: Callable[[np.ndarray], object]) -> Callable[..., tuple]:
    return lambda s, a, i, text: (s, a, {key: change(frames) for key, frames in i.items()}, text)


def instruction(text: object) -> Callable[..., tuple]:
    return lambda s, a, i, _: (s, a, i, text)


def with_value(value: float) -> Callable[..., tuple]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[3, 1] = value
        return rows

    return states(change)


REFUSED = {
    "nan": (with_value(np.nan), r"observation.state is nan in row 3, dimension 1 \(gripper\): expected finite"),
    "infinite": (with_value(-np.inf), "observation.state is -inf in row 3"),
    "float64, beyond float32": (states(lambda s: 1e300 * s.astype(float)), "dtype float64: expected float32"),
    "big-endian": (states(lambda s: s.astype(">f4")), "dtype >f4: expected float32"),
    "integers": (states(lambda s: s.astype(int)), "dtype int64: expected float32"),
    "list": (states(np.ndarray.tolist), "observation.state is a list: expected a plain array"),
    "masked": (states(lambda s: np.ma.masked_less(s, 0)), "is a MaskedArray: expected a plain array"),
    "too wide": (states(lambda s: np.hstack([s, s])), r"shape \(6, 4\) .*expected float32 .6, 2."),
    "one row less": (states(lambda s: s[1:]), r"action has shape \(6, 2\)"),
    "no axis of rows": (states(lambda s: s[0]), r"shape \(2,\)"),
    "no rows": (lambda s, a, i, t: (s[:0], a[:0], {k: x[:0] for k, x in i.items()}, t), "expected float32 .at least"),
    "no pictures": (lambda s, a, i, t: (s, a, {}, t), "expected exactly"),
    "another camera": (lambda s, a, i, t: (s, a, i | {"observation.images.b": i[KEY]}, t), "expected exactly"),
    "floats": (images(lambda x: x / 255), "cam_high: shape .* and dtype float64 given, expected uint8"),
    "channels first": (images(lambda x: x.transpose(0, 3, 1, 2)), "expected uint8 .frames, height, width, 3."),
    "grey": (images(lambda x: x[..., 0]), "expected uint8 .frames, height, width, 3."),
    "transparent": (images(lambda x: np.concatenate([x, x[..., :1]], -1)), "expected uint8 .frames, height, width, 3"),
    "list of pictures": (images(list), "cam_high: list given, expected an array .*np.stack"),
    "another size": (images(lambda x: x[:, :16]), r"6 frames of \(16, 48\): expected 6 of \(32, 48\)"),
    "one picture less": (images(lambda x: x[1:]), "5 frames .*: expected 6"),
    "encoded at another rate": (images(lambda x: encode_video(x, 30)), "the second at 0.0333 s: expected .*0.0400 s"),
    "encoded, one less": (images(lambda x: encode_video(x[1:], 25)), "5 frames .*: expected 6"),
    "no mp4": (images(lambda x: EncodedVideo(b"x" * 99, 6, (32, 48), np.ones((3, 256), int))), "no readable mp4"),
    "no instruction": (instruction(None), "The instruction is None: expected words"),
    "empty": (instruction(""), "The instruction is '': expected words"),
    "blank": (instruction(" \n"), "expected words"),
    "bytes": (instruction(b"lift"), "The instruction is b'lift': expected words"),
    "surrogate": (instruction("lift \ud800"), "UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_with_an_episode_cost_nothing(tmp_path: Path, name: str) -> None:
    """The episodes before are kept, a right one can follow, and the dataset be finished."""
    change, message = REFUSED[name]
    root, kept = tmp_path / "set", [(*episode(n), "lift") for n in range(2)]
    out = make(root)
    for one in kept:
        out.add_episode(*one)
        with pytest.raises(ValueError, match=message):
            out.add_episode(*change(*episode(4), "drop"))
    out.close()
    check(root, kept, Fraction(25))
    assert open_episodes(root).instructions == ["lift"]


def test_videos_that_do_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two encoders' settings in one file would decode to rubbish from the second on."""
    states_, actions, pictures = episode()
    usual = encode_video(pictures[KEY], 25)
    monkeypatch.setitem(encode_video.__globals__["_H264"], "x264-params", "cabac=0:ref=3")
    other = encode_video(pictures[KEY], 25)
    out = make(tmp_path / "set")
    out.add_episode(states_, actions, {KEY: usual}, "lift")
    with pytest.raises(ValueError, match="cam_high: encoded with other settings than the episodes before"):
        out.add_episode(states_, actions, {KEY: other}, "lift")
    out.close()


def test_an_episode_too_long_for_its_time_stamps(tmp_path: Path) -> None:
    rows = np.broadcast_to(np.float32(0), (12_000_000, 1))  # 20 minutes
    out = make(tmp_path / "set", fps=10_000, state_names=["a"], cameras={})
    out.add_episode(rows[:1000], rows[:1000], {}, "lift")
    with pytest.raises(ValueError, match="12000000 rows at 10000 per second are too many"):
        out.add_episode(rows, rows, {}, "lift")
    out.close()


# ---------------------------------------------------------------- recordings that end early
def test_an_exception_keeps_the_episodes_before(tmp_path: Path) -> None:
    root, partial = tmp_path / "set", tmp_path / "set.partial"
    kept = [(*episode(n), "lift") for n in range(3)]
    with pytest.raises(ZeroDivisionError) as stopped, make(root, episodes_per_file=2) as out:
        for one in kept:
            out.add_episode(*one)
        _ = 1 / 0
    (note,) = stopped.value.__notes__
    assert note == f"3 whole episodes are in {partial}: rename it to set to use them, or remove it."
    check(partial, kept, Fraction(25))  # whole, under the other name
    with pytest.raises(DatasetError, match="set is not a folder.*set.partial holds what a recording left"):
        open_episodes(root)
    with pytest.raises(FileExistsError, match="set.partial holds what .*left. It opens as a dataset. Rename it"):
        make(root)
    with pytest.raises(ValueError, match="takes no further episode: it was closed"):
        out.add_episode(*kept[0])
    out.close()
    check(root, kept, Fraction(25))
    assert not partial.exists()


def test_an_exception_before_the_first_episode_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "set"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="set has no episode"), make(tmp_path / "set"):
        pass
    assert not list(tmp_path.iterdir())


def test_closing_twice(tmp_path: Path) -> None:
    out = make(tmp_path / "set")
    out.add_episode(*episode(), "lift")
    out.close()
    out.close()
    with pytest.raises(ZeroDivisionError), out:
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(ValueError, match="set takes no further episode: it was closed"):
        out.add_episode(*episode(), "lift")


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            make(tmp_path / name)
    out = make(tmp_path / "set")
    with pytest.raises(OwnedError, match="set.partial is being written by process"):
        make(tmp_path / "set")
    out.add_episode(*episode(), "lift")
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="set has come to exist meanwhile; the recording is whole in .*partial"):
        out.close()
    (tmp_path / "set").rmdir()
    out.close()
    check(tmp_path / "set", [(*episode(), "lift")], Fraction(25))


def test_an_episode_without_room_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused while there is room to finish those before it, and taken once there is room."""
    written = [(*episode(n), "lift") for n in range(3)]
    out = make(tmp_path / "set")
    out.add_episode(*written[0])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000))
        with pytest.raises(DiskError, match="needs 0.3 MB more, 0.2 MB are free; make room .* finishes the 1 before"):
            out.add_episode(*written[1])
    for one in written[1:]:
        out.add_episode(*one)
    out.close()
    check(tmp_path / "set", written, Fraction(25))


def test_a_disk_that_fails_in_the_midst_is_a_sentence(tmp_path: Path) -> None:
    out = make(tmp_path / "set")
    words = "set cannot be written: files may not grow.*The 0 episodes before are kept: .* close.. finishes the ep"
    with files_end_at(100), pytest.raises(DiskError, match=words):
        out.add_episode(*episode(), "lift")


def test_an_episode_that_could_not_be_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: what came before stands, though a part of it lies in the same files."""
    kept = [(*episode(n), "lift") for n in range(2)]
    out = make(tmp_path / "set")
    for one in kept:
        out.add_episode(*one)
    with monkeypatch.context() as patch:
        patch.setattr(VideoFile, "append", lambda *_: os.strerror(1 / 0))
        with pytest.raises(ZeroDivisionError):
            out.add_episode(*episode(2), "put down")
    with pytest.raises(ValueError, match="the last one could not be written whole; close.. finishes the episodes"):
        out.add_episode(*episode(3), "lift")
    out.close()
    dataset = open_episodes(tmp_path / "set")
    assert len(dataset.lengths) == 2 and dataset.instructions == ["lift"]
    for number, (states_, _, pictures, _) in enumerate(kept):
        np.testing.assert_array_equal(dataset.states(number), states_)
        assert np.abs(dataset.frames(number, "cam_high", range(6)).astype(int) - pictures[KEY]).max() < 2 * LEVELS


KILLED = """
import os, signal, sys
import numpy as np
from data_pipelines.recording.lerobot_writer import LeRobotWriter
out = LeRobotWriter(sys.argv[1], 25, ["a"], {}, "arm")
for _ in range(3):
    out.add_episode(np.zeros((9, 1), np.float32), np.zeros((9, 1), np.float32), {}, "lift")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_recording_is_named(tmp_path: Path) -> None:
    root, partial = tmp_path / "set", tmp_path / "set.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(DatasetError, match="set.partial is what a recording left that did not come to its end"):
        open_episodes(partial)
    with pytest.raises(DatasetError, match="set is not a folder.*set.partial holds what a recording left"):
        open_episodes(root)
    with pytest.raises(FileExistsError, match="set.partial holds what an interrupted recording left. Rename it"):
        make(root)
    assert discard_unfinished(root) and not discard_unfinished(root)
    with make(root) as out:
        out.add_episode(*episode(), "lift")
        with pytest.raises(OwnedError, match="is being written by"):
            discard_unfinished(root)
