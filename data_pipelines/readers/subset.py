"""Subset files: which datasets a mixture has, how often each is drawn, and how its robot is read."""

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.paths import local_path
from data_pipelines.readers.excerpt import Excerpt, excerpt
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.naming import KINDS, Gripper, Reading, UnmappableError, are_numbers, are_views
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.resampled import Resampled, same_rate
from data_pipelines.readers.robocoin import Mapped, open_robocoin
from data_pipelines.readers.selected import Selected

NAMED = 3  # datasets named for each reason that some are skipped for


@dataclass(frozen=True)
class Entry:
    """A dataset of a subset file.

    name: what it is called from then on, of letters, digits, dots, _ and -.  path: its folder, relative to the subset
    file.  weight: its share of a mixture is weight / sum of weights.  robot: name of the embodiment, in place of the
    recorded one; datasets of one robot share statistics.  layout: of LAYOUTS, "" for the robot's own default.  said:
    how its numbers, grippers and cameras are read, where names do not tell.  if_unmappable: "error", or "skip" to go
    on without this dataset.  fps: its rows per second, where the recorded label is wrong.  rate: rows per second to
    use of it, which the subset file says once for all of them.  exclude: why it is left out, "" where it is not.
    without, still_tail: see `excerpt`.
    """

    name: str
    path: Path
    weight: float
    robot: str
    layout: str = ""
    said: Reading = Reading()
    if_unmappable: str = "error"
    fps: float | None = None
    rate: float | None = None
    exclude: str = ""
    without: tuple[int, ...] = ()
    still_tail: float | None = None

    def open(self) -> Episodes:
        """The dataset in its layout, without the rows to leave out, at its rate."""
        mapped = Mapped(open_robocoin(self.path), LAYOUTS.get(self.layout), self.robot, self.said)
        rest = excerpt(mapped, self.without, self.still_tail, self.fps)
        if self.fps is None and self.rate is None:
            return rest
        return Resampled(rest, self.rate or self.fps, self.fps)


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture. name: as the subset file calls it, "" for a dataset alone.  weight: see `Entry`."""

    name: str
    dataset: Episodes
    weight: float = 1.0


def load_subset(path: str | Path) -> list[Entry]:
    """The datasets of a subset file, a TOML file with a table [[dataset]] for each, in its order.

    Before them it may have a rate and a layout for all, and a table [robot.NAME] of how a robot is read.

    Raises DatasetError, naming the file and the dataset, for whatever is missing, misspelled or of the wrong kind.
    Opens no dataset.
    """
    path = local_path(path)
    if not path.is_file():
        raise DatasetError(
            f"{path} does not exist; see data_pipelines/readers/robocoin_example.toml for a subset file."
        )
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not valid TOML: {error}; correct it.") from error
    tables = content.pop("dataset", None)
    head = {key: content.pop(key) for key in _HEAD if key in content}
    if content or not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise DatasetError(
            f"{path} must hold tables [[dataset]], at least one, and besides them only {', '.join(_HEAD)}; found "
            f"{', '.join([*content, *(['dataset'] if tables is not None else [])]) or 'nothing'}."
        )
    for key, value in head.items():
        _check(value, _HEAD[key], f"{path}: {key}")
    robots = {
        name: _reading(table, f"{path}: robot.{name}", _ROBOT) for name, table in head.pop("robot", {}).items()
    }
    entries = [
        _entry(table, f"{path}, dataset {number}", path.parent, head, robots) for number, table in enumerate(tables, 1)
    ]
    if idle := sorted(robots.keys() - {entry.robot for entry in entries}):
        raise DatasetError(f"{path} has tables of the robots {', '.join(idle)}, which no dataset has; correct a name.")
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"{path} names {', '.join(twice)} more than once; give every dataset its own name.")
    return entries


def open_subset(entries: Sequence[Entry]) -> tuple[dict[str, Episodes], dict[str, str]]:
    """({name: dataset}, {name: why it was skipped}). Only what an entry allows to skip, or excludes, is skipped."""
    opened, skipped = {}, {}
    for entry in entries:
        if entry.exclude:
            skipped[entry.name] = entry.exclude
            continue
        try:
            opened[entry.name] = entry.open()
        except UnmappableError as error:
            if entry.if_unmappable == "error":
                raise
            skipped[entry.name] = str(error)
    return opened, skipped


def told(skipped: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason: as "a: why", or "12 datasets, a, b, c and 9 more: why". skipped: {dataset: reason}."""
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        few = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        yield f"{f'{len(names)} datasets, ' if len(names) > 1 else ''}{few}: {reason}"


