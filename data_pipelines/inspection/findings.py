"""What one recorded dataset holds, in few numbers. Its rows are read once, an episode at a time, and not kept."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment, Vector
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.inspection.robot_checks import (
    RowChecks,
    RowFindings,
    check_names,
    gripper_scales,
)
from data_pipelines.inspection.video_headers import too_short
from data_pipelines.readers.layouts import LAYOUTS, default_layout, is_gripper
from data_pipelines.readers.naming import AS_NAMED, KINDS, SIDES, Reading, number_of
from data_pipelines.readers.robocoin import Mapped, bad_rows, open_robocoin

VERSION = 2  # of what is found: a finding of another one is made anew
LAYOUT = LAYOUTS["two_arms"]
STILL_SECONDS = 1.0  # an episode that stands still for longer at its end has a tail to cut
SAMPLED = 5  # episodes that the size of the grippers' numbers is taken from before the rows are read
ROOM = 1.1  # numbers may go beyond the power of ten that they are taken for by this factor


@dataclass(frozen=True)
class Grip:
    """One gripper as it was recorded, in states or in actions: the ends of its range, and what 1% of the rows are
    below and above. std: standard deviation.  scale: its correlation with the feature gripper_open_scale_*, None where
    there is none."""

    side: str
    kind: str
    least: float
    greatest: float
    q01: float
    q99: float
    std: float
    scale: float | None

    @property
    def size(self) -> float:
        """Of its numbers, whichever way they go."""
        return max(abs(self.least), abs(self.greatest))


@dataclass(frozen=True)
class Finding:
    """A dataset as it was recorded.

    path: below the folder that was searched.  problem: the sentence that stops reading it, "" if none does; broken:
    the episodes it is about, () where it is about all.  unmappable: why it fits no layout.
    robot: its type.  rate: rows per second.  lengths: rows of each episode.  bad: rows marked so.  still: episodes
    with a tail that stands still.  instructions: how many.  cameras: recorded.  absent: views that are black.
    names: {"state" and "action": recorded}.  present: likewise, numbers of two_arms that it has.  layout: its default.
    arms; joints, hands: of an arm and of its hand.  gripper: whether it has one to drive.  unnamed: {kind: places}.
    grippers: all that move or do not.  together: {side: correlation of the action with the state}.  equal: whether
    every action is the state of its row.  crossed: whether actions follow the other arm's states.  misplaced: names
    that stand in the wrong arm.  off: rows by which time stamps are off, at most.  videos: sentences about them.
    """

    path: str
    problem: str = ""
    broken: tuple[int, ...] = ()
    unmappable: str = ""
    robot: str = ""
    rate: float = 0.0
    lengths: tuple[int, ...] = ()
    bad: int = 0
    still: int = 0
    instructions: int = 0
    cameras: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    present: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layout: str = ""
    arms: int = 0
    joints: int = 0
    hands: int = 0
    gripper: bool = False
    unnamed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    grippers: tuple[Grip, ...] = ()
    together: Mapping[str, float] = field(default_factory=dict)
    equal: bool = False
    crossed: bool = False
    misplaced: tuple[str, ...] = ()
    off: float = 0.0
    videos: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """That can be learned from."""
        return sum(self.lengths) - self.bad

    @property
    def hours(self) -> float:
        return self.rows / self.rate / 3600 if self.rate else 0.0

    @property
    def views(self) -> int:
        return len(CAMERAS) - len(self.absent) if self.present else 0

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Finding":
        """What `to_json` gave, also after a journey through a file."""
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        for key in ("names", "present", "unnamed"):
            tuples[key] = {kind: tuple(values) for kind, values in record[key].items()}
        return cls(**{**tuples, "grippers": tuple(Grip(**grip) for grip in record["grippers"])})


def state_of_files(root: Path, videos: bool = False) -> str:
    """A text that changes with all that a finding depends on: names, sizes and times of the files."""
    digest = hashlib.sha256(str(VERSION).encode())
    for folder in ("meta", "annotations", "data", *["videos"] * videos):
        for where, below, files in os.walk(root / folder):
            below.sort()
            for path in (os.path.join(where, name) for name in sorted(files)):
                about = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nothing
                digest.update(f"{os.path.relpath(path, root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def find(root: Path, path: str, videos: bool = False) -> Finding:
    """Reads the metadata and rows of the dataset in a folder, no pictures.

    path: what the finding is to call it.  videos: also the header of every video that a view needs.
    """
    try:
        return _find(root, path, videos)
    except (DatasetError, OSError) as error:
        return Finding(path, problem=str(error))
    except Exception as error:  # of whatever nobody thought of; it must not stop the scan of a thousand others
        return Finding(path, problem=f"{root} cannot be read: {error!r}; copy the dataset again.")


def _find(root: Path, path: str, videos: bool) -> Finding:
    dataset = open_robocoin(root)
    said = _metadata(dataset)
    try:
        # What is recorded of a gripper is for `units` to say.
        mapped = Mapped(dataset, LAYOUT, dataset.robot, Reading(gripper=AS_NAMED))
    except DatasetError as error:
        return Finding(path, **said, unmappable=str(error))
    has = {"state": mapped.state_present, "action": mapped.action_present}
    said["present"] = {kind: tuple(np.array(LAYOUT.names)[has[kind]].tolist()) for kind in KINDS}
    said["absent"] = mapped.embodiment.absent
    said["videos"] = tuple(too_short(mapped)) if videos else ()
    return Finding(path, **said, **_rows(dataset, mapped.embodiment))


# ---------------------------------------------------------------- metadata
def _metadata(dataset: Episodes) -> dict[str, Any]:
    names = {kind: getattr(dataset, f"{kind}_names") for kind in KINDS}
    checked = check_names(names)
    driven = {kind: {number_of(name) for name in names[kind]} for kind in KINDS}
    joints = [sum(name.startswith(f"{side}_arm_joint") for name in driven["action"]) for side in SIDES]
    hands = [sum(name.startswith(f"{side}_hand_joint") for name in names["action"]) for side in SIDES]
    return {
        "robot": dataset.robot,
        "rate": dataset.fps,
        "lengths": tuple(dataset.lengths.tolist()),
        "instructions": len(dataset.instructions),
        "cameras": tuple(dataset.cameras),
        "names": names,
        "layout": default_layout([*names.values()]).name,
        "arms": sum(map(bool, joints)),
        "joints": max(joints),
        "hands": max(hands),
        "gripper": all(any(map(is_gripper, numbers)) for numbers in driven.values()),
        "unnamed": {kind: places for kind, places in checked.unnamed.items() if places},
        "misplaced": tuple(dict.fromkeys(name for kind in KINDS for name in checked.misplaced[kind])),
    }


# ---------------------------------------------------------------- rows
def _rows(dataset: Episodes, embodiment: Embodiment) -> dict[str, Any]:
    """What all episodes that can be read show together, and which cannot."""
    broken: dict[int, str] = {}
    off = 0.0
    checks = RowChecks(*_vectors(dataset, embodiment), LAYOUT.names)
    for episode, length in enumerate(dataset.lengths):
        try:
            states, actions = dataset.states(episode), dataset.actions(episode)
            places = dataset.timestamps(episode) * np.float64(dataset.fps)
            checks.add(episode, states, actions, bad_rows(dataset, episode), gripper_scales(dataset, episode))
        except (DatasetError, OSError) as error:
            broken[episode] = str(error)
        else:
            off = max(off, float(np.abs(places - np.arange(length)).max()))
    said = {"problem": next(iter(broken.values()), ""), "broken": tuple(broken), "off": round(off, 4)}
    return said if len(broken) == len(dataset.lengths) else said | _shown(checks.finish(), dataset.fps)


def _vectors(dataset: Episodes, embodiment: Embodiment) -> list[Vector]:
    """State and action, grippers in a unit of about their size: in it a tail shows whether it stands still."""
    few = range(0, len(dataset.lengths), -(-len(dataset.lengths) // SAMPLED))
    vectors = []
    for vector, read in ((embodiment.state, dataset.states), (embodiment.action, dataset.actions)):
        grippers = [place for name, place in zip(LAYOUT.names, vector.places, strict=True) if is_gripper(name)]
        there = [place for place in grippers if place >= 0]
        greatest = 0.0
        for episode in few:
            try:
                greatest = max(greatest, float(np.abs(read(episode)[:, there]).max(initial=0)))
            except (DatasetError, OSError):
                continue  # it is met again
        unit = power_of_ten(greatest)
        one = tuple(unit if is_gripper(name) else 1.0 for name in LAYOUT.names)
        vectors.append(dataclasses.replace(vector, one=one))
    return vectors


def power_of_ten(greatest: float) -> float:
    """1, 10, 100, ...: the first that numbers up to `greatest` fit into, or nearly."""
    return 10.0 ** max(0, int(np.ceil(np.log10(max(greatest, 1e-9) / ROOM))))


def _shown(rows: RowFindings, rate: float) -> dict[str, Any]:
    grippers = [
        Grip(
            gripper.side,
            kind,
            **{key: float(f"{value:.6g}") for key, value in dataclasses.asdict(opening.recorded).items()},
            scale=opening.scale,
        )
        for gripper in rows.grippers
        for kind, opening in gripper.openings.items()
    ]
    return {
        "bad": sum(rows.bad),
        "still": sum(count > STILL_SECONDS * rate for count in rows.still),
        "grippers": tuple(grippers),
        "together": {gripper.side: gripper.together for gripper in rows.grippers if gripper.together is not None},
        "equal": rows.equal_driven == len(rows.rows),
        "crossed": rows.crossed,
    }
