"""The two streams: thousands of random schedules on a clock of their own, and the engine's promises one by one."""

import dataclasses
import json
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ahawam_jax.inference.background import Beside, Turns
from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.policy import PolicyConfig
from ahawam_jax.inference.streaming import Chunk, PlannerError, Stream, StreamSettings, replay

HORIZON, CHUNK, EXECUTE, EVERY = 16, 4, 2, 3
SCHEDULES = 2000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A background whose slices take what `took` says of the clock; they run when it is moved on."""

    def __init__(self, clock: Clock, took: Callable[[], float]) -> None:
        self.clock, self.took = clock, took
        self.slices: Iterator[None] | None = None
        self.waits = 0

    def begin(self, slices: Iterator[None]) -> None:
        assert self.slices is None, "two refreshes at once"
        self.slices, self.ends = slices, self.clock.now + self.took()

    def pass_by(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.slices is not None and self.ends <= until:
            self._next()
        self.clock.now = until

    def _next(self) -> None:
        self.clock.now = max(self.clock.now, self.ends)
        try:
            next(self.slices)
            self.ends = self.clock.now + self.took()
        except StopIteration:
            self.slices = None

    def wait(self) -> None:
        self.waits += 1
        assert self.slices is not None, "waiting for what nobody does"
        while self.slices is not None:
            self._next()

    def chunk(self) -> Any:
        return nullcontext()


@dataclasses.dataclass
class Memory:
    """Rows that were planned; a refresh takes it, as donated arrays are taken."""

    frames: tuple[tuple[int, int], ...] = ()
    taken: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    episode: int
    memory: Memory
    context: Any = None
    planned_at: int = 0
    elapsed: int = 0
    calls: int = 0


class Reasoned:
    """A policy without a model: a plan is what it has seen, and actions are a plan, a row and a number.

    fails: whether the next refresh does.
    """

    one_queue = False
    config = PolicyConfig(refresh_every=EVERY, execute=EXECUTE)
    sizes = SimpleNamespace(horizon=HORIZON, chunk=CHUNK)

    def __init__(self, fails: Callable[[], bool] = lambda: False, slices: int = 2) -> None:
        self.fails, self.slices, self.episode = fails, slices, 0
        self.plans: list[tuple[tuple[int, int], ...]] = []

    def start(self, instructions: Sequence[str]) -> State:
        self.episode += 1
        return State(self.episode, Memory())

    def encode(self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, episodes: int) -> int:
        return int(robot_state[0, 0])  # the row, as the world knows it

    def refreshing(self, seen: int, state: State) -> Generator[None, None, State]:
        assert not state.memory.taken, "a memory that was written over"
        state.memory.taken = True
        for _ in range(self.slices):
            yield
        if self.fails():
            raise RuntimeError("out of luck")
        assert seen == state.elapsed
        frames = (*state.memory.frames, (state.episode, seen))
        return dataclasses.replace(state, context=frames, memory=Memory(frames), planned_at=state.elapsed)

    def forget(self, state: State) -> State:
        return dataclasses.replace(state, memory=Memory())

    def act(self, seen: int, state: State, continued: Any = None) -> tuple[np.ndarray, State]:
        assert seen == state.elapsed and state.context[-1] == (state.episode, state.planned_at)
        assert {episode for episode, _ in state.context} == {state.episode}, "a memory of two episodes"
        self.plans.append(state.context)
        first = zlib.crc32(repr((state.context, seen, state.calls)).encode()) % 2**20
        return np.arange(first, first + 2 * CHUNK, dtype=np.float32).reshape(1, CHUNK, 2), state


def shown(row: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return {}, np.array([[row]], np.float32)


@dataclasses.dataclass
class World:
    """A stream on a clock of its own, and what it has logged and said."""

    settings: StreamSettings
    policy: Reasoned
    took: Callable[[], float]

    def __post_init__(self) -> None:
        self.clock, self.events, self.said = Clock(), [], []
        self.background = Fake(self.clock, self.took)
        self.stream = Stream(
            self.policy, self.settings, self.background, self.clock, self.events.append, self.said.append
        )

    def call(self, row: int) -> Chunk:
        return self.stream.act(self.stream.observe(*shown(row), row))


def world(took: float = 1.0, fails: Callable[[], bool] = lambda: False, **settings: Any) -> World:
    """took: a slice of the clock's seconds; a refresh has two, and ends one slice later."""
    made = World(StreamSettings(**settings), Reasoned(fails), lambda: took)
    made.stream.start(["open it"])
    return made


