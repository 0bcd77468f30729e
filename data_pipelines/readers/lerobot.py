"""Readers for LeRobot datasets, v2.1 and v3.0: parquet tables by pyarrow, mp4 videos by PyAV.

Both keep meta/info.json. v2.1 has one parquet file and one mp4 per camera for every episode, listed in
meta/episodes.jsonl; v3.0 puts several episodes in a file and lists their places in meta/episodes/**.parquet.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.base import GRID_TOLERANCE, Reader, Rows
from data_pipelines.readers.video import VideoError, decode_frames

INFO = "meta/info.json"
# The second of each pair is what conversions with several groups of state numbers write.
STATE_KEYS = ("observation.state", "observation.state.default")
ACTION_KEYS = ("action", "action.default")
IMAGE_PREFIX = "observation.images."

Fields = Mapping[str, type | tuple[type, ...]]
NUMBER = (int, float)


@dataclass(frozen=True)
class _DataFile:
    """The columns of one parquet file; row i belongs to episode[i], in ascending order."""

    state: np.ndarray  # float32 [rows, p]
    action: np.ndarray  # float32 [rows, d]
    timestamp: np.ndarray  # float32 [rows] seconds from the episode's start
    frame: np.ndarray  # [rows]
    episode: np.ndarray  # [rows]
    task: np.ndarray  # [rows]


class LeRobot(Reader):
    """One LeRobot dataset; its versions differ in where the metadata, rows and frames lie."""

    _needed: Fields = {}  # positive numbers in info.json beyond those of every version
    _listing: str  # where the episodes are listed

    def __init__(self, root: Path, info: dict[str, Any]) -> None:
        path = root / INFO
        needed = {"features": dict, "fps": NUMBER, "total_episodes": int, "total_frames": int, "data_path": str}
        _require(info, needed | self._needed, path)
        for name in ("fps", *self._needed):
            if not 0 < info[name] < float("inf"):
                raise DatasetError(f"{path} says {name} = {info[name]}, expected a positive number; correct it.")
        features = info["features"]
        self.cameras = _cameras(features, path)
        if self.cameras:
            _require(info, {"video_path": str}, path)
        self._state_key, self.state_dim, self.state_names = _vector(features, STATE_KEYS, path)
        self._action_key, self.action_dim, self.action_names = _vector(features, ACTION_KEYS, path)
        self.root, self.robot, self.fps = root, str(info.get("robot_type") or ""), float(info["fps"])
        self._info = info
        self.instructions = self._read_instructions()
        self._episodes = _numbered(self._read_episodes(), "episode_index", root / self._listing)
        self._set_lengths([episode["length"] for episode in self._episodes])
        for name, found in (("total_episodes", len(self.lengths)), ("total_frames", self.lengths.sum())):
            if info[name] != found:
                raise DatasetError(
                    f"{path} says {name} = {info[name]}, {self._listing} lists {len(self.lengths)} episodes of "
                    f"{self.lengths.sum()} rows together; copy or record the dataset again."
                )

    @abstractmethod
    def _read_instructions(self) -> list[str]:
        """The instructions in the order of their task_index."""

    @abstractmethod
    def _read_episodes(self) -> list[dict[str, Any]]:
        """Episodes in any order, each with episode_index, length and what else this version needs."""

    @abstractmethod
    def _data_path(self, episode: int) -> Path:
        """The parquet file of an episode."""

    @abstractmethod
    def video(self, episode: int, key: str) -> tuple[Path, int]:
        """The mp4 file of an episode and the number of the episode's first frame in it."""

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        path, first = self.video(episode, IMAGE_PREFIX + camera)
        return path, f"from frame {first} on, {self.fps} a second"

    def _read_rows(self, episode: int) -> Rows:
        path = self._data_path(episode)
        file, length = self._data_file(path), self.lengths[episode]
        rows = slice(*np.searchsorted(file.episode, [episode, episode + 1]))
        if not np.array_equal(file.frame[rows], np.arange(length)):
            raise DatasetError(
                f"{path} holds {rows.stop - rows.start} rows of episode {episode}, {self._listing} promises {length} "
                f"rows with frame_index 0..{length - 1} in order; copy or record the dataset again."
            )
        tasks = np.unique(file.task[rows])
        if len(tasks) != 1 or not 0 <= tasks[0] < len(self.instructions):
            raise DatasetError(
                f"{path}: episode {episode} has task_index {tasks.tolist()}, expected one of the "
                f"{len(self.instructions)} tasks in {self.root}/meta; split the episode by task."
            )
        return Rows(path, file.state[rows], file.action[rows], file.timestamp[rows], int(tasks[0]))

    def _data_file(self, path: Path) -> _DataFile:
        scalars = ("timestamp", "frame_index", "episode_index", "task_index")
        with _parquet(path) as file:
            table = _read_columns(file, [self._state_key, self._action_key, *scalars], path)
        state = _matrix(table, self._state_key, self.state_dim, path)
        action = _matrix(table, self._action_key, self.action_dim, path)
        timestamp, frame, episode, task = (_numbers(table, name, path) for name in scalars)
        if (np.diff(episode) < 0).any():
            raise DatasetError(f"{path}: the rows are not sorted by episode_index; record the dataset again.")
        return _DataFile(state, action, timestamp.astype(np.float32), frame, episode, task)

    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        path, first = self.video(episode, IMAGE_PREFIX + camera)
        where = f"{path} (camera {camera!r}, episode {episode})"
        if not path.is_file():
            raise DatasetError(f"{where} does not exist; copy the dataset again.")
        try:
            decode_frames(path, first + rows, self.fps, out)
        except VideoError as error:
            raise DatasetError(
                f"{where} cannot be decoded: {error}. The file is truncated, damaged or at odds with {INFO}; copy or "
                "record it again."
            ) from error

    def _path(self, template: str, **places: Any) -> Path:
        """A file named by a template of info.json."""
        try:
            return self.root / self._info[template].format(**places)
        except (KeyError, IndexError, ValueError) as error:
            raise DatasetError(
                f"{self.root / INFO}: {template} is {self._info[template]!r}, expected a template of "
                f"{', '.join(places)}; copy the dataset again."
            ) from error


