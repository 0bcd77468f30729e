"""A tiny LeRobot v3.0 dataset whose frames carry their own number, for tests."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, STATE_DIM, ACTION_DIM = 25, 5, 3
LENGTHS = (40, 23, 31)
EPISODE_FILES = (0, 0, 1)  # two episodes in the first file, one in the second
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


def write_dataset(root: Path) -> Path:
    """Writes the dataset into the folder and returns it."""
    rng = np.random.default_rng(0)
    rows = []
    for episode, length in enumerate(LENGTHS):
        state = rng.normal(size=(length, STATE_DIM)).astype(np.float32)
        action = rng.normal(size=(length, ACTION_DIM)).astype(np.float32)
        rows += [
            {
                "observation.state": state[row].tolist(),
                "action": action[row].tolist(),
                "timestamp": row / FPS,
                "frame_index": row,
                "episode_index": episode,
                "task_index": TASKS[episode],
            }
            for row in range(length)
        ]
    metas = []
    for episode, (length, file) in enumerate(zip(LENGTHS, EPISODE_FILES, strict=True)):
        start = sum(n for n, f in zip(LENGTHS[:episode], EPISODE_FILES, strict=False) if f == file) / FPS
        meta = {"episode_index": episode, "length": length, "data/chunk_index": 0, "data/file_index": file}
        for camera in CAMERAS:
            prefix = f"videos/observation.images.{camera}"
            meta |= {f"{prefix}/chunk_index": 0, f"{prefix}/file_index": file, f"{prefix}/from_timestamp": start}
        metas.append(meta)
    _write(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(metas))
    # pandas keeps the index in a column of this name
    tasks = {"task_index": range(len(INSTRUCTIONS)), "__index_level_0__": list(INSTRUCTIONS)}
    _write(root / "meta/tasks.parquet", pa.table(tasks))
    lists = pa.schema(
        [("observation.state", pa.list_(pa.float32(), STATE_DIM)), ("action", pa.list_(pa.float32(), ACTION_DIM))]
        + [("timestamp", pa.float32())]
        + [(name, pa.int64()) for name in ("frame_index", "episode_index", "task_index")]
    )
    for file in set(EPISODE_FILES):
        here = [row for row in rows if EPISODE_FILES[row["episode_index"]] == file]
        _write(data_path(root, file), pa.Table.from_pylist(here, lists))
        for camera, size in CAMERAS.items():
            numbers = [frame_number(camera, row["episode_index"], row["frame_index"]) for row in here]
            _write_video(video_path(root, camera, file), [picture(n, size) for n in numbers])
    features = {
        "observation.state": {"dtype": "float32", "shape": [STATE_DIM], "names": None},
        "action": {"dtype": "float32", "shape": [ACTION_DIM], "names": None},
    }
    for camera, size in CAMERAS.items():
        names = ["height", "width", "channels"]
        features[f"observation.images.{camera}"] = {"dtype": "video", "shape": [*size, 3], "names": names}
    info = {
        "codebase_version": "v3.0",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def data_path(root: Path, file: int) -> Path:
    return root / f"data/chunk-000/file-{file:03d}.parquet"


def video_path(root: Path, camera: str, file: int) -> Path:
    return root / f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"


def change_info(root: Path, **changes: object) -> None:
    """Overwrites entries of meta/info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_video(path: Path, images: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=VIDEO_OPTIONS)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