def test_random_schedules() -> None:
    """No deadlock, no plan older than its bound, no memory of two episodes, nothing of an episode that has ended."""
    late = held = failures = dropped = 0
    for seed in range(SCHEDULES):
        rng = np.random.default_rng(seed)

        def one_of(*choices: Any) -> Any:
            return choices[rng.integers(len(choices))]  # noqa: B023

        settings = StreamSettings(one_of(None, *range(HORIZON)), one_of(None, 2.0, 50.0), one_of("wait", "hold"))
        often, speed, slices = one_of(0, 0, 0.1, 0.5), one_of(0.001, 0.01, 0.1), one_of(1, 2, 3)
        w = World(settings, Reasoned(lambda: rng.random() < often, slices), lambda: rng.exponential(speed))  # noqa: B023
        actions, row = [], 0
        for step in range(12):
            if step == 0 or rng.random() < 0.1:
                w.stream.start(["open it"])
                row, last = 0, None
            w.background.pass_by(rng.exponential(0.01))
            before = w.background.waits
            for _ in range(rng.integers(1, 4)):  # observations between chunks, as of a camera
                seen = w.stream.observe(*shown(row), row)
            try:
                chunk = w.stream.act(seen)
            except PlannerError:
                assert often
                row += 1
                continue
            finally:
                assert w.background.waits - before <= 3
            too_old = chunk.age_rows > w.stream.max_age or chunk.age_ms > (settings.max_age_ms or np.inf)
            assert chunk.held == too_old and not (chunk.held and settings.late == "wait")
            assert chunk.age_rows == row - chunk.plan_row >= 0
            if chunk.held:
                place = min(max(row - last.row - 1, 0), CHUNK - 1)
                np.testing.assert_array_equal(chunk.actions, np.repeat(last.actions[:, place, None], CHUNK, 1))
            actions.append(chunk.actions)
            last, late, held = chunk, late + (chunk.waited_ms > 0), held + chunk.held
            row += rng.integers(0, CHUNK + 2)
            w.background.pass_by(rng.exponential(0.02))
        kinds = [event["event"] for event in w.events]
        failures, dropped = failures + kinds.count("failed"), dropped + kinds.count("dropped")
        if seed % 10 == 0:
            events = json.loads(json.dumps(w.events, default=int))
            rows = {(e["episode"], e["seen"]): shown(e["row"]) for e in events if "seen" in e}
            np.testing.assert_array_equal(replay(Reasoned(), events, rows), actions)
    assert min(late, held, failures, dropped) > SCHEDULES / 10  # it all came about


def test_chunks_go_on_from_the_newest_finished_plan() -> None:
    w = world()
    assert w.call(0).waited_ms == 3000
    w.call(2), w.call(4)
    chunk = w.call(6)  # due: begins, and this chunk does not wait
    assert (chunk.waited_ms, chunk.plan, chunk.plan_row, chunk.age_rows, chunk.age_ms) == (0, 0, 0, 6, 3000)
    w.background.pass_by(2.9)
    assert w.call(8).plan == 0
    w.background.pass_by(0.1)
    chunk = w.call(8)
    assert (chunk.plan, chunk.plan_row, chunk.age_rows, chunk.age_ms, chunk.number) == (1, 6, 2, 3000, 5)
    assert w.policy.plans[-1] == ((1, 0), (1, 6))
    assert not w.said


def test_a_refresh_that_is_due_while_one_runs_begins_with_the_next_observation() -> None:
    w = world(took=100)
    w.call(0)
    w.call(6), w.call(12)
    w.background.wait()
    assert w.stream.plan.row == 6
    w.call(13)
    assert [e["row"] for e in w.events if e["event"] == "refresh"] == [0, 6, 13]


@pytest.mark.parametrize("late", ["wait", "hold"])
def test_past_max_age(late: str) -> None:
    w = world(max_age=7, late=late)
    first = w.call(0)
    assert w.call(7).age_rows == 7 and not w.said  # a refresh is due and has begun
    chunk = w.call(8)
    assert "at control step 8 the newest plan is of step 0, older than its bound of 7 steps" in w.said[0]
    if late == "wait":
        assert (chunk.plan_row, chunk.waited_ms, chunk.held) == (7, 3000, False)
        return
    assert (chunk.plan_row, chunk.waited_ms, chunk.held, chunk.age_rows) == (0, 0, True, 8)
    np.testing.assert_array_equal(chunk.actions[0], [w.stream._last.actions[0, 0]] * CHUNK)
    assert not np.array_equal(chunk.actions, first.actions)
    w.background.wait()
    assert (w.call(8).plan_row, w.call(8).held) == (7, False)


