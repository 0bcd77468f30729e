"""What recordings have in common that are some rows of another one."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from data_pipelines.episodes import Episodes


class Selected(Episodes):
    """Some rows of `source`: its states, actions, subtasks and pictures, its robot and cameras.

    What is made of it sets `lengths`, and answers which rows an episode has and what caches go by.
    """

    source: Episodes

    def _take(self, source: Episodes, lengths: Sequence[int] | np.ndarray, fps: float) -> None:
        """lengths: rows of each episode.  fps: rows per second."""
        self.source, self.fps = source, fps
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.root, self.robot, self.cameras = source.root, source.robot, source.cameras
        self.instructions = source.instructions
        self.state_dim, self.action_dim = source.state_dim, source.action_dim
        self.state_names, self.action_names = source.state_names, source.action_names
        self.state_present, self.action_present = source.state_present, source.action_present

    @abstractmethod
    def _rows(self, episode: int) -> np.ndarray:
        """Rows of the source's episode, ascending."""

    def _source_episode(self, episode: int) -> int:
        """The source's episode that an episode is of."""
        return episode

    def states(self, episode: int) -> np.ndarray:
        return self.source.states(self._source_episode(episode))[self._rows(episode)]

    def actions(self, episode: int) -> np.ndarray:
        return self.source.actions(self._source_episode(episode))[self._rows(episode)]

    def instruction_index(self, episode: int) -> int:
        return self.source.instruction_index(self._source_episode(episode))

    def instruction(self, episode: int) -> str:
        return self.source.instruction(self._source_episode(episode))

    def subtasks(self, episode: int) -> list[str]:
        """See `robocoin.subtasks`; the source must have them."""
        texts = self.source.subtasks(self._source_episode(episode))
        return [texts[row] for row in self._rows(episode)]

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < self.lengths[episode]):
            raise IndexError(
                f"frames of episode {episode}: indices {wanted.min()}..{wanted.max()} asked for, {self._left()} "
                f"has rows 0..{self.lengths[episode] - 1}."
            )
        return self.source.frames(self._source_episode(episode), camera, self._rows(episode)[wanted])

    @abstractmethod
    def _left(self) -> str:
        """How a sentence calls what is left of an episode."""

    def require_cameras(self, names: Sequence[str]) -> None:
        self.source.require_cameras(names)
