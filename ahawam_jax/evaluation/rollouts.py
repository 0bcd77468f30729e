"""Closed-loop rollouts in simulation: many seeds at once, success with an interval, videos."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ahawam_jax.inference.policy import Policy
from data_pipelines.progress import Progress
from data_pipelines.simulation.env import EPISODE_STEPS, FPS, INSTRUCTIONS
from data_pipelines.simulation.parallel import ParallelSims

FILMED = 8  # episodes in the video and the contact sheet
RECORD_EVERY = 4  # control steps between two frames of the video
SHEET_COLUMNS = 8  # moments of an episode on the contact sheet

Observation = tuple[np.ndarray, Mapping[str, np.ndarray]]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a binomial proportion."""
    z = 1.959964
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of rollouts on one task."""

    name: str
    success: np.ndarray  # bool [N], the greatest reward was reached
    held: np.ndarray  # bool [N], it still holds at the end
    chunk_ms: float  # mean wall time of one executor call for the whole batch, planner refresh included
    refreshes_per_second: float  # planner refreshes of one episode per second of robot time

    def row(self) -> str:
        """One line of a markdown table."""
        count, trials = int(self.success.sum()), len(self.success)
        low, high = wilson(count, trials)
        speed = f"{self.chunk_ms:.0f} ms | {self.refreshes_per_second:.1f}" if self.chunk_ms else "- | -"
        return (
            f"| {self.name} | {count}/{trials} | {count / trials:.0%} | {low:.0%} - {high:.0%} | "
            f"{int(self.held.sum())}/{trials} | {speed} |"
        )


HEADER = (
    "| policy | success | rate | 95% interval | held at the end | chunk latency | refreshes/s |\n"
    "|---|---|---|---|---|---|---|"
)

Actor = Callable[[Observation], np.ndarray]  # observation of N episodes -> actions to run, [N, T, 14]


def roll_out(
    name: str, task: str, seeds: Sequence[int], actor: Actor, processes: int, folder: Path | None = None,
    refresh_every: int | None = None,
) -> Result:  # fmt: skip
    """Runs one episode per seed in lockstep, T actions at a time, until the episodes end.

    folder: where to write `<name>.mp4` and `<name>.png` of the first episodes; None writes nothing.
    refresh_every: calls per planner refresh, for the table.
    """
    film = range(min(FILMED, len(seeds))) if folder else ()
    latencies, run, actions = [], 0, None
    progress = Progress(EPISODE_STEPS, f"steps of {len(seeds)} episodes, {name}", stream=sys.stderr)
    with ParallelSims(task, seeds, processes, film=film) as sims:
        observation = sims.observe()
        while run < EPISODE_STEPS:
            began = time.perf_counter()
            actions = actor(observation)[:, : EPISODE_STEPS - run]
            latencies.append(time.perf_counter() - began)
            observation = sims.run(actions, RECORD_EVERY if folder else None)
            run += actions.shape[1]
            progress.add(f"{sims.success.sum()} succeeded", actions.shape[1])
        result = Result(
            name, sims.success, sims.held,
            1e3 * float(np.mean(latencies[1:])) if refresh_every else 0.0,  # the first call compiles
            len(latencies) / refresh_every / (EPISODE_STEPS / FPS) if refresh_every else 0.0,
        )  # fmt: skip
        if folder:
            frames = [np.stack(sims.films[i]) for i in film]
            stem = name.lower().replace(" ", "_").replace(",", "")
            write_video(folder / f"{stem}.mp4", frames)
            write_sheet(folder / f"{stem}.png", frames, result.success)
    return result


def policy_actor(policy: Policy, task: str, episodes: int, blank: bool = False) -> Actor:
    """A fresh batch of episodes under a policy. `blank` shows it black images: the control that must fail."""
    state = policy.start([INSTRUCTIONS[task]] * episodes)

    def act(observation: Observation) -> np.ndarray:
        nonlocal state
        robot_state, images = observation
        if blank:
            images = {camera: np.zeros_like(view) for camera, view in images.items()}
        actions, state = policy(images, robot_state, state)
        return actions[:, : policy.config.execute]

    return act


def write_video(path: Path, episodes: list[np.ndarray]) -> None:
    """Episodes uint8 [frames, h, w, 3] side by side in a grid, as h264."""
    columns = math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    length, height, width, _ = episodes[0].shape
    grid = np.zeros((length, rows, height, columns, width, 3), np.uint8)
    for i, episode in enumerate(episodes):
        grid[:, i // columns, :, i % columns] = episode
    grid = grid.reshape(length, rows * height, columns * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=round(FPS / RECORD_EVERY))
        stream.height, stream.width, stream.pix_fmt = grid.shape[1], grid.shape[2], "yuv420p"
        for frame in grid:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_sheet(path: Path, episodes: list[np.ndarray], success: np.ndarray) -> None:
    """One row per episode, moments from left to right, framed green on success and red on failure."""
    border, scale = 4, 2
    rows = []
    for episode, solved in zip(episodes, success, strict=False):
        moments = episode[np.linspace(0, len(episode) - 1, SHEET_COLUMNS).round().astype(int)]
        row = np.concatenate([frame[::scale, ::scale] for frame in moments], 1)
        colour = np.array((40, 160, 60) if solved else (200, 40, 40), np.uint8)
        framed = np.broadcast_to(colour, (row.shape[0] + 2 * border, row.shape[1] + 2 * border, 3)).copy()
        framed[border:-border, border:-border] = row
        rows.append(framed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
