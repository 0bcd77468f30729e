"""Two streams: the planner refreshes beside the executor, which answers from the newest finished plan.

    stream = Stream(policy, StreamSettings(max_age=40, late="wait"))
    stream.start(["pick up the red cube ..."])
    row = 0                                              # control steps since the episode began
    while True:
        chunk = stream.act(stream.observe(images, robot_state, row))
        ...                                              # run some of chunk.actions, count them in row

One thread calls; refreshes run on another (`Beside`), or wherever a `Background` lets them. Policies are `Policy`, in
JAX, and `export.runtime.DeployedPolicy`, in PyTorch and engines.
"""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ahawam_jax.inference.background import Background, Beside, Turns, finish
from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.policy import PolicyConfig
from ahawam_jax.models.config import ModelConfig

LATE = ("wait", "hold")
TRIES = 2  # refreshes of one observation that a chunk begins while it waits for a plan

Event = dict[str, Any]  # JSON, but for what a chunk goes on from, which is None or a Continued


class TwoStreams(Protocol):
    """A policy of B episodes in the calls that the two streams make.

    A state is a frozen dataclass with, among others, `context`, the plan in use, `planned_at`, the row of its
    observation, `elapsed`, the row of now, and `calls`, the number of the chunk. `refreshing` and `forget` are called
    by the planner's stream, everything else by the executor's; both may run at the same time.
    """

    config: PolicyConfig
    one_queue: bool  # chunk and refresh wait for one another on the device

    @property
    def sizes(self) -> ModelConfig: ...

    def start(self, instructions: Sequence[str]) -> Any: ...

    def encode(self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, episodes: int) -> Any: ...

    def refreshing(self, observation: Any, state: Any) -> Generator[None, None, Any]:
        """A refresh in slices, one a `next`; returns the state with the finished plan, seen at state.elapsed."""

    def forget(self, state: Any) -> Any:
        """The state without memory, as of a new episode."""

    def act(self, observation: Any, state: Any, continued: Continued | None = None) -> tuple[np.ndarray, Any]: ...


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """Of the age of plans.

    max_age: control steps from a plan's observation to that of a chunk that may be made of it; None: as far as
    training went, horizon - 1. max_age_ms: the same on the clock, None for no bound. late: what `act` does where every
    finished plan is older: "wait" for a younger one, or "hold", repeat the last command.

    With wait and max_age (refresh_every - 1) * execute every chunk has the plan of the synchronous schedule.
    """

    max_age: int | None = None
    max_age_ms: float | None = None
    late: str = "wait"

    def bound(self, model: ModelConfig) -> int:
        """max_age in control steps. Raises ValueError for settings that cannot be kept."""
        if self.late not in LATE:
            raise ValueError(f"late is {self.late!r}; expected {' or '.join(LATE)}.")
        if self.max_age_ms is not None and not self.max_age_ms > 0:
            raise ValueError(f"max_age_ms is {self.max_age_ms}; expected more than 0, or None for no bound.")
        reach = model.horizon - 1
        if self.max_age is not None and not 0 <= self.max_age <= reach:
            raise ValueError(
                f"max_age is {self.max_age} control steps; expected 0 to {reach}: training covered {model.horizon} "
                "actions from the planner's frame on."
            )
        return reach if self.max_age is None else self.max_age


@dataclasses.dataclass(frozen=True)
class Seen:
    """An observation of the stream."""

    observation: Any  # of `TwoStreams.encode`
    row: int  # control steps since the episode began
    time: float  # s, on the stream's clock
    episode: int
    number: int  # of the episode's observations, from 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A finished refresh."""

    context: Any  # what the executor reads of it; nobody writes in it
    row: int  # of its observation
    time: float
    episode: int
    number: int  # of the episode's refreshes, from 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Actions, and how old the plan is that they were made from."""

    actions: np.ndarray  # float32 [B, T, m] in the robot's order and units; the first is meant for `row + begins`
    row: int  # of its observation
    begins: int  # 0, unless the state was rolled forward
    number: int  # of the episode's chunks, from 0
    plan: int  # number of its plan
    plan_row: int
    age_rows: int  # control steps from the plan's observation to the chunk's
    age_ms: float  # the same on the clock
    waited_ms: float  # for a plan
    held: bool  # no plan was young enough: what is committed, then the last command again
    error: str | None  # of the last refresh, if it failed


