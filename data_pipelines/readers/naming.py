"""Which recorded number and camera is which, by the table robots.toml and what a subset file adds to it.

A name that could be two things is never guessed at: the sentence lists both.
"""

import fnmatch
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_pipelines.canvas import CAMERAS, HEAD
from data_pipelines.episodes import DatasetError

TABLE = Path(__file__).with_name("robots.toml")
SIDES = ("left", "right")
KINDS = ("state", "action")
Span = tuple[float, float]  # what is recorded of a closed and of an open gripper


class UnmappableError(DatasetError):
    """A robot or its cameras do not fit the layout; the subset file may say to skip such a dataset."""


@dataclass(frozen=True)
class Gripper:
    """What a robot records of its (left, right) gripper, in states and in actions."""

    state: tuple[Span, Span]
    action: tuple[Span, Span]

    @classmethod
    def parse(cls, value: Any, where: str) -> "Gripper":
        """From {closed = 0, open = 100}, or {state = {..}, action = {..}}; each number may be [left, right].

        Raises DatasetError, beginning with `where`, for anything else.
        """
        if isinstance(value, dict) and value.keys() == {*KINDS}:
            return cls(**{kind: _spans(value[kind], where) for kind in KINDS})
        spans = _spans(value, where)
        return cls(spans, spans)


AS_NAMED = Gripper(((0.0, 1.0),) * 2, ((0.0, 1.0),) * 2)


def _spans(value: Any, where: str) -> tuple[Span, Span]:
    """Of the left and the right gripper."""
    ends = [value.get("closed"), value.get("open")] if isinstance(value, dict) and len(value) == 2 else [None]
    pairs = [end if isinstance(end, list) else [end, end] for end in ends]
    numbers = [x for pair in pairs for x in pair]
    fine = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
    if not fine or any(len(pair) != 2 for pair in pairs) or any(a == b for a, b in zip(*pairs, strict=True)):
        raise DatasetError(
            f"{where} is {value!r}, expected what is recorded of a closed and of an open gripper, two different "
            "numbers, as { closed = 0.0, open = 100.0 }; { state = { .. }, action = { .. } } where they differ, and "
            "[left, right] in place of a number where the sides do."
        )
    left, right = zip(*(map(float, pair) for pair in pairs), strict=True)
    return left, right


@dataclass(frozen=True)
class Reading:
    """What is said of a robot or dataset beside the names in general.

    cameras: {view: recorded camera}; None: found by name. A view that it lacks is black.  state, action: {number of
    the layout: recorded name or place}, "" for one that the robot has not.  gripper: its unit.  doubtful: why the unit
    must be stated, "" where it need not.  lead: the action of a row is the one recorded so many rows later; 1 where a
    robot without commands recorded its states as actions, of which the next is the one to reach.
    """

    cameras: Mapping[str, str] | None = field(default=None, hash=False)
    state: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    action: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    gripper: Gripper | None = None
    doubtful: str = ""
    lead: int = 0

    def over(self, other: "Reading") -> "Reading":
        """This one, and where it says nothing, the other."""
        return Reading(
            other.cameras if self.cameras is None else self.cameras,
            {**other.state, **self.state},
            {**other.action, **self.action},
            self.gripper or other.gripper,
            self.doubtful or other.doubtful,
            self.lead or other.lead,
        )


def are_views(value: Any) -> bool:
    """Whether a value is {view: recorded camera}, the head among them, each camera once."""
    names = [name for name in value.values() if isinstance(name, str) and name] if isinstance(value, dict) else []
    return HEAD in value and value.keys() <= {*CAMERAS} and len({*names}) == len(value) if names else False


def are_numbers(value: Any) -> bool:
    """Whether a value is {number of a layout: recorded name or place}."""
    return isinstance(value, dict) and all(
        number_of(name) == name and (isinstance(x, str) or type(x) is int and x >= 0) for name, x in value.items()
    )


