"""A recording without some of its rows: those marked as bad, those at the end where nothing moves, whole episodes."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers.robocoin import bad_rows
from data_pipelines.readers.selected import Selected

SHORTEST = 16  # rows of a chunk: what lies between two gaps and is shorter is left out, too
# A number of a state or action that moves by no more stands still: rad, or part of a gripper's way.
STILL = 0.005


class Excerpt(Selected):
    """Another dataset without the rows that `kept` leaves out. What lies between two gaps is an episode of its own.

    kept: (episode of the source, first row, row behind the last), in order.  origin: int64 [E] episode of the source
    that each is from. All else, lengths and starts too, counts the rows that are left.
    """

    def __init__(self, source: Episodes, kept: Sequence[tuple[int, int, int]]) -> None:
        if not kept:
            raise DatasetError(
                f"{source.root}: no row is left to learn from, all are marked as bad or left out by the subset file; "
                "leave the dataset out."
            )
        self.origin, self._first, ends = np.array(kept, np.int64).T
        self._take(source, ends - self._first, source.fps)

    def _source_episode(self, episode: int) -> int:
        return int(self.origin[episode])

    def _rows(self, episode: int) -> np.ndarray:
        return self._first[episode] + np.arange(self.lengths[episode])

    def _left(self) -> str:
        return "what is left of it"

    def timestamps(self, episode: int) -> np.ndarray:
        seconds = self.source.timestamps(self._source_episode(episode))[self._rows(episode)]
        return seconds - seconds[0]

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        path, place = self.source.picture_file(self._source_episode(episode), camera)
        return path, f"{place}, from row {self._first[episode]} on"


def excerpt(
    source: Episodes, without: Collection[int] = (), still_tail: float | None = None, fps: float | None = None
) -> Episodes:
    """`source` without rows that are marked as bad; itself where nothing is left out.

    without: episodes to leave out.  still_tail: seconds that an episode may stand still at its end, None for any.
    fps: the source's rows per second, where its own label is wrong.
    Raises DatasetError for episodes that are not there, and where nothing is left.
    """
    total = len(source.lengths)
    if strange := sorted(episode for episode in without if episode >= total):
        raise DatasetError(
            f"{source.root} has the episodes 0 to {total - 1}, without names {', '.join(map(str, strange))}; correct "
            "the subset file."
        )

    def of(episode: int) -> list[tuple[int, int, int]]:
        if episode in without:
            return []
        good = ~bad_rows(source, episode)
        if still_tail is not None:
            tail = max(0, still_rows(source, episode) - round(still_tail * (fps or source.fps)))
            good[len(good) - tail :] = False
        edges = np.flatnonzero(np.diff(good, prepend=False, append=False))
        whole = good.all()
        pairs = edges.reshape(-1, 2).tolist()
        return [(episode, a, b) for a, b in pairs if whole or b - a >= SHORTEST]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kept = [run for runs in pool.map(of, range(total)) for run in runs]
    everything = [(episode, 0, int(length)) for episode, length in enumerate(source.lengths)]
    return source if kept == everything else Excerpt(source, kept)


def still_rows(dataset: Episodes, episode: int) -> int:
    """Rows at the end of an episode in which nothing moves, neither state nor action, beside its last row."""
    return still_end(np.concatenate([dataset.states(episode), dataset.actions(episode)], 1))


def still_end(rows: np.ndarray) -> int:
    """Rows [T, n] at the end that are as the last one, beside that one."""
    moved = np.flatnonzero((np.abs(rows - rows[-1]) > STILL).any(1))
    return len(rows) - 1 - (int(moved[-1]) + 1 if moved.size else 0)