def test_what_is_committed_is_run_before_it_holds() -> None:
    """Whichever row a chunk begins with, the robot stops where it is by then; replayed bit for bit."""
    w, rest = world(max_age=7, late="hold"), np.float32([[[1, 2], [3, 4], [5, 6]]])
    ways = None, Continued(rest, 2, forward=True), None, Continued(rest, 2), Continued(rest, 2, forward=True)
    at = 0, 7, 11, 12, 13
    chunks = [w.stream.act(w.stream.observe(*shown(row), row), way) for row, way in zip(at, ways, strict=True)]
    assert [chunk.held for chunk in chunks] == [False, False, True, True, True]
    assert [chunk.begins for chunk in chunks] == [0, 2, 0, 0, 2]
    np.testing.assert_array_equal(chunks[2].actions[0], [chunks[1].actions[0, 1]] * CHUNK)  # 10 is the second from 9
    np.testing.assert_array_equal(chunks[3].actions[0], [[1, 2], [3, 4], [3, 4], [3, 4]])
    np.testing.assert_array_equal(chunks[4].actions[0], [[3, 4]] * CHUNK)
    rows = {(1, number): shown(row) for number, row in enumerate(at)}
    np.testing.assert_array_equal(replay(Reasoned(), w.events, rows), [chunk.actions for chunk in chunks])


def test_a_pause_makes_a_plan_too_old_by_the_clock() -> None:
    w = world(max_age_ms=10_000)
    w.call(0)
    w.background.pass_by(60)
    chunk = w.call(1)
    assert (chunk.plan_row, chunk.age_ms, chunk.waited_ms) == (1, 0, 3000)
    assert "older than its bound of 15 steps or 10000 ms; waiting for the planner" in w.said[0]


def test_a_plan_of_an_episode_that_has_ended_is_dropped() -> None:
    w = world()
    w.stream.observe(*shown(0), 0)
    w.stream.start(["close it"])
    chunk = w.call(0)
    assert chunk.waited_ms == 6000  # for the old one to end, and for its own
    assert [e["event"] for e in w.events] == ["start", "refresh", "start", "dropped", "refresh", "planned", "chunk"]
    assert w.policy.plans == [((2, 0),)]


def test_a_failing_planner_is_survived_and_said() -> None:
    luck = chain([False, True, False], repeat(True))
    w = world(max_age=8, fails=lambda: next(luck))
    assert w.call(0).error is None
    w.call(6)
    w.background.wait()
    chunk = w.call(7)
    assert chunk.plan_row == 0 and chunk.error == "refresh 1 failed (RuntimeError: out of luck)."
    assert w.said == [f"{chunk.error} Its memory is lost; the next one begins without."]
    w.background.wait()
    chunk = w.call(8)  # the one that began at 7 was well, and remembers nothing
    assert (chunk.plan_row, chunk.error, w.policy.plans[-1]) == (7, None, ((1, 7),))
    with pytest.raises(PlannerError, match="no plan to act from at control step 16: refresh 5 failed"):
        w.call(16)
    with pytest.raises(PlannerError, match="refresh 8 failed"):
        w.call(16)


def test_what_cannot_be_kept_is_refused() -> None:
    for settings, message in (
        (dict(max_age=16), "max_age is 16 control steps; expected 0 to 15: training covered 16 actions"),
        (dict(max_age=-1), "expected 0 to 15"),
        (dict(max_age_ms=0), "max_age_ms is 0; expected more than 0"),
        (dict(late="never"), "late is 'never'; expected wait or hold"),
    ):
        with pytest.raises(ValueError, match=message):
            world(**settings)
    w = world()
    old = w.stream.observe(*shown(3), 3)
    with pytest.raises(ValueError, match="row is 2 after 3; expected the control steps since start"):
        w.stream.observe(*shown(2), 2)
    w.stream.observe(*shown(3), 3)
    with pytest.raises(ValueError, match="act was given observation 0 of episode 1; it takes the newest"):
        w.stream.act(old)
    with pytest.raises(ValueError, match="the stream has no episode; call start"):
        Stream(Reasoned()).observe(*shown(0), 0)
    w.call(4)
    w.policy.start = lambda instructions: [][0]
    with pytest.raises(IndexError):
        w.stream.start(["what nobody encoded"])
    with pytest.raises(ValueError, match="the stream has no episode; call start"):  # and never goes on in the old one
        w.stream.observe(*shown(5), 5)


def test_a_chunk_waits_for_the_slice_that_runs_and_no_other() -> None:
    """Of any stream that shares the device."""
    turns, order = Turns(), []
    entered, may = threading.Event(), threading.Event()

    def slices() -> Iterator[None]:
        for number in range(3):
            order.append(f"slice {number}")
            entered.set()
            assert may.wait(20)
            yield

    def chunk(background: Beside) -> None:
        with background.chunk():
            order.append("chunk")

    refreshing = Beside(turns)
    refreshing.begin(slices())
    assert entered.wait(20)
    threads = [threading.Thread(target=chunk, args=[background]) for background in (refreshing, Beside(turns))]
    for thread in threads:
        thread.start()
    while turns._chunks < 2:
        time.sleep(0.001)
    assert order == ["slice 0"]
    may.set()
    refreshing.wait()
    assert order == ["slice 0", "chunk", "chunk", "slice 1", "slice 2"]
    for thread in threads:
        thread.join()