def as_recorded(dataset: Episodes) -> tuple[Episodes, list[str]]:
    """What `Entry.open` built a dataset on, and what its cameras are called there; of any other, itself."""
    cameras = list(dataset.cameras)
    while isinstance(dataset, Mapped | Selected):
        if isinstance(dataset, Mapped):
            cameras = [dataset.views[view] for view in cameras if view in dataset.views]
        dataset = dataset.source
    return dataset, cameras


def origin_of(dataset: Episodes) -> np.ndarray:
    """The recorded episode that each episode is from, int64 [E]; an excerpt may hold several pieces of one."""
    if not hasattr(dataset, "source"):
        return getattr(dataset, "origin", np.arange(len(dataset.lengths)))
    below = origin_of(dataset.source)
    return below[dataset.origin] if isinstance(dataset, Excerpt) else below


def embodiment_of(dataset: Episodes) -> Embodiment | None:
    """How the robot's own vectors were brought to the dataset's; None of one that is read as it was recorded."""
    while not hasattr(dataset, "embodiment"):
        if not hasattr(dataset, "source"):
            return None
        dataset = dataset.source
    return dataset.embodiment


def open_datasets(path: str | Path) -> list[Part]:
    """The datasets at a path and their weights: the one in a folder, or all of a subset file (.toml).

    What a subset file excludes, or allows to skip and does not fit, is named on stdout and left out.
    """
    if Path(path).suffix != ".toml":
        return [Part("", open_episodes(path))]
    entries = load_subset(path)
    opened, skipped = open_subset(entries)
    for line in told(skipped):
        print(f"skipping {line}", flush=True)
    parts = [Part(entry.name, opened[entry.name], entry.weight) for entry in entries if entry.name in opened]
    check_parts(parts, path)
    return parts


def check_parts(parts: Sequence[Part], path: str | Path) -> None:
    """Raises DatasetError where a subset file has no dataset left, or some that differ in their rows per second."""
    if not parts:
        raise DatasetError(f"{path}: every dataset was skipped; correct the layouts or cameras of at least one.")
    widths = {part.name: part.dataset.action_dim for part in parts}
    if len({*widths.values()}) > 1:
        few = [next(name for name, found in widths.items() if found == width) for width in sorted({*widths.values()})]
        told = ", ".join(f"{widths[name]} numbers ({name})" for name in few)
        raise DatasetError(
            f'{path} mixes layouts: {told}. Write layout = "two_arms" above the first [[dataset]], which holds all '
            "robots, or train on them apart."
        )
    rates = {part.name: part.dataset.fps for part in parts}
    low = min(rates.values())
    if not all(same_rate(rate, low) for rate in rates.values()):
        listed = ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
        raise DatasetError(
            f"{path} mixes datasets of different rows per second: {listed}. A chunk would last longer in one than in "
            f"another, and they would be trained as one. Write rate = {low:g} above the first [[dataset]] to use all "
            "at that rate, by leaving out rows; where a recorded rate is wrong, give its dataset the true one as fps."
        )


