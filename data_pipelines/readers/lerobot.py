"""Readers for LeRobot datasets, v2.1 and v3.0: parquet tables by pyarrow, mp4 videos by PyAV.

Both keep meta/info.json. v2.1 has one parquet file and one mp4 per camera for every episode, listed in
meta/episodes.jsonl; v3.0 puts several episodes in a file and lists their places in meta/episodes/**.parquet.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.episodes import DatasetError
from data_pipelines.files import absent, disguised, read_json
from data_pipelines.readers.base import GRID_TOLERANCE, Reader, Rows
from data_pipelines.readers.lerobot_files import (
    AGAIN,
    IMAGE_PREFIX,
    INFO,
    NUMBER,
    Fields,
    cameras,
    matrix,
    numbered,
    numbers,
    parquet,
    read_columns,
    read_lines,
    read_tasks,
    require,
    vector,
)
from data_pipelines.readers.video import VideoError, decode_frames

# The second of each pair is what conversions with several groups of state numbers write.
STATE_KEYS = ("observation.state", "observation.state.default")
ACTION_KEYS = ("action", "action.default")
SAME_RATE = 1e-3  # relative; rates that differ by less are one


@dataclass(frozen=True)
class _DataFile:
    """The columns of one parquet file; row i belongs to episode[i], in ascending order."""

    state: np.ndarray  # float32 [rows, p]
    action: np.ndarray  # float32 [rows, d]
    timestamp: np.ndarray  # [rows] seconds
    frame: np.ndarray  # [rows]
    episode: np.ndarray  # [rows]
    task: np.ndarray  # [rows]


class LeRobot(Reader):
    """One LeRobot dataset; its versions differ in where the metadata, rows and frames lie."""

    _needed: Fields = {}  # positive numbers in info.json beyond those of every version
    _listing: str  # where the episodes are listed
    _tasks_file: str
    _told = INFO  # what says how a video is to be read

    def __init__(self, root: Path, info: dict[str, Any]) -> None:
        path = root / INFO
        require(info, {"features": dict, "fps": NUMBER, "data_path": str, **self._needed}, path)
        for name in ("fps", *self._needed):
            if not 0 < info[name] < float("inf"):
                raise DatasetError(f"{path} says {name} = {info[name]}, expected a positive number; correct it.")
        features = info["features"]
        self.cameras, self.unusable = cameras(features, path)
        if self.cameras:
            require(info, {"video_path": str}, path)
        self._state_key, self.state_dim, self.state_names = vector(features, STATE_KEYS, path)
        self._action_key, self.action_dim, self.action_names = vector(features, ACTION_KEYS, path)
        self.root, self.robot, self.fps = root, str(info.get("robot_type") or ""), float(info["fps"])
        self._info = info
        self._set_instructions()
        self._episodes = numbered(self._read_episodes(), "episode_index", root / self._listing)
        self._set_lengths([episode["length"] for episode in self._episodes])
        for name, found in (("total_episodes", len(self.lengths)), ("total_frames", self.lengths.sum())):
            if info.get(name, found) != found:
                raise DatasetError(
                    f"{path} says {name} = {info[name]}, {self._listing} lists {len(self.lengths)} episodes of "
                    f"{self.lengths.sum()} rows together; copy or record the dataset again."
                )

    def _set_instructions(self) -> None:
        """Those of tasks that say something; a task that does not is a fault of the episodes that have it."""
        path = self.root / self._tasks_file
        self._texts: dict[int, Any] = {}
        for task in self._read_tasks(path):
            number, text = task["task_index"], task.get("task")
            if self._texts.setdefault(number, text) != text:
                raise DatasetError(f"{path}: task_index {number} is {self._texts[number]!r} and {text!r}; {AGAIN}.")
        usable = sorted(number for number, text in self._texts.items() if isinstance(text, str) and text.strip())
        self.instructions = [self._texts[number] for number in usable]
        self._places = {number: place for place, number in enumerate(usable)}

    @abstractmethod
    def _read_tasks(self, path: Path) -> list[dict[str, Any]]:
        """Tasks in any order, each with a task_index and perhaps its text as "task"."""

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
        tasks = np.unique(file.task[rows]).tolist()
        where = f"{path}: episode {episode} has task_index {tasks}"
        if len(tasks) != 1:
            raise DatasetError(f"{where}, expected one of the tasks in {self._tasks_file}; split the episode by task.")
        if tasks[0] not in self._texts:
            raise DatasetError(
                f"{where}, expected one of the {len(self._texts)} tasks in {self.root / self._tasks_file}; {AGAIN}."
            )
        if tasks[0] not in self._places:
            raise DatasetError(
                f"{where}, whose instruction in {self.root / self._tasks_file} is {self._texts[tasks[0]]!r}, expected "
                "words; write there what the robot was told."
            )
        return Rows(path, file.state[rows], file.action[rows], file.timestamp[rows], self._places[tasks[0]])

    def _data_file(self, path: Path) -> _DataFile:
        scalars = ("timestamp", "frame_index", "episode_index", "task_index")
        with parquet(path) as file:
            table = read_columns(file, [self._state_key, self._action_key, *scalars], path)
        state = matrix(table, self._state_key, self.state_dim, path)
        action = matrix(table, self._action_key, self.action_dim, path)
        timestamp, frame, episode, task = (numbers(table, name, path) for name in scalars)
        if (np.diff(episode) < 0).any():
            raise DatasetError(f"{path}: the rows are not sorted by episode_index; record the dataset again.")
        return _DataFile(state, action, timestamp, frame, episode, task)

    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        path, first = self.video(episode, IMAGE_PREFIX + camera)
        where = f"{path} (camera {camera!r}, episode {episode})"
        if not path.is_file():
            raise DatasetError(f"{where} {absent(path)}; {AGAIN}.")
        try:
            decode_frames(path, first + rows, self.fps, out)
        except VideoError as error:
            found = disguised(path, own=b"ftyp") or (
                f"cannot be decoded: {error}. The file is truncated, damaged or at odds with {self._told}; copy or "
                "record it again"
            )
            raise DatasetError(f"{where} {found}.") from error

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
    _listing, _tasks_file = "meta/episodes.jsonl", "meta/tasks.jsonl"

    def _read_tasks(self, path: Path) -> list[dict[str, Any]]:
        return read_lines(path, {"task_index": int})

    def _read_episodes(self) -> list[dict[str, Any]]:
        return read_lines(self.root / self._listing, {"episode_index": int, "length": int})

    def _data_path(self, episode: int) -> Path:
        return self._path("data_path", episode_chunk=self._chunk(episode), episode_index=int(episode))

    def video(self, episode: int, key: str) -> tuple[Path, int]:
        places = {"episode_chunk": self._chunk(episode), "episode_index": int(episode), "video_key": key}
        return self._path("video_path", **places), 0

    def column(self, episode: int, name: str) -> np.ndarray | None:
        """Another feature of an episode's rows, float32 [T, k]; None where info.json or the file has it not."""
        feature, path = self._info["features"].get(name), self._data_path(episode)
        if not isinstance(feature, dict):
            return None
        with parquet(path) as file:
            if name not in file.schema_arrow.names:
                return None
            table = read_columns(file, [name], path)
        width = feature.get("shape")
        return matrix(table, name, width[0], path) if isinstance(width, list) and len(width) == 1 else None

    def _chunk(self, episode: int) -> int:
        return int(episode) // self._info["chunks_size"]