class PlannerError(RuntimeError):
    """There is no plan to act from, because refreshes fail."""


class Stream:
    """One batch of episodes at a time, from `start` to the next.

    plan: the newest finished one of this batch; None before the first. error: sentence about the last refresh, where
    it failed.
    """

    plan: Plan | None
    error: str | None

    def __init__(
        self, policy: TwoStreams, settings: StreamSettings | None = None, background: Background | None = None,
        clock: Callable[[], float] = time.monotonic, log: Callable[[Event], None] = lambda event: None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:  # fmt: skip
        """background: where refreshes run, by default a thread. log: takes every event, see `replay`. say: takes a
        sentence where plans are late or fail."""
        self._policy, self._settings = policy, settings or StreamSettings()
        self.max_age = self._settings.bound(policy.sizes)
        self._every = policy.config.refresh_every * policy.config.execute
        self._background = background or Beside(Turns() if policy.one_queue else None)
        self._clock, self._log, self._say = clock, log, say
        self._lock = threading.Lock()  # of what a refresh writes when it ends
        self._busy = False  # a refresh runs
        self._episode = 0
        self._acting: Any = None  # the executor's state, where there is an episode

    def start(self, instructions: Sequence[str]) -> None:
        """New episodes, one an instruction, with an empty memory. What still runs for the old ones is dropped."""
        with self._lock:
            self._episode += 1  # first, so that no plan of before is taken from here on
            self.plan = self.error = self._acting = None
        self._acting = self._planning = self._policy.start(instructions)
        self._episodes = len(instructions)
        self._seen: Seen | None = None
        self._begun: int | None = None  # row of the newest refresh
        self._refreshes = self._chunks = 0
        self._last: Chunk | None = None
        self._log({"event": "start", "episode": self._episode, "instructions": list(instructions)})

    def observe(self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, row: int) -> Seen:
        """Takes an observation, as `Policy.__call__` does, of control step `row`; begins a refresh if one is due.

        Due is the first one, and then one every config.refresh_every * config.execute control steps; so is one after
        a failure, and where the plan is too old. A refresh that is due while one runs begins with the first
        observation after it. Raises ValueError for observations that do not fit, and for a row before the last.
        """
        if self._acting is None:
            raise ValueError("the stream has no episode; call start with an instruction first.")
        if self._seen is not None and row < self._seen.row:
            raise ValueError(f"row is {row} after {self._seen.row}; expected the control steps since start.")
        number = 0 if self._seen is None else self._seen.number + 1
        observation = self._policy.encode(images, robot_state, self._episodes)
        seen = self._seen = Seen(observation, row, self._clock(), self._episode, number)
        due = self._begun is None or row - self._begun >= self._every
        if not self._busy and (due or self.error is not None or self._usable(seen) is None):
            self._begin(seen)
        return seen

    def act(self, seen: Seen, continued: Continued | None = None) -> Chunk:
        """A chunk for the newest observation, from the newest finished plan.

        continued: as of `Policy.act`. Raises PlannerError where there is no plan young enough and refreshes fail.
        """
        if seen is not self._seen:
            raise ValueError(
                f"act was given observation {seen.number} of episode {seen.episode}; it takes the newest."
            )
        asked, held, plan = self._clock(), None, self._usable(seen)
        if plan is None:
            if self._settings.late == "hold" and self._last is not None:
                held = held_actions(self._last, seen.row, continued)
            self._tell_late(seen, "waiting for the planner" if held is None else "holding the last command")
            plan = self._await(seen) if held is None else self.plan
        waited = self._clock() - asked
        if held is None:
            state = _at(self._acting, plan, seen.row, self._chunks)
            with self._background.chunk():
                actions, _ = self._policy.act(seen.observation, state, continued)
        else:
            actions = held
        begins = 0 if continued is None else continued.begins
        chunk = Chunk(
            actions, seen.row, begins, self._chunks, plan.number, plan.row, seen.row - plan.row,
            1e3 * (seen.time - plan.time), 1e3 * waited, held is not None, self.error,
        )  # fmt: skip
        self._last, self._chunks = chunk, self._chunks + 1
        self._log({
            "event": "chunk", "episode": seen.episode, "seen": seen.number,
            **{field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)[1:]},
            "continued": continued,
        })  # fmt: skip
        return chunk

    def _usable(self, seen: Seen) -> Plan | None:
        """The newest finished plan, if a chunk of this observation may be made of it."""
        plan, most_ms = self.plan, self._settings.max_age_ms
        young = plan is not None and seen.row - plan.row <= self.max_age
        return plan if young and (most_ms is None or 1e3 * (seen.time - plan.time) <= most_ms) else None

    def _await(self, seen: Seen) -> Plan:
        """Waits for a plan young enough: of the refresh that runs, or else of one of this very observation."""
        tries = TRIES
        while (plan := self._usable(seen)) is None:
            if not self._busy:
                if not tries:
                    raise PlannerError(f"there is no plan to act from at control step {seen.row}: {self.error}")
                tries -= 1
                self._begin(seen)
            self._background.wait()
        return plan

    def _tell_late(self, seen: Seen, what: str) -> None:
        if self.plan is not None:
            most_ms = self._settings.max_age_ms
            bound = f"{self.max_age} steps" + ("" if most_ms is None else f" or {most_ms:g} ms")
            self._say(
                f"at control step {seen.row} the newest plan is of step {self.plan.row}, older than its bound of "
                f"{bound}; {what}."
            )

    def _begin(self, seen: Seen) -> None:
        """Begins a refresh; after a failure, which has taken the memory, without any."""
        number, anew, state = self._refreshes, self.error is not None, self._planning
        self._refreshes, self._begun, self._busy = number + 1, seen.row, True
        fields = {"episode": seen.episode, "refresh": number, "seen": seen.number, "row": seen.row}
        self._log({"event": "refresh", **fields, "anew": anew})
        self._background.begin(self._refresh(seen, fields, dataclasses.replace(state, elapsed=seen.row), anew))

    def _refresh(self, seen: Seen, fields: Event, state: Any, anew: bool) -> Iterator[None]:
        """What the planner's stream does; never raises."""
        failed = None
        try:
            if anew:
                state = self._policy.forget(state)
            state = yield from self._policy.refreshing(seen.observation, state)
        except Exception as error:  # whatever it is, the executor has a plan to go on with
            failed = f"refresh {fields['refresh']} failed ({type(error).__name__}: {error})."
        with self._lock:
            if seen.episode != self._episode:
                event = "dropped"
            elif failed is None:
                event, self.error = "planned", None
                self._planning = state
                self.plan = Plan(state.context, seen.row, seen.time, seen.episode, fields["refresh"])
            else:
                event, self.error = "failed", failed
                self._say(f"{failed} Its memory is lost; the next one begins without.")
            self._log({"event": event, **fields})
            self._busy = False


