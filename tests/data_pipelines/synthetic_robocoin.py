"""Small datasets as RoboCOIN publishes them, LeRobot v2.1, of any naming: real names, order, widths, rate and codec.

A naming is a record of `robocoin_census.json` or a dict in the same form. `Synthetic(record).write(folder)` writes a
dataset; `value`, `opening` and `rows` say what its numbers are.
"""

import json
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipelines import tiny_dataset as tiny

Record = Mapping[str, Any]

# Of the records in the census, in their order.
SCHEMAS = (
    "1", "2", "3", "4", "5a", "5b", "6a", "6b", "7a", "7b", "8", "9", "10", "11", "12", "14", "15", "16", "18", "19",
    "20a", "20b",
)  # fmt: skip
KEYS = {"state": "observation.state", "action": "action"}
LEAD = 2  # rows by which an action is ahead of the state
FPS = 30  # where the census tells none
HEIGHT = 32  # of the pictures; the width keeps the camera's shape, 48 where that is not told
CODECS = {"av1": ("libsvtav1", {"g": "30", "crf": "20", "preset": "12"}), "h264": ("libx264", tiny.VIDEO_OPTIONS)}
INSTRUCTIONS = ("put the cup on the tray", "close the drawer with the right hand")
SUBTASKS = (
    "Grasp the cup", "Lift the cup", "null", "Place the cup on the tray", "End", "end", "Static", "Abnormal",
    "abnormal", "Discard.",
)  # fmt: skip
# Which subtasks a row has, by its tenth of the episode.
PHASES = ((0,), (0,), (0, 1), (1,), (2,), (3,), (3,), (6,), (4,), (5,))
# How far a number goes to either side of 0, by the end of its name.
REACH = {"_pos_x_m": 0.5, "_pos_y_m": 0.5, "_pos_z_m": 0.5, "_vel_rad_s": 1.0, "_eff_nm": 10.0, "_rad": 1.9}


def census(shared_dir: Path) -> list[dict[str, Any]]:
    """All records of the census."""
    return json.loads((shared_dir / "datasets/robocoin_census.json").read_text())


