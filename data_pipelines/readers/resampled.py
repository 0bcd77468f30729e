"""A recording at a lower rate: some of its rows, chosen by index."""

from pathlib import Path

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers.selected import Selected

# Rates that differ by less count as one: over the 64 rows of a horizon they part by less than a row.
SAME_RATE = 0.01


def same_rate(one: float, other: float) -> bool:
    """Whether two rates, in rows per second, are one as far as a window can tell."""
    return abs(one - other) <= SAME_RATE * max(one, other)


class Resampled(Selected):
    """Another dataset at `rate` rows per second: row i is the source's row nearest to i * fps / rate.

    fps: the source's rows per second, where its own label is wrong.
    State, action and pictures come from that one row. This is right for commands that name a place to be (absolute
    joints), wrong for those that name a step. All else, lengths and starts too, counts the rows that are left.
    Raises DatasetError for a rate above the source's: rows would have to be repeated.
    """

    def __init__(self, source: Episodes, rate: float, fps: float | None = None) -> None:
        fps = fps or source.fps
        if rate > fps and not same_rate(rate, fps):
            raise DatasetError(
                f"{source.root} has {fps:g} rows per second, rate = {rate:g} asks for more: rows can be left out, not "
                "made up; choose a rate that is at most the lowest of all datasets."
            )
        self._ratio = 1.0 if same_rate(rate, fps) else fps / rate
        self._take(source, [len(self._chosen(int(length))) for length in source.lengths], float(rate))

    def _rows(self, episode: int) -> np.ndarray:
        return self._chosen(int(self.source.lengths[episode]))

    def _chosen(self, length: int) -> np.ndarray:
        """Which of so many rows, ascending."""
        last = length - 1
        count = int(last / self._ratio + 1e-9) + 1  # 1e-9: a quotient that should be whole may be a little below
        return np.minimum(np.floor(np.arange(count) * self._ratio + 0.5).astype(np.int64), last)

    def _left(self) -> str:
        return f"at {self.fps:g} rows per second the episode"

    def timestamps(self, episode: int) -> np.ndarray:
        return (np.arange(self.lengths[episode]) / self.fps).astype(np.float32)

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        path, place = self.source.picture_file(episode, camera)
        return path, place if self._ratio == 1 else f"{place}, one row of {self._ratio}"
