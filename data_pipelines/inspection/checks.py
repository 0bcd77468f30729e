"""What the doctor looks at: the rows of every episode, its videos, and how fast they decode.

A problem is the very DatasetError that stops training, a warning is what training would take without a word.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.inspection.video_headers import header
from data_pipelines.loader import THREADS
from data_pipelines.normalization import RELEASED, label, losses, recoverable
from data_pipelines.readers.base import BLOCK, GRID_TOLERANCE
from data_pipelines.readers.lerobot import IMAGE_PREFIX, LeRobot, LeRobotV30
from data_pipelines.readers.subset import as_recorded
from data_pipelines.windows import WindowConfig

WINDOW = WindowConfig()  # the one RoboTwin is trained with
SAMPLED = 5  # frames decoded of every video unless all are
JUMP = 20.0  # standard deviations; by Chebyshev at most one row in 400 can change by more
MEASURE_SECONDS = 0.4  # per camera and way of reading
NAMED = 6  # examples in a warning


@dataclass(frozen=True)
class Check:
    """Outcome of one look. problem: the reader's sentence, "" if there is none; so for the warning."""

    problem: str = ""
    warning: str = ""
    codec: str = ""


@dataclass(frozen=True)
class Table:
    """Per dimension of a state or action, over whole episodes.

    stats: mean, std, min, max, normalised as in the release.  The rest is float64 [d].  frozen: share of
    episodes in which the dimension has a single value.  cut: share of rows that normalising cuts.  lost: how far from
    the recording the worst of them comes back.
    """

    stats: dict[str, np.ndarray]
    frozen: np.ndarray
    cut: np.ndarray
    lost: np.ndarray


@dataclass(frozen=True)
class Speed:
    """Frames per second of one camera, decoded by one thread. random: as a window asks for them.

    window_seconds: time for the frames of one window.
    """

    sequential: float
    random: float
    window_seconds: float


# ---------------------------------------------------------------- one episode
def check_rows(dataset: Episodes, episode: int) -> Check:
    """Reads an episode's rows; the reader checks all of them."""
    try:
        dataset.states(episode)
    except DatasetError as error:
        return Check(str(error))
    return Check()


def check_frames(dataset: Episodes, promised: dict[Path, int], episode: int, camera: str, whole: bool) -> Check:
    """Decodes frames of an episode, first and last among them; all of them if `whole` or if the video is too short.

    promised: frames per video file, from `video_headers.promised_frames`.
    """
    length = int(dataset.lengths[episode])
    warning, codec = "", "JPEG"
    try:
        if isinstance(as_recorded(dataset)[0], LeRobot):
            path, _ = dataset.picture_file(episode, camera)
            found, codec = header(path)
            # The reader names the missing frame when it meets it, so it must come by.
            whole |= found < promised[path]
            if found > promised[path]:
                warning = (
                    f"{path} holds {found} frames, {promised[path]} belong to an episode; the rest is never read. "
                    "Make sure that it is the video of these rows."
                )
        rows = np.arange(length) if whole else np.unique(np.linspace(0, length - 1, SAMPLED).astype(int))
        for low in range(0, len(rows), BLOCK):
            dataset.frames(episode, camera, rows[low : low + BLOCK])
    except DatasetError as error:
        return Check(str(error), warning, codec)
    return Check("", warning, codec)


def unclaimed_frames(dataset: Episodes, cameras: Sequence[str]) -> Iterator[str]:
    """Warnings about frames in the videos of LeRobot v3.0 that lie before an episode and belong to none."""
    for camera in cameras if isinstance(dataset, LeRobotV30) else ():
        try:
            gaps = dataset.gaps(IMAGE_PREFIX + camera)
        except (KeyError, ValueError):  # places that are not told, or are no numbers: told by check_frames
            continue
        if gaps:
            episode, frames = gaps[0]
            others = f", likewise before {len(gaps) - 1} others" if gaps[1:] else ""
            yield (
                f"{frames} frames of {camera} lie before those of episode {episode} in its file and belong to none"
                f"{others}; unless episodes were taken out, from_timestamp is wrong there."
            )


# ---------------------------------------------------------------- all episodes
def tabulate(what: str, episodes: Sequence[np.ndarray]) -> Table:
    """episodes: at least one, each float32 [T, d]; what: "state" or "action"."""
    rows = np.concatenate(episodes)
    frozen = np.mean([np.ptp(episode, axis=0) == 0 for episode in episodes], axis=0)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0, dtype=np.float64)}
    stats |= {"std": rows.std(0, dtype=np.float64)} | RELEASED.of(what, (), rows.shape[1])
    off = (np.abs(episode - recoverable(episode, stats)) for episode in episodes)
    cut, lost = zip(*(((x > 0).sum(0), x.max(0)) for x in off), strict=True)
    return Table(stats, frozen, np.sum(cut, 0) / len(rows), np.max(lost, 0))


def describe_rows(dataset: Episodes, healthy: Sequence[int]) -> Iterator[str]:
    """Warnings about lengths, instructions, states and actions. healthy: episodes whose rows can be read."""
    lengths, needed = dataset.lengths, WINDOW.rows + 1
    short = np.flatnonzero(lengths < needed)
    if len(short):
        yield (
            f"{len(short)} of {len(lengths)} episodes have fewer rows than a training window ({needed}), the shortest "
            f"is episode {lengths.argmin()} with {lengths.min()}; the missing rows are padding."
        )
    if not healthy:
        return
    yield from _jitter(dataset, healthy)
    states = [dataset.states(episode) for episode in healthy]
    actions = [dataset.actions(episode) for episode in healthy]
    has = {"state": dataset.state_present, "action": dataset.action_present}
    for what, episodes, names in (("state", states, dataset.state_names), ("action", actions, dataset.action_names)):
        yield from _frozen(what, episodes, names, has[what], healthy)
        yield from _jumps(what, episodes, names, healthy)
        yield from _losses(what, episodes, names)
    if dataset.state_dim == dataset.action_dim:
        if all(map(np.array_equal, states, actions)):
            yield "Every action equals the state of its own row: the policy would learn to stand still."
        elif dataset.state_names == dataset.action_names:
            both = has["state"] & has["action"]
            yield from _far_actions(np.concatenate(states), np.concatenate(actions), dataset.action_names, both)