def _entry(
    table: dict[str, Any], where: str, folder: Path, head: Mapping[str, Any], robots: Mapping[str, Reading]
) -> Entry:
    where = f"{where} ({table['name']})" if "name" in table else where
    if "rate" in table:
        raise DatasetError(f"{where}: rate is one for all datasets; write it above the first [[dataset]].")
    unknown = [key for key in table if key not in _RULES]
    missing = [key for key in _NEEDED if key not in table]
    if unknown or missing:
        raise DatasetError(
            f"{where}: {'unknown ' + ', '.join(unknown) if unknown else 'lacks ' + ', '.join(missing)}; a dataset has "
            f"{', '.join(_NEEDED)} and may have {', '.join(key for key in _RULES if key not in _NEEDED)}."
        )
    for key, value in table.items():
        _check(value, _RULES[key], f"{where}: {key}")
    rest = {key: value for key, value in table.items() if key not in _ROBOT}
    said = _reading({key: value for key, value in table.items() if key in _ROBOT}, where, _ROBOT)
    rest |= {"path": folder / local_path(table["path"]), "without": tuple(table.get("without", ()))}
    return Entry(**head | rest, said=said.over(robots.get(table["robot"], Reading())))


def _reading(table: Any, where: str, rules: Mapping[str, "Rule"]) -> Reading:
    """What a table says of a robot or dataset."""
    if not isinstance(table, dict) or not table.keys() <= rules.keys():
        raise DatasetError(f"{where} must be a table that may have {', '.join(rules)}.")
    for key, value in table.items():
        _check(value, rules[key], f"{where}: {key}")
    gripper = Gripper.parse(table["gripper"], f"{where}: gripper") if "gripper" in table else None
    return Reading(**{**table, "gripper": gripper})


def _check(value: Any, rule: "Rule", what: str) -> None:
    kind, holds, expected = rule
    if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
        raise DatasetError(f"{what} is {value!r}, expected {expected}.")


def is_name(text: str) -> bool:
    """Whether a text can name a dataset or robot: letters, digits, dots, _ and -, the first a letter or digit."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


# Of a value: its kind, a test, and what was expected.
Rule = tuple[type | tuple[type, ...], Callable[[Any], bool], str]
_RATE: Rule = ((int, float), lambda value: 0 < value < math.inf, "rows per second, a positive number")
_LAYOUT: Rule = (str, LAYOUTS.__contains__, f"one of {', '.join(LAYOUTS)}")
_NUMBERS: Rule = (
    dict,
    are_numbers,
    'a table of numbers of a layout, each with its recorded name or place, as { left_arm_joint_7_rad = 6 }, or "" for '
    "one that the robot has not",
)
_ROBOT: dict[str, Rule] = {  # of a [robot.NAME], and of each [[dataset]]
    "cameras": (
        dict,
        are_views,
        f"a table of the views {', '.join(CAMERAS)}, cam_high among them, each with a recorded camera of its own",
    ),
    "gripper": (dict, lambda value: True, "a table, as { closed = 0.0, open = 100.0 }"),
    **dict.fromkeys(KINDS, _NUMBERS),
    "lead": (int, lambda value: value >= 0, "rows by which the recorded action is early, 0 or more"),
}
_NEEDED: dict[str, Rule] = {
    "name": (str, is_name, "letters, digits, dots, _ and -"),
    "path": (str, bool, "the dataset's folder"),
    "weight": ((int, float), lambda value: 0 < value < math.inf, "a positive number"),
    "robot": (str, is_name, "letters, digits, dots, _ and -"),
}
_RULES: dict[str, Rule] = {  # of each entry of a [[dataset]]
    **_NEEDED,
    "layout": _LAYOUT,
    **_ROBOT,
    "if_unmappable": (str, ("error", "skip").__contains__, '"error" or "skip"'),
    "fps": _RATE,
    "exclude": (str, bool, "why the dataset is left out"),
    "without": (
        list,
        lambda value: all(type(x) is int and x >= 0 for x in value),
        "a list of episodes to leave out, from 0",
    ),
    "still_tail": ((int, float), lambda value: 0 <= value < math.inf, "seconds, a number that is not negative"),
}
_HEAD: dict[str, Rule] = {  # above the first [[dataset]]
    "rate": _RATE,
    "layout": _LAYOUT,
    "robot": (dict, lambda value: all(map(is_name, value)), "tables [robot.NAME]"),
}
