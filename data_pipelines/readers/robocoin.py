"""RoboCOIN: many robots brought to one vector and three views.

A RoboCOIN dataset is LeRobot v2.1, one folder per robot and task. Which number is which joint, and how the cameras
are called, varies by robot: both are mapped by name, never by place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.files import read_json, read_json_lines
from data_pipelines.readers.lerobot import LeRobotV21
from data_pipelines.readers.lerobot_files import AGAIN, INFO
from data_pipelines.readers.opening import open_episodes

SUBTASKS = "annotations/subtask_annotations.jsonl"
SUBTASK_COLUMN = "subtask_annotation"
JOINT = re.compile(r"(left|right)_(arm_joint_\d+_rad|gripper_open_scale)")
UNITS = {"_rad": "rad", "_open_scale": "0 closed .. 1 open"}  # by the end of a number's name


class UnmappableError(DatasetError):
    """A robot or its cameras do not fit the layout; the subset file may say to skip such a dataset."""


# ---------------------------------------------------------------- vectors
def unit_of(name: str) -> str:
    """Unit of a number in a vector, "" where its name does not tell."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


@dataclass(frozen=True)
class Layout:
    """A vector of joints in fixed order, the same for every robot mapped to it.

    names: one per number, as RoboCOIN writes them in info.json.
    """

    names: tuple[str, ...]

    @property
    def units(self) -> tuple[str, ...]:
        """What each number is measured in."""
        return tuple(unit_of(name) for name in self.names)

    def places(self, names: Sequence[str], where: str) -> np.ndarray:
        """Where in a robot's vector with these names the layout's numbers are, int64 [len(self.names)].

        `where` begins the sentence of an UnmappableError: the robot lacks a joint, names it twice, or has one more.
        Numbers that are no joints (poses of the hands) are left out.
        """
        missing = [name for name in self.names if name not in names]
        twice = sorted({name for name in self.names if names.count(name) > 1})
        extra = [name for name in names if JOINT.fullmatch(name) and name not in self.names]
        for problem, found in (("lacks", missing), ("names twice", twice), ("has beyond the layout", extra)):
            if found:
                raise UnmappableError(
                    f"{where} {problem} {', '.join(found)}; its names are {', '.join(names) or 'not recorded'}. "
                    f'Choose another layout ({", ".join(LAYOUTS)}) or set if_unmappable = "skip" in the subset file.'
                )
        return np.array([names.index(name) for name in self.names])


def _two_arms(joints: int) -> Layout:
    return Layout(
        tuple(
            f"{side}_{what}"
            for side in ("left", "right")
            for what in (*(f"arm_joint_{n}_rad" for n in range(1, joints + 1)), "gripper_open_scale")
        )
    )


LAYOUTS = {"two_6dof_arms": _two_arms(6), "two_7dof_arms": _two_arms(7)}

# ---------------------------------------------------------------- cameras
# What recordings call the three views. Of a head with two lenses the left one counts.
CAMERAS = {
    "cam_high": (
        "cam_high", "cam_high_rgb", "cam_head_rgb", "cam_head_left_rgb", "cam_front_head_rgb", "cam_high_left_rgb",
    ),
    "cam_left_wrist": ("cam_left_wrist", "cam_left_wrist_rgb"),
    "cam_right_wrist": ("cam_right_wrist", "cam_right_wrist_rgb"),
}  # fmt: skip


def find_cameras(recorded: Sequence[str], where: str) -> dict[str, str]:
    """{view: recorded camera} for all three views. Raises UnmappableError unless each has exactly one candidate."""
    chosen = {}
    for view, known in CAMERAS.items():
        found = [name for name in recorded if name in known]
        if len(found) != 1:
            raise UnmappableError(
                f"{where} has {' and '.join(found) or 'no known camera'} for {view} among its cameras "
                f"{', '.join(recorded) or '(none)'}; name the views to use in the subset file, as in "
                f'cameras = {{ {view} = "..." }}.'
            )
        chosen[view] = found[0]
    return chosen