@dataclasses.dataclass(frozen=True)
class StreamState:
    """Of `StreamedPolicy`. told: of the newest chunk, for whoever is answered: JSON."""

    stream: Stream
    elapsed: int = 0
    planned_at: int = 0
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StreamedPolicy:
    """Two streams in the interface of a policy, for whoever serves one: config.execute actions are run a call.

    policy: the one whose streams they are, with the synchronous schedule.
    """

    def __init__(self, policy: Any, settings: StreamSettings, several: bool) -> None:
        """policy: `TwoStreams`, with canvas and embodiment. several: `start` ends no batch of before."""
        settings.bound(policy.sizes)
        self.policy, self._settings, self._several = policy, settings, several
        self.sizes, self.config = policy.sizes, policy.config
        self.canvas, self.embodiment = policy.canvas, policy.embodiment
        self.can_guide, self.max_delay = policy.can_guide, policy.max_delay
        self._turns = Turns() if policy.one_queue else None  # of all streams
        self._stream: Stream | None = None

    def start(self, instructions: Sequence[str]) -> StreamState:
        """As of `Policy`."""
        if self._several or self._stream is None:
            self._stream = Stream(self.policy, self._settings, Beside(self._turns))
        self._stream.start(instructions)
        return StreamState(self._stream)

    def __call__(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, state: StreamState,
        continued: Continued | None = None,
    ) -> tuple[np.ndarray, StreamState]:  # fmt: skip
        """As of `Policy`, but that a call only waits for a refresh where no plan is young enough."""
        stream = state.stream
        chunk = stream.act(stream.observe(images, robot_state, state.elapsed), continued)
        told = {"plan_age_ms": chunk.age_ms, "held": chunk.held, "planner_error": chunk.error}
        return chunk.actions, StreamState(stream, state.elapsed + self.config.execute, chunk.plan_row, told)


