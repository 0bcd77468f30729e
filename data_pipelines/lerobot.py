"""Reader for LeRobot v3.0 datasets: parquet tables by pyarrow, mp4 videos by PyAV.

Episodes and frames are addressed by integer index, never by wall time: many recordings carry a wrong
fps, and only the order of the rows is sure. Layout: `meta/info.json`, `meta/tasks.parquet`,
`meta/episodes/**.parquet`, and several episodes per file in `data/` and `videos/{key}/`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "v3.0"
STATE, ACTION = "observation.state", "action"
IMAGE_PREFIX = "observation.images."
# A new seek costs about as much as decoding this many frames forward.
SEEK_GAP = 16
# A frame's time stamp may be off its place on the fps grid by at most this part of a frame.
PTS_TOLERANCE = 0.1


class DatasetError(ValueError):
    """A dataset on disk is not what its metadata promises. The message names the file and the way out."""


@dataclass(frozen=True)
class _DataFile:
    """The checked columns of one parquet file; row i belongs to episode[i]."""

    path: Path
    state: np.ndarray  # float32 [rows, p]
    action: np.ndarray  # float32 [rows, d]
    timestamp: np.ndarray  # float32 [rows] seconds from the episode's start
    frame: np.ndarray  # int64 [rows]
    episode: np.ndarray  # int64 [rows]
    task: np.ndarray  # int64 [rows]


class LeRobotDataset:
    """One LeRobot v3.0 dataset on disk.

    root: folder of the dataset.  fps: frames per second as labelled.
    cameras: short name ("cam_high") -> (height, width) in pixels.
    lengths: int64 [E] rows per episode.  starts: int64 [E] dataset row of each episode's first row.
    state_dim, action_dim: widths p and d.  instructions: the distinct instructions, by task index.
    Raises DatasetError where the files do not hold what the metadata says.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        info = self._read_info()
        features = info["features"]
        self.fps = float(info["fps"])
        self._info = info
        self.state_dim = self._width(features, STATE)
        self.action_dim = self._width(features, ACTION)
        self.cameras = self._cameras(features)
        self.instructions = self._read_instructions()
        self._episodes = self._read_episodes(info["total_episodes"])
        self.lengths = np.array([episode["length"] for episode in self._episodes], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        if self.lengths.sum() != info["total_frames"]:
            raise DatasetError(
                f"{self.root}/meta/info.json says total_frames = {info['total_frames']}, but the episodes in "
                f"meta/episodes add up to {self.lengths.sum()} rows; copy or record the dataset again."
            )
        self._files: dict[Path, _DataFile] = {}

    def states(self, episode: int) -> np.ndarray:
        """Robot state, float32 [T, p], in the units of the recording."""
        file, rows = self._rows(episode)
        return file.state[rows]

    def actions(self, episode: int) -> np.ndarray:
        """Commanded action, float32 [T, d], in the units of the recording."""
        file, rows = self._rows(episode)
        return file.action[rows]

    def timestamps(self, episode: int) -> np.ndarray:
        """Seconds since the episode's start as labelled, float32 [T]."""
        file, rows = self._rows(episode)
        return file.timestamp[rows]

    def instruction_index(self, episode: int) -> int:
        """Place of the episode's instruction in `instructions`."""
        file, rows = self._rows(episode)
        tasks = np.unique(file.task[rows])
        if len(tasks) != 1 or not 0 <= tasks[0] < len(self.instructions):
            raise DatasetError(
                f"{file.path}: episode {episode} has task_index {tasks.tolist()}, expected one value below "
                f"{len(self.instructions)} (the rows of meta/tasks.parquet); split the episode by task."
            )
        return int(tasks[0])

    def instruction(self, episode: int) -> str:
        """The sentence that told the robot what to do."""
        return self.instructions[self.instruction_index(episode)]

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decoded RGB frames uint8 [n, h, w, 3] of the episode's rows `indices` (any order, repeats allowed).

        Opens its own container, so calls from several threads do not meet.
        """
        path, first = self._video(episode, camera)
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < self.lengths[episode]):
            raise IndexError(
                f"frames of episode {episode}: indices {wanted.min()}..{wanted.max()} asked for, the episode "
                f"has rows 0..{self.lengths[episode] - 1}."
            )
        unique, inverse = np.unique(wanted, return_inverse=True)
        height, width = self.cameras[camera]
        out = np.empty((len(unique), height, width, 3), np.uint8)
        where = f"camera {camera!r}, episode {episode}"
        try:
            with av.open(str(path)) as container:
                stream = next(iter(container.streams.video), None)
                if stream is None or stream.codec_context is None:
                    raise _BadVideo("it holds no video stream of a known codec")
                # Windows are decoded side by side already; a decoder's own threads would only compete.
                stream.codec_context.thread_count = 1
                for run in np.split(np.arange(len(unique)), np.flatnonzero(np.diff(unique) > SEEK_GAP) + 1):
                    if len(run):
                        _decode(container, stream, first + unique[run], self.fps, out[run[0] : run[-1] + 1])
        except (av.error.FFmpegError, _BadVideo) as error:
            raise DatasetError(
                f"{path} ({where}) cannot be decoded: {error}. The file is truncated, damaged or at "
                "odds with meta/info.json; copy or record it again."
            ) from error
        return out if np.array_equal(unique, wanted) else out[inverse]

    def require_cameras(self, names: Sequence[str]) -> None:
        """Refuses with a sentence if a camera is missing."""
        missing = [name for name in names if name not in self.cameras]
        if missing:
            raise DatasetError(
                f"{self.root} has no camera {', '.join(missing)}; it has: "
                f"{', '.join(self.cameras) or 'none'}. "
                f"Rename the feature in meta/info.json ({IMAGE_PREFIX}<name>) or choose another dataset."
            )

    # ------------------------------------------------------------------ metadata
    def _read_info(self) -> dict:
        path = self.root / "meta" / "info.json"
        if not path.is_file():
            raise DatasetError(f"{self.root} is not a LeRobot dataset: {path} does not exist.")
        try:
            info = json.loads(path.read_text())
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON ({error}); copy the dataset again.") from error
        version = info.get("codebase_version")
        if version != VERSION:
            raise DatasetError(
                f"{path} says codebase_version {version!r}, this reader takes {VERSION}; convert the dataset "
                "with lerobot's own converter."
            )
        needed = ("features", "fps", "total_episodes", "total_frames", "data_path", "video_path")
        missing = [key for key in needed if key not in info]
        if missing:
            raise DatasetError(f"{path} lacks {', '.join(missing)}; copy the dataset again.")
        return info

    def _width(self, features: dict, key: str) -> int:
        if key not in features or len(features[key]["shape"]) != 1:
            raise DatasetError(
                f"{self.root}/meta/info.json: expected a feature {key!r} with one axis, the features are "
                f"{', '.join(features)}."
            )
        return int(features[key]["shape"][0])

    def _cameras(self, features: dict) -> dict[str, tuple[int, int]]:
        cameras = {}
        for key, feature in features.items():
            if not key.startswith(IMAGE_PREFIX):
                continue
            names = feature.get("names") or []
            if feature["dtype"] != "video" or "height" not in names or "width" not in names:
                raise DatasetError(
                    f"{self.root}/meta/info.json: {key} must have dtype 'video' and axis names height and "
                    f"width, found dtype {feature['dtype']!r} and names {names}."
                )
            size = feature["shape"][names.index("height")], feature["shape"][names.index("width")]
            cameras[key.removeprefix(IMAGE_PREFIX)] = size
        return cameras

    def _read_instructions(self) -> list[str]:
        path = self.root / "meta" / "tasks.parquet"
        table = _read_table(path)
        # The instruction is the index of a pandas table, named differently by different lerobot versions.
        text = [field.name for field in table.schema if field.type in (pa.string(), pa.large_string())]
        if "task_index" not in table.column_names or len(text) != 1:
            raise DatasetError(
                f"{path}: expected the column task_index and one text column, found {', '.join(table.column_names)}."
            )
        pairs = sorted(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True))
        if [index for index, _ in pairs] != list(range(len(pairs))):
            raise DatasetError(f"{path}: task_index must count from 0 without gaps.")
        return [sentence for _, sentence in pairs]

    def _read_episodes(self, total: int) -> list[dict]:
        folder = self.root / "meta" / "episodes"
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for camera in self.cameras:
            prefix = f"videos/{IMAGE_PREFIX}{camera}"
            columns += [f"{prefix}/chunk_index", f"{prefix}/file_index", f"{prefix}/from_timestamp"]
        episodes = []
        for path in sorted(folder.glob("*/*.parquet")):
            episodes += _read_table(path, columns).to_pylist()
        episodes.sort(key=lambda episode: episode["episode_index"])
        found = [episode["episode_index"] for episode in episodes]
        if found != list(range(total)):
            raise DatasetError(
                f"{folder} lists {len(found)} episodes, {self.root}/meta/info.json promises episodes "
                f"0..{total - 1}; copy the dataset again."
            )
        return episodes

    # ------------------------------------------------------------------ rows and videos
    def _path(self, template: str, chunk: int, file: int, key: str = "") -> Path:
        return self.root / template.format(chunk_index=chunk, file_index=file, video_key=key)

    def _rows(self, episode: int) -> tuple[_DataFile, slice]:
        meta = self._episodes[episode]
        path = self._path(self._info["data_path"], meta["data/chunk_index"], meta["data/file_index"])
        if path not in self._files:
            self._files[path] = self._read_data(path)
        file = self._files[path]
        begin, end = np.searchsorted(file.episode, [episode, episode + 1])
        length = meta["length"]
        if not np.array_equal(file.frame[begin:end], np.arange(length)):
            raise DatasetError(
                f"{path} holds {end - begin} rows of episode {episode}, meta/episodes promises {length} rows "
                f"with frame_index 0..{length - 1} in order; copy or record the dataset again."
            )
        return file, slice(begin, end)

    def _read_data(self, path: Path) -> _DataFile:
        table = _read_table(path, [STATE, ACTION, "timestamp", "frame_index", "episode_index", "task_index"])
        state = _matrix(table, STATE, self.state_dim, path)
        action = _matrix(table, ACTION, self.action_dim, path)
        for name, values in ((STATE, state), (ACTION, action)):
            bad = np.flatnonzero(~np.isfinite(values).all(1))
            if len(bad):
                raise DatasetError(
                    f"{path}: {name} holds NaN or infinity in {len(bad)} rows, first in row {bad[0]} "
                    f"(episode {table['episode_index'][bad[0]]}); remove that episode."
                )
        names = ("frame_index", "episode_index", "task_index")
        frame, episode, task = (table[name].to_numpy() for name in names)
        if (np.diff(episode) < 0).any():
            raise DatasetError(f"{path}: the rows are not sorted by episode_index; record the dataset again.")
        timestamp = table["timestamp"].to_numpy().astype(np.float32)
        return _DataFile(path, state, action, timestamp, frame, episode, task)

    def _video(self, episode: int, camera: str) -> tuple[Path, int]:
        """The mp4 of an episode and the number of its first frame in it."""
        self.require_cameras([camera])
        meta = self._episodes[episode]
        key = IMAGE_PREFIX + camera
        chunk, file, start = (meta[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp"))
        path = self._path(self._info["video_path"], chunk, file, key)
        if not path.is_file():
            raise DatasetError(
                f"{path} (camera {camera!r}, episode {episode}) does not exist; copy the dataset again."
            )
        return path, round(start * self.fps)


class _BadVideo(Exception):
    """What is wrong with a video; `frames` adds which file, camera and episode."""


def _decode(container, stream, numbers: np.ndarray, fps: float, out: np.ndarray) -> None:
    """Decodes the frames `numbers` (ascending, counted in the file) into out [n, h, w, 3] with one seek."""
    container.seek(round(numbers[0] / fps / stream.time_base), stream=stream, backward=True)
    done = 0
    for frame in container.decode(stream):
        place = float(frame.pts * stream.time_base) * fps
        number = round(place)
        if abs(place - number) > PTS_TOLERANCE:
            raise _BadVideo(f"a frame lies at {place:.3f} frames, off the grid of {fps:g} frames per second")
        if number < numbers[done]:
            continue
        if number > numbers[done]:
            raise _BadVideo(f"frame {numbers[done]} is missing, frame {number} follows instead")
        if frame.is_corrupt:
            raise _BadVideo(f"frame {number} is damaged")
        image = frame.to_ndarray(format="rgb24")
        if image.shape != out.shape[1:]:
            raise _BadVideo(f"frames are {image.shape[:2]}, meta/info.json says {out.shape[1:3]} (height, width)")
        out[done] = image
        done += 1
        if done == len(numbers):
            return
    raise _BadVideo(f"the video ends before frame {numbers[done]}")


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; copy the dataset again.")
    try:
        names = pq.read_schema(path).names
        missing = [name for name in columns or [] if name not in names]
        if missing:
            raise DatasetError(f"{path} lacks the column {', '.join(missing)}; it has: {', '.join(names)}.")
        return pq.ParquetFile(path).read(columns)
    except pa.ArrowException as error:
        raise DatasetError(f"{path} cannot be read as parquet ({error}); copy the dataset again.") from error


def _matrix(table: pa.Table, name: str, width: int, path: Path) -> np.ndarray:
    """A column of fixed or variable lists as float32 [rows, width]."""
    values = table[name].combine_chunks()
    lengths = values.value_lengths() if pa.types.is_list(values.type) else None
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if (
        values.null_count
        or len(flat) != len(table) * width
        or (lengths is not None and (lengths.to_numpy() != width).any())
    ):
        raise DatasetError(f"{path}: every row of {name} must hold {width} numbers, as meta/info.json says.")
    return flat.astype(np.float32).reshape(len(table), width)