def _jitter(dataset: Episodes, numbers: Sequence[int]) -> Iterator[str]:
    off = [dataset.timestamps(e) * np.float64(dataset.fps) - np.arange(dataset.lengths[e]) for e in numbers]
    most = np.array([np.abs(rows).max() for rows in off])
    if far := [numbers[place] for place in np.flatnonzero(most > GRID_TOLERANCE)]:
        yield (
            f"Time stamps are up to {most.max():.2f} rows off their places at {dataset.fps:.5g} rows per second, in "
            f"{some('episode', far)}; rows go by number, so training takes them as evenly spaced."
        )


def _frozen(
    what: str, episodes: Sequence[np.ndarray], names: Sequence[str], present: np.ndarray, numbers: Sequence[int]
) -> Iterator[str]:
    still = np.array([np.ptp(episode, axis=0) == 0 for episode in episodes])
    dead = still.all(1)  # what a robot has not never moves
    if dead.any():
        resting = [numbers[place] for place in np.flatnonzero(dead)]
        yield f"The {what} never changes in {some('episode', resting)}; remove what shows a robot at rest."
    counts = still.sum(0)
    frozen = [f"{label(names, d)} in {counts[d]}" for d in np.flatnonzero(present & (counts > dead.sum()))]
    if frozen:
        yield f"The {what} has dimensions that stand still over whole episodes, of {len(still)}: {listed(frozen)}."


def _jumps(what: str, episodes: Sequence[np.ndarray], names: Sequence[str], numbers: Sequence[int]) -> Iterator[str]:
    steps = [np.diff(episode.astype(np.float64), axis=0) for episode in episodes]
    scale = np.concatenate(steps).std(0) if sum(map(len, steps)) else np.zeros(episodes[0].shape[1])
    found = [(e, *place) for e, step in enumerate(steps) for place in np.argwhere(np.abs(step) > JUMP * scale)]
    if found:
        e, row, d = found[0]
        yield (
            f"Jumps of the {what}: {len(found)}, in {len({place[0] for place in found})} of {len(steps)} episodes, "
            f"first in episode {numbers[e]} from row {row} to {row + 1}, {label(names, d)}: {steps[e][row, d]:+.3g} "
            f"(rule: more than {JUMP:g} standard deviations of the change from row to row, here {scale[d]:.2g})."
        )


def _losses(what: str, episodes: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[str]:
    table = tabulate(what, episodes)
    yield from losses(what, names, table.stats, np.stack([table.stats["min"], table.stats["max"]]), table.cut)


def _far_actions(state: np.ndarray, action: np.ndarray, names: Sequence[str], present: np.ndarray) -> Iterator[str]:
    low, high = state.min(0), state.max(0)
    far = present & ((action < 2 * low - high) | (action > 2 * high - low))
    share = far.mean(0)
    if far.any():
        worst = [f"{label(names, d)} {100 * share[d]:.1f}%" for d in np.argsort(-share) if share[d]]
        yield (
            "Actions lie outside the range of their states by more than its width (rule: below min - (max - min) or "
            f"above max + (max - min)), share of rows: {listed(worst)}; are the units the same?"
        )


def some(what: str, numbers: Sequence[int]) -> str:
    """As "episodes 3, 5 and 7 more"."""
    return f"{what}{'s' * (len(numbers) > 1)} {listed([str(number) for number in numbers])}"


def listed(words: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(words[:NAMED]) + (f" and {len(words) - NAMED} more" if len(words) > NAMED else "")


# ---------------------------------------------------------------- speed
def measure(dataset: Episodes, camera: str, episodes: Sequence[int]) -> Speed:
    """Decodes frames of `episodes`, at least one, forward and as windows that start anywhere."""
    rng = np.random.default_rng(0)
    history = -WINDOW.history_stride * np.arange(1, WINDOW.history_frames + 1)
    window = np.concatenate([WINDOW.video_ratio * np.arange(WINDOW.video_frames), history])

    def forward(episode: int) -> np.ndarray:
        return np.arange(min(BLOCK, dataset.lengths[episode]))

    def scattered(episode: int) -> np.ndarray:
        last = int(dataset.lengths[episode]) - 1
        return np.unique(np.clip(rng.integers(last + 1) + window, 0, last))

    sequential, _ = _rate(dataset, camera, episodes, forward)
    random, seconds = _rate(dataset, camera, episodes, scattered)
    return Speed(sequential, random, seconds)


def _rate(
    dataset: Episodes, camera: str, episodes: Sequence[int], choose: Callable[[int], np.ndarray]
) -> tuple[float, float]:
    """Frames per second, and seconds per call."""
    frames = calls = 0
    begin = time.perf_counter()
    while not calls or time.perf_counter() - begin < MEASURE_SECONDS:
        episode = episodes[calls % len(episodes)]
        rows = choose(episode)
        dataset.frames(episode, camera, rows)
        frames, calls = frames + len(rows), calls + 1
    seconds = time.perf_counter() - begin
    return frames / seconds, seconds / calls


def loader_threads() -> int:
    """How many windows the loader decodes at a time on this machine."""
    return min(THREADS, os.cpu_count() or 1)
