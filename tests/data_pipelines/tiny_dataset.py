"""A tiny LeRobot dataset, v2.1 or v3.0, whose frames carry their own number, for tests."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, STATE_DIM, ACTION_DIM = 25, 5, 3
STATE_NAMES = ["waist", "shoulder", "elbow", "wrist", "gripper"]
LENGTHS = (40, 23, 31)
# Which file each episode is in, and the files: v3.0 has two episodes in the first and one in the second.
EPISODE_FILES = {"v2.1": (0, 1, 2), "v3.0": (0, 0, 1)}
PATHS = {
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "chunks_size": 2,
    },
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
TASKS = (1, 0, 1)
INSTRUCTIONS = ("open the drawer", "close the drawer")
VIDEO_OPTIONS = {"g": "12", "bf": "3", "crf": "10"}  # a key frame every 12 frames, B-frames between
CAMERAS = {"cam_high": (32, 48), "cam_left_wrist": (16, 24), "cam_right_wrist": (16, 24)}


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """RGB image that `number_of` reads back: units of 20 in the left half, twenties in the right half."""
    image = np.empty((*size, 3), np.uint8)
    image[:, : size[1] // 2] = 30 + 10 * (number % 20)
    image[:, size[1] // 2 :] = 30 + 10 * (number // 20)
    return image


def number_of(image: np.ndarray) -> int:
    """The number in a decoded picture [h, w, 3]; read away from the edge between the halves."""
    quarter = image.shape[1] // 4
    low, high = (round((image[:, part].mean() - 30) / 10) for part in (slice(quarter), slice(-quarter, None)))
    return low + 20 * high


def frame_number(camera: str, episode: int, row: int) -> int:
    """Number shown by a camera in a row: the dataset row, 100 more for each camera."""
    return 100 * list(CAMERAS).index(camera) + sum(LENGTHS[:episode]) + row


def write_dataset(root: Path, version: str = "v3.0") -> Path:
    """Writes the dataset into the folder and returns it."""
    (root / "meta").mkdir(parents=True)
    rng = np.random.default_rng(0)
    tables = []
    for episode, length in enumerate(LENGTHS):
        state = rng.normal(size=(length, STATE_DIM)).astype(np.float32)
        action = rng.normal(size=(length, ACTION_DIM)).astype(np.float32)
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(state.ravel(), STATE_DIM),
            "action": pa.FixedSizeListArray.from_arrays(action.ravel(), ACTION_DIM),
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "task_index": np.full(length, TASKS[episode]),
        }
        tables.append(pa.table(columns))
    features = {
        "observation.state": {"dtype": "float32", "shape": [STATE_DIM], "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": [ACTION_DIM], "names": None},
    }
    for camera, size in CAMERAS.items():
        names = ["height", "width", "channels"]
        features[f"observation.images.{camera}"] = {"dtype": "video", "shape": [*size, 3], "names": names}
    info = {
        "codebase_version": version,
        "robot_type": "tiny",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info | PATHS[version]))
    for file in sorted(set(EPISODE_FILES[version])):
        here = [e for e in range(len(LENGTHS)) if EPISODE_FILES[version][e] == file]
        _write(data_path(root, here[0]), pa.concat_tables([tables[e] for e in here]))
        for camera, size in CAMERAS.items():
            numbers = [frame_number(camera, e, row) for e in here for row in range(LENGTHS[e])]
            write_video(video_path(root, camera, here[0]), [picture(n, size) for n in numbers])
    if version == "v2.1":
        tasks = [{"task_index": i, "task": text} for i, text in enumerate(INSTRUCTIONS)]
        episodes = [{"episode_index": e, "length": length} for e, length in enumerate(LENGTHS)]
        for name, records in (("tasks", tasks), ("episodes", episodes)):
            (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        # pandas keeps the index in a column of this name
        tasks = {"task_index": range(len(INSTRUCTIONS)), "__index_level_0__": list(INSTRUCTIONS)}
        _write(root / "meta/tasks.parquet", pa.table(tasks))
        _write(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(_places()))
    return root


def _places() -> list[dict]:
    """The rows of meta/episodes of v3.0."""
    files = EPISODE_FILES["v3.0"]
    rows = []
    for episode, (length, file) in enumerate(zip(LENGTHS, files, strict=True)):
        start = sum(n for n, f in zip(LENGTHS[:episode], files, strict=False) if f == file) / FPS
        row = {"episode_index": episode, "length": length, "data/chunk_index": 0, "data/file_index": file}
        for camera in CAMERAS:
            prefix = f"videos/observation.images.{camera}"
            row |= {f"{prefix}/chunk_index": 0, f"{prefix}/file_index": file, f"{prefix}/from_timestamp": start}
        rows.append(row)
    return rows


def data_path(root: Path, episode: int) -> Path:
    """The parquet file an episode is in."""
    return _path(root, "data_path", episode)


def video_path(root: Path, camera: str, episode: int) -> Path:
    """The mp4 file an episode is in."""
    return _path(root, "video_path", episode, video_key=f"observation.images.{camera}")


def _path(root: Path, template: str, episode: int, **key: str) -> Path:
    version = json.loads((root / "meta/info.json").read_text())["codebase_version"]
    if version == "v2.1":
        places = {"episode_chunk": episode // 2, "episode_index": episode}
    else:
        places = {"chunk_index": 0, "file_index": EPISODE_FILES[version][episode]}
    return root / PATHS[version][template].format(**places, **key)


def change_info(root: Path, **changes: object) -> None:
    """Overwrites entries of meta/info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_column(path: Path, column: str, change: Callable[[list], pa.Array]) -> None:
    """Overwrites a column of a parquet file by what `change` makes of its values."""
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, change(table[column].to_pylist())), path)


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@contextmanager
def own_priority() -> Iterator[None]:
    """After the block this thread has the priority that it had before.

    Where root calls it, SVT-AV1 gives its caller the highest priority of real time, for good: threads started from
    then on inherit it, and on a few cores all that has an ordinary one then starves.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def write_video(
    path: Path,
    images: list[np.ndarray],
    codec: str = "libx264",
    options: dict[str, str] = VIDEO_OPTIONS,
    fps: int | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with own_priority(), av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=fps or FPS, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
