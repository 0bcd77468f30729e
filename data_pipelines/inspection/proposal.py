"""A subset file out of what was found of many datasets: robots, layout, rate, weights, units, and what is left out."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.inspection.findings import STILL_SECONDS, Finding
from data_pipelines.inspection.units import Unit, toml_gripper, unit_of
from data_pipelines.readers.base import GRID_TOLERANCE
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.resampled import same_rate
from data_pipelines.windows import WindowConfig

WINDOW = WindowConfig().rows + 1  # rows of a recording that a training window takes
UNREAD = "unread"  # in place of a robot whose metadata cannot be read
LISTED = 6  # places or episodes listed in a sentence

# Why datasets are left out, in short.
UNREADABLE, UNMAPPABLE, EQUAL, CROSSED, SHORT, ODD, DOUBTFUL, VIDEOS = (
    "cannot be read",
    "fit no layout",
    "actions are the states",
    "sides are swapped",
    "too short",
    "grippers unlike those of their robot",
    "what a gripper records is in doubt",
    "videos do not fit the rows",
)


@dataclass(frozen=True)
class Candidate:
    """A dataset of the file. exclude: why it is left out, "" where it is not; reason: the same in short."""

    name: str
    robot: str
    finding: Finding
    exclude: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Proposal:
    """candidates: by robot and name.  units: {robot: unit of its grippers}."""

    candidates: tuple[Candidate, ...]
    units: dict[str, Unit]

    @property
    def included(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.exclude]

    @property
    def layout(self) -> str:
        """The one that holds all that are included."""
        found = {candidate.finding.layout for candidate in self.included}
        return found.pop() if len(found) == 1 else "two_arms"

    @property
    def rate(self) -> float | None:
        """The lowest, where those that are included differ."""
        rates = [candidate.finding.rate for candidate in self.included]
        return None if not rates or all(same_rate(rate, min(rates)) for rate in rates) else min(rates)


def propose(findings: Sequence[Finding]) -> Proposal:
    """findings: of datasets with different paths. The same findings give the same proposal."""
    findings = sorted(findings, key=lambda finding: finding.path)
    robots = _robots(findings)
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(robots[finding.path], []).append(finding)
    sound = {robot: [f for f in of if f.grippers and not _fault(f)] for robot, of in groups.items()}
    units = {robot: unit_of(of) for robot, of in sound.items() if of}
    names = _names(findings)
    candidates = []
    for robot in sorted(groups):
        for finding in groups[robot]:
            reason, why = _fault(finding) or _doubt(finding, robot, units.get(robot, Unit())) or ("", "")
            candidates.append(Candidate(names[finding.path], robot, finding, why, reason))
    return Proposal(tuple(candidates), units)


# ---------------------------------------------------------------- names
def _robots(findings: Sequence[Finding]) -> dict[str, str]:
    """{path: name of the robot}. Datasets of one name have the same numbers, as their statistics are pooled."""
    forms: dict[str, dict[str, str]] = {}  # recorded type -> what is present -> name
    for finding in findings:
        if finding.present:
            forms.setdefault(slug(finding.robot), {})[json.dumps(finding.present)] = _form(finding)
    named = {}
    for finding in findings:
        robot = slug(finding.robot) if finding.names else UNREAD
        alike = forms.get(robot, {})
        named[finding.path] = robot
        if finding.present and len(alike) > 1:
            form = json.dumps(finding.present)
            called = [other for other, name in alike.items() if name == alike[form]]
            named[finding.path] += alike[form] + (f"-{called.index(form) + 1}" if len(called) > 1 else "")
    return named


def _form(finding: Finding) -> str:
    """What a robot has, to tell it apart: "-2x6" for arms and joints, "-2x6-gripper"."""
    return f"-{finding.arms}x{finding.joints}{'-gripper' * finding.gripper}"


def slug(text: str) -> str:
    """A text as a name of a subset file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "unknown"


def _names(findings: Sequence[Finding]) -> dict[str, str]:
    """{path: name}: the last part of the path, or all of it where several have the same."""
    last = {finding.path: slug(Path(finding.path).name or "dataset") for finding in findings}
    count = Counter(last.values())
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path, name in last.items():
        whole = name if count[name] == 1 else slug(path.replace("/", "__"))
        numbered = (f"{whole}-{number}" for number in range(2, len(last) + 2))
        names[path] = next(name for name in (whole, *numbered) if name not in taken)
        taken.add(names[path])
    return names


# ---------------------------------------------------------------- what is left out
def _fault(finding: Finding) -> tuple[str, str] | None:
    """(in short, sentence) of what stands against a dataset by itself."""
    if finding.broken:
        return UNREADABLE, (
            f"{len(finding.broken)} of {len(finding.lengths)} episodes cannot be read ({_some(finding.broken)}): "
            f"{finding.problem} Deleting this line leaves out those episodes alone."
        )
    if finding.problem:
        return UNREADABLE, finding.problem
    if finding.unmappable:
        return UNMAPPABLE, finding.unmappable
    if finding.videos:
        more = f" So it is with {len(finding.videos) - 1} others." if finding.videos[1:] else ""
        return VIDEOS, finding.videos[0] + more
    if finding.equal:
        return EQUAL, (
            "every action equals the state of its own row, and a policy would learn to stand still. Where the robot "
            "recorded no commands, delete this line: by lead = 1 the action is the next row's state."
        )
    if finding.crossed or finding.misplaced:
        names = f"{_some(finding.misplaced)} stand among the joints of the other arm"
        what = "the actions of each arm follow the states of the other" if finding.crossed else names
        return CROSSED, f"{what}; say which is which by state = {{ .. }} or action = {{ .. }} and delete this line."
    if finding.rows < 1:
        return SHORT, "all its rows are marked as bad."
    if max(finding.lengths) < WINDOW:
        return SHORT, f"its longest episode has {max(finding.lengths)} rows, a window of training takes {WINDOW}."
    return None


