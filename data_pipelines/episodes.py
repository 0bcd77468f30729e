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

    root: what `open_episodes` was given.
    robot: type of the robot as recorded, "" where it is not.  fps: rows per second as labelled.
    cameras: short name ("cam_high") -> (height, width) in pixels.
    lengths: int64 [E] rows per episode.  starts: int64 [E] dataset row of each episode's first row.
    state_dim, action_dim: widths p and d.  state_names, action_names: one per number, () where not recorded.
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

    def identity(self) -> str:
        """Hash of the recording: other pictures, episodes or cameras give another one. What caches go by."""

    def require_cameras(self, names: Sequence[str]) -> None:
        """Refuses with a sentence if a camera is missing."""


def open_episodes(path: str | Path) -> Episodes:
    """Opens the dataset in a folder, whichever of the known formats it has.

    LeRobot v2.1 or v3.0: a folder with meta/info.json. RoboTwin, classic or XPolicyLab form: a folder with
    episode*.hdf5, or with a folder data/ of them. What `data_pipelines.tfds` converted: a folder with
    conversion.json. Raises DatasetError for anything else.
    """
    # The readers build on this module.
    from data_pipelines.lerobot import INFO, open_lerobot
    from data_pipelines.robotwin import episode_files, open_robotwin
    from data_pipelines.tfds.episodes import open_converted
    from data_pipelines.tfds.layout import CONVERSION

    root = Path(path)
    if (root / INFO).is_file():
        return open_lerobot(root)
    if episode_files(root):
        return open_robotwin(root)
    if (root / CONVERSION).is_file():
        return open_converted(root)
    raise DatasetError(
        f"{root} {'is no dataset' if root.is_dir() else 'is not a folder'}: looked for {INFO} (LeRobot v2.1, v3.0), "
        f"for episode*.hdf5 or data/episode*.hdf5 (RoboTwin) and for {CONVERSION} (converted by data_pipelines.tfds)."
    )
