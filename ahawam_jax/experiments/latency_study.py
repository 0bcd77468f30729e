"""What latency costs in closed loop, by hand-over and by the planner's age: the simulation does not wait.

Time is simulated: at 25 Hz control a latency of 160 ms is four control rows, in which the robot runs what it has. So a
cell is the same on every machine, and its episodes run side by side.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.inference.policy import Observation, Policy, PolicyState
from data_pipelines.simulation.env import EPISODE_STEPS, FPS
from data_pipelines.simulation.parallel import ParallelSims
from data_pipelines.simulation.tasks import TASKS

ROW_MS = 1000 // FPS
LATENCIES = (0, 40, 80, 160, 320)  # ms, of a chunk
PLANNER = (0, 320, 640, 960, 1280)  # ms, of a plan
ARMS = np.array([*range(6), *range(7, 13)])  # of the 14 numbers of an action, those in radians
RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the study. Latencies are of every chunk and of every plan, in ms."""

    run: str  # name of the checkpoint
    hand_over: str = "wait"
    latency: int = 0
    planner: int = 0
    routing: bool = True

    @property
    def key(self) -> str:
        """Names its line."""
        routed = "" if self.routing else ", not routed"
        return f"{self.run}: {self.hand_over}, chunk {self.latency} ms, plan {self.planner} ms{routed}"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run.  episodes: seeds 0, 1, ... of every cell."""

    episodes: int = 200
    latencies: tuple[int, ...] = LATENCIES
    planner: tuple[int, ...] = PLANNER


FULL = Size()
QUICK = Size(50, (0, 160, 320), (0, 640, 1280))


def cells(runs: Sequence[str], size: Size, hand_overs: Sequence[str] = tuple(HAND_OVERS)) -> Iterator[Cell]:
    """These hand-overs of every run, then the age of plans, with and without routing.

    Hand-overs that hand over nothing at latency 0 are there the same as to wait, which stands for them.
    """
    for run in runs:
        for latency in size.latencies:
            for name in hand_overs:
                if latency or name == "wait" or hasattr(HAND_OVERS[name], "guidance"):
                    yield Cell(run, name, latency)
    for run in runs:
        for planner in size.planner:
            for routing in (True, False):
                if planner or not routing:  # else it is the run's first cell
                    yield Cell(run, planner=planner, routing=routing)


def drive(policy: Policy, sims: Any, task: str, cell: Cell) -> np.ndarray:
    """Runs the episodes of `sims` to their end. Returns the commands that were run, [B, rows, 14], from the pose held
    at the start on.

    A chunk is asked for every `execute` rows. Before the episode the first plan is waited for; a later one is used by
    the first chunk that is asked for once it is there, and only then the next refresh begins.
    """
    hand_over, delay = HAND_OVERS[cell.hand_over], cell.latency // ROW_MS
    execute, every = policy.config.execute, policy.config.refresh_every
    robot_state, images = sims.observe()
    state = policy.start([TASKS[task].instruction] * len(robot_state))
    rest, ran = np.repeat(robot_state[:, None], delay, 1), [robot_state[:, None]]
    clock = row = 0  # control rows, and those of them in which the robot ran a chunk
    planner = _Planner(policy, cell.planner // ROW_MS, every)
    for call in range(EPISODE_STEPS):
        observation = policy.encode(images, robot_state, len(robot_state))
        state = planner(observation, state.replace(elapsed=row, calls=call), clock)
        chunk, _ = policy.act(observation, state, hand_over.ask(rest, delay))
        if hand_over.moves:
            coming = np.concatenate([rest[:, :delay], hand_over.join(rest, chunk, delay, delay)], 1)
            rows, rest = coming[:, :execute], coming[:, execute:]
        else:
            rows = np.concatenate([np.repeat(ran[-1][:, -1:], delay, 1), chunk[:, :execute]], 1)
        rows = rows[:, : EPISODE_STEPS - clock]
        robot_state, images = sims.run(rows)
        ran.append(rows)
        clock, row = clock + rows.shape[1], row + execute
        if clock == EPISODE_STEPS:
            break
    return np.concatenate(ran, 1)


class _Planner:
    """Refreshes that take so many rows: one at a time, no more often than every few chunks."""

    def __init__(self, policy: Policy, takes: int, every: int):
        self._policy, self._takes, self._every = policy, takes, every
        self._coming: tuple[int, Any, int] | None = None  # when it is there, its context, the row of its observation
        self._calls: int | None = None  # when the newest refresh began

    def __call__(self, observation: Observation, state: PolicyState, clock: int) -> PolicyState:
        """The state with the newest plan that is there."""
        state = self._take(state, clock)
        first = self._calls is None
        if self._coming is None and (first or state.calls - self._calls >= self._every):
            planned = self._policy.refresh(observation, state)
            self._calls = state.calls
            self._coming = (0 if first else clock + self._takes, planned.context, state.elapsed)
            state = self._take(state.replace(memory=planned.memory), clock)
        return state

    def _take(self, state: PolicyState, clock: int) -> PolicyState:
        if self._coming is None or self._coming[0] > clock:
            return state
        (_, context, planned_at), self._coming = self._coming, None
        return state.replace(context=context, planned_at=planned_at)


def jerk(rows: np.ndarray) -> np.ndarray:
    """Root mean square of the third difference of the arms' joint commands, rad/s^3: [B, rows, 14] -> [B]."""
    third = np.diff(rows[..., ARMS].astype(np.float64), 3, axis=1) * FPS**3
    return np.sqrt(np.square(third).mean((1, 2)))


def measure(policy: Policy, task: str, cell: Cell, episodes: int, processes: int) -> dict[str, Any]:
    """One line of the results: the cell, whether each episode succeeded, and the jerk of its commands."""
    with ParallelSims(task, range(episodes), processes) as sims:
        rows = drive(policy, sims, task, cell)
        success = sims.success
    line = {"key": cell.key, **dataclasses.asdict(cell), "task": task, "execute": policy.config.execute}
    return line | {"success": success.tolist(), "jerk": np.round(jerk(rows), 3).tolist()}
