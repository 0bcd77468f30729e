"""From chunks of actions to one command every control step: no clock, no thread and no robot of its own.

`driving.drive` gives it those. A control step is one call of `tick`; everything is counted in them.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ahawam_client.guard import Guard, GuardError

LAGS = 15  # control steps: how late feedback is looked for
KEPT = 20_000  # control steps that the report is of, the last ones
RECENT = 10  # chunks of which the slowest says how late the next one will be


@dataclass(frozen=True)
class Observation:
    """images: uint8 [h, w, 3] by camera.  state: [n], the robot's own.  time: in seconds, of the older of both."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    time: float


@dataclass(frozen=True)
class Request:
    """What to ask the policy.  rest: [rows, n], the commands that are still to be run, the first in this very step;
    None where the robot stands.  delay: so many of them will have been run when the answer is there."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    rest: np.ndarray | None = None
    delay: int = 0


@dataclass(frozen=True)
class Command:
    """positions: [n], to be sent.  held: the robot is to stay where it was told to be, for want of a chunk.
    clipped: names of the numbers that the guard changed."""

    positions: np.ndarray
    held: bool
    clipped: tuple[str, ...]


class Bridge:
    """One episode.

    A chunk's row r is for the step r after its observation's. After `execute` rows the next chunk is asked for; until
    it is here the robot holds (`wait` True), or the rows that are left go on (`wait` False). Then the policy is told
    these rows, as the guard will let them pass, and how many of them will have been run, which is what the slowest of
    the last chunks took; the server's hand-over says what it makes of them. Rows of the new chunk whose step has
    passed are left out. So the policy is asked every `execute` rows that were run, which is what its own clock counts.

    stopped: why nothing is sent any more, "" while all is well.
    """

    def __init__(
        self, metadata: Mapping[str, Any], guard: Guard, patience: float = 0.3, wait: bool = True,
        state_of_commands: bool = False,
    ) -> None:  # fmt: skip
        """metadata: the server's.  patience: seconds that an observation may be old.  wait: hold between chunks,
        whatever the server's hand-over.  state_of_commands: show the policy the last command as the robot's state,
        where feedback lags. Raises GuardError for another robot's."""
        if "hand_over" not in metadata:
            raise GuardError("the server does not say how chunks are handed over; it needs a newer ahawam serve.")
        for name in ("state", "actions"):
            if list(metadata[name]) != list(guard.labels):
                raise GuardError(
                    f"the policy's {name} are {', '.join(metadata[name])}; this robot has {', '.join(guard.labels)}."
                )
        if metadata["held"]:
            raise GuardError(f"the policy does not drive {', '.join(metadata['held'])}, which this robot has.")
        self._guard, self._patience, self._own = guard, patience, state_of_commands
        self._wait = wait or metadata["hand_over"] == "wait"
        self._execute, self._max_delay, self.stopped = int(metadata["execute"]), int(metadata["max_delay"]), ""
        self._observation: Observation | None = None
        self._report = _Report()
        self._last: np.ndarray | None = None  # command
        self._action: np.ndarray | None = None  # what it was before the guard
        self._rows: np.ndarray | None = None  # to run since the newest chunk came
        self._row, self._joint = 0, 0  # of these, next to run; the first of the new chunk
        self._moved = self._steps = 0  # rows run, and control steps, since the episode began
        self._asked: _Asked | None = None  # the newest
        self._awaited = False
        self._took: deque[int] = deque(maxlen=RECENT)  # control steps until a chunk was there

    def observe(self, observation: Observation) -> None:
        """The robot's newest."""
        self._observation = observation

    def stop(self, reason: str) -> None:
        """Nothing is sent from here on; the first reason stays."""
        self.stopped = self.stopped or reason

    def ask(self) -> Request | None:
        """What to ask the policy now, None while there is nothing to ask; its answer goes to `answer`."""
        if self.stopped or self._awaited or self._observation is None:
            return None
        ran = 0 if self._asked is None else self._moved - self._asked.moved
        if self._rows is not None and self._row < len(self._rows) and ran < self._execute:
            return None
        try:
            rest = self._rest()
        except GuardError as error:
            return self.stop(str(error))
        seen = self._observation
        state = seen.state if self._last is None or not self._own else self._last
        delay = min(max(self._took, default=0), self._max_delay, len(rest))
        self._asked, self._awaited = _Asked(self._moved, self._steps, rest, delay), True
        return Request(seen.images, np.array(state), rest if len(rest) else None, delay)

    def _rest(self) -> np.ndarray:
        """[rows, n], what will be sent if no other chunk comes. Raises GuardError where that must not be."""
        rest, last = [], self._last
        if last is not None and not self._wait:
            for action in self._rows[self._row :]:
                last, _ = self._guard.limit(action, last)
                rest.append(last)
        return np.reshape(rest, (len(rest), len(self._guard.labels)))

    def answer(self, actions: np.ndarray, begins: int = 0) -> None:
        """The chunk for what was asked, [rows, n].  begins: control steps from its observation to its first row."""
        asked, actions = self._asked, np.asarray(actions, np.float64)
        passed, took = self._moved - asked.moved, self._steps - asked.steps
        before = asked.rest[passed:begins]
        rows = np.concatenate([before, actions[max(passed - begins, 0) :]])
        self._rows = rows[: self._execute] if self._wait else rows
        self._row, self._joint, self._awaited = 0, len(before), False
        self._took.append(took)
        if len(asked.rest):
            self._report.came(passed, asked.delay)

    def tick(self, now: float) -> Command | None:
        """The command of this control step; None before the first chunk, and where nothing is to be sent."""
        self._report.ticks.append(now)
        self._steps += 1
        seen = self._observation
        if self.stopped or seen is None:
            return None
        if now - seen.time > self._patience:
            return self.stop(f"the newest observation is {now - seen.time:.2f} s old; cameras or joints are silent.")
        if not np.isfinite(seen.state).all():
            return self.stop("the robot's state is not finite.")
        if self._last is not None:
            self._report.followed.append((self._last, np.array(seen.state)))
        if self._rows is None or self._row >= len(self._rows):
            self._report.holds += 1
            return None if self._last is None else Command(self._last, True, ())
        action = self._rows[self._row]
        try:
            if self._last is None:
                command, clipped = self._guard.start(action, seen.state), ()
            else:
                command, clipped = self._guard.limit(action, self._last)
        except GuardError as error:
            return self.stop(str(error))
        self._report.clip(clipped)
        if self._action is not None:
            changes = self._report.joins if self._row == self._joint else self._report.inside
            changes.append(float(np.abs(action - self._action).max()))
        self._action, self._last = action, command
        self._row, self._moved = self._row + 1, self._moved + 1
        return Command(command, False, clipped)

    def report(self) -> list[str]:
        """What makes motion jerky, in numbers: a sentence each."""
        return self._report.lines()


