"""What a scan found, as a table: a line for each robot, the totals, and what is left out by reason."""

from collections.abc import Iterator, Sequence

from data_pipelines.inspection.proposal import Candidate, Proposal
from data_pipelines.inspection.units import Unit
from data_pipelines.readers.subset import told

HEAD = (
    "robot", "datasets", "out", "episodes", "hours", "rows/s", "numbers", "views", "gripper, recorded", "in 0..1",
    "bad rows", "still tails",
)  # fmt: skip
TO_THE_LEFT = (0, 8)  # columns of words


def table(proposal: Proposal) -> Iterator[str]:
    """Lines for the terminal."""
    robots: dict[str, list[Candidate]] = {}
    for candidate in proposal.candidates:
        robots.setdefault(candidate.robot, []).append(candidate)
    lines = [HEAD, *(_line(robot, of, proposal.units.get(robot, Unit())) for robot, of in robots.items())]
    if len(robots) > 1:
        lines.append(_line("all", proposal.candidates, None))
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        if number == 1 or number == len(robots) + 1 > 2:
            yield "-" * (sum(wide) + 2 * len(wide) - 2)
        cells = zip(line, wide, range(len(line)), strict=True)
        yield "  ".join(cell.ljust(w) if k in TO_THE_LEFT else cell.rjust(w) for cell, w, k in cells).rstrip()
    yield from _reasons(proposal)


def _line(robot: str, candidates: Sequence[Candidate], unit: Unit | None) -> tuple[str, ...]:
    """unit: None for all robots together. All counts are of the datasets that are included."""
    used = [candidate.finding for candidate in candidates if not candidate.exclude]
    of_robot = unit is not None
    return (
        robot,
        str(len(used)),
        str(len(candidates) - len(used)),
        f"{sum(len(finding.lengths) for finding in used):,}",
        f"{sum(finding.hours for finding in used):.1f}",
        "/".join(f"{rate:g}" for rate in sorted({finding.rate for finding in used})),
        _span([len(finding.present["action"]) for finding in used]) if of_robot else "",
        _span([finding.views for finding in used]),
        (unit.measured.partition(", in ")[0] or "none") if of_robot else "",
        _common(candidates, unit) if of_robot else "",
        f"{sum(finding.bad for finding in used):,}",
        f"{sum(finding.still for finding in used):,}",
    )


def _span(values: Sequence[int]) -> str:
    return "-".join(map(str, sorted({min(values), max(values)}))) if values else ""


def _common(candidates: Sequence[Candidate], unit: Unit) -> str:
    """The range of the grippers of what is included, from 0 closed to 1 open."""
    found = openings(candidates, unit)
    ends = (min(low for low, _ in found), max(high for _, high in found)) if found else ()
    return " to ".join(f"{round(end, 2) + 0.0:.2f}" for end in ends)  # 0.0: no minus before a nought


def openings(candidates: Sequence[Candidate], unit: Unit) -> list[tuple[float, float]]:
    """(least, greatest) of each gripper of what is included, from 0 closed to 1 open, 1% at either end left out."""
    if unit.spans is None:
        return []
    found = []
    for grip in (grip for candidate in candidates if not candidate.exclude for grip in candidate.finding.grippers):
        closed, opened = unit.span(grip)
        low, high = sorted((x - closed) / (opened - closed) for x in (grip.q01, grip.q99))
        found.append((low, high))
    return found


def reasons(proposal: Proposal) -> dict[str, list[Candidate]]:
    """{why in short: what is left out for it}, the most frequent first."""
    found: dict[str, list[Candidate]] = {}
    for candidate in proposal.candidates:
        if candidate.exclude:
            found.setdefault(candidate.reason, []).append(candidate)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _reasons(proposal: Proposal) -> Iterator[str]:
    for reason, of in reasons(proposal).items():
        yield ""
        yield f"left out, {reason}: {len(of)}"
        yield from (f"  {line}" for line in told({candidate.name: candidate.exclude for candidate in of}))
