"""The one interface to recorded episodes, whatever their format on disk.

Rows and frames are addressed by integer index, never by wall time: many recordings carry a wrong fps, and only
the order of the rows is sure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class DatasetError(ValueError):
    """A dataset on disk is not what its metadata promises. The message names the file and the way out."""


class Episodes(Protocol):
    """The episodes of one dataset. A row holds what the robot saw and felt and the action it then was given.

    A dataset may be pickled and used in another process.

    root: folder of the dataset.
    robot: type of the robot as recorded, "" where it is not.  fps: rows per second as labelled.
    cameras: short name ("cam_high") -> (height, width) in pixels.
    lengths: int64 [E] rows per episode.  starts: int64 [E] dataset row of each episode's first row.
    state_dim, action_dim: widths p and d.  state_names, action_names: one per number, () where not recorded, and
    "" for single ones that are not.  state_present, action_present: bool [p] and [d], which numbers the robot has; the
    others, of a layout that holds several robots, are 0.
    instructions: the distinct instructions.
    All methods raise DatasetError where the files do not hold what the metadata says.
    """

    root: Path
    robot: str
    fps: float
    cameras: dict[str, tuple[int, int]]
    lengths: np.ndarray
    starts: np.ndarray
    state_dim: int
    action_dim: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    state_present: np.ndarray
    action_present: np.ndarray
    instructions: list[str]

    def states(self, episode: int) -> np.ndarray:
        """Robot state, finite float32 [T, p], in the units of the recording."""

    def actions(self, episode: int) -> np.ndarray:
        """Commanded action, finite float32 [T, d], in the units of the recording."""

    def timestamps(self, episode: int) -> np.ndarray:
        """Seconds since the episode's start as labelled, float32 [T]: row / fps."""

    def instruction_index(self, episode: int) -> int:
        """Place of the episode's instruction in `instructions`."""

    def instruction(self, episode: int) -> str:
        """The sentence that told the robot what to do."""

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decoded RGB frames uint8 [n, h, w, 3] of the episode's rows `indices` (any order, repeats allowed).

        Calls from several threads do not meet. Raises IndexError for rows outside the episode.
        """

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        """The file that the pictures of an episode lie in, and where in it: with the file's content and the number of
        rows, all that `frames` depends on. What caches go by."""

    def require_cameras(self, names: Sequence[str]) -> None:
        """Refuses with a sentence if a camera is missing."""
