"""RoboCOIN: many robots brought to one vector and three views.

A RoboCOIN dataset is LeRobot v2.1, one folder per robot and task. Which number is which joint, and how the cameras
are called, varies by robot: both are mapped by name, never by place; see robots.toml.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.canvas import CAMERAS, HEAD
from data_pipelines.embodiment import Embodiment, Vector
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.files import read_json, read_json_lines
from data_pipelines.readers.layouts import Layout, default_layout, is_gripper
from data_pipelines.readers.lerobot import LeRobotV21
from data_pipelines.readers.lerobot_files import AGAIN, INFO
from data_pipelines.readers.naming import AS_NAMED, KINDS, SIDES, Reading, UnmappableError, find_cameras, reading_of
from data_pipelines.readers.opening import open_episodes

SUBTASKS = "annotations/subtask_annotations.jsonl"
SUBTASK_COLUMN = "subtask_annotation"
NOTHING = {"null", "end", "static", ""}  # subtasks that mean none
BAD = {"abnormal", "discard"}  # subtasks that mark rows nobody should learn from
NO_CAMERA = (2, 2)  # height and width of the black pictures in place of a camera that a robot has not


# ---------------------------------------------------------------- datasets
class RoboCoin(LeRobotV21):
    """A RoboCOIN dataset with its annotation of subtasks.

    The column subtask_annotation holds five numbers per row, -1 for an unused one; each is the subtask_index of a line
    of annotations/subtask_annotations.jsonl, {"subtask_index": 3, "subtask": "Lift the cup"}. What RoboCOIN does not
    define is assumed by its words: NOTHING are texts that stand for no subtask, BAD those that mark rows to leave out.
    """

    @cached_property
    def _of_number(self) -> dict[int, str]:
        return _read_subtasks(self.root / SUBTASKS)

    def subtasks(self, episode: int) -> list[str]:
        """What the robot is doing in each row, "" where nothing is annotated; several at a time are joined by "; "."""
        texts = {number: "" if _word(text) in NOTHING else text for number, text in self._of_number.items()}
        found: list[dict[str, None]] = [{} for _ in range(self.lengths[episode])]
        for row, number in zip(*(x.tolist() for x in self._annotated(episode)), strict=True):
            found[row] |= {texts[number]: None} if texts[number] else {}
        return list(map("; ".join, found))

    def bad_rows(self, episode: int) -> np.ndarray:
        """Which rows are marked as nothing to learn from, bool [T]."""
        bad = [number for number, text in self._of_number.items() if _word(text) in BAD]
        found = np.zeros(self.lengths[episode], bool)
        if bad:
            rows, numbers = self._annotated(episode)
            found[rows[np.isin(numbers, bad)]] = True
        return found

    def _annotated(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and their subtasks' numbers, int64 [n] each, in order: a row as often as it has subtasks."""
        path = self._data_path(episode)
        try:
            with pq.ParquetFile(path) as file:
                column = file.read([SUBTASK_COLUMN])[SUBTASK_COLUMN].combine_chunks()
            counts = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            rows = np.repeat(np.arange(self.lengths[episode]), counts)
            numbers = column.flatten().to_numpy(zero_copy_only=False)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(_unreadable(path, self.root, repr(error))) from error
        used = numbers != -1
        if unknown := sorted({*numbers[used].tolist()} - self._of_number.keys()):
            raise DatasetError(_unreadable(path, self.root, f"found {', '.join(map(str, unknown))}"))
        return rows[used], numbers[used]


def _word(text: str) -> str:
    return text.strip().strip(".").casefold()


def _unreadable(path: Path, root: Path, why: str) -> str:
    return (
        f"{path}: every row of {SUBTASK_COLUMN} must hold numbers listed in {root / SUBTASKS}, or -1 ({why}); copy "
        "the dataset again."
    )


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


def bad_rows(dataset: Episodes, episode: int) -> np.ndarray:
    """Which rows of any dataset are marked as nothing to learn from, bool [T]; none where nothing was annotated."""
    read = getattr(dataset, "bad_rows", None)
    return read(episode) if read else np.zeros(dataset.lengths[episode], bool)


def _has_gripper(layout: Layout, vector: Vector) -> bool:
    return any(has and is_gripper(name) for name, has in zip(layout.names, vector.present, strict=True))


