"""Subset files: which datasets a mixture has, how often each is drawn, and how its robot is read."""

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.paths import local_path
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.resampled import Resampled, same_rate
from data_pipelines.readers.robocoin import CAMERAS, LAYOUTS, Mapped, UnmappableError, open_robocoin


@dataclass(frozen=True)
class Entry:
    """A dataset of a subset file.

    name: what it is called from then on, of letters, digits, dots, _ and -.  path: its folder, relative to the subset
    file.  weight: its share of a mixture is weight / sum of weights.  robot: name of the embodiment, in place of the
    recorded one; datasets of one robot share statistics.  layout: of LAYOUTS.  cameras: {view: recorded camera}, only
    these views are used; left out, all three are found by name.  if_unmappable: "error", or "skip" to go on without
    this dataset.  fps: its rows per second, where the recorded label is wrong.  rate: rows per second to use of it,
    which the subset file says once for all of them.
    """

    name: str
    path: Path
    weight: float
    robot: str
    layout: str
    cameras: Mapping[str, str] | None = field(default=None, hash=False)
    if_unmappable: str = "error"
    fps: float | None = None
    rate: float | None = None

    def open(self) -> Episodes:
        """The dataset in its layout, at its rate."""
        mapped = Mapped(open_robocoin(self.path), LAYOUTS[self.layout], self.robot, self.cameras)
        if self.fps is None and self.rate is None:
            return mapped
        return Resampled(mapped, self.rate or self.fps, self.fps)


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture. name: as the subset file calls it, "" for a dataset alone.  weight: see `Entry`."""

    name: str
    dataset: Episodes
    weight: float = 1.0


def load_subset(path: str | Path) -> list[Entry]:
    """The datasets of a subset file, a TOML file with a table [[dataset]] for each, in its order, and perhaps a rate.

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
    tables, rate = content.pop("dataset", None), content.pop("rate", None)
    if content or not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise DatasetError(
            f"{path} must hold tables [[dataset]], at least one, and besides them only a rate; found "
            f"{', '.join([*content, *(['dataset'] if tables is not None else [])]) or 'nothing'}."
        )
    if rate is not None:
        _check(rate, _RATE, f"{path}: rate")
    entries = [_entry(table, f"{path}, dataset {number}", path.parent, rate) for number, table in enumerate(tables, 1)]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"{path} names {', '.join(twice)} more than once; give every dataset its own name.")
    return entries


def open_subset(entries: Sequence[Entry]) -> tuple[dict[str, Episodes], dict[str, str]]:
    """({name: dataset}, {name: why it was skipped}). Only what an entry allows to skip is skipped."""
    opened, skipped = {}, {}
    for entry in entries:
        try:
            opened[entry.name] = entry.open()
        except UnmappableError as error:
            if entry.if_unmappable == "error":
                raise
            skipped[entry.name] = str(error)
    return opened, skipped


def as_recorded(dataset: Episodes) -> tuple[Episodes, list[str]]:
    """What `Entry.open` built a dataset on, and what its cameras are called there; of any other, itself."""
    cameras = list(dataset.cameras)
    while isinstance(dataset, Mapped | Resampled):
        if isinstance(dataset, Mapped):
            cameras = [dataset.views[view] for view in cameras]
        dataset = dataset.source
    return dataset, cameras


def open_datasets(path: str | Path) -> list[Part]:
    """The datasets at a path and their weights: the one in a folder, or all of a subset file (.toml).

    What a subset file allows to skip, and does not fit, is named on stdout and left out.
    """
    if Path(path).suffix != ".toml":
        return [Part("", open_episodes(path))]
    entries = load_subset(path)
    opened, skipped = open_subset(entries)
    for name, reason in skipped.items():
        print(f"skipping {name}: {reason}", flush=True)
    parts = [Part(entry.name, opened[entry.name], entry.weight) for entry in entries if entry.name in opened]
    check_parts(parts, path)
    return parts


def check_parts(parts: Sequence[Part], path: str | Path) -> None:
    """Raises DatasetError where a subset file has no dataset left, or some that differ in their rows per second."""
    if not parts:
        raise DatasetError(f"{path}: every dataset was skipped; correct the layouts or cameras of at least one.")
    rates = {part.name: part.dataset.fps for part in parts}
    low = min(rates.values())
    if not all(same_rate(rate, low) for rate in rates.values()):
        listed = ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
        raise DatasetError(
            f"{path} mixes datasets of different rows per second: {listed}. A chunk would last longer in one than in "
            f"another, and they would be trained as one. Write rate = {low:g} above the first [[dataset]] to use all "
            "at that rate, by leaving out rows; where a recorded rate is wrong, give its dataset the true one as fps."
        )


def _entry(table: dict[str, Any], where: str, folder: Path, rate: float | None) -> Entry:
    where = f"{where} ({table['name']})" if "name" in table else where
    if "rate" in table:
        raise DatasetError(f"{where}: rate is one for all datasets; write it above the first [[dataset]].")
    optional = [key for key in _RULES if key in ("cameras", "if_unmappable", "fps")]
    unknown = [key for key in table if key not in _RULES]
    missing = [key for key in _RULES if key not in table and key not in optional]
    if unknown or missing:
        raise DatasetError(
            f"{where}: {'unknown ' + ', '.join(unknown) if unknown else 'lacks ' + ', '.join(missing)}; a dataset has "
            f"{', '.join(key for key in _RULES if key not in optional)} and may have {', '.join(optional)}."
        )
    for key, value in table.items():
        _check(value, _RULES[key], f"{where}: {key}")
    return Entry(**table | {"path": folder / local_path(table["path"])}, rate=rate)


def _check(value: Any, rule: "Rule", what: str) -> None:
    kind, holds, expected = rule
    if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
        raise DatasetError(f"{what} is {value!r}, expected {expected}.")


def is_name(text: str) -> bool:
    """Whether a text can name a dataset or robot: letters, digits, dots, _ and -, the first a letter or digit."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def _are_views(value: dict[str, Any]) -> bool:
    names = [name for name in value.values() if isinstance(name, str) and name]
    return "cam_high" in value and value.keys() <= CAMERAS.keys() and len(set(names)) == len(value)


# Of a value: its kind, a test, and what was expected.
Rule = tuple[type | tuple[type, ...], Callable[[Any], bool], str]
_RATE: Rule = ((int, float), lambda value: 0 < value < math.inf, "rows per second, a positive number")
_RULES: dict[str, Rule] = {  # of each entry of a [[dataset]]
    "name": (str, is_name, "letters, digits, dots, _ and -"),
    "path": (str, bool, "the dataset's folder"),
    "weight": ((int, float), lambda value: 0 < value < math.inf, "a positive number"),
    "robot": (str, is_name, "letters, digits, dots, _ and -"),
    "layout": (str, LAYOUTS.__contains__, f"one of {', '.join(LAYOUTS)}"),
    "cameras": (
        dict,
        _are_views,
        f"a table of the views {', '.join(CAMERAS)}, cam_high among them, each with a recorded camera of its own",
    ),
    "if_unmappable": (str, ("error", "skip").__contains__, '"error" or "skip"'),
    "fps": _RATE,
}