def _at(state: Any, plan: Plan, row: int, call: int) -> Any:
    """The executor's state for a chunk."""
    return dataclasses.replace(state, context=plan.context, planned_at=plan.row, elapsed=row, calls=call)


def held_actions(last: Chunk, row: int, continued: Continued | None) -> np.ndarray:
    """As many actions as the newest chunk has, [B, T, m], that stop a robot whose actions are positions.

    What is run before they are there, as far as they are to begin with it, and then the last command of that again and
    again; where nothing is known of it, the command before this row, which is the newest chunk's.
    """
    length = last.actions.shape[1]
    if continued is not None and continued.committed:
        run = np.asarray(continued.actions, np.float32)[:, : continued.committed]
    else:
        place = min(max(row - last.row - last.begins - 1, 0), length - 1)
        run = last.actions[:, place : place + 1]
    stop = np.repeat(run[:, -1:], length, 1)
    return stop if continued is None or continued.forward else np.concatenate([run, stop], 1)[:, :length]


def replay(
    policy: TwoStreams, events: Iterable[Event],
    observations: Mapping[tuple[int, int], tuple[Mapping[str, np.ndarray], np.ndarray]],
) -> list[np.ndarray]:  # fmt: skip
    """The actions of all chunks of a log again, one after the other and without a clock, bit for bit.

    events: as `Stream` gave them to its log. observations: images and state by number of episode and observation.
    """
    events = list(events)
    failed = {(event["episode"], event["refresh"]) for event in events if event["event"] == "failed"}
    actions: list[np.ndarray] = []
    for event in events:
        if event["event"] == "start":
            acting = planning = policy.start(event["instructions"])
            batch, plans, last = len(event["instructions"]), {}, None
        elif event["event"] == "refresh" and (event["episode"], event["refresh"]) not in failed:
            seen = policy.encode(*observations[event["episode"], event["seen"]], batch)
            state = dataclasses.replace(planning, elapsed=event["row"])
            planning = finish(policy.refreshing(seen, policy.forget(state) if event["anew"] else state))
            plans[event["refresh"]] = Plan(planning.context, event["row"], 0.0, event["episode"], event["refresh"])
        elif event["event"] == "chunk":
            continued = event["continued"]
            if event["held"]:
                made = held_actions(last, event["row"], continued)
            else:
                seen = policy.encode(*observations[event["episode"], event["seen"]], batch)
                state = _at(acting, plans[event["plan"]], event["row"], event["number"])
                made, _ = policy.act(seen, state, continued)
            actions.append(made)
            last = Chunk(made, **{field.name: event[field.name] for field in dataclasses.fields(Chunk)[1:]})
    return actions
