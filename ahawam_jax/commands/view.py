"""One episode as a video: all views side by side, below them the curves of states and actions."""

import argparse
import sys
from pathlib import Path

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.inspection.viewer import write_view
from data_pipelines.paths import local_path
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.subset import load_subset


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ahawam view",
        description="Write one episode as an mp4: all cameras side by side, below them states and actions, and a png "
        "of its middle frame.",
    )
    parser.add_argument("path", type=local_path, help="folder of a dataset, or a subset file (.toml)")
    parser.add_argument("--dataset", help="which one of a subset file; it is shown as training reads it")
    parser.add_argument("--episode", type=int, required=True, help="number of the episode, from 0")
    parser.add_argument("--out", type=local_path, help="the mp4 file; by default <dataset>_episode_<N>.mp4 here")
    chosen = parser.parse_args(argv)
    out = chosen.out or Path(f"{chosen.dataset or chosen.path.resolve().name}_episode_{chosen.episode}.mp4")
    if out.suffix != ".mp4":
        parser.error(f"--out is {out}: expected a name that ends in .mp4")
    if not out.parent.is_dir():
        parser.error(f"--out is {out}: the folder {out.parent} does not exist; make it first")
    try:
        dataset = _open(chosen.path, chosen.dataset)
        last = len(dataset.lengths) - 1
        if not 0 <= chosen.episode <= last:
            parser.error(f"--episode is {chosen.episode}: {chosen.path} has the episodes 0 to {last}")
        write_view(dataset, chosen.episode, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out} and {out.with_suffix('.png').name}")
    return 0


def _open(path: Path, name: str | None) -> Episodes:
    if path.suffix != ".toml":
        if name:
            raise DatasetError(f"--dataset is {name}, but {path} is no subset file; leave it out.")
        return open_episodes(path)
    entries = {entry.name: entry for entry in load_subset(path)}
    if name not in entries:
        raise DatasetError(f"--dataset is {name}; name one of {path}: {', '.join(entries)}.")
    return entries[name].open()