@dataclass(frozen=True)
class Synthetic:
    """A dataset to be written. All numbers follow from these fields.

    record: its naming.  lengths: rows of each episode.  state_gripper, action_gripper: (closed, open) as recorded,
    each a number or a pair (left, right).  still_tail: rows at the end of each episode in which nothing moves.
    action_is_state: every action is the state of its row.  bad: {episode: [(first, stop, subtask)]}, rows annotated
    with one of SUBTASKS, such as "Abnormal".  labels: {"state" or "action": names that info.json gives instead of the
    record's}, as `twice` and `other_side` make them.  depth: cameras of depth beside the record's.  repeat: episode e
    has the numbers and bad rows of episode e % repeat; 0: every episode its own.
    """

    record: Record
    lengths: Sequence[int] = (100, 90)
    state_gripper: tuple[Any, Any] = (0.0, 1.0)
    action_gripper: tuple[Any, Any] = (0.0, 1.0)
    still_tail: int = 0
    action_is_state: bool = False
    bad: Mapping[int, Sequence[tuple[int, int, str]]] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    depth: Sequence[str] = ()
    repeat: int = 0

    @property
    def fps(self) -> int:
        return self.record["fps"] or FPS

    def names(self, kind: str) -> tuple[str, ...]:
        """One per number of the "state" or "action"; numbers beyond the record's names are "#16" and so on."""
        names, width = self.record[f"{kind}_names"], self.record[f"{kind}_width"]
        return (*names, *(f"#{place}" for place in range(len(names), width)))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Camera -> (height, width)."""
        shape = [_size(camera, self.record["resolution"]) for camera in self.record["cameras"]]
        return dict(zip(self.record["cameras"], shape, strict=True)) | {camera: (HEIGHT, 48) for camera in self.depth}

    # ------------------------------------------------------------ numbers
    def _path(self, name: str, kind: str, episode: int) -> np.ndarray:
        """A smooth float64 [T] in -1..1 that only this number of this episode follows."""
        length = self.lengths[episode]
        rows = np.arange(length) + (LEAD if kind == "action" and not self.action_is_state else 0)
        if self.still_tail:
            rows = np.minimum(rows, length - self.still_tail)
        seed = zlib.crc32(f"{name} {self._number(episode)}".encode())
        cycles, phase, middle = ((seed >> shift & 1023) / 1024 for shift in (0, 10, 20))
        return 0.4 * middle - 0.2 + 0.8 * np.sin(2 * np.pi * ((1.1 + cycles) * rows / length + phase))

    def _number(self, episode: int) -> int:
        """The first episode with the same numbers."""
        return episode % self.repeat if self.repeat else episode

    def opening(self, side: str, kind: str, episode: int) -> np.ndarray:
        """How far a gripper is open, float64 [T], from 0 closed to 1 open, both reached."""
        return np.clip(0.5 + 1.2 * self._path(f"{side}_gripper_open", kind, episode), 0, 1)

    def value(self, name: str, kind: str, episode: int) -> np.ndarray:
        """What is recorded of a number, float32 [T]."""
        gripper = re.fullmatch("(left|right)_gripper_open", name)
        if not gripper:
            reach = next((reach for end, reach in REACH.items() if name.endswith(end)), 1.0)
            return (reach * self._path(name, kind, episode)).astype(np.float32)
        unit = self.state_gripper if kind == "state" or self.action_is_state else self.action_gripper
        closed, opened = (np.broadcast_to(end, 2)[int(gripper[1] == "right")] for end in unit)
        return (closed + (opened - closed) * self.opening(gripper[1], kind, episode)).astype(np.float32)

    def rows(self, kind: str, episode: int) -> np.ndarray:
        """States or actions as recorded, float32 [T, n]."""
        return np.stack([self.value(name, kind, episode) for name in self.names(kind)], 1)

    def subtasks(self, episode: int) -> np.ndarray:
        """The column subtask_annotation, int32 [T, 5]: places in SUBTASKS, -1 for none."""
        length = self.lengths[episode]
        phases = np.array([[*phase, *[-1] * (5 - len(phase))] for phase in PHASES], np.int32)
        column = phases[np.arange(length) * len(PHASES) // length]
        for first, stop, text in self.bad.get(self._number(episode), ()):
            column[first:stop] = [SUBTASKS.index(text), -1, -1, -1, -1]
        return column

    # ------------------------------------------------------------ files
    def write(self, root: Path, pictures: str | None = "shared") -> Path:
        """Writes the dataset, of 1000 episodes at most, into a folder that does not exist and returns it.

        pictures: None writes no video; "shared": every camera shows the row's number, see `shown`; "distinct": the
        number tells camera and episode too, which takes longer to encode.
        """
        (root / "meta").mkdir(parents=True)
        (root / "annotations").mkdir()
        lengths = self.lengths
        info = {
            "codebase_version": "v2.1",
            "robot_type": self.record["robot_type_in_info"],
            "total_episodes": len(lengths),
            "total_frames": sum(lengths),
            "total_tasks": len(INSTRUCTIONS),
            "total_videos": len(lengths) * len(self.sizes()),
            "total_chunks": 1,
            "fps": self.fps,
            "splits": {"train": f"0:{len(lengths)}"},
            "features": self._features(),
            **tiny.PATHS["v2.1"],
            "chunks_size": 1000,
        }
        (root / "meta/info.json").write_text(json.dumps(info, indent=4))
        episodes = enumerate(lengths)
        _lines(root / "meta/episodes.jsonl", ({"episode_index": e, "tasks": [], "length": n} for e, n in episodes))
        _lines(root / "meta/tasks.jsonl", ({"task_index": i, "task": text} for i, text in enumerate(INSTRUCTIONS)))
        texts = ({"subtask_index": i, "subtask": text} for i, text in enumerate(SUBTASKS))
        _lines(root / "annotations/subtask_annotations.jsonl", texts)
        _lines(root / "annotations/scene_annotations.jsonl", [{"scene_index": 0, "scene": "A table with a tray."}])
        self._write_rows(root)
        if pictures is not None:
            self._write_pictures(root, pictures)
        return root

    def _features(self) -> dict[str, Any]:
        features: dict[str, Any] = {
            key: {
                "dtype": "float32",
                "shape": [self.record[f"{kind}_width"]],
                "names": list(self.labels.get(kind, self.record[f"{kind}_names"])),
            }
            for kind, key in KEYS.items()
        }
        for camera, (height, width) in self.sizes().items():
            features[f"observation.images.{camera}"] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": height, "video.width": width, "video.codec": self.record["codec"] or "h264",
                    "video.pix_fmt": "yuv420p", "video.is_depth_map": camera in self.depth, "video.fps": self.fps,
                    "video.channels": 3, "has_audio": False,
                },
            }  # fmt: skip
        scalars = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"),
                                                           "int64")  # fmt: skip
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}
        for name, (dtype, width, names) in _others(self.record).items():
            features[name] = {"dtype": dtype, "shape": [width], "names": names}
        return features

    def _write_rows(self, root: Path) -> None:
        """The parquet file of each episode, and the statistics beside them."""
        made: dict[tuple[int, int], tuple[dict[str, pa.Array], str]] = {}
        begin = 0
        (root / "data/chunk-000").mkdir(parents=True)
        with (root / "meta/episodes_stats.jsonl").open("w") as stats:
            for episode, length in enumerate(self.lengths):
                same = self._number(episode), length
                if same not in made:
                    vectors = {key: _stats(self.rows(kind, episode)) for kind, key in KEYS.items()}
                    made[same] = self._columns(episode), json.dumps(vectors)
                columns, told = made[same]
                counts = {
                    "episode_index": np.full(length, episode),
                    "index": np.arange(begin, begin + length),
                    "task_index": np.full(length, episode % len(INSTRUCTIONS)),
                }
                path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
                pq.write_table(pa.table(columns | counts), path, use_dictionary=False)
                stats.write(f'{{"episode_index": {episode}, "stats": {told}}}\n')
                begin += length

    def _columns(self, episode: int) -> dict[str, pa.Array]:
        """The columns that do not count episodes."""
        length = self.lengths[episode]
        columns = {key: _lists(self.rows(kind, episode)) for kind, key in KEYS.items()}
        columns["timestamp"] = pa.array((np.arange(length) / self.fps).astype(np.float32))
        columns["frame_index"] = pa.array(np.arange(length))
        for name, (dtype, width, names) in _others(self.record).items():
            if name == "subtask_annotation":
                columns[name] = _lists(self.subtasks(episode))
            elif name.startswith("gripper_open_scale"):
                if names == []:  # such a feature is promised by info.json alone
                    continue
                kind = "action" if name.endswith("action") else "state"
                opening = [self.opening(side, kind, episode) for side in ("left", "right")]
                columns[name] = _lists(np.stack(opening, 1).astype(np.float32))
            else:
                zeros = np.zeros((length, width), dtype)
                columns[name] = pa.array(zeros[:, 0]) if width == 1 else _lists(zeros)
        return columns

    # ------------------------------------------------------------ pictures
    def shown(self, pictures: str, camera: str, episode: int, row: int) -> int:
        """The number that `tiny.number_of` reads off a picture."""
        apart = 31 * list(self.sizes()).index(camera) + 101 * episode if pictures == "distinct" else 0
        return (apart + row) % 400

    def _write_pictures(self, root: Path, pictures: str) -> None:
        for camera, size in self.sizes().items():
            for episode, length in enumerate(self.lengths):
                first = self.shown(pictures, camera, episode, 0)
                path = root / f"videos/chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_clip(self.record["codec"] or "h264", size, self.fps, length, first))


# ---------------------------------------------------------------- names that are wrong
def twice(names: Sequence[str], name: str) -> list[str]:
    """The number after `name` is called as it is."""
    place = list(names).index(name) + 1
    return [*names[:place], name, *names[place + 1 :]]


def other_side(names: Sequence[str]) -> list[str]:
    """Left is called right and right left."""
    other = {"left_": "right_", "right_": "left_"}
    return [re.sub("^(left|right)_", lambda found: other[found[0]], name) for name in names]


# ---------------------------------------------------------------- namings that no census has
def _arm(side: str, joints: int) -> list[str]:
    return [f"{side}_arm_joint_{n}_rad" for n in range(1, joints + 1)]


def _hand(side: str) -> list[str]:
    return [f"{side}_eef_pos_{axis}_m" for axis in "xyz"] + [f"{side}_eef_rot_euler_{axis}_rad" for axis in "xyz"]


def naming(robot: str, cameras: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """A record with the same names in state and action."""
    record = {"schema": robot, "robot_type_in_info": robot, "fps": 30, "codec": None, "resolution": None}
    record |= {"cameras": list(cameras), "other_features": ["subtask_annotation[5] int32"]}
    for kind in KEYS:
        record |= {f"{kind}_names": list(names), f"{kind}_width": len(names)}
    return record


GRIPPERS = ["left_gripper_open", "right_gripper_open"]
WRISTS = ["cam_left_wrist_rgb", "cam_right_wrist_rgb"]
UNSEEN = {
    record["schema"]: record
    for record in (
        naming("right_first", ["cam_high_rgb", *WRISTS],
               [*_arm("right", 7), GRIPPERS[1], *_arm("left", 7), GRIPPERS[0]]),
        naming("grippers_first", [*WRISTS, "cam_head_rgb"], [*GRIPPERS, *_arm("left", 6), *_arm("right", 6)]),
        naming("body_between", ["camera_head_rgb", "camera_left_wrist_rgb", "camera_right_wrist_rgb"],
               [*_arm("left", 7), *_hand("left"), GRIPPERS[0], "waist_joint_1_rad", "neck_joint_1_rad", "lift_m",
                *_arm("right", 7), *_hand("right"), GRIPPERS[1]]),
        naming("one_arm", ["cam_high_rgb", WRISTS[1]], [*_arm("right", 6), GRIPPERS[1]]),
        naming("first_person", ["cam_ego_rgb", *WRISTS],
               [*_arm("left", 6), GRIPPERS[0], *_arm("right", 6), GRIPPERS[1]]),
        naming("single_view", ["cam_high_rgb"], [*_arm("left", 6), *_arm("right", 6), *GRIPPERS]),
    )
}  # fmt: skip


# ---------------------------------------------------------------- what a record says in words
def _size(camera: str, resolution: str | None) -> tuple[int, int]:
    """(height, width) of a tiny picture, of the shape that the record tells of this camera."""
    shapes = dict(re.findall(r"(?:^|, )(?:(\w+) )?(\d+x\d+)", resolution or ""))
    part = next((part for part in ("wrist", "fisheye") if part in camera), "head")
    shape = shapes.get(part) or shapes.get(f"{part}s") or shapes.get("") or "2x3"
    height, width = map(int, shape.split("x"))
    return HEIGHT, round(HEIGHT * width / height / 2) * 2


def _others(record: Record) -> dict[str, tuple[str, int, list[str] | None]]:
    """Feature -> (dtype, width, names) of the record's other features."""
    found: dict[str, tuple[str, int, list[str] | None]] = {}
    for text in record["other_features"]:
        told = re.fullmatch(r"(\w+?)((?:_state|_action)?)(/action)?\[(\d+)\]( int32)?(?: ([\w,]+))?", text)
        if not told:  # "gripper scalars of shape [1] with names []"
            found |= {f"gripper_open_scale_{kind}": ("float32", 1, []) for kind in KEYS}
            continue
        for kind in (told[2], "_action") if told[3] else (told[2],):
            names = told[6].split(",") if told[6] else None
            found[told[1] + kind] = ("int32" if told[5] else "float32", int(told[4]), names)
    return found


# ---------------------------------------------------------------- files
def _lines(path: Path, records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _stats(rows: np.ndarray) -> dict[str, list[float]]:
    exact = rows.astype(np.float64)
    stats = {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0), "std": exact.std(0)}
    return {name: value.tolist() for name, value in stats.items()} | {"count": [len(rows)]}


@cache
def _clip(codec: str, size: tuple[int, int], fps: int, length: int, first: int) -> bytes:
    """An mp4 file whose pictures show the numbers from `first` on, see `Synthetic.shown`."""
    images = [tiny.picture((first + row) % 400, size) for row in range(length)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        tiny.write_video(path, images, *CODECS[codec], fps)
        return path.read_bytes()