class Mapped(Episodes):
    """Another dataset with its vectors in a layout's order and units, and its cameras under the names of the views.

    source: the dataset that is mapped.  layout: None for `default_layout`.  robot: name of the embodiment.  said: what
    a subset file says of it; the table robots.toml, by the recorded type of the robot, says the rest.
    Numbers that the robot has not are 0, views that it has no camera for, `embodiment.absent`, are black; `views` are
    {view: camera of the source} of the others.
    Raises UnmappableError where the source does not fit, DatasetError where it lacks a camera that is named.
    """

    def __init__(self, source: Episodes, layout: Layout | None, robot: str, said: Reading = Reading()) -> None:  # noqa: B008
        where = f"{source.root} (robot {robot!r})"
        said = said.over(reading_of(source.robot))
        names = {kind: getattr(source, f"{kind}_names") for kind in KINDS}
        layout = layout or default_layout(list(names.values()))
        unit = said.gripper or AS_NAMED
        vectors = {
            kind: layout.vector(
                names[kind],
                getattr(said, kind),
                dict(zip(SIDES, getattr(unit, kind), strict=True)),
                f"{where}: the {kind}",
            )
            for kind in KINDS
        }
        if said.doubtful and not said.gripper and any(_has_gripper(layout, vectors[kind]) for kind in KINDS):
            raise UnmappableError(
                f"{where}: {said.doubtful}. Look at its films and write what is recorded closed and open into the "
                f"subset file, as in gripper = {{ closed = 1.0, open = 0.0 }}."
            )
        self.views = dict(said.cameras) if said.cameras is not None else find_cameras(source.cameras, where)
        source.require_cameras(list(self.views.values()))
        absent = tuple(view for view in CAMERAS if view not in self.views)
        self.source, self.layout, self._lead = source, layout, said.lead
        self.embodiment = Embodiment(vectors["state"], vectors["action"], absent)
        self.root, self.robot, self.fps = source.root, robot, source.fps
        self.lengths, self.starts, self.instructions = source.lengths, source.starts, source.instructions
        self.cameras = dict.fromkeys(CAMERAS, NO_CAMERA) | {v: source.cameras[c] for v, c in self.views.items()}
        self.state_names = self.action_names = layout.names
        self.state_dim = self.action_dim = len(layout.names)
        self.state_present, self.action_present = vectors["state"].present, vectors["action"].present

    def states(self, episode: int) -> np.ndarray:
        return self.embodiment.state.to_layout(self.source.states(episode))

    def actions(self, episode: int) -> np.ndarray:
        rows = self.embodiment.action.to_layout(self.source.actions(episode))
        return rows[np.minimum(np.arange(len(rows)) + self._lead, len(rows) - 1)] if self._lead else rows

    def timestamps(self, episode: int) -> np.ndarray:
        return self.source.timestamps(episode)

    def instruction_index(self, episode: int) -> int:
        return self.source.instruction_index(episode)

    def instruction(self, episode: int) -> str:
        return self.source.instruction(episode)

    def subtasks(self, episode: int) -> list[str]:
        """See `subtasks`."""
        return subtasks(self.source, episode)

    def bad_rows(self, episode: int) -> np.ndarray:
        """See `bad_rows`."""
        return bad_rows(self.source, episode)

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        self.require_cameras([camera])
        if camera in self.embodiment.absent:
            return np.zeros((len(indices), *NO_CAMERA, 3), np.uint8)
        return self.source.frames(episode, self.views[camera], indices)

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        if camera in self.embodiment.absent:
            return self.source.picture_file(episode, self.views[HEAD])[0], "no camera, black"
        return self.source.picture_file(episode, self.views[camera])

    def require_cameras(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.cameras]
        if missing:
            raise DatasetError(
                f"{self.root} is mapped without {', '.join(missing)}; it has: {', '.join(self.cameras)}. Name the "
                "camera in the subset file."
            )


def _read_subtasks(path: Path) -> dict[int, str]:
    """{subtask_index: text}."""
    found: dict[int, str] = {}
    for where, record in read_json_lines(path, DatasetError, AGAIN):
        index, text = record.get("subtask_index"), record.get("subtask")
        if not isinstance(index, int) or not isinstance(text, str) or index in found:
            raise DatasetError(
                f'{where} must be {{"subtask_index": a number, "subtask": "a text"}}, each number once; {AGAIN}.'
            )
        found[index] = text
    return found
