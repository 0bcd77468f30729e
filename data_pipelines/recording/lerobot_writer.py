"""Writes LeRobot datasets, version 3.0: parquet tables, several episodes per mp4 file, and their metadata.

- meta/info.json, meta/stats.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet
- data/chunk-000/file-000.parquet
- videos/{camera key}/chunk-000/file-000.mp4
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.disk import require_room, writing
from data_pipelines.ownership import Owner
from data_pipelines.paths import local_path
from data_pipelines.recording.arguments import checked_cameras, checked_count, checked_names, checked_text
from data_pipelines.recording.encoded_video import (
    EncodedVideo,
    VideoFile,
    check_images,
    check_video,
    encode_video,
    frame_rate,
)
from data_pipelines.recording.lerobot_tables import (
    SCALARS,
    VECTORS,
    data_schema,
    data_table,
    image_stats,
    task_table,
    vector_stats,
)

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_FILES_PER_CHUNK = 1000
_TABLES, _TABLES_PER_EPISODE, _INDEX_PER_FRAME = 2**18, 2**13, 2**6  # bytes, at most, of what `close` writes


@dataclass
class LeRobotWriter:
    """Writes one dataset, episode by episode, and names it `root` only once it is whole.

    root: a folder that must not exist yet; until `close` the dataset is `root`.partial. fps: frames per second, any
    number or fraction (`frame_rate`). state_names: what the numbers of a state are, in order, each by another name; an
    action has the same. cameras: {key: (height, width)}, keys like "observation.images.cam_high". robot_type: as in
    info.json. episodes_per_file: how many episodes share a parquet file and an mp4 file.

    What could not be read back is a ValueError when it is handed in, here or in `add_episode`, and leaves the episodes
    before as they are: go on, or call `close`. Used as a context manager it closes itself; after an exception the
    episodes so far are a whole dataset under the name `root`.partial, and `close` still gives it its own.
    """

    root: Path
    fps: float | Fraction
    state_names: Sequence[str]
    cameras: Mapping[str, tuple[int, int]]
    robot_type: str
    episodes_per_file: int = 50

    _episodes: list[dict] = field(default_factory=list, init=False)
    _tasks: dict[str, int] = field(default_factory=dict, init=False)
    _columns: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)
    _histograms: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _total: int = field(default=0, init=False)
    _table: pq.ParquetWriter | None = field(default=None, init=False)
    _videos: dict[str, VideoFile] = field(default_factory=dict, init=False)
    _settings: dict[str, bytes] = field(default_factory=dict, init=False)  # of the decoders of the open files
    _closed: str = field(default="", init=False)  # why no further episode is taken
    _named: bool = field(default=False, init=False)  # the dataset has its own name

    def __post_init__(self) -> None:
        self.root = local_path(self.root)
        self._rate = frame_rate(self.fps)
        self.state_names = checked_names(self.state_names)
        self.robot_type = checked_text(self.robot_type, "robot_type")
        self.episodes_per_file = checked_count(self.episodes_per_file, "episodes_per_file")
        self.cameras = checked_cameras(self.cameras, self._rate)
        if os.path.lexists(self.root):
            raise FileExistsError(f"{self.root} exists already: expected a new folder; remove it or name another.")
        self._partial = unfinished(self.root)
        self._owner = Owner(self._partial)
        if left := _files(self._partial):
            self._owner.release()
            whole = " It opens as a dataset." if self._partial / "meta/info.json" in left else ""
            raise FileExistsError(
                f"{self._partial} holds what an interrupted recording left.{whole} Rename it to keep it, or remove it."
            )
        self._columns = {name: [] for name in (*VECTORS, *SCALARS)}
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in self.cameras}

    def add_episode(
        self,
        states: np.ndarray,
        actions: np.ndarray,
        images: Mapping[str, np.ndarray | EncodedVideo],
        instruction: str,
    ) -> None:
        """Append one episode of T frames.

        states, actions: finite float32 [T, len(state_names)]. images: for each camera uint8 [T, height, width, 3] RGB,
        or what `encode_video` made of it elsewhere. instruction: the task in words, not empty. Raises ValueError for
        anything else; then nothing was written.
        """
        if self._closed:
            raise ValueError(f"{self.root} takes no further episode: {self._closed}.")
        columns = self._checked_rows(states, actions)
        instruction = checked_text(instruction, "The instruction", blank=False)
        videos, settings = self._checked_videos(images, len(columns["action"]))
        self._require_room(columns, videos)
        self._closed = "the last one could not be written whole; close() finishes the episodes before it"
        with writing(self.root, f"The {len(self._episodes)} episodes before are kept: {self._closed}."):
            self._write(columns, videos, settings, instruction)
        self._closed = ""

    def close(self) -> None:
        """Write the metadata and give the dataset its name. A second call does nothing."""
        if self._named:
            return
        if not self._episodes:
            self._leave()
            raise ValueError(f"{self.root} has no episode: expected at least one; call add_episode first.")
        self._finish()
        if os.path.lexists(self.root):
            raise FileExistsError(
                f"{self.root} has come to exist meanwhile; the recording is whole in {self._partial}: rename it."
            )
        self._partial.rename(self.root)
        self._named = True

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close()
        elif not self._named and self._leave():
            error.add_note(
                f"{len(self._episodes)} whole episodes are in {self._partial}: rename it to {self.root.name} to use "
                "them, or remove it."
            )

    def _leave(self) -> bool:
        """Ends early, leaving the episodes so far, if there are any, as a whole dataset; whether there are."""
        with suppress(OSError):  # as on a full disk; what led here is told
            if self._episodes:
                self._finish()
                return True
            self._close_files()
            self._closed = self._closed or "it was closed"
            shutil.rmtree(self._partial)
        self._owner.release()
        return False

    # ---------------------------------------------------------------- what is handed in
    def _checked_rows(self, states: np.ndarray, actions: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of an episode, copies of what was handed in."""
        width = len(self.state_names)
        length = states.shape[0] if isinstance(states, np.ndarray) and states.ndim == 2 else 0
        for name, rows in zip(VECTORS, (states, actions), strict=True):
            if not isinstance(rows, np.ndarray) or isinstance(rows, np.ma.MaskedArray):
                raise ValueError(f"{name} is a {type(rows).__name__}: expected a plain array float32 [T, {width}].")
            if rows.shape != (length, width) or rows.dtype != np.float32 or not length:
                raise ValueError(
                    f"{name} has shape {rows.shape} and dtype {rows.dtype}: expected float32 "
                    f"[{length or 'at least 1'}, {width}]."
                )
            if len(bad := np.argwhere(~np.isfinite(rows))):
                row, place = bad[0]
                raise ValueError(
                    f"{name} is {rows[row, place]} in row {row}, dimension {place} ({self.state_names[place]}): "
                    "expected finite numbers; leave the episode out or record it again."
                )
        frame_index = np.arange(length)
        timestamp = (frame_index / float(self._rate)).astype(np.float32)
        if (np.rint(timestamp * np.float64(self._rate)) != frame_index).any():
            raise ValueError(
                f"{length} rows at {float(self._rate):g} per second are too many for the time stamps of an episode, "
                "which are float32; split it."
            )
        return {
            "observation.state": np.array(states, order="C"),
            "action": np.array(actions, order="C"),
            "timestamp": timestamp,
            "frame_index": frame_index,
            "episode_index": np.full(length, len(self._episodes)),
            "index": self._total + frame_index,
        }

    def _checked_videos(
        self, images: Mapping[str, np.ndarray | EncodedVideo], length: int
    ) -> tuple[dict[str, EncodedVideo], dict[str, bytes]]:
        """All cameras encoded, and the settings of their decoders."""
        if set(images) != set(self.cameras):
            raise ValueError(f"The images are of {sorted(images)}: expected exactly {sorted(self.cameras)}.")
        for key, size in self.cameras.items():
            video = images[key]
            if not isinstance(video, EncodedVideo):
                check_images(video, key)
            frames, found = (video.frames, video.size) if isinstance(video, EncodedVideo) else (
                len(video), video.shape[1:3]
            )  # fmt: skip
            if (frames, tuple(found)) != (length, size):
                raise ValueError(f"{key} has {frames} frames of {tuple(found)}: expected {length} of {size}.")
        videos = {
            key: images[key] if isinstance(images[key], EncodedVideo) else encode_video(images[key], self._rate)
            for key in self.cameras
        }
        settings = {key: check_video(video, self._rate, key) for key, video in videos.items()}
        other = [key for key, found in settings.items() if found != self._settings.get(key, found)]
        if other and len(self._episodes) % self.episodes_per_file:
            raise ValueError(
                f"{', '.join(other)}: encoded with other settings than the episodes before in the same file; encode "
                "all of them with encode_video and one version of PyAV."
            )
        return videos, settings

    # ---------------------------------------------------------------- files
    def _require_room(self, columns: dict[str, np.ndarray], videos: dict[str, EncodedVideo]) -> None:
        """Refuses an episode for which there is no room, while there still is some to finish those before it.

        A video whose writing failed cannot be finished, and the episodes before are in the same file.
        """
        content = sum(len(video.mp4) for video in videos.values()) + sum(x.nbytes for x in columns.values())
        before = self._episodes[-self.episodes_per_file :]
        frames = len(columns["index"]) + sum(episode["length"] for episode in before)
        tables = _TABLES + _TABLES_PER_EPISODE * len(self._episodes) + _INDEX_PER_FRAME * frames * len(videos)
        count = len(self._episodes)
        advice = f"make room and hand the episode in again, or call close(), which finishes the {count} before it"
        require_room(self._partial, content + tables, advice)

    def _write(
        self, columns: dict[str, np.ndarray], videos: dict[str, EncodedVideo], settings: dict[str, bytes],
        instruction: str,
    ) -> None:  # fmt: skip
        number, length = len(self._episodes), len(columns["action"])
        if number % self.episodes_per_file == 0:
            self._next_file(number // self.episodes_per_file)
            self._settings = settings
        columns["task_index"] = np.full(length, self._tasks.get(instruction, len(self._tasks)))
        self._table.write_table(data_table(columns))
        episode = self._describe(columns, videos, instruction)
        for key, video in videos.items():
            self._videos[key].append(video)
        self._tasks.setdefault(instruction, len(self._tasks))
        self._episodes.append(episode)
        for name, values in columns.items():
            self._columns[name].append(values)
        for key, video in videos.items():
            self._histograms[key] += video.histogram
        self._total += length

    def _next_file(self, file: int) -> None:
        self._close_files()
        self._place = {"chunk_index": file // _FILES_PER_CHUNK, "file_index": file % _FILES_PER_CHUNK}
        path = self._partial / _DATA_PATH.format(**self._place)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._table = pq.ParquetWriter(path, data_schema(len(self.state_names)))
        for key in self.cameras:
            path = self._partial / _VIDEO_PATH.format(video_key=key, **self._place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._videos[key] = VideoFile(path, self._rate)

    def _close_files(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
        for video in self._videos.values():
            video.close()
        self._videos = {}

    def _finish(self) -> None:
        """Makes the episodes so far a whole dataset, under the name it has until `close`."""
        self._closed = self._closed or "it was closed"
        self._close_files()
        stats = {name: vector_stats(np.concatenate(values)) for name, values in self._columns.items()}
        stats |= {key: image_stats(h, self._total) for key, h in self._histograms.items()}
        meta = self._partial / "meta"
        episodes = self._partial / _EPISODES_PATH
        episodes.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        pq.write_table(task_table(list(self._tasks)), meta / "tasks.parquet")
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        self._owner.release()

    def _describe(self, columns: dict, videos: dict[str, EncodedVideo], instruction: str) -> dict:
        """The row of meta/episodes: where the episode lies and its statistics."""
        length = len(columns["index"])
        row = {
            "episode_index": len(self._episodes),
            "tasks": [instruction],
            "length": length,
            "data/chunk_index": self._place["chunk_index"],
            "data/file_index": self._place["file_index"],
            "dataset_from_index": self._total,
            "dataset_to_index": self._total + length,
        }
        for key in self.cameras:
            start = self._videos[key].frames
            row |= {f"videos/{key}/{name}": value for name, value in self._place.items()}
            row[f"videos/{key}/from_timestamp"] = float(start / self._rate)
            row[f"videos/{key}/to_timestamp"] = float((start + length) / self._rate)
        stats = {name: vector_stats(columns[name]) for name in VECTORS}
        stats |= {key: image_stats(videos[key].histogram, length) for key in self.cameras}
        stats |= {name: vector_stats(columns[name]) for name in SCALARS}
        row |= {f"stats/{name}/{what}": value for name, of in stats.items() for what, value in of.items()}
        return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

    def _info(self) -> dict:
        names = list(self.state_names)
        fps = self._rate.numerator if self._rate.denominator == 1 else float(self._rate)
        features = {name: {"dtype": "float32", "shape": [len(names)], "names": names} for name in VECTORS}
        for key, (height, width) in self.cameras.items():
            features[key] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": fps,
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        for name, dtype in SCALARS.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._total,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": features,
        }


def unfinished(root: Path) -> Path:
    """What the dataset `root` is called while it is recorded, and where a recording that was killed lies."""
    return root.with_name(root.name + ".partial")


def discard_unfinished(root: Path) -> bool:
    """Removes what an interrupted recording of `root` left, for recorders that make the same again; whether it did.

    Raises OwnedError while another process records there.
    """
    partial = unfinished(Path(root))
    if not partial.is_dir():
        return False
    owner = Owner(partial)
    shutil.rmtree(partial)
    owner.release()
    return True


def _files(folder: Path) -> list[Path]:
    """What lies in a folder but for the note of its owner."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