class LeRobotV21(LeRobot):
    """Every episode in files of its own."""

    _needed = {"chunks_size": int}
    _listing = "meta/episodes.jsonl"

    def _read_instructions(self) -> list[str]:
        path = self.root / "meta/tasks.jsonl"
        tasks = _numbered(_read_lines(path, {"task_index": int, "task": str}), "task_index", path)
        return [task["task"] for task in tasks]

    def _read_episodes(self) -> list[dict[str, Any]]:
        return _read_lines(self.root / self._listing, {"episode_index": int, "length": int})

    def _data_path(self, episode: int) -> Path:
        return self._path("data_path", episode_chunk=self._chunk(episode), episode_index=int(episode))

    def video(self, episode: int, key: str) -> tuple[Path, int]:
        places = {"episode_chunk": self._chunk(episode), "episode_index": int(episode), "video_key": key}
        return self._path("video_path", **places), 0

    def _chunk(self, episode: int) -> int:
        return int(episode) // self._info["chunks_size"]


class LeRobotV30(LeRobot):
    """Several episodes to a file."""

    _listing = "meta/episodes"

    def __init__(self, root: Path, info: dict[str, Any]) -> None:
        super().__init__(root, info)
        self._data_files: dict[Path, _DataFile] = {}
        for camera in self.cameras:
            self._check_apart(IMAGE_PREFIX + camera)

    def _data_file(self, path: Path) -> _DataFile:
        # Kept for good: a window of another episode in it must not read 100 MB again.
        if path not in self._data_files:
            self._data_files[path] = super()._data_file(path)
        return self._data_files[path]

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process reads its files itself."""
        return self.__dict__ | {"_data_files": {}}

    def _read_instructions(self) -> list[str]:
        path = self.root / "meta/tasks.parquet"
        with _parquet(path) as file:
            schema = file.schema_arrow
            # The instruction is the index of a pandas table, named differently by different lerobot versions.
            text = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
            if "task_index" not in schema.names or len(text) != 1:
                raise DatasetError(
                    f"{path}: expected the column task_index and one text column, found {', '.join(schema.names)}."
                )
            tasks = file.read().to_pylist()
        for task in tasks:
            _require(task, {"task_index": int, text[0]: str}, path)
        return [task[text[0]] for task in _numbered(tasks, "task_index", path)]

    def _read_episodes(self) -> list[dict[str, Any]]:
        fields = dict.fromkeys(("episode_index", "length", "data/chunk_index", "data/file_index"), int)
        for camera in self.cameras:
            prefix = f"videos/{IMAGE_PREFIX}{camera}"
            fields |= {f"{prefix}/chunk_index": int, f"{prefix}/file_index": int, f"{prefix}/from_timestamp": NUMBER}
        episodes = []
        for path in sorted((self.root / self._listing).glob("*/*.parquet")):
            with _parquet(path) as file:
                here = _read_columns(file, list(fields), path).to_pylist()
            for episode in here:
                _require(episode, fields, path)
            episodes += here
        return episodes

    def _data_path(self, episode: int) -> Path:
        return self._path("data_path", **self._place(episode, "data"))

    def video(self, episode: int, key: str) -> tuple[Path, int]:
        start = self._episodes[episode][f"videos/{key}/from_timestamp"] * self.fps
        if not abs(start - np.rint(start)) <= GRID_TOLERANCE:  # also where it is NaN
            raise DatasetError(
                f"{self.root / self._listing}: the frames of episode {episode} in {key} start at {start:.3f} frames, "
                f"off the grid of {self.fps:g} frames per second; correct fps in {INFO} or record the dataset again."
            )
        return self._path("video_path", video_key=key, **self._place(episode, f"videos/{key}")), round(start)

    def _check_apart(self, key: str) -> None:
        """Refuses episodes that claim the same frames of a file."""
        columns = (f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp"))
        chunk, file, seconds = np.array([[episode[name] for episode in self._episodes] for name in columns])
        order = np.lexsort((seconds, file, chunk))
        before, after = order[:-1], order[1:]
        together = (chunk[before] == chunk[after]) & (file[before] == file[after])
        distance = (seconds[after] - seconds[before]) * self.fps
        overlap = np.flatnonzero(together & (distance < self.lengths[before] - 0.5))
        if len(overlap):
            first, second = before[overlap[0]], after[overlap[0]]
            raise DatasetError(
                f"{self.root / self._listing}: the episodes {first} and {second} claim the same frames of {key} at "
                f"{self.fps:g} frames per second; correct fps in {INFO} or copy the dataset again."
            )

    def _place(self, episode: int, prefix: str) -> dict[str, int]:
        return {name: self._episodes[episode][f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}


VERSIONS = {"v2.1": LeRobotV21, "v3.0": LeRobotV30}


def open_lerobot(root: str | Path) -> LeRobot:
    """The dataset in the folder `root`, by the version its meta/info.json names."""
    root = Path(root)
    path = root / INFO
    if not path.is_file():
        raise DatasetError(f"{root} is not a LeRobot dataset: {path} does not exist.")
    info = _parse(path.read_bytes(), path)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise DatasetError(
            f"{path} says codebase_version {version!r}, expected {' or '.join(VERSIONS)}; convert the dataset with "
            "lerobot's own converter."
        )
    return VERSIONS[version](root, info)


# ---------------------------------------------------------------- features
def _vector(features: dict, keys: Sequence[str], path: Path) -> tuple[str, int, tuple[str, ...]]:
    """Which of `keys` the dataset has, its width, and the names of its numbers, () where there are none."""
    found = [key for key in keys if key in features]
    if len(found) != 1:
        raise DatasetError(
            f"{path}: expected exactly one of the features {' and '.join(keys)}, found {', '.join(features)}."
        )
    _require(features[found[0]], {"shape": list}, path)
    _require(features[found[0]], {"shape": list}, path)
    shape, names = features[found[0]]["shape"], features[found[0]].get("names")
    if len(shape) != 1 or not isinstance(shape[0], int) or shape[0] < 1:
        raise DatasetError(f"{path}: the feature {found[0]} has shape {shape}, expected one axis of numbers.")
    return found[0], shape[0], _names(names, shape[0])


def _names(names: Any, width: int) -> tuple[str, ...]:
    """Names of a vector's numbers; () where info.json names none, or the axis as a whole."""
    # Older versions wrap the list: {"motors": [...]} or [[...]].
    if isinstance(names, dict) and len(names) == 1:
        names = list(names.values())
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    whole = isinstance(names, list) and len(names) == width and all(isinstance(name, str) for name in names)
    return tuple(names) if whole else ()


