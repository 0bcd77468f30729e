"""Demonstrations of the scripted expert as a LeRobot v3.0 dataset."""

import itertools
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.recording.lerobot_writer import EncodedVideo, LeRobotWriter, encode_video
from data_pipelines.simulation.env import FPS, IMAGE_SIZES, INSTRUCTIONS, STATE_NAMES, AlohaSim
from data_pipelines.simulation.expert import plan

_RECALL = 0.85  # how much of a disturbance is left one step later: it lasts about a quarter of a second
_HOPELESS = 50  # attempts without a single success after which recording gives up


@dataclass(frozen=True)
class Episode:
    """states, actions: float32 [T, 14]. videos: one per camera key."""

    states: np.ndarray
    actions: np.ndarray
    videos: dict[str, EncodedVideo]


def disturbance(steps: int, noise: float, seed: int) -> np.ndarray:
    """Ornstein-Uhlenbeck noise on the joint angles, float64 [steps, 14] in rad; the grippers get none.

    `noise` is the standard deviation it settles at; it starts from none.
    """
    scale = noise * np.sqrt(1 - _RECALL**2)
    increments = np.random.default_rng([seed, 1]).normal(scale=scale, size=(steps, 14))
    increments[:, [6, 13]] = 0
    total = np.zeros_like(increments)
    for step in range(1, steps):
        total[step] = _RECALL * total[step - 1] + increments[step]
    return total


def record_episode(task: str, seed: int, noise: float) -> Episode | None:
    """One demonstration, or None if the expert failed to hold the object at the end.

    The disturbance goes to the motors but not into the recorded actions, so that the demonstration shows how to
    come back from where it led.
    """
    env = AlohaSim(task)
    env.reset(seed)
    actions = plan(env)
    states = np.empty_like(actions)
    images = {camera: np.empty((len(actions), *size, 3), np.uint8) for camera, size in IMAGE_SIZES.items()}
    for step, executed in enumerate(actions + disturbance(len(actions), noise, seed)):
        states[step] = env.state()
        for camera, image in env.images().items():
            images[camera][step] = image
        env.step(executed)
    if not env.held:
        return None
    return Episode(states, actions, {_key(c): encode_video(frames, FPS) for c, frames in images.items()})


def record(task: str, episodes: int, out: Path, processes: int, noise: float, seed0: int) -> None:
    """Write `episodes` successful demonstrations to the new folder `out`.

    Seeds are tried in order from `seed0` and failures left out, so what is written does not depend on `processes`.
    """
    cameras = {_key(camera): size for camera, size in IMAGE_SIZES.items()}
    started = time.monotonic()
    with LeRobotWriter(out, FPS, STATE_NAMES, cameras, robot_type="aloha") as writer:
        kept = 0
        for tried, episode in enumerate(_attempts(task, noise, seed0, processes), start=1):
            if episode is not None:
                writer.add_episode(episode.states, episode.actions, episode.videos, INSTRUCTIONS[task])
                kept += 1
            rate = kept / (time.monotonic() - started)
            left = (episodes - kept) / rate if kept else float("inf")
            print(
                f"\r{kept}/{episodes} episodes, {rate:.2f}/s, {left:.0f} s left, expert {kept}/{tried}",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip
            if kept == episodes:
                break
            if kept == 0 and tried >= _HOPELESS:
                raise RuntimeError(f"No success in {tried} attempts at {task} with --noise {noise}: use less noise.")
    print(f"\n{out}: {kept} episodes in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _attempts(task: str, noise: float, seed0: int, processes: int) -> Iterator[Episode | None]:
    """What each seed gives, in order, without end."""
    seeds = itertools.count(seed0)
    pending: deque[Future] = deque()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            while True:
                while len(pending) < 2 * processes:
                    pending.append(pool.submit(record_episode, task, next(seeds), noise))
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _key(camera: str) -> str:
    return f"observation.images.{camera}"
