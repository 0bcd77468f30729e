"""Closed-loop rollouts in simulation: many seeds at once, success with an interval, videos."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ahawam_jax.evaluation.films import write_sheet, write_video
from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.inference.policy import Policy
from data_pipelines.disk import writing
from data_pipelines.progress import Progress
from data_pipelines.simulation.env import EPISODE_STEPS, FPS
from data_pipelines.simulation.parallel import ParallelSims
from data_pipelines.simulation.tasks import TASKS

FILMED = 6  # episodes in the video and the contact sheet
RECORD_EVERY = 4  # control steps between two frames of the video
MOMENTS = 6  # of an episode on the contact sheet
COLUMNS = ("policy", "success", "rate", "95% interval", "held at the end", "stage", "chunk latency", "refreshes/s")

Observation = tuple[np.ndarray, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of rollouts on one task."""

    name: str
    stages: np.ndarray  # int [N], the greatest reward of each episode
    greatest: int  # of the task, that is success
    held: np.ndarray  # bool [N], it still holds at the end
    chunk_ms: float  # mean wall time of one executor call for the whole batch, planner refresh included
    refreshes_per_second: float  # planner refreshes of one episode per second of robot time

    @property
    def success(self) -> np.ndarray:
        """bool [N]."""
        return self.stages == self.greatest

    def cells(self) -> tuple[str, ...]:
        """One for each of COLUMNS."""
        count, trials = int(self.success.sum()), len(self.success)
        low, high = wilson(count, trials)
        speed = (f"{self.chunk_ms:.0f} ms", f"{self.refreshes_per_second:.1f}") if self.chunk_ms else ("-", "-")
        return (
            self.name, f"{count}/{trials}", f"{count / trials:.0%}", f"{low:.0%} - {high:.0%}",
            f"{int(self.held.sum())}/{trials}", f"{self.stages.mean():.2f} of {self.greatest}", *speed,
        )  # fmt: skip

    def outcome(self) -> dict[str, Any]:
        """For a file of results."""
        return {
            "stages": self.stages.tolist(), "greatest": self.greatest, "held": self.held.tolist(),
            "chunk_ms": round(self.chunk_ms, 1), "refreshes_per_second": round(self.refreshes_per_second, 2),
        }  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """A markdown table whose columns are aligned, names to the left and numbers to the right."""
    rows = [COLUMNS, *(result.cells() for result in results)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]) + " |" for row in rows]
    rule = "|".join(["", "-" * (wide[0] + 2), *("-" * (width + 1) + ":" for width in wide[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


Actor = Callable[[Observation], np.ndarray]  # observation of N episodes -> actions to run, [N, T, 14]


def roll_out(
    name: str, task: str, seeds: Sequence[int], actor: Actor, processes: int, folder: Path | None = None,
    refresh_every: int | None = None, randomise: bool = False,
) -> Result:  # fmt: skip
    """Runs one episode per seed in lockstep, T actions at a time, until the episodes end.

    folder: where to write `<name>.mp4` and `<name>.png` of FILMED episodes, spread over the seeds; None: nowhere.
    refresh_every: calls per planner refresh, for the table.
    randomise: scenes of another look for each seed, see `AlohaSim`.
    """
    # Spread, so that the workers share the drawing.
    film = np.linspace(0, len(seeds) - 1, min(FILMED, len(seeds))).round().astype(int).tolist() if folder else []
    latencies, run, actions = [], 0, None
    progress = Progress(EPISODE_STEPS, f"steps of {len(seeds)} episodes, {name}", stream=sys.stderr)
    with ParallelSims(task, seeds, processes, film=film, randomise=randomise) as sims:
        observation = sims.observe()
        while run < EPISODE_STEPS:
            began = time.perf_counter()
            actions = actor(observation)[:, : EPISODE_STEPS - run]
            latencies.append(time.perf_counter() - began)
            observation = sims.run(actions, RECORD_EVERY if folder else None)
            run += actions.shape[1]
            progress.add(f"{sims.success.sum()} succeeded", actions.shape[1])
        result = Result(
            name, sims.stage, TASKS[task].greatest, sims.held,
            1e3 * float(np.mean(latencies[1:])) if refresh_every else 0.0,  # the first call compiles
            len(latencies) / refresh_every / (EPISODE_STEPS / FPS) if refresh_every else 0.0,
        )  # fmt: skip
        if folder:
            frames = [np.stack(sims.films[i]) for i in film]
            stem = name.lower().replace(" ", "_").replace(",", "")
            moments = np.linspace(0, len(frames[0]) - 1, MOMENTS).round().astype(int)
            with writing(folder, f"{result.success.sum()} of {len(seeds)} episodes succeeded."):
                write_video(folder / f"{stem}.mp4", frames, Fraction(FPS, RECORD_EVERY))
                write_sheet(
                    folder / f"{stem}.png", [episode[moments] for episode in frames],
                    [f"seed {seeds[i]}" for i in film], result.success[film], (moments + 1) * RECORD_EVERY / FPS,
                )  # fmt: skip
    return result


def policy_actor(policy: Policy, task: str, episodes: int, blank: bool = False) -> Actor:
    """A fresh batch of episodes under a policy. `blank` shows it black images: the control that must fail."""
    state = policy.start([TASKS[task].instruction] * episodes)

    def act(observation: Observation) -> np.ndarray:
        nonlocal state
        robot_state, images = observation
        if blank:
            images = {camera: np.zeros_like(view) for camera, view in images.items()}
        actions, state = policy(images, robot_state, state)
        return actions[:, : policy.config.execute]

    return act
