"""Opens a dataset, whatever its format: the one place that knows all of them."""

from pathlib import Path

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.paths import local_path
from data_pipelines.readers.lerobot import INFO, open_lerobot
from data_pipelines.readers.robotwin import episode_files, open_robotwin
from data_pipelines.tfds.episodes import open_converted
from data_pipelines.tfds.layout import CONVERSION

UNFINISHED = ".partial"  # at the end of the name of a dataset that is being recorded


def open_episodes(path: str | Path) -> Episodes:
    """Opens the dataset in a folder, whichever of the known formats it has.

    LeRobot v2.1 or v3.0: a folder with meta/info.json. RoboTwin, classic or XPolicyLab form: a folder with
    episode*.hdf5, or with a folder data/ of them. What `ahawam convert` wrote: a folder with
    conversion.json. Raises DatasetError for anything else.
    """
    root = local_path(path)
    if (root / INFO).is_file():
        return open_lerobot(root)
    if episode_files(root):
        return open_robotwin(root)
    if (root / CONVERSION).is_file():
        return open_converted(root)
    looked = (
        f"looked for {INFO} (LeRobot v2.1, v3.0), for episode*.hdf5 or data/episode*.hdf5 (RoboTwin) and for "
        f"{CONVERSION} (written by ahawam convert)."
    )
    if root.name.endswith(UNFINISHED):
        raise DatasetError(
            f"{root} is what a recording left that did not come to its end: {looked} Record it again, or remove it."
        )
    partial = root.with_name(root.name + UNFINISHED)
    left = f" {partial} holds what a recording left before its end." if root.name and partial.is_dir() else ""
    raise DatasetError(f"{root} {'is no dataset' if root.is_dir() else 'is not a folder'}: {looked}{left}")
