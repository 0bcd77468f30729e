"""One page on a dataset, or on each of a subset file: what it holds, what is wrong with it, how fast it decodes."""

import argparse

from data_pipelines.inspection.doctor import NEEDED, diagnose
from data_pipelines.paths import local_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ahawam doctor",
        description="One page on a dataset, or on each dataset of a subset file: what it holds, what is wrong with "
        "it, how fast it decodes. Problems are the sentences that would stop training; with any, the exit status is "
        "1.",
    )
    parser.add_argument("path", type=local_path, help="folder of a dataset, or a subset file (.toml)")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="metadata and rows only, no video")
    depth.add_argument("--full", action="store_true", help="decode every frame, not a few of every video")
    parser.add_argument(
        "--cameras",
        choices=NEEDED,
        default="three",
        help="what training will ask for: the three views (default), the head alone (config.data.single_view), or "
        "names that a subset file maps",
    )
    chosen = parser.parse_args(argv)
    return diagnose(chosen.path, chosen.cameras, chosen.fast, chosen.full)
