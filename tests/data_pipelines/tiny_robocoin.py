"""The tiny dataset as RoboCOIN would write it: named joints in any order, its camera names, annotated subtasks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.readers.layouts import LAYOUTS
from tests.data_pipelines import tiny_dataset as tiny

# Both grippers last, and a pose that is no joint.
GRIPPERS_LAST = (
    *(name for name in LAYOUTS["two_6dof_arms"].names if "gripper" not in name),
    "left_gripper_open_scale",
    "right_gripper_open_scale",
    "left_eef_pos_x",
)
CAMERAS = {
    "cam_high": "cam_head_left_rgb",
    "cam_left_wrist": "cam_left_wrist_rgb",
    "cam_right_wrist": "cam_right_wrist_rgb",
}
SUBTASKS = {0: "Reach the drawer", 1: "Pull", 2: "null"}
# The annotation of each row, by row % 4, and what it says.
ANNOTATED = ([0, -1, -1, -1, -1], [0, 1, 0, -1, -1], [2, -1, -1, -1, -1], [-1] * 5)
TEXTS = ("Reach the drawer", "Reach the drawer; Pull", "", "")


def write_robocoin(root: Path, names: Sequence[str] = GRIPPERS_LAST) -> Path:
    """Writes the dataset into the folder and returns it. Rows are `value` of each name."""
    tiny.write_dataset(root, "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    for episode, length in enumerate(tiny.LENGTHS):
        path = tiny.data_path(root, episode)
        table = pq.read_table(path)
        for key in ("observation.state", "action"):
            rows = np.stack([value(name, episode, length, key) for name in names], 1)
            column = pa.FixedSizeListArray.from_arrays(rows.ravel(), len(names))
            table = table.set_column(table.column_names.index(key), key, column)
        annotation = pa.array([ANNOTATED[row % 4] for row in range(length)], pa.list_(pa.int32(), 5))
        pq.write_table(table.append_column("subtask_annotation", annotation), path)
    features = info["features"]
    for key in ("observation.state", "action"):
        features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    for view, camera in CAMERAS.items():
        features[f"observation.images.{camera}"] = features.pop(f"observation.images.{view}")
        for folder in (root / "videos").glob(f"*/observation.images.{view}"):
            folder.rename(folder.with_name(f"observation.images.{camera}"))
    tiny.change_info(root, features=features)
    (root / "annotations").mkdir()
    lines = (json.dumps({"subtask_index": index, "subtask": text}) for index, text in SUBTASKS.items())
    (root / "annotations/subtask_annotations.jsonl").write_text("\n".join(lines) + "\n")
    return root


def value(name: str, episode: int, length: int, key: str) -> np.ndarray:
    """Float32 [length] that only this number of this episode has."""
    seed = [*name.encode(), episode, len(key)]
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)
