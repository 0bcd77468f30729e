"""One page on a dataset, or on each of a subset file, and whether it can be trained on.

Exit status 0: fine, with or without warnings.  1: problems, each the sentence that would stop training.
130: interrupted; the page covers what was looked at until then.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.canvas import CAMERAS
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.inspection import robot_page
from data_pipelines.inspection.checks import (
    SAMPLED,
    WINDOW,
    Check,
    Speed,
    Table,
    check_frames,
    check_rows,
    describe_rows,
    loader_threads,
    measure,
    tabulate,
    unclaimed_frames,
)
from data_pipelines.inspection.video_headers import promised_frames
from data_pipelines.loader import Source, check_alike
from data_pipelines.normalization import CLIP
from data_pipelines.progress import Progress, finish_line
from data_pipelines.readers.base import Reader
from data_pipelines.readers.lerobot import LeRobotV21, LeRobotV30
from data_pipelines.readers.naming import Reading, UnmappableError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robotwin import RobotwinClassic, RobotwinXPolicyLab
from data_pipelines.readers.subset import Entry, Part, as_recorded, check_parts, load_subset, told
from data_pipelines.statistics import grippers_unlike
from data_pipelines.tfds.episodes import Converted

FORMATS = {
    LeRobotV21: "LeRobot v2.1",
    LeRobotV30: "LeRobot v3.0",
    RobotwinClassic: "RoboTwin, classic form",
    RobotwinXPolicyLab: "RoboTwin, XPolicyLab form",
    Converted: "converted by ahawam convert",
}
NEEDED = {"three": CAMERAS, "head": CAMERAS[:1], "mapped": ()}  # cameras that training asks for
LISTED = 20  # problems and warnings written out
EXAMPLES = 3  # instructions written out
MEASURED = 3  # episodes whose decoding is timed
INTERRUPTED = 130  # what shells report for Ctrl-C


@dataclass
class Findings:
    """What the checks have found so far.

    problems: sentence -> the episodes it is about.  warnings: each once, in order.  rows_read: episodes with healthy
    rows.  codecs: of each camera.  unread: cameras with faults that nobody asks for.  left: checks not done, because
    somebody pressed Ctrl-C.
    """

    problems: dict[str, list[int]] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    rows_read: list[int] = field(default_factory=list)
    codecs: dict[str, set[str]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    left: int = 0

    def add(self, check: Check, episode: int, camera: str | None, needed: bool = True) -> None:
        if check.problem and not needed:
            self.warnings[f"{check.problem} Training does not ask for this camera."] = None
            self.unread.add(camera)
        elif check.problem:
            self.problems.setdefault(check.problem, []).append(episode)
        elif camera is None:
            self.rows_read.append(episode)
        if check.warning:
            self.warnings[check.warning] = None
        if check.codec:
            self.codecs.setdefault(camera, set()).add(check.codec)

    def include(self, other: "Findings", name: str) -> None:
        """Adds those of a dataset of a mixture; problems name their files, warnings get its name."""
        for sentence, episodes in other.problems.items():
            self.problems.setdefault(sentence, []).extend(episodes)
        self.warnings |= dict.fromkeys(f"{name}: {sentence}" for sentence in other.warnings)
        self.left += other.left

    def healthy(self) -> list[int]:
        """Episodes without any problem."""
        ill = {episode for episodes in self.problems.values() for episode in episodes}
        return [episode for episode in self.rows_read if episode not in ill]


def diagnose(path: Path, cameras: str, fast: bool, full: bool) -> int:
    """Prints the page on a dataset, or on every dataset of a subset file, and returns the exit status.

    cameras: a key of NEEDED.  fast: no pictures.  full: every frame of every video.
    """
    findings = Findings()
    try:
        if path.suffix == ".toml":
            _examine_subset(path, cameras, fast, full, findings)
        else:
            _page(open_episodes(path), None, NEEDED[cameras], fast, full, findings)
    except DatasetError as error:
        findings.problems[str(error)] = []
        return _verdict(findings, "the metadata")
    frames = "every frame" if full else f"{SAMPLED} frames of every video"
    return _verdict(findings, "metadata and rows" if fast else f"metadata, rows and {frames}")


def _examine_subset(path: Path, cameras: str, fast: bool, full: bool, findings: Findings) -> None:
    """A page on every dataset, whether they fit together, and totals. Raises DatasetError for the file itself."""
    parts, ranges, entries = [], {}, load_subset(path)
    for entry in entries:
        if entry.exclude:
            continue
        print(f"\n--- {entry.name}", flush=True)
        try:
            part = Part(entry.name, entry.open(), entry.weight)
        except UnmappableError as error:
            if entry.if_unmappable == "skip":
                findings.warnings[f"skipping {entry.name}: {error}"] = None
            else:
                findings.problems[str(error)] = []
            continue
        except DatasetError as error:
            findings.problems[str(error)] = []
            continue
        parts.append(part)
        here = Findings()
        _page(part.dataset, entry.said, NEEDED[cameras], fast, full, here)
        findings.include(here, entry.name)
        if here.left:
            return
        if here.rows_read:
            for number, ends in robot_page.gripper_ranges(part.dataset, here.rows_read).items():
                ranges.setdefault((part.dataset.robot, number), {})[str(part.dataset.root)] = ends
    _print(_totals(parts, entries))
    if not parts and findings.problems:
        return
    findings.problems |= {text: [] for key, ends in ranges.items() if (text := grippers_unlike(*key, ends))}
    try:
        check_parts(parts, path)
        check_alike([Source(part.dataset, None, None, part.weight) for part in parts])
    except ValueError as error:
        findings.problems[str(error)] = []


def _page(
    dataset: Episodes, said: Reading | None, cameras: Sequence[str], fast: bool, full: bool, findings: Findings
) -> None:
    """Prints the page on one dataset and adds what is found. said: of its robot by a subset file, None without one."""
    recorded, _ = as_recorded(dataset)
    _print(_description(dataset, recorded))
    examine(dataset, cameras, not fast, full, findings)
    if findings.rows_read:
        _print(_tables(dataset, findings.rows_read))
        _look_at_robot(dataset, said, findings)
    if not findings.left:
        findings.warnings |= dict.fromkeys(describe_rows(dataset, findings.rows_read))
        if not fast:
            with suppress(KeyboardInterrupt):  # what was found stands without the speed
                _print(_speeds(dataset, findings))


def _look_at_robot(dataset: Episodes, said: Reading | None, findings: Findings) -> None:
    try:
        robot = robot_page.look(dataset, findings.rows_read, said)
    except DatasetError as error:
        findings.warnings[f"{error} Its robot is not looked at."] = None
        return
    if robot:
        print()
        _print(robot_page.describe(robot))
        findings.warnings |= dict.fromkeys(robot_page.warnings(robot))


def examine(dataset: Episodes, cameras: Sequence[str], videos: bool, whole: bool, findings: Findings) -> None:
    """Looks at the rows, and if `videos` at the pictures, of every episode; all frames if `whole`.

    cameras: what it must have; what is wrong with others is a warning. None: any may be asked for.
    """
    try:
        dataset.require_cameras(cameras)
    except DatasetError as error:
        findings.problems[str(error)] = []
    if isinstance(dataset, Reader):
        others = [reason for camera, reason in dataset.unusable.items() if camera not in cameras]
        findings.warnings |= dict.fromkeys(f"{reason} Training does not ask for this camera." for reason in others)
    episodes = range(len(dataset.lengths))
    checks: list[tuple[int, str | None, Callable[[], Check]]]
    checks = [(episode, None, partial(check_rows, dataset, episode)) for episode in episodes]
    if videos:
        promised = promised_frames(dataset)
        findings.warnings |= dict.fromkeys(unclaimed_frames(dataset, cameras or list(dataset.cameras)))
        checks += [
            (episode, camera, partial(check_frames, dataset, promised, episode, camera, whole))
            for episode in episodes
            for camera in dataset.cameras
        ]
    progress = Progress(len(checks), "checks", stream=sys.stderr)  # stdout is for the page
    # Decoding runs outside the interpreter lock.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = [pool.submit(check) for _, _, check in checks]
        for (episode, camera, _), future in zip(checks, futures, strict=True):
            findings.add(future.result(), episode, camera, camera is None or not cameras or camera in cameras)
            progress.add(f"{len(findings.problems)} problems", 1)
    except KeyboardInterrupt:
        findings.left = len(checks) - progress.done
        finish_line()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- the page
def _description(dataset: Episodes, recorded: Episodes) -> Iterator[str]:
    rows, lengths = int(dataset.lengths.sum()), dataset.lengths
    form = next((name for kind, name in FORMATS.items() if isinstance(recorded, kind)), type(recorded).__name__)
    yield f"{dataset.root}: {form}, robot {dataset.robot or 'not recorded'}"
    yield (
        f"episodes      {len(lengths)} of {lengths.min()} to {lengths.max()} rows, {rows} rows together, "
        f"{_duration(rows / dataset.fps)} at {dataset.fps:.5g} rows per second"
        + ("" if rows == recorded.lengths.sum() else f", left of {recorded.lengths.sum()} at {recorded.fps:.5g}")
    )
    cameras = (f"{camera} {height}x{width}" for camera, (height, width) in dataset.cameras.items())
    yield f"cameras       {', '.join(cameras) or 'none'} (height x width)"
    yield f"state, action {dataset.state_dim} and {dataset.action_dim} numbers"
    texts = dataset.instructions
    examples = ", ".join(repr(text) for text in texts[:EXAMPLES])
    yield f"instructions  {len(texts)} distinct: {examples}{', ...' if len(texts) > EXAMPLES else ''}"


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def _tables(dataset: Episodes, episodes: Sequence[int]) -> Iterator[str]:
    tables = (
        ("state", dataset.state_names, dataset.state_present, dataset.states),
        ("action", dataset.action_names, dataset.action_present, dataset.actions),
    )
    for what, names, present, read in tables:
        yield ""
        table = tabulate(what, [read(episode) for episode in episodes])
        yield from _table(what, names or [""] * len(present), present, table)
    yield f"frozen: share of the {len(episodes)} episodes in which the dimension does not change"
    yield f"cut: share of the rows that a z-score cut at {CLIP:g} changes; lost: by how much at most"


def _table(what: str, names: Sequence[str], present: np.ndarray, table: Table) -> Iterator[str]:
    wide = max(len(what), *(len(name) + 3 for name in names))
    yield f"{what:{wide}}{'min':>11}{'mean':>11}{'max':>11}{'std':>11}{'frozen':>9}{'cut':>9}{'lost':>9}"
    measured = (table.stats[name] for name in ("min", "mean", "max", "std"))
    columns = zip(names, *measured, table.frozen, table.cut, table.lost, strict=True)
    for place, (name, *values, frozen, cut, lost) in enumerate(columns):
        if not present[place]:
            yield f"{f'{place:2} {name}':{wide}}     the robot has none"
            continue
        numbers = "".join(f"{value:11.4g}" for value in values)
        yield f"{f'{place:2} {name}':{wide}}{numbers}{frozen:9.0%}{cut:9.2%}{lost:9.3g}"


def _totals(parts: Sequence[Part], entries: Sequence[Entry]) -> Iterator[str]:
    """By robot, and what is excluded."""
    robots: dict[str, list[Episodes]] = {}
    for part in parts:
        robots.setdefault(part.dataset.robot, []).append(part.dataset)
    wide = max(5, *map(len, robots)) if robots else 5
    yield f"\n{'robot':{wide}}{'datasets':>10}{'episodes':>10}{'rows':>12}{'hours':>9}{'rows/s':>9}"
    everything = [part.dataset for part in parts]
    for robot, group in [*robots.items(), *([("all", everything)] if len(robots) > 1 else [])]:
        episodes, rows = (sum(of) for of in zip(*((len(x.lengths), x.lengths.sum()) for x in group), strict=True))
        hours, rates = sum(x.lengths.sum() / x.fps for x in group) / 3600, sorted({f"{x.fps:.5g}" for x in group})
        yield f"{robot:{wide}}{len(group):>10,}{episodes:>10,}{rows:>12,}{hours:>9.2f}{', '.join(rates):>9}"
    excluded = {entry.name: entry.exclude for entry in entries if entry.exclude}
    if excluded:
        yield f"excluded: {len(excluded)} of {len(entries)} datasets, which were not opened"
        yield from (f"  {line}" for line in told(excluded))


def _speeds(dataset: Episodes, findings: Findings) -> Iterator[str]:
    healthy = findings.healthy()
    cameras = [camera for camera in dataset.cameras if camera not in findings.unread]
    if not healthy or not cameras:
        return
    few = healthy[:: -(-len(healthy) // MEASURED)]
    speeds: dict[str, Speed] = {camera: measure(dataset, camera, few) for camera in cameras}
    wide = max(map(len, speeds))
    yield ""
    yield f"{'camera':{wide}}      codec  frames/s in order  frames/s at random (one thread)"
    for camera, speed in speeds.items():
        codec = "+".join(sorted(findings.codecs[camera]))
        yield f"{camera:{wide}} {codec:>10}{speed.sequential:19.0f}{speed.random:20.0f}"
    if set(CAMERAS) <= speeds.keys():
        threads = loader_threads()
        rate = threads / sum(speeds[camera].window_seconds for camera in CAMERAS)
        yield (
            f"Estimate: the loader decodes {rate:.1f} RoboTwin windows ({WINDOW.video_frames} + "
            f"{WINDOW.history_frames} frames x {len(CAMERAS)} cameras) per second with {threads} threads, if each "
            "keeps this speed; composing the canvases comes on top."
        )


def _verdict(findings: Findings, looked_at: str) -> int:
    """Prints problems and warnings; the exit status."""
    for kind, sentences in (("warning", findings.warnings), ("problem", findings.problems)):
        if sentences:
            print()
        for sentence in list(sentences)[:LISTED]:
            episodes = findings.problems.get(sentence, [])
            # Several episodes share a file; their number tells how much is lost with it.
            shared = f" [in {len(episodes)} episodes]" if len(episodes) > 1 else ""
            print(f"{kind}: {sentence}{shared}")
        if len(sentences) > LISTED:
            print(f"... and {len(sentences) - LISTED} more {kind}s")
    print()
    counts = f"{_count(findings.problems, 'problem')}, {_count(findings.warnings, 'warning')} in {looked_at}"
    if findings.left:
        print(f"Interrupted with {findings.left} checks left; so far {counts}.")
        return INTERRUPTED
    print(f"{counts}. {'Training would stop.' if findings.problems else 'Fit for training.'}")
    return int(bool(findings.problems))


def _count(found: dict, what: str) -> str:
    return f"{len(found) or 'no'} {what}{'' if len(found) == 1 else 's'}"


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)