def _cameras(features: dict, path: Path) -> dict[str, tuple[int, int]]:
    cameras = {}
    for key, feature in features.items():
        if not key.startswith(IMAGE_PREFIX):
            continue
        _require(feature, {"dtype": str, "shape": list}, path)
        names, shape = feature.get("names"), feature["shape"]
        sized = isinstance(names, list) and len(names) == len(shape) and {"height", "width"} <= {*map(str, names)}
        if feature["dtype"] != "video" or not sized or not all(isinstance(n, int) and n > 0 for n in shape):
            raise DatasetError(
                f"{path}: {key} must have dtype 'video' and a shape whose axes are named, among them height and "
                f"width, found dtype {feature['dtype']!r}, shape {shape} and names {names}."
            )
        cameras[key.removeprefix(IMAGE_PREFIX)] = shape[names.index("height")], shape[names.index("width")]
    return cameras


# ---------------------------------------------------------------- files
def _parse(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); copy the dataset again.") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{path} holds {str(value)[:40]!r}, expected a JSON object; copy the dataset again.")
    return value


def _read_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """A JSON object per line, each with `fields`."""
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; copy the dataset again.")
    records = [_parse(line, path) for line in path.read_bytes().splitlines() if line.strip()]
    for record in records:
        _require(record, fields, path)
    return records


