"""A recording at a lower rate: some of its rows, chosen by index."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes

# Rates that differ by less count as one: over the 64 rows of a horizon they part by less than a row.
SAME_RATE = 0.01


def same_rate(one: float, other: float) -> bool:
    """Whether two rates, in rows per second, are one as far as a window can tell."""
    return abs(one - other) <= SAME_RATE * max(one, other)


class Resampled(Episodes):
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
        self.source, self._ratio = source, 1.0 if same_rate(rate, fps) else fps / rate
        self.root, self.robot, self.fps, self.cameras = source.root, source.robot, float(rate), source.cameras
        self.instructions = source.instructions
        self.state_dim, self.action_dim = source.state_dim, source.action_dim
        self.state_names, self.action_names = source.state_names, source.action_names
        self.state_present, self.action_present = source.state_present, source.action_present
        self.lengths = np.array([len(self._rows(episode)) for episode in range(len(source.lengths))], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def _rows(self, episode: int) -> np.ndarray:
        """Rows of the source, ascending."""
        last = int(self.source.lengths[episode]) - 1
        count = int(last / self._ratio + 1e-9) + 1  # 1e-9: a quotient that should be whole may be a little below
        return np.minimum(np.floor(np.arange(count) * self._ratio + 0.5).astype(np.int64), last)

    def states(self, episode: int) -> np.ndarray:
        return self.source.states(episode)[self._rows(episode)]

    def actions(self, episode: int) -> np.ndarray:
        return self.source.actions(episode)[self._rows(episode)]

    def timestamps(self, episode: int) -> np.ndarray:
        return (np.arange(self.lengths[episode]) / self.fps).astype(np.float32)

    def instruction_index(self, episode: int) -> int:
        return self.source.instruction_index(episode)

    def instruction(self, episode: int) -> str:
        return self.source.instruction(episode)

    def subtasks(self, episode: int) -> list[str]:
        """See `robocoin.subtasks`; the source must have them."""
        return [self.source.subtasks(episode)[row] for row in self._rows(episode)]

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < self.lengths[episode]):
            raise IndexError(
                f"frames of episode {episode}: indices {wanted.min()}..{wanted.max()} asked for, at {self.fps:g} rows "
                f"per second the episode has rows 0..{self.lengths[episode] - 1}."
            )
        return self.source.frames(episode, camera, self._rows(episode)[wanted])

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        path, place = self.source.picture_file(episode, camera)
        return path, place if self._ratio == 1 else f"{place}, one row of {self._ratio}"

    def require_cameras(self, names: Sequence[str]) -> None:
        self.source.require_cameras(names)