# ---------------------------------------------------------------- datasets
class RoboCoin(LeRobotV21):
    """A RoboCOIN dataset with its annotation of subtasks."""

    @cached_property
    def _subtasks(self) -> dict[int, str]:
        return _read_subtasks(self.root / SUBTASKS)

    def subtasks(self, episode: int) -> list[str]:
        """What the robot is doing in each row, "" where nothing is annotated; several at a time are joined by "; ".

        The column subtask_annotation holds five numbers per row, -1 for an unused one; each is the subtask_index of
        a line of annotations/subtask_annotations.jsonl, {"subtask_index": 3, "subtask": "Lift the cup"}. Assumed
        here, since RoboCOIN does not define it: the subtask "null" means that there is none.
        """
        path = self._data_path(episode)
        try:
            column = pq.read_table(path, columns=[SUBTASK_COLUMN])[SUBTASK_COLUMN].to_pylist()
            return ["; ".join(dict.fromkeys(filter(None, map(self._subtask, row)))) for row in column]
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: every row of {SUBTASK_COLUMN} must hold numbers listed in {self.root / SUBTASKS}, or -1 "
                f"({error!r}); copy the dataset again."
            ) from error

    def _subtask(self, number: int) -> str:
        return "" if number == -1 else self._subtasks[number]


def open_robocoin(root: str | Path) -> Episodes:
    """The dataset in a folder; with `subtasks` where it is LeRobot v2.1 and has annotations of them."""
    dataset = open_episodes(root)
    if isinstance(dataset, LeRobotV21) and (dataset.root / SUBTASKS).is_file():
        return RoboCoin(dataset.root, read_json(dataset.root / INFO, DatasetError, AGAIN))
    return dataset


def subtasks(dataset: Episodes, episode: int) -> list[str]:
    """One text per row of any dataset, "" where subtasks were not annotated."""
    read = getattr(dataset, "subtasks", None)
    return read(episode) if read else [""] * int(dataset.lengths[episode])


class Mapped(Episodes):
    """Another dataset with its vectors in a layout's order and its cameras under the names of the views.

    source: the dataset that is mapped.  cameras: {view: camera of the source}, by default `find_cameras`; kept as
    `views`.  robot: name of the embodiment.
    Raises UnmappableError where the source does not fit, DatasetError where it lacks a camera of `cameras`.
    """

    def __init__(self, source: Episodes, layout: Layout, robot: str, cameras: Mapping[str, str] | None = None) -> None:
        where = f"{source.root} (robot {robot!r})"
        self.source = source
        self._state = layout.places(source.state_names, f"{where}: the state")
        self._action = layout.places(source.action_names, f"{where}: the action")
        self.views = dict(cameras) if cameras is not None else find_cameras(list(source.cameras), where)
        source.require_cameras(list(self.views.values()))
        self.root, self.robot, self.fps, self.layout = source.root, robot, source.fps, layout
        self.lengths, self.starts, self.instructions = source.lengths, source.starts, source.instructions
        self.cameras = {view: source.cameras[camera] for view, camera in self.views.items()}
        self.state_names = self.action_names = layout.names
        self.state_dim = self.action_dim = len(layout.names)

    def states(self, episode: int) -> np.ndarray:
        return self.source.states(episode)[:, self._state]

    def actions(self, episode: int) -> np.ndarray:
        return self.source.actions(episode)[:, self._action]

    def timestamps(self, episode: int) -> np.ndarray:
        return self.source.timestamps(episode)

    def instruction_index(self, episode: int) -> int:
        return self.source.instruction_index(episode)

    def instruction(self, episode: int) -> str:
        return self.source.instruction(episode)

    def subtasks(self, episode: int) -> list[str]:
        """See `subtasks`."""
        return subtasks(self.source, episode)

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        self.require_cameras([camera])
        return self.source.frames(episode, self.views[camera], indices)

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        return self.source.picture_file(episode, self.views[camera])

    def require_cameras(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.cameras]
        if missing:
            raise DatasetError(
                f"{self.root} is mapped without {', '.join(missing)}; it has: {', '.join(self.cameras)}. Name the "
                "camera in the subset file."
            )


def _read_subtasks(path: Path) -> dict[int, str]:
    """{subtask_index: text}, "" for the subtask "null"."""
    found: dict[int, str] = {}
    for where, record in read_json_lines(path, DatasetError, AGAIN):
        index, text = record.get("subtask_index"), record.get("subtask")
        if not isinstance(index, int) or not isinstance(text, str) or index in found:
            raise DatasetError(
                f'{where} must be {{"subtask_index": a number, "subtask": "a text"}}, each number once; {AGAIN}.'
            )
        found[index] = "" if text == "null" else text
    return found
