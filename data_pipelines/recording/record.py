"""Demonstrations of the scripted expert as a LeRobot v3.0 dataset."""

import hashlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.disk import whole_file, writing
from data_pipelines.processes import worker_pool
from data_pipelines.progress import Progress, say
from data_pipelines.recording.encoded_video import EncodedVideo, encode_video
from data_pipelines.recording.lerobot_writer import LeRobotWriter, discard_unfinished
from data_pipelines.simulation.env import FPS, IMAGE_SIZES, STATE_NAMES, AlohaSim, scene_file
from data_pipelines.simulation.expert import plan
from data_pipelines.simulation.tasks import TASKS

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


def record_episode(task: str, seed: int, noise: float, randomise: bool = False) -> Episode | None:
    """One demonstration, or None if the expert's success does not last to the end.

    The disturbance goes to the motors but not into the recorded actions, so that the demonstration shows how to
    come back from where it led.
    """
    env = AlohaSim(task, randomise=randomise)
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


def record(
    task: str, episodes: int, out: Path, processes: int, noise: float, seed0: int, randomise: bool = False
) -> None:
    """Write `episodes` successful demonstrations to the new folder `out`.

    randomise: each shows a scene of another look, see `AlohaSim`.
    Seeds are tried in order from `seed0` and failures left out, so what is written does not depend on `processes`.
    Each attempt is kept in a file beside `out` until the dataset is whole: stopped in whatever way, the same call goes
    on from there. Raises DiskError, WorkerError, and RuntimeError where the expert never succeeds or the simulation's
    scene files are missing.
    """
    scene_file(task)
    cameras = {_key(camera): size for camera, size in IMAGE_SIZES.items()}
    # Pictures of another renderer are other attempts, too.
    kind = hashlib.sha256(json.dumps([task, noise, randomise, os.environ.get("MUJOCO_GL")]).encode()).hexdigest()[:8]
    attempts = out.with_name(f".{out.name}.attempts-{kind}")
    safe = f"The episodes before are kept in {attempts}; the same command goes on from there."
    progress, kept = Progress(episodes, "episodes"), []
    discard_unfinished(out)  # the attempts hold all of it
    with writing(out, safe), LeRobotWriter(out, FPS, STATE_NAMES, cameras, robot_type="aloha") as writer:
        attempts.mkdir(parents=True, exist_ok=True)
        with closing(_attempts(task, noise, randomise, seed0, processes, attempts, safe)) as files:
            for tried, file in enumerate(files, start=1):
                if file.stat().st_size:
                    kept.append(file)
                progress.add(f"expert {len(kept)}/{tried}", len(kept) - progress.done)
                if len(kept) == episodes:
                    break
                if not kept and tried >= _HOPELESS:
                    raise RuntimeError(
                        f"No success in {tried} attempts at {task} with --noise {noise}: use less noise."
                    )
        for file in kept:
            episode = _load(file)
            writer.add_episode(episode.states, episode.actions, episode.videos, TASKS[task].instruction)
    shutil.rmtree(attempts)
    say(f"{out}: {len(kept)} episodes in {progress.seconds:.0f} s")


def _attempts(
    task: str, noise: float, randomise: bool, seed0: int, processes: int, folder: Path, safe: str
) -> Iterator[Path]:
    """The file of each seed's attempt, in order, without end; an empty one where the expert failed."""
    seeds = itertools.count(seed0)
    pending: deque[Future] = deque()
    with worker_pool(processes, safe) as pool:
        while True:
            while len(pending) < 2 * processes:
                pending.append(pool.submit(_attempt, task, next(seeds), noise, randomise, folder))
            yield pending.popleft().result()


def _attempt(task: str, seed: int, noise: float, randomise: bool, folder: Path) -> Path:
    """Runs in a worker."""
    path = folder / f"{seed}.npz"
    if not path.exists():
        episode = record_episode(task, seed, noise, randomise)
        with whole_file(path) as partial, partial.open("wb") as file:
            if episode is not None:
                _save(episode, file)
    return path


def _save(episode: Episode, file: BinaryIO) -> None:
    arrays = {"states": episode.states, "actions": episode.actions}
    for key, video in episode.videos.items():
        arrays |= {f"{key} mp4": np.frombuffer(video.mp4, np.uint8), f"{key} histogram": video.histogram}
        arrays |= {f"{key} size": np.array(video.size)}
    np.savez(file, **arrays)


def _load(path: Path) -> Episode:
    with np.load(path) as arrays:
        states, actions = arrays["states"], arrays["actions"]
        videos = {
            key: EncodedVideo(
                arrays[f"{key} mp4"].tobytes(), len(states), tuple(arrays[f"{key} size"].tolist()),
                arrays[f"{key} histogram"],
            )
            for key in map(_key, IMAGE_SIZES)
        }  # fmt: skip
    return Episode(states, actions, videos)


def _key(camera: str) -> str:
    return f"observation.images.{camera}"