def _doubt(finding: Finding, robot: str, unit: Unit) -> tuple[str, str] | None:
    """The same, of what stands against a dataset as one of its robot."""
    if finding.path in unit.odd:
        return ODD, unit.odd[finding.path]
    if unit.doubt and finding.grippers:
        return DOUBTFUL, (
            f"{unit.doubt}. Look at its films, write what is recorded closed and open as gripper of [robot.{robot}], "
            "and delete this line."
        )
    return None


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:LISTED])) + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


# ---------------------------------------------------------------- the file
def to_toml(proposal: Proposal, root: Path, out: Path, about: Sequence[str]) -> str:
    """The subset file. root: folder that the paths of the findings are below.  about: lines for its head."""
    below = os.path.relpath(root.resolve(), out.resolve().parent)
    return "\n".join([*_head(proposal, about), *_tables(proposal, below)]) + "\n"


def _head(proposal: Proposal, about: Sequence[str]) -> Iterator[str]:
    included = proposal.included
    hours = sum(candidate.finding.hours for candidate in included)
    episodes = sum(len(candidate.finding.lengths) for candidate in included)
    yield from (f"# {line}" for line in about)
    robots = len({candidate.robot for candidate in included})
    yield f"# {len(included)} datasets of {robots} robots: {episodes:,} episodes, {hours:.1f} h."
    if left := len(proposal.candidates) - len(included):
        yield f"# {left} more are left out, with the reason as exclude; delete that line to use one all the same."
    yield ""
    count = len(LAYOUTS[proposal.layout].names)
    yield f"# {count} numbers: train with --config.model.action_dim={count} --config.model.state_dim={count}."
    yield f'layout = "{proposal.layout}"'
    if proposal.rate is not None:
        yield f"rate = {proposal.rate:g}  # rows per second of the slowest; of the others rows are left out"


def _tables(proposal: Proposal, below: str) -> Iterator[str]:
    robot = ""
    for candidate in proposal.candidates:
        if candidate.robot != robot:
            robot = candidate.robot
            yield from _robot(robot, [c for c in proposal.candidates if c.robot == robot], proposal.units.get(robot))
        yield from _dataset(candidate, below)


def _robot(robot: str, candidates: Sequence[Candidate], unit: Unit | None) -> Iterator[str]:
    included = [candidate.finding for candidate in candidates if not candidate.exclude]
    hours = sum(finding.hours for finding in included)
    yield ""
    yield f"# {'-' * 16} {robot}: {len(included)} of {len(candidates)} datasets, {hours:.1f} h"
    if unit is None or unit.spans is None:
        return
    yield f"# Grippers recorded: {unit.measured}."
    if unit.stated:
        return
    mark = "# " * bool(unit.doubt)
    if unit.doubt:
        yield f"# In doubt: {unit.doubt}. One of these, with closed and open in their places:"
    yield f"{mark}[robot.{_key(robot)}]"
    yield f"{mark}gripper = {toml_gripper(unit.spans)}"


def _key(robot: str) -> str:
    return robot if "." not in robot else json.dumps(robot)


def _dataset(candidate: Candidate, below: str) -> Iterator[str]:
    finding = candidate.finding
    yield ""
    yield "[[dataset]]"
    yield f"name = {_text(candidate.name)}"
    yield f"path = {_text(os.path.normpath(os.path.join(below, finding.path)))}"
    yield f"weight = {max(round(finding.hours, 4), 1e-4)}{_size(finding)}"
    yield f"robot = {_text(candidate.robot)}"
    if finding.still:
        yield f"still_tail = {STILL_SECONDS}  # {finding.still} episodes stand still for longer at their end"
    if finding.equal:
        yield "lead = 1  # rows by which the recorded action is early"
    if finding.broken:
        yield f"without = {list(finding.broken)}  # cannot be read"
    yield from (f"# {note}" for note in _notes(finding))
    if candidate.exclude:
        yield f"exclude = {_text(candidate.exclude)}"


def _size(finding: Finding) -> str:
    if not finding.lengths:
        return ""
    return f"  # hours: {len(finding.lengths)} episodes at {finding.rate:g} rows per second"


def _notes(finding: Finding) -> Iterator[str]:
    if finding.off > GRID_TOLERANCE:
        yield f"Time stamps are up to {finding.off:.2g} rows off; rows are taken as evenly spaced."
    if finding.bad:
        yield f"{finding.bad} rows are marked as bad; they are left out."
    for kind, places in finding.unnamed.items():
        yield f"Of the {kind}'s {len(finding.names[kind])} numbers, {_some(places)} (from 0) have no name; not used."
    if finding.absent:
        yield f"No camera for {', '.join(finding.absent)}: black."


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
