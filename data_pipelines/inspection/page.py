"""What a scan found, as a page of plots: hours, lengths, grippers, rates, views, and what is left out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.disk import whole_file
from data_pipelines.inspection.curves import COLOURS, FAINT, GRID, INK, PAPER, SCALE, ticks
from data_pipelines.inspection.overview import openings, reasons
from data_pipelines.inspection.proposal import Proposal
from data_pipelines.inspection.units import Unit

SUFFIXES = {".png": "PNG", ".pdf": "PDF"}
WIDTH, MARGIN, GAP = 1400, 40, 32  # pixels; GAP is between panels
HEAD, TITLE, LINE, FOOT = 96, 34, 20, 34  # heights: of the page's head, a panel's title, a bar with its gap, an axis
PLOT = 170  # height of a histogram
BEHIND = 70  # what is written behind the longest bar
BINS = 40
LONGEST = 99.0  # percentile of the lengths that the histogram ends at; longer ones are in its last bar
BLUE, ORANGE, PALE = COLOURS[0], COLOURS[1], (196, 206, 216)
BEYOND = 0.3  # of a gripper's way, shown at most on either side of closed and open

Box = tuple[float, float, float]  # left, top, width of a panel
Bar = tuple[str, Sequence[float], str]  # label, lengths one after the other, what is written behind


def write_page(proposal: Proposal, path: Path, title: str) -> None:
    """Writes the page; the name ends in one of SUFFIXES. title: what the proposal is of."""
    with whole_file(path) as partial:
        large = _page(proposal, title)
        if path.suffix == ".png":
            large.reduce(SCALE).save(partial, "PNG")
        else:
            large.save(partial, "PDF", resolution=100.0 * SCALE, quality=95)


class _Pen:
    """Draws in pixels of the page on a picture that is SCALE times as large."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int = 12, colour: tuple = INK, anchor: str = "lm") -> None:
        self._draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor=anchor)

    def box(self, left: float, top: float, right: float, bottom: float, colour: tuple) -> None:
        if min(right - left, bottom - top) >= 1 / SCALE:
            self._draw.rectangle((left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1), colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: tuple = GRID, wide: float = 1) -> None:
        self._draw.line((x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE), colour, round(wide * SCALE))


def wide_of(text: str, size: int = 12) -> float:
    """Pixels that a text takes on the page."""
    return ImageFont.load_default(size * SCALE).getlength(text) / SCALE


# ---------------------------------------------------------------- the page
def _page(proposal: Proposal, title: str) -> Image.Image:
    robots = list(dict.fromkeys(candidate.robot for candidate in proposal.candidates))
    grippers = [robot for robot in robots if openings(_of(proposal, robot), proposal.units.get(robot, Unit()))]
    left = [_bars_height(len(robots)), _bars_height(len(grippers))]
    right = [TITLE + PLOT + FOOT, _bars_height(len(_by_rate(proposal))), _bars_height(3),
             _bars_height(max(len(reasons(proposal)), 1))]  # fmt: skip
    pen = _Pen(HEAD + max(sum(column) + GAP * len(column) for column in (left, right)))
    _title(pen, proposal, title)
    wide = WIDTH / 2 - 2 * MARGIN
    top = float(HEAD)
    _bars(pen, (MARGIN, top, wide), "Hours by robot", _by_robot(proposal, robots), (BLUE, PALE), "pale: left out")
    _ranges(pen, (MARGIN, top + left[0] + GAP, wide), proposal, grippers)
    x = WIDTH / 2 + MARGIN
    _lengths(pen, (x, top, wide), proposal)
    tops = np.cumsum([top, *(height + GAP for height in right)])
    _bars(pen, (x, tops[1], wide), "Hours by rows per second", _by_rate(proposal), (BLUE,))
    _bars(pen, (x, tops[2], wide), "Hours by views", _by_views(proposal), (BLUE,))
    found = [(reason, (float(len(of)),), f"{len(of)}") for reason, of in reasons(proposal).items()]
    _bars(pen, (x, tops[3], wide), "Datasets left out", found or [("none", (0.0,), "")], (ORANGE,), axis=False)
    return pen.image


def _title(pen: _Pen, proposal: Proposal, title: str) -> None:
    used = [candidate.finding for candidate in proposal.included]
    robots = len({candidate.robot for candidate in proposal.included})
    totals = (
        f"{len(used):,} datasets of {robots} robots, {sum(len(finding.lengths) for finding in used):,} trajectories, "
        f"{sum(finding.hours for finding in used):,.1f} hours; layout {proposal.layout}"
        + (f", used at {proposal.rate:g} rows per second" if proposal.rate else "")
    )
    pen.text(MARGIN, 34, title, 20)
    pen.text(MARGIN, 62, totals, 14, FAINT)


def _of(proposal: Proposal, robot: str) -> list:
    return [candidate for candidate in proposal.candidates if candidate.robot == robot]


def _by_robot(proposal: Proposal, robots: Sequence[str]) -> list[Bar]:
    bars: list[Bar] = []
    for robot in robots:
        used, out = (
            sum(c.finding.hours for c in _of(proposal, robot) if bool(c.exclude) == left_out)
            for left_out in (False, True)
        )
        bars.append((robot, (used, out), f"{used:,.1f}" + (f" of {used + out:,.1f}" if out else "")))
    return sorted(bars, key=lambda bar: -sum(bar[1]))


