"""Writes LeRobot datasets, version 3.0: parquet tables, several episodes per mp4 file, and their metadata.

- meta/info.json, meta/stats.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet
- data/chunk-000/file-000.parquet
- videos/{camera key}/chunk-000/file-000.mp4
"""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.paths import local_path

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_FILES_PER_CHUNK = 1000
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Every second frame is a key frame, so that reading one at random decodes two at most. No B frames: frames are
# then stored in the order they are shown, and files join without gaps.
_H264 = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast", "threads": "1"}
_VECTORS = ("observation.state", "action")
_SCALARS = {
    "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64",
}  # fmt: skip


@dataclass(frozen=True)
class EncodedVideo:
    """One camera of one episode.

    mp4: a whole h264 file. frames: how many. size: (height, width). histogram: int64 [3, 256], how often each
    value occurs in each colour, from which the statistics follow exactly.
    """

    mp4: bytes
    frames: int
    size: tuple[int, int]
    histogram: np.ndarray


def encode_video(images: np.ndarray, fps: int | Fraction) -> EncodedVideo:
    """Encode `images` uint8 [frames, height, width, 3] RGB; height and width must be even."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"The images have shape {images.shape} and dtype {images.dtype}: "
            "expected uint8 [frames, height, width, 3]."
        )
    frames, height, width, _ = images.shape
    if height % 2 or width % 2:
        raise ValueError(f"The images are {height}x{width}: h264 needs an even height and width; resize them.")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_H264)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    histogram = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    return EncodedVideo(buffer.getvalue(), frames, (height, width), histogram)


@dataclass
class LeRobotWriter:
    """Writes one dataset, episode by episode, and names it `root` only once it is whole.

    root: a folder that must not exist yet. fps: frames per second. state_names: what the numbers of a state are,
    in order; an action has the same. cameras: {key: (height, width)}, keys like "observation.images.cam_high".
    robot_type: as in info.json. episodes_per_file: how many episodes share a parquet file and an mp4 file.
    Used as a context manager it closes itself, unless an exception left the dataset incomplete.
    """

    root: Path
    fps: int
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
    _videos: dict[str, "VideoFile"] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.root = local_path(self.root)
        if self.root.exists():
            raise FileExistsError(f"{self.root} exists already: expected a new folder; remove it or name another.")
        self._partial = self.root.with_name(self.root.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # what an interrupted run left
        (self._partial / "meta").mkdir(parents=True)
        self._columns = {name: [] for name in (*_VECTORS, *_SCALARS)}
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in self.cameras}

    def add_episode(
        self,
        states: np.ndarray,
        actions: np.ndarray,
        images: Mapping[str, np.ndarray | EncodedVideo],
        instruction: str,
    ) -> None:
        """Append one episode of T frames.

        states, actions: float32 [T, len(state_names)]. images: for each camera uint8 [T, height, width, 3] RGB,
        or what `encode_video` made of it elsewhere. instruction: the task in words.
        """
        length = len(states)
        for name, rows in zip(_VECTORS, (states, actions), strict=True):
            if rows.shape != (length, len(self.state_names)) or rows.dtype != np.float32 or not length:
                raise ValueError(
                    f"{name} has shape {rows.shape} and dtype {rows.dtype}: expected float32 "
                    f"[{length or 'at least 1'}, {len(self.state_names)}]."
                )
        if set(images) != set(self.cameras):
            raise ValueError(f"The images are of {sorted(images)}: expected exactly {sorted(self.cameras)}.")
        videos = {}
        for key, size in self.cameras.items():
            video = images[key]
            videos[key] = video if isinstance(video, EncodedVideo) else encode_video(video, self.fps)
            if (videos[key].frames, videos[key].size) != (length, tuple(size)):
                raise ValueError(
                    f"{key} has {videos[key].frames} frames of {videos[key].size}: expected {length} of {size}."
                )

        number = len(self._episodes)
        if number % self.episodes_per_file == 0:
            self._next_file(number // self.episodes_per_file)
        frame_index = np.arange(length)
        columns = {
            "observation.state": states,
            "action": actions,
            "timestamp": (frame_index / self.fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(length, number),
            "index": self._total + frame_index,
            "task_index": np.full(length, self._tasks.setdefault(instruction, len(self._tasks))),
        }
        self._table.write_table(_data_table(columns))
        self._episodes.append(self._describe(columns, videos, instruction))
        for name, values in columns.items():
            self._columns[name].append(values)
        for key, video in videos.items():
            self._videos[key].append(video)
            self._histograms[key] += video.histogram
        self._total += length

    def close(self) -> None:
        """Write the metadata and give the dataset its name."""
        if not self._episodes:
            raise ValueError(f"{self.root} has no episode: expected at least one; call add_episode first.")
        self._close_files()
        stats = {name: _vector_stats(np.concatenate(values)) for name, values in self._columns.items()}
        stats |= {key: _image_stats(h, self._total) for key, h in self._histograms.items()}
        meta = self._partial / "meta"
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        pq.write_table(_task_table(list(self._tasks)), meta / "tasks.parquet")
        episodes = self._partial / _EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        self._partial.rename(self.root)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()

    def _next_file(self, file: int) -> None:
        self._close_files()
        self._place = {"chunk_index": file // _FILES_PER_CHUNK, "file_index": file % _FILES_PER_CHUNK}
        path = self._partial / _DATA_PATH.format(**self._place)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._table = pq.ParquetWriter(path, _data_schema(len(self.state_names)))
        for key in self.cameras:
            path = self._partial / _VIDEO_PATH.format(video_key=key, **self._place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._videos[key] = VideoFile(path, self.fps)

    def _close_files(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
        for video in self._videos.values():
            video.close()
        self._videos = {}

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
            row[f"videos/{key}/from_timestamp"] = start / self.fps
            row[f"videos/{key}/to_timestamp"] = (start + length) / self.fps
        stats = {name: _vector_stats(columns[name]) for name in _VECTORS}
        stats |= {key: _image_stats(videos[key].histogram, length) for key in self.cameras}
        stats |= {name: _vector_stats(columns[name]) for name in _SCALARS}
        row |= {f"stats/{name}/{what}": value for name, of in stats.items() for what, value in of.items()}
        return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

    def _info(self) -> dict:
        names = list(self.state_names)
        features = {name: {"dtype": "float32", "shape": [len(names)], "names": names} for name in _VECTORS}
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
                    "video.fps": self.fps,
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        for name, dtype in _SCALARS.items():
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
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": features,
        }


class VideoFile:
    """An mp4 file to which encoded episodes are appended without encoding them again."""

    def __init__(self, path: Path, fps: int | Fraction) -> None:
        self._container = av.open(str(path), "w")
        self._stream = None
        self._fps = fps
        self.frames = 0

    def append(self, video: EncodedVideo) -> None:
        with av.open(io.BytesIO(video.mp4)) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size == 0:  # the end
                    continue
                start = int(Fraction(self.frames, self._fps) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + start, packet.dts + start, self._stream
                self._container.mux(packet)
        self.frames += video.frames

    def close(self) -> None:
        self._container.close()


def _data_schema(width: int) -> pa.Schema:
    """The columns of the data files, with the note by which the `datasets` package knows them again."""
    vector = {"feature": {"dtype": "float32", "_type": "Value"}, "length": width, "_type": "List"}
    features = {name: vector for name in _VECTORS}
    features |= {name: {"dtype": dtype, "_type": "Value"} for name, dtype in _SCALARS.items()}
    fields = [(name, pa.list_(pa.float32(), width)) for name in _VECTORS]
    fields += [(name, pa.float32() if dtype == "float32" else pa.int64()) for name, dtype in _SCALARS.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _data_table(columns: dict[str, np.ndarray]) -> pa.Table:
    width = columns["action"].shape[1]
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width) if name in _VECTORS else pa.array(values)
        for name, values in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=_data_schema(width))


def _task_table(tasks: list[str]) -> pa.Table:
    """Task numbers, with the instructions as what pandas calls the index."""
    index = "__index_level_0__"
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
    ]
    label = {
        "name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object",
        "metadata": {"encoding": "UTF-8"},
    }  # fmt: skip
    pandas = {
        "index_columns": [index],
        "column_indexes": [label],
        "columns": [column | {"metadata": None} for column in columns],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), (index, pa.large_string())], metadata={"pandas": json.dumps(pandas)}
    )
    return pa.table({"task_index": list(range(len(tasks))), index: tasks}, schema=schema)


def _vector_stats(rows: np.ndarray) -> dict[str, list]:
    """Statistics over the first axis; a scalar column counts as a vector of one."""
    rows = rows.reshape(len(rows), -1)
    exact = rows.astype(np.float64)
    stats = {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        "count": np.array([len(rows)]),
    }
    stats |= dict(zip(_QUANTILES, np.quantile(exact, list(_QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in stats.items()}


def _image_stats(histogram: np.ndarray, frames: int) -> dict[str, list]:
    """Statistics of pixel values 0..1 per colour, each shaped [3, 1, 1]."""
    levels = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ levels
    stats = {
        "min": levels[(histogram > 0).argmax(axis=1)],
        "max": levels[255 - (histogram[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    below = share.cumsum(axis=1)
    stats |= {name: levels[(below >= q - 1e-12).argmax(axis=1)] for name, q in _QUANTILES.items()}
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()}
    return {**{n: shaped[n] for n in ("min", "max", "mean", "std")}, "count": [frames]} | {
        name: shaped[name] for name in _QUANTILES
    }