@dataclass(frozen=True)
class _Asked:
    """moved, steps: rows run and control steps until then.  rest, delay: what the policy was told, rest [rows, n]."""

    moved: int
    steps: int
    rest: np.ndarray
    delay: int


class _Report:
    """What a bridge notes down; nothing of it is printed while the robot moves."""

    def __init__(self) -> None:
        self.ticks: deque[float] = deque(maxlen=KEPT)
        self.holds = self.handed = self.late = 0
        # Greatest change of a number from an action to the next, before the guard: to another chunk's, within one.
        self.joins: deque[float] = deque(maxlen=KEPT)
        self.inside: deque[float] = deque(maxlen=KEPT)
        self.followed: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=KEPT)  # command, and the state a step later
        self._clipped: dict[str, int] = {}

    def came(self, passed: int, delay: int) -> None:
        """A chunk was handed over in motion, `passed` rows after its observation."""
        self.handed, self.late = self.handed + 1, self.late + (passed > delay)

    def clip(self, labels: Sequence[str]) -> None:
        for label in labels:
            self._clipped[label] = self._clipped.get(label, 0) + 1

    def lines(self) -> list[str]:
        if len(self.ticks) < 2:
            return ["no control step was run"]
        gaps = 1e3 * np.diff(self.ticks)
        found = [f"{len(self.ticks)} control steps, {_spread(gaps)} ms apart; {self.holds} of them without an action"]
        if self.joins and self.inside:
            found.append(f"the largest change of a number where a chunk begins: {_spread(self.joins)}; "
                         f"within a chunk: {_spread(self.inside)}")  # fmt: skip
        if self.handed:
            found.append(f"{self.handed} chunks were handed over in motion, {self.late} of them later than announced")
        if self._clipped:
            found.append("cut by the guard: " + ", ".join(f"{label} {n} times" for label, n in self._clipped.items()))
        lag = self._lag()
        if lag is not None:
            found.append(f"the state follows the commands {lag} control steps late")
        return found

    def _lag(self) -> int | None:
        """How many steps after its command the state is most like it; None where too little moved."""
        if len(self.followed) < 3 * LAGS:
            return None
        commands, states = (np.stack([pair[which] for pair in self.followed]) for which in (0, 1))
        if min(np.ptp(commands, axis=0).max(), np.ptp(states, axis=0).max()) < 1e-3:
            return None
        length = len(commands) - LAGS
        errors = [np.abs(states[lag : lag + length] - commands[:length]).mean() for lag in range(LAGS + 1)]
        return int(np.argmin(errors)) + 1


def _spread(values: Sequence[float]) -> str:
    median, most = np.median(values), np.max(values)
    return f"{median:.3g} (median) to {most:.3g}"