def _by_rate(proposal: Proposal) -> list[Bar]:
    hours: dict[float, float] = {}
    for candidate in proposal.included:
        hours[candidate.finding.rate] = hours.get(candidate.finding.rate, 0.0) + candidate.finding.hours
    return [(f"{rate:g}", (hours[rate],), f"{hours[rate]:,.1f}") for rate in sorted(hours)]


def _by_views(proposal: Proposal) -> list[Bar]:
    names = {3: "three", 2: "two, one black", 1: "one, two black"}
    hours = {views: sum(c.finding.hours for c in proposal.included if c.finding.views == views) for views in names}
    return [(names[views], (hours[views],), f"{hours[views]:,.1f}") for views in names]


# ---------------------------------------------------------------- panels
def _bars_height(count: int) -> int:
    return TITLE + LINE * max(count, 1) + FOOT


def _heading(pen: _Pen, box: Box, title: str, note: str = "") -> None:
    left, top, wide = box
    pen.text(left, top + 10, title, 15)
    pen.text(left + wide, top + 11, note, 12, FAINT, "rm")


def _bars(
    pen: _Pen, box: Box, title: str, bars: Sequence[Bar], colours: Sequence[tuple], note: str = "", axis: bool = True
) -> None:
    """A bar a line, its parts in `colours` one after the other."""
    left, top, wide = box
    _heading(pen, box, title, note)
    start = left + _labels(pen, box, [label for label, _, _ in bars])
    most = max((sum(parts) for _, parts, _ in bars), default=0.0) or 1.0
    scale = (left + wide - start - BEHIND) / most
    bottom = top + TITLE + LINE * max(len(bars), 1)
    for value in ticks(0.0, most) if axis else ():
        x = start + value * scale
        pen.line(x, top + TITLE, x, bottom)
        pen.text(x, bottom + 12, f"{value:g}", 11, FAINT, "mm")
    for place, (_, parts, behind) in enumerate(bars):
        y, x = top + TITLE + LINE * place, start
        for part, colour in zip(parts, colours, strict=True):
            pen.box(x, y + 4, x + part * scale, y + LINE - 3, colour)
            x += part * scale
        pen.text(x + 6, y + LINE / 2, behind, 11, FAINT)
    pen.line(start, top + TITLE, start, bottom, FAINT)


def _labels(pen: _Pen, box: Box, labels: Sequence[str]) -> float:
    """Writes a label a line, and returns how wide they are together with the gap behind."""
    left, top, _ = box
    wide = max((wide_of(label) for label in labels), default=0.0)
    for place, label in enumerate(labels):
        pen.text(left + wide, top + TITLE + LINE * (place + 0.5), label, 12, INK, "rm")
    return wide + 10


def _ranges(pen: _Pen, box: Box, proposal: Proposal, robots: Sequence[str]) -> None:
    """For each robot the range of its grippers, that of each dataset over the others, so that common ones are dark."""
    left, top, wide = box
    _heading(pen, box, "Grippers, from 0 closed to 1 open", "1% of the rows left out at either end")
    start = left + _labels(pen, box, robots)
    bottom = top + TITLE + LINE * max(len(robots), 1)
    scale = (left + wide - start - 8) / (1 + 2 * BEYOND)

    def at(opening: float) -> float:
        return start + scale * (min(max(opening, -BEYOND), 1 + BEYOND) + BEYOND)

    for value in ticks(-BEYOND, 1 + BEYOND):
        pen.line(at(value), top + TITLE, at(value), bottom)
        pen.text(at(value), bottom + 12, f"{value:g}", 11, FAINT, "mm")
    for place, robot in enumerate(robots):
        y = top + TITLE + LINE * place
        found = openings(_of(proposal, robot), proposal.units[robot])
        pen.box(at(min(low for low, _ in found)), y + 4, at(max(high for _, high in found)), y + LINE - 3, PALE)
        low, high = np.median(found, 0)
        pen.box(at(low), y + 7, at(high), y + LINE - 6, BLUE)
    for end in (0.0, 1.0):
        pen.line(at(end), top + TITLE, at(end), bottom, ORANGE, 1.5)
    pen.text(start, bottom + 30, "blue: the median gripper of a robot's datasets; pale: all of them", 11, FAINT)


def _lengths(pen: _Pen, box: Box, proposal: Proposal) -> None:
    """A histogram of the seconds of all trajectories."""
    left, top, wide = box
    parts = [np.array(c.finding.lengths) / c.finding.rate for c in proposal.included]
    seconds = np.concatenate(parts) if parts else np.zeros(1)
    middle = float(np.median(seconds))
    _heading(pen, box, "Trajectories by seconds", f"median {middle:.1f} s, longest {seconds.max():,.0f} s")
    end = float(np.percentile(seconds, LONGEST)) or 1.0
    counts, _ = np.histogram(np.minimum(seconds, end), BINS, (0.0, end))
    most = float(counts.max())
    start = left + max(wide_of(f"{value:,.0f}", 11) for value in ticks(0.0, most)) + 10
    bottom = top + TITLE + PLOT
    for value in ticks(0.0, most):
        y = bottom - PLOT * value / most
        pen.line(start, y, left + wide, y)
        pen.text(start - 6, y, f"{value:,.0f}", 11, FAINT, "rm")
    step = (left + wide - start) / BINS
    for place, count in enumerate(counts):
        x = start + step * place
        pen.box(x + 0.5, bottom - PLOT * count / most, x + step - 0.5, bottom, BLUE)
    for value in ticks(0.0, end):
        pen.text(start + (left + wide - start) * value / end, bottom + 12, f"{value:g}", 11, FAINT, "mm")
    pen.line(start, bottom, left + wide, bottom, FAINT)
