"""Looks through many downloaded datasets and proposes a subset to train on, before anyone spends a GPU hour."""

import argparse
import sys
from collections.abc import Callable

from data_pipelines.disk import whole_file, writing
from data_pipelines.episodes import DatasetError
from data_pipelines.inspection.choosing import SelectError, draw, selection
from data_pipelines.inspection.findings import Finding
from data_pipelines.inspection.overview import table
from data_pipelines.inspection.page import SUFFIXES, write_page
from data_pipelines.inspection.proposal import propose, to_toml
from data_pipelines.inspection.scan import scan
from data_pipelines.paths import local_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ahawam robocoin",
        description="Look through every RoboCOIN dataset below a folder and write a subset file to train on: robots, "
        "layout, rate, weights, what the grippers record, and what is left out, with the reason. Only metadata and "
        "rows are read. What was found is kept beside the file: a scan that was stopped goes on, and only what is new "
        "or has changed is read again.",
    )
    parser.add_argument("folder", type=local_path, help="that the datasets are below, at any depth")
    parser.add_argument("--out", type=local_path, required=True, help="the subset file (.toml)")
    parser.add_argument(
        "--select",
        metavar="EXPRESSION",
        help="use only datasets that it holds for, as in 'arms == 2 and gripper and joints == 6'",
    )
    parser.add_argument(
        "--videos", action="store_true", help="also ask the header of every video whether it has a frame for each row"
    )
    parser.add_argument("--hours", type=float, help="draw about so many of what is left, every robot in its share")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default %(default)s)")
    parser.add_argument("--report", type=local_path, help="also a page of plots (.png or .pdf)")
    chosen = parser.parse_args(argv)
    try:
        wanted = selection(chosen.select) if chosen.select else None
    except SelectError as error:
        parser.error(str(error))
    if chosen.out.suffix != ".toml":
        parser.error(f"--out is {chosen.out}: expected a name that ends in .toml")
    if not chosen.out.parent.is_dir():
        parser.error(f"--out is {chosen.out}: the folder {chosen.out.parent} does not exist; make it first")
    if chosen.report and chosen.report.suffix not in SUFFIXES:
        parser.error(f"--report is {chosen.report}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if chosen.hours is not None and not 0 < chosen.hours < float("inf"):
        parser.error(f"--hours is {chosen.hours:g}: expected a positive number")
    try:
        lines = _write(chosen, wanted)
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    return 0


def _write(chosen: argparse.Namespace, wanted: Callable[[Finding], bool] | None) -> list[str]:
    """Writes what was asked for, and returns what to say of it."""
    found = scan(chosen.folder, chosen.out.with_name(f"{chosen.out.name}.scan.jsonl"), chosen.videos)
    about = [f"A subset of the {len(found)} datasets below {chosen.folder}, proposed by ahawam robocoin."]
    if wanted:
        # Of one whose metadata cannot be read nothing is known: it stays in sight.
        some = [finding for finding in found if not finding.names or wanted(finding)]
        about.append(f"{len(found) - len(some)} are not listed: --select {chosen.select!r} does not hold for them.")
        found = some
    proposal = propose(found)
    if chosen.hours is not None:
        drawn = draw(proposal, chosen.hours, chosen.seed)
        more = len(proposal.included) - len(drawn.included)
        about.append(f"{more} are not listed: --hours {chosen.hours:g} --seed {chosen.seed} did not draw them.")
        proposal = drawn
    safe = "What was found is kept; the same command writes the file from it."
    with writing(chosen.out, safe), whole_file(chosen.out) as partial:
        partial.write_text(to_toml(proposal, chosen.folder, chosen.out, about), "utf-8")
    if chosen.report:
        with writing(chosen.report, f"{chosen.out} is written."):
            write_page(proposal, chosen.report, f"{chosen.out.name}: a subset of {chosen.folder}")
    hours = sum(candidate.finding.hours for candidate in proposal.included)
    last = f"{chosen.out}: {len(proposal.included)} datasets, {hours:.1f} hours. Look through it, then train."
    return [*about[1:], *table(proposal), "", last]