class LeRobotV30(LeRobot):
    """Several episodes to a file."""

    _listing, _tasks_file = "meta/episodes", "meta/tasks.parquet"
    _told = f"{INFO}, or with the from_timestamp of the episode in {_listing}"

    def __init__(self, root: Path, info: dict[str, Any]) -> None:
        super().__init__(root, info)
        self._data_files: dict[Path, _DataFile] = {}
        self._apart: set[str] = set()  # cameras whose episodes are known to have frames of their own

    def _data_file(self, path: Path) -> _DataFile:
        # Kept for good: a window of another episode in it must not read 100 MB again.
        if path not in self._data_files:
            self._data_files[path] = super()._data_file(path)
        return self._data_files[path]

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process reads its files itself."""
        return self.__dict__ | {"_data_files": {}}

    def _read_tasks(self, path: Path) -> list[dict[str, Any]]:
        tasks = read_tasks(path)
        for task in tasks:
            require(task, {"task_index": int}, path)
        return tasks

    def _read_episodes(self) -> list[dict[str, Any]]:
        fields: Fields = dict.fromkeys(("episode_index", "length", "data/chunk_index", "data/file_index"), int)
        of_cameras = [name for camera in self.cameras for name in _video_fields(IMAGE_PREFIX + camera)]
        episodes = []
        for path in sorted((self.root / self._listing).glob("chunk-*/file-*.parquet")):
            with parquet(path) as file:
                there = [name for name in of_cameras if name in file.schema_arrow.names]  # the rest may not be needed
                here = read_columns(file, [*fields, *there], path).to_pylist()
            for episode in here:
                require(episode, fields, path)
            episodes += here
        return episodes

    def _data_path(self, episode: int) -> Path:
        return self._path("data_path", **self._place(episode, "data"))

    def video(self, episode: int, key: str) -> tuple[Path, int]:
        if key not in self._apart:
            self._check_places(key)
            self._apart.add(key)
        seconds = self._episodes[episode][f"videos/{key}/from_timestamp"]
        start = seconds * self.fps
        if not abs(start - np.rint(start)) <= GRID_TOLERANCE:  # also where it is NaN
            raise DatasetError(
                f"{self.root / self._listing}: the frames of episode {episode} in {key} start at {start:.3f} frames "
                f"(from_timestamp {seconds:.6f} s at {self.fps:g} frames per second), expected a whole number; "
                f"{self._way_out(key)}."
            )
        return self._path("video_path", video_key=key, **self._place(episode, f"videos/{key}")), round(start)

    def _check_places(self, key: str) -> None:
        """Refuses a camera whose place is not told, and episodes that claim the same frames of a file."""
        for number, episode in enumerate(self._episodes):
            require(episode, _video_fields(key), f"{self.root / self._listing}: episode {number}")
        (before, after), seconds = self._neighbours(key)
        ends = seconds[before] + self.lengths[before] / self.fps
        overlap = np.flatnonzero(seconds[after] < ends - 0.5 / self.fps)
        if len(overlap):
            first, second = before[overlap[0]], after[overlap[0]]
            raise DatasetError(
                f"{self.root / self._listing}: the episodes {first} and {second} claim the same frames of {key}: "
                f"{second} starts at {seconds[second]:.6f} s (from_timestamp), {first} ends at {ends[overlap[0]]:.6f} "
                f"s at {self.fps:g} frames per second; {self._way_out(key)}."
            )

    def gaps(self, key: str) -> list[tuple[int, int]]:
        """Episodes whose frames start behind the end of what comes before them in the file: (episode, frames between).

        Nothing is wrong if those frames are of episodes that were taken out.
        """
        (before, after), seconds = self._neighbours(key)
        ends = np.zeros(len(self.lengths))
        ends[after] = seconds[before] + self.lengths[before] / self.fps
        between = np.rint((seconds - ends) * self.fps).astype(int)
        return [(int(episode), int(between[episode])) for episode in np.flatnonzero(between > 0)]

    def _neighbours(self, key: str) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Episodes that follow each other in a file, (before, after), and where each episode starts, in seconds."""
        names = (f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp"))
        chunk, file, seconds = np.array([[episode[name] for episode in self._episodes] for name in names])
        order = np.lexsort((seconds, file, chunk))
        before, after = order[:-1], order[1:]
        together = (chunk[before] == chunk[after]) & (file[before] == file[after])
        return (before[together], after[together]), seconds

    def _way_out(self, key: str) -> str:
        """Of starts that are at odds with fps: it is to blame where all of them fit another one."""
        (before, after), seconds = self._neighbours(key)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = self.lengths[before] / (seconds[after] - seconds[before])
        steady = len(rates) > 1 and np.ptp(rates) <= SAME_RATE * rates[0]
        if steady and abs(rates[0] / self.fps - 1) > SAME_RATE:
            return f"all episodes lie there as at {rates[0]:.5g} frames per second: correct fps in {INFO}"
        return f"correct this from_timestamp, or {AGAIN}"

    def _place(self, episode: int, prefix: str) -> dict[str, int]:
        return {name: self._episodes[episode][f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}


def _video_fields(key: str) -> Fields:
    """Where an episode's frames of a camera lie, v3.0."""
    fields: Fields = {f"videos/{key}/chunk_index": int, f"videos/{key}/file_index": int}
    return {**fields, f"videos/{key}/from_timestamp": NUMBER}


# By the first number of codebase_version: versions of one have the files that are read here in the same places.
VERSIONS = {"2": LeRobotV21, "3": LeRobotV30}


def open_lerobot(root: str | Path) -> LeRobot:
    """The dataset in the folder `root`, by the version its meta/info.json names."""
    root = Path(root)
    path = root / INFO
    if not path.is_file():
        raise DatasetError(f"{root} is not a LeRobot dataset: {path} {absent(path)}.")
    info = read_json(path, DatasetError, AGAIN)
    version = info.get("codebase_version")
    kind = re.fullmatch(r"v?(\d+)\.\d+(\.\d+)?", str(version))
    if not kind or kind[1] not in VERSIONS:
        raise DatasetError(
            f"{path} says codebase_version {version!r}, expected v2.1 or v3.0 or a neighbour of them; convert the "
            "dataset with lerobot's own converter."
        )
    return VERSIONS[kind[1]](root, info)