# ---------------------------------------------------------------- the table
@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text("utf-8"))


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """(recorded name, name in a layout) of [numbers]."""

    def pattern(text: str) -> re.Pattern[str]:
        escaped = re.escape(text).replace(r"\{side\}", f"(?P<side>{'|'.join(SIDES)})").replace(r"\{n\}", r"(?P<n>\d+)")
        return re.compile(escaped)

    return [(pattern(name), ours) for ours, recorded in _table()["numbers"].items() for name in recorded]


@cache
def number_of(name: str) -> str:
    """What a layout calls a recorded number, "" for one that no layout has."""
    for pattern, ours in _patterns():
        if found := pattern.fullmatch(name):
            return ours.format(**found.groupdict())
    return ""


@cache
def reading_of(robot_type: str) -> Reading:
    """What the table says of a robot, by its recorded type."""
    for robot in _table()["robot"]:
        if any(fnmatch.fnmatchcase(robot_type.lower(), pattern.lower()) for pattern in robot["type"]):
            said = {key: value for key, value in robot.items() if key not in ("type", "gripper")}
            gripper = Gripper.parse(robot["gripper"], f"{TABLE}: gripper") if "gripper" in robot else None
            return Reading(**said, gripper=gripper)
    return Reading()


# ---------------------------------------------------------------- numbers
def place_of(number: str, names: Sequence[str], said: Mapping[str, str | int], where: str) -> int:
    """Where a number of a layout is in a recorded vector with these names; -1 where the robot has none.

    said: see `Reading`. Raises UnmappableError where two fit, or what is said is not there; `where` begins it.
    """
    if number in said:
        chosen = said[number]
        if chosen == "":
            return -1
        found = [chosen] if isinstance(chosen, int) else [k for k, name in enumerate(names) if name == chosen]
        if len(found) == 1 and found[0] < len(names):
            return found[0]
        problem = "is not there" if not found or isinstance(chosen, int) else f"is there {len(found)} times"
        raise UnmappableError(f"{where}: {number} is said to be {chosen!r}, which {problem}; {_told(names)}.")
    found = [k for k, name in enumerate(names) if number_of(name) == number]
    if len(found) > 1:
        listed = " and ".join(f"{names[k]} (place {k})" for k in found)
        kind = where.rsplit(" ", 1)[-1]
        raise UnmappableError(
            f"{where} has {listed} for {number}; say which one it is in the subset file, by name or place, as in "
            f"{kind if kind in KINDS else 'state'} = {{ {number} = {found[0]} }}."
        )
    return found[0] if found else -1


def _told(names: Sequence[str]) -> str:
    return f"its names are {', '.join(name or '(none)' for name in names) or 'not recorded'}"


# ---------------------------------------------------------------- cameras
def find_cameras(recorded: Iterable[str], where: str) -> dict[str, str]:
    """{view: recorded camera}; a view that the robot has no camera for is left out, but never the head.

    Raises UnmappableError where two cameras fit a view, or one that is missing may be there under another name.
    """
    recorded, table = list(recorded), _table()["cameras"]
    chosen: dict[str, str] = {}
    known = {name for view in CAMERAS for name in table[view]}
    unknown = [
        name
        for name in recorded
        if name not in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in table["other"])
    ]
    for view in CAMERAS:
        found = [name for name in recorded if name in table[view]]
        if len(found) > 1 or not found and (view == HEAD or unknown):
            maybe = f"; perhaps {' or '.join(unknown)}" if unknown and not found else ""
            raise UnmappableError(
                f"{where} has {' and '.join(found) or 'no known camera'} for {view} among its cameras "
                f"{', '.join(recorded) or '(none)'}{maybe}; name the views to use in the subset file, as in "
                f'cameras = {{ {view} = "..." }}: those that it leaves out are black.'
            )
        if found:
            chosen[view] = found[0]
    return chosen
