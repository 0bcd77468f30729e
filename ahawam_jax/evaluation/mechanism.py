"""One rollout watched from inside: what was seen, planned, read by the router and done."""

import dataclasses
import sys
from collections.abc import Mapping

import numpy as np

from ahawam_jax.analysis.routing import layers
from ahawam_jax.inference.policy import Observation, Policy, PolicyState
from data_pipelines.progress import Progress
from data_pipelines.simulation.env import EPISODE_STEPS, STATE_NAMES
from data_pipelines.simulation.parallel import ParallelSims
from data_pipelines.simulation.tasks import TASKS
from data_pipelines.windows import FRAMES_PER_LATENT

SCENE_EVERY = 2  # control steps between two frames of the film


@dataclasses.dataclass(frozen=True)
class Call:
    """One executor call."""

    row: int  # control step that it saw
    planned_at: int  # control step of the frame that its plan is of
    actions: np.ndarray  # float32 [T, m], for the control steps after `row`
    reads: np.ndarray | None  # [S] as of `mean_reads`; None without routing


@dataclasses.dataclass(frozen=True)
class Story:
    """A rollout of R control steps."""

    task: str
    seed: int
    execute: int  # actions that are run of a chunk
    refresh_every: int
    foresight: int  # control steps that the four video frames after the current one reach
    canvases: np.ndarray  # uint8 [R + 1, H, W, 3], what the policy sees
    states: np.ndarray  # float32 [R + 1, m]
    stages: np.ndarray  # int [R + 1], the greatest reward so far
    scenes: Mapping[int, np.ndarray]  # uint8 [h, w, 3] of the film's camera, by control step
    calls: tuple[Call, ...]

    @property
    def rows(self) -> int:
        """R."""
        return len(self.states) - 1

    @property
    def refreshes(self) -> tuple[int, ...]:
        """The control steps whose frames the planner was given."""
        return tuple(sorted({call.planned_at for call in self.calls}))

    def call_at(self, row: int) -> Call:
        """The newest call at a control step."""
        return next(call for call in reversed(self.calls) if call.row <= row)

    def age(self, row: int) -> int:
        """Control steps since the frame that the plan in use is of."""
        return row - self.call_at(row).planned_at

    @property
    def uses(self) -> list[tuple[Call, int]]:
        """Every call, and the control step at which the next one or the end takes its place."""
        return list(zip(self.calls, [*(call.row for call in self.calls[1:]), self.rows], strict=True))

    @property
    def oldest(self) -> int:
        """Control steps that a plan is old at most, when the next one takes its place."""
        return max(end - call.planned_at for call, end in self.uses)


def mean_reads(policy: Policy, state: PolicyState, observation: Observation) -> np.ndarray:
    """How much the router reads each token of the plan's frame (Eq. 9), the mean over layers, heads and queries.

    float32 [S], rows of tokens from the top left; sums to 1.
    """
    return np.mean([layer.weights for layer in layers(policy, state.context, observation)], (0, 1, 2))


def check_fits(policy: Policy) -> None:
    """Raises ValueError for a policy of another robot than the simulated one."""
    state, action = (len(vector.names) for vector in (policy.embodiment.state, policy.embodiment.action))
    if (state, action) != (len(STATE_NAMES),) * 2:
        raise ValueError(
            f"the checkpoint drives a robot of {state} state and {action} action numbers, but the simulated one has "
            f"{len(STATE_NAMES)} of either; give a run that was trained on recordings of ahawam record."
        )


def watch(policy: Policy, task: str, seed: int, rows: int = EPISODE_STEPS) -> Story:
    """One episode of `rows` control steps. Raises ValueError for a policy that does not fit the simulated robot."""
    check_fits(policy)
    state = policy.start([TASKS[task].instruction])
    progress = Progress(rows, f"steps of {task}, seed {seed}", stream=sys.stderr)
    canvases, states, stages, calls, scenes = [], [], [], [], {}
    with ParallelSims(task, [seed], 1, film=[0]) as sims:

        def look() -> None:
            canvases.append(policy.canvas.compose(policy.embodiment.views(sims.observe()[1]))[0])
            states.append(sims.observe()[0][0])
            stages.append(int(sims.stage[0]))

        look()
        while len(states) <= rows:
            row = len(states) - 1
            robot_state, images = sims.observe()
            observation = policy.encode(images, robot_state, 1)
            if state.calls % policy.config.refresh_every == 0:
                state = policy.refresh(observation, state)
            reads = mean_reads(policy, state, observation) if policy.config.routing else None
            planned_at = state.planned_at
            actions, state = policy.act(observation, state)
            calls.append(Call(row, planned_at, actions[0], reads))
            for step in range(min(policy.config.execute, rows - row)):
                sims.run(actions[:, step : step + 1], SCENE_EVERY)
                look()
                if (row + step + 1) % SCENE_EVERY == 0:
                    scenes[row + step + 1] = sims.films[0][-1]
            progress.add(f"stage {stages[-1]} of {TASKS[task].greatest}", len(states) - 1 - row)
    return Story(
        task, seed, policy.config.execute, policy.config.refresh_every, FRAMES_PER_LATENT * policy.sizes.video_ratio,
        np.stack(canvases), np.stack(states), np.array(stages), scenes, tuple(calls),
    )  # fmt: skip