def _require(record: Any, fields: Fields, path: Path) -> None:
    record = record if isinstance(record, dict) else {}
    bad = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
    if bad:
        found = ", ".join(f"{name} = {record[name]!r}" if name in record else f"no {name}" for name in bad)
        raise DatasetError(f"{path} lacks {', '.join(bad)} or holds the wrong kind ({found}); copy the dataset again.")


def _numbered(records: list[dict[str, Any]], key: str, path: Path) -> list[dict[str, Any]]:
    """The records in the order of `key`, which must count from 0."""
    records = sorted(records, key=lambda record: record[key])
    found = [record[key] for record in records]
    if found != list(range(len(found))):
        raise DatasetError(f"{path}: {key} must count from 0 without gaps or repeats; copy the dataset again.")
    return records


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The open file; complaints of the parquet library become a DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; copy the dataset again.")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as parquet ({error}); copy the dataset again.") from error


def _read_columns(file: pq.ParquetFile, columns: list[str], path: Path) -> pa.Table:
    names = file.schema_arrow.names
    missing = [name for name in columns if name not in names]
    if missing:
        raise DatasetError(f"{path} lacks the column {', '.join(missing)}; it has: {', '.join(names)}.")
    return file.read(columns)


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    kind = table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or table[name].null_count:
        raise DatasetError(f"{path}: every row of {name} must hold a number, as in {INFO}; copy the dataset again.")
    return table[name].to_numpy()


def _matrix(table: pa.Table, name: str, width: int, path: Path) -> np.ndarray:
    """A column of fixed or variable lists as float32 [rows, width]; of plain numbers where the width is 1."""
    if width == 1 and not pa.types.is_nested(table.schema.field(name).type):
        return _numbers(table, name, path).astype(np.float32)[:, None]
    values = table[name].combine_chunks()
    ragged = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if ragged or pa.types.is_fixed_size_list(values.type):
        flat = values.flatten()
        kind = flat.type
        if (
            (pa.types.is_integer(kind) or pa.types.is_floating(kind))
            and not values.null_count + flat.null_count
            and len(flat) == len(table) * width
            and not (ragged and (values.value_lengths().to_numpy() != width).any())
        ):
            return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), width)
    raise DatasetError(f"{path}: every row of {name} must hold {width} numbers, as {INFO} says.")
