"""Converts datasets into ArrayRecord shards that TFDS and grain read:

    ahawam convert --dataset data/transfer_cube --out data/tfds
"""

import argparse
import sys
import time

from data_pipelines.episodes import DatasetError
from data_pipelines.paths import local_path
from data_pipelines.readers.naming import UnmappableError
from data_pipelines.readers.subset import is_name, load_subset
from data_pipelines.tfds.builder import ENCODINGS, Folder, Source
from data_pipelines.tfds.convert import Conversion, convert, plan

LOST_WORKERS = "direct_running_mode=multi_processing"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ahawam convert",
        description="Convert a dataset, or all datasets of a subset file, into ArrayRecord shards for TFDS and grain. "
        "Stopped at any moment, it goes on with the missing shards when run again.",
        epilog="With --runner, options of Apache Beam and of its runner follow after --, as in: -- --region=REGION",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", type=local_path, help="folder of one dataset, converted as recorded")
    source.add_argument("--subset", type=local_path, help="subset file; its datasets are mapped to their layouts")
    parser.add_argument("--out", type=local_path, required=True, help="folder for <out>/robot_episodes/<name>/1.0.0")
    parser.add_argument("--image-format", choices=sorted(ENCODINGS), default="jpeg", help="png keeps every bit")
    parser.add_argument("--episodes-per-shard", type=int, default=50, help="at most so many episodes in a file")
    parser.add_argument("--processes", type=int, default=1, help="of this machine; a shard each at a time")
    parser.add_argument(
        "--runner", help="Apache Beam's, in place of processes here: DataflowRunner, FlinkRunner, SparkRunner, ..."
    )
    parser.add_argument("beam", nargs="*", metavar="-- BEAM OPTION", help="passed to Beam")
    arguments = parser.parse_args(argv)
    if arguments.episodes_per_shard < 1:
        parser.error(f"--episodes-per-shard is {arguments.episodes_per_shard}: expected at least 1")
    if arguments.processes < 1 or (arguments.processes > 1 and arguments.runner):
        parser.error(f"--processes is {arguments.processes}: expected at least 1, and no more beside --runner")
    if arguments.beam and not arguments.runner:
        parser.error(f"{' '.join(arguments.beam)}: options of Beam without --runner")
    if any(LOST_WORKERS in option for option in arguments.beam):
        parser.error(f"{LOST_WORKERS} waits for ever for a worker that was killed: use --processes without --runner")
    beam = [f"--runner={arguments.runner}", *arguments.beam] if arguments.runner else []
    started = time.monotonic()
    try:
        conversions = _plan(_sources(arguments), arguments)
        new = [len(conversion.missing()) for conversion in conversions]
        convert(conversions, arguments.processes, beam)
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    for conversion, written in zip(conversions, new, strict=True):
        print(f"{conversion.root}: {conversion.shards} shards, {written} of them new", file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


def _sources(arguments: argparse.Namespace) -> list[Source]:
    if arguments.subset:
        return load_subset(arguments.subset.absolute())
    name = arguments.dataset.resolve().name
    if not is_name(name):
        raise DatasetError(
            f"{arguments.dataset}: the folder's name {name!r} names the converted dataset, expected letters, digits, "
            "dots, _ and -; rename it, or give it a name in a subset file."
        )
    return [Folder(name, arguments.dataset.absolute())]


def _plan(sources: list[Source], arguments: argparse.Namespace) -> list[Conversion]:
    """Of all sources but those that the subset file lets be skipped."""
    conversions = []
    for source in sources:
        try:
            out = arguments.out.absolute()  # workers may start elsewhere
            conversions.append(plan(source, out, arguments.image_format, arguments.episodes_per_shard))
        except UnmappableError as problem:
            if getattr(source, "if_unmappable", "error") == "error":
                raise
            print(f"Skipped {source.name}: {problem}", file=sys.stderr)
    return conversions
