"""Per-dimension statistics of states and actions, and with them how each number is normalised.

They come from the rows alone, no video is opened: every batch of episodes gives a `Partial`, and partials merge
exactly, so that threads, hosts and datasets may share the work in any way.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipelines import normalization
from data_pipelines.disk import whole_file
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.files import absent, read_json
from data_pipelines.normalization import RELEASED, RULES, Normalization
from data_pipelines.paths import local_path
from data_pipelines.readers.layouts import gripper_moves, is_gripper

NAMES = ("mean", "std", "min", "max", "q01", "q99")
KINDS = ("state", "action")
TAIL = 0.01  # q01 and q99 leave this share of the rows outside
BATCH_ROWS = 16_384  # rows a thread reduces at a time
FILE = "dataset_stats.json"
UNLIKE = 5.0  # grippers of one robot whose greatest values differ by more are not in one unit

Statistics = dict[str, dict[str, np.ndarray]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Partial:
    """What some of `total` rows contribute to the statistics of all of them.

    total: rows there are altogether.  count: rows seen so far.  mean, m2: float64 [d], m2 the sum of squared
    deviations from the mean.  min, max: float64 [d].  low, high: float64 [d, k], the smallest and the largest values
    seen, ascending, k = min(count, tail_length(total)).

    The q-quantile of n sorted values lies between places floor(q (n - 1)) and the next. With n known beforehand, q01
    needs the tail_length(n) smallest values and q99 as many of the largest. Those of a union are among those of its
    parts, so cutting the tails loses nothing, whichever way rows are grouped.
    """

    total: int
    count: int
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, total: int) -> "Partial":
        """Of `rows` [n, d], at least one, out of `total`."""
        rows, keep = rows.astype(np.float64), tail_length(total)
        # Relative to one of its rows, a dimension that never moves has exactly its own mean and no deviation.
        moved = rows - rows[0]
        mean = moved.mean(0)
        m2 = np.square(moved - mean).sum(0)
        ordered = np.sort(np.ascontiguousarray(rows.T), axis=1)
        low, high = ordered[:, :keep], ordered[:, -keep:]
        return cls(total, len(rows), rows[0] + mean, m2, ordered[:, 0], ordered[:, -1], low, high)

    def merge(self, other: "Partial") -> "Partial":
        """Of the rows of both: mean, m2 up to rounding, the rest to the bit.

        Raises ValueError where the partials expect different totals.
        """
        if self.total != other.total:
            raise ValueError(f"Partials out of {self.total} and {other.total} rows do not merge: compute them anew.")
        count, keep = self.count + other.count, tail_length(self.total)
        shift = other.mean - self.mean
        return Partial(
            self.total,
            count,
            self.mean + shift * (other.count / count),
            self.m2 + other.m2 + shift**2 * (self.count * other.count / count),
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
            np.sort(np.concatenate([self.low, other.low], 1), axis=1)[:, :keep],
            np.sort(np.concatenate([self.high, other.high], 1), axis=1)[:, -keep:],
        )

    def finish(self) -> dict[str, np.ndarray]:
        """mean, std, min, max, q01, q99, each float64 [d]. Raises ValueError while rows are missing."""
        if self.count != self.total:
            raise ValueError(f"The statistics of {self.total} rows have seen {self.count}: merge each row once.")
        place = TAIL * (self.total - 1)
        low = _between(self.low, place)
        # The same place from the top, counted as numpy does from the bottom.
        high = _between(self.high, (1 - TAIL) * (self.total - 1) - (self.total - self.high.shape[1]))
        values = (self.mean, np.sqrt(self.m2 / self.count), self.min, self.max, low, high)
        return dict(zip(NAMES, values, strict=True))


def tail_length(total: int) -> int:
    """How many of the smallest (and largest) of `total` values decide the 1% (and 99%) quantile."""
    return min(total, int(TAIL * (total - 1)) + 2)


def compute_statistics(dataset: Episodes, how: Normalization = RELEASED) -> Statistics:
    """{"state": s, "action": a}, each with mean, std, min, max, q01, q99 as float64 [d], from the rows alone, and, as
    `how` says it of each number, normalization str [d] and clip float64 [d].

    Every row of every episode counts once; units are those of the recording. Raises DatasetError for numbers that
    `how` names and the dataset has not.
    """
    return _compute([dataset], how)


def compute_by_robot(datasets: Iterable[Episodes], how: Normalization = RELEASED) -> dict[str, Statistics]:
    """Statistics of each robot over all of its datasets, by `robot`.

    Raises DatasetError where datasets of one robot differ in what their numbers mean or in the unit of a gripper, and
    as `compute_statistics`.
    """
    groups = _by_robot(datasets)
    for robot, (first, *others) in groups.items():
        for other in others:
            if _meaning(other) != _meaning(first):
                raise DatasetError(
                    f"{other.root} and {first.root} are both of the robot {robot!r}, but their states or actions "
                    "differ in width, names or which numbers are there; map them to one layout or name the robots "
                    "apart."
                )
    return {robot: _compute(group, how) for robot, group in groups.items()}


def grippers_unlike(robot: str, number: str, ranges: Mapping[str, tuple[float, float, float]]) -> str:
    """What is wrong with a gripper's (least, greatest value, standard deviation) in the datasets of a robot, by
    folder; "" for nothing.

    Those in which it does not move tell no unit.
    """
    moving = {name: (low, high) for name, (low, high, std) in ranges.items() if gripper_moves(low, high, std)}
    reach = {name: max(map(abs, ends)) for name, ends in moving.items()}
    if not reach or max(reach.values()) <= UNLIKE * min(reach.values()):
        return ""
    small, large = (of(reach, key=reach.__getitem__) for of in (min, max))
    told = (f"from {moving[name][0]:.4g} to {moving[name][1]:.4g} in {name}" for name in (small, large))
    return (
        f"The robot {robot!r} has its {number} {' and '.join(told)}, which cannot be one unit: their statistics would "
        "fit neither. In the subset file, write what one of them records of a closed and of an open gripper, as in "
        'gripper = { closed = 0.0, open = 100.0 }, leave it out by exclude = "...", or name the robots apart.'
    )


def describe_losses(datasets: Iterable[Episodes], statistics: Mapping[str, Statistics]) -> Iterator[str]:
    """What normalising by `statistics`, by robot, takes from the rows of these datasets, in sentences.

    The rows need not be those of the statistics.
    """
    for robot, group in _by_robot(datasets).items():
        stats = statistics[robot]
        runs = _of_rows(group, lambda rows, stats=stats: {kind: _cut(rows(kind), stats[kind]) for kind in KINDS})
        parts = [part for of_dataset in runs for part in of_dataset]
        total = sum(dataset.lengths.sum() for dataset in group)
        for kind in KINDS:
            low, high, cut = (np.stack(x) for x in zip(*(part[kind] for part in parts), strict=True))
            names, ends = getattr(group[0], f"{kind}_names"), np.stack([low.min(0), high.max(0)])
            for sentence in normalization.losses(kind, names, stats[kind], ends, cut.sum(0) / total):
                yield f"robot {robot!r}: {sentence}" if robot else sentence


def save_statistics(stats: Statistics, path: str | Path) -> None:
    """Writes `stats` as the release's dataset_stats.json, to that file; normalization and clip lie beside the numbers
    that the release reads."""
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {
        kind: {
            "default": {
                f"global_{name}" if name in NAMES else name: values.tolist() for name, values in stats[kind].items()
            }
        }
        for kind in KINDS
    }
    with whole_file(path) as partial:
        partial.write_text(json.dumps(lists, indent=1) + "\n")


def load_statistics(path: str | Path) -> Statistics:
    """Reads a release's dataset_stats.json: {"state" | "action": {field: {"global_mean": [d], ...}}}.

    Several fields of a state or action (arms, grippers) are put side by side in the file's order, as the release
    does. Its stepwise_* entries, statistics per row of a window, are not used. A field that does not say how it is
    normalised is so as in the release.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path} {absent(path)}; give the dataset_stats.json that came with the checkpoint.")
    fields = read_json(path, DatasetError, "download or compute it again")
    try:
        read = {kind: [_read_field(kind, field) for field in fields[kind].values()] for kind in KINDS}
        stats = {kind: {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
                 for kind, parts in read.items()}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DatasetError(
            f"{path} must hold global_{', global_'.join(NAMES)} for the fields of state and action ({error!r}); "
            "download or compute it again."
        ) from error
    for kind, values in stats.items():
        numbers = [x for name, x in values.items() if name != "normalization"]
        if len({len(x) for x in values.values()}) != 1 or not all(np.isfinite(x).all() for x in numbers):
            raise DatasetError(f"{path} has {kind} statistics of differing lengths or that are not finite.")
        if not set(values["normalization"].tolist()) <= set(RULES) or (values["clip"] < 0).any():
            raise DatasetError(
                f"{path} must normalise every number of the {kind} by {', '.join(RULES)}, cut at 0 or more; take the "
                "file as it was written."
            )
    return stats


def save_by_robot(stats: Mapping[str, Statistics], folder: str | Path) -> None:
    """Writes <folder>/<robot>/dataset_stats.json for each robot."""
    for robot, of_robot in stats.items():
        if robot in ("", "..") or Path(robot).name != robot:
            raise DatasetError(f"The robot {robot!r} cannot name a folder: give it a name of letters and digits.")
        save_statistics(of_robot, local_path(folder) / robot / FILE)


def load_by_robot(folder: str | Path) -> dict[str, Statistics]:
    """Reads what `save_by_robot` wrote: {robot: statistics}."""
    paths = sorted(Path(folder).glob(f"*/{FILE}"))
    if not paths:
        raise DatasetError(f"{folder} holds no <robot>/{FILE}; compute the statistics of its robots first.")
    return {path.parent.name: load_statistics(path) for path in paths}


def to_lists(stats: Mapping[str, Statistics]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Statistics by robot as JSON can hold them."""
    return {
        robot: {kind: {name: x.tolist() for name, x in values.items()} for kind, values in of_robot.items()}
        for robot, of_robot in stats.items()
    }


def pick_robot(stats: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], robot: str | None) -> Statistics:
    """The statistics of one robot out of what `to_lists` made; None for the only one there is.

    Raises DatasetError where that one is not there, or several are and none is named.
    """
    if robot is None and len(stats) == 1:
        robot = next(iter(stats))
    if robot not in stats:
        raise DatasetError(
            f"There are statistics of the robots {', '.join(map(repr, stats)) or '(none)'}, "
            f"{'none was chosen' if robot is None else f'not of {robot!r}'}; name one of them."
        )
    return {
        kind: _as_released(kind, {name: np.array(x) for name, x in values.items()})
        for kind, values in stats[robot].items()
    }


def _read_field(kind: str, field: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    """One field of a dataset_stats.json."""
    values = {name: np.array(field[f"global_{name}"], np.float64) for name in NAMES}
    own = {name: np.array(field[name]) for name in ("normalization", "clip") if name in field}
    return _as_released(kind, values | own)


def _as_released(kind: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`values` with the release's normalisation where they do not say theirs."""
    return values | {k: x for k, x in RELEASED.of(kind, (), len(values["mean"])).items() if k not in values}


def _meaning(dataset: Episodes) -> tuple:
    present = (tuple(x.tolist()) for x in (dataset.state_present, dataset.action_present))
    return dataset.state_dim, dataset.action_dim, dataset.state_names, dataset.action_names, *present


def _by_robot(datasets: Iterable[Episodes]) -> dict[str, list[Episodes]]:
    groups: dict[str, list[Episodes]] = {}
    for dataset in datasets:
        groups.setdefault(dataset.robot, []).append(dataset)
    return groups


def _compute(datasets: Sequence[Episodes], how: Normalization) -> Statistics:
    first, total = datasets[0], int(sum(dataset.lengths.sum() for dataset in datasets))
    # Before the rows are read: a misspelt name is told at once.
    chosen = {
        "state": how.of("state", first.state_names, first.state_dim),
        "action": how.of("action", first.action_names, first.action_dim),
    }
    runs = _of_rows(datasets, lambda rows: {kind: Partial.of(rows(kind), total) for kind in KINDS})
    for kind in KINDS:
        _check_grippers(kind, datasets, [[part[kind] for part in of_dataset] for of_dataset in runs])
    partials = [part for of_dataset in runs for part in of_dataset]
    return {kind: reduce(Partial.merge, (part[kind] for part in partials)).finish() | chosen[kind] for kind in KINDS}


def _check_grippers(kind: str, datasets: Sequence[Episodes], runs: Sequence[Sequence[Partial]]) -> None:
    """Raises DatasetError where a gripper of the layout has not one unit. runs: of each dataset."""
    for d, name in enumerate(getattr(datasets[0], f"{kind}_names")):
        if is_gripper(name):
            ranges = {
                str(dataset.root): _range(parts, d) for dataset, parts in zip(datasets, runs, strict=True)
            }
            if problem := grippers_unlike(datasets[0].robot, f"{name} ({kind})", ranges):
                raise DatasetError(problem)


def _range(parts: Sequence[Partial], d: int) -> tuple[float, float, float]:
    """Least and greatest value and standard deviation of number `d`, the tails of the partials not merged."""
    counts, means = (np.array([getattr(part, name) for part in parts]) for name in ("count", "mean"))
    total = counts.sum()
    apart = counts @ np.square(means[:, d] - counts @ means[:, d] / total)
    std = np.sqrt((sum(part.m2[d] for part in parts) + apart) / total)
    return min(part.min[d] for part in parts), max(part.max[d] for part in parts), std


def _cut(rows: np.ndarray, stats: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least and greatest value of rows [n, d], and in how many of them normalising cuts it, each [d]."""
    return rows.min(0), rows.max(0), (rows != normalization.recoverable(rows, stats)).sum(0)


def _of_rows(
    datasets: Sequence[Episodes], work: Callable[[Callable[[str], np.ndarray]], Result]
) -> list[list[Result]]:
    """What `work` makes of runs of rows, by dataset; all runs together are the rows of the datasets. It is called in
    threads with a function that reads the run's states or actions [n, d]."""

    def of(task: tuple[Episodes, range]) -> Result:
        dataset, batch = task
        read = {"state": dataset.states, "action": dataset.actions}
        return work(lambda kind: np.concatenate([read[kind](episode) for episode in batch]))

    tasks = [[(dataset, batch) for batch in _batches(dataset.lengths)] for dataset in datasets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(of, [task for of_dataset in tasks for task in of_dataset])
        return [[next(done) for _ in of_dataset] for of_dataset in tasks]


def _batches(lengths: np.ndarray) -> list[range]:
    """Runs of episodes of about BATCH_ROWS rows together."""
    number = (np.cumsum(lengths) - lengths) // BATCH_ROWS
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _between(ordered: np.ndarray, place: float) -> np.ndarray:
    """Linear interpolation at a fractional place of ordered [d, k], rounding as numpy's quantile does."""
    before = int(place)
    after, part = min(before + 1, ordered.shape[1] - 1), place - before
    a, b = ordered[:, before], ordered[:, after]
    return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)
