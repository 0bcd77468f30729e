"""The latency study's table and figure, of the lines of its results."""

from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.evaluation.markdown import grid
from ahawam_jax.inference.handover import HAND_OVERS

Line = dict[str, Any]  # of results.jsonl
Point = tuple[float, float, float, float]  # x, y and the ends of its interval
COLOURS = dict(zip(HAND_OVERS, ("#666666", "#c0392b", "#1f6fb2", "#2e8b57", "#8e5bb0", "#c98a1b"), strict=True))
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # by run
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 230, 60, 40, 90  # of a panel and around it, in pixels


def table(lines: Sequence[Line]) -> str:
    """A markdown table, a row for every cell. Jerk in rad/s^3, mean over episodes."""
    columns = ("run", "hand-over", "chunk late by", "plan late by", "success", "rate", "95% interval", "jerk, rad/s^3")
    rows = [
        (line["run"], line["hand_over"] + ("" if line["routing"] else ", not routed"), f"{line['latency']} ms",
         f"{line['planner']} ms", f"{sum(line['success'])}/{len(line['success'])}", f"{np.mean(line['success']):.0%}",
         "{:.0%} - {:.0%}".format(*wilson(sum(line["success"]), len(line["success"]))), f"{np.mean(line['jerk']):.0f}")
        for line in lines
    ]  # fmt: skip
    return "\n".join(grid([columns, *rows]))


def figure(lines: Sequence[Line]) -> str:
    """An SVG of three panels: success and jerk against the latency of chunks, success against that of plans."""
    runs = list(dict.fromkeys(line["run"] for line in lines))
    by_chunk = list(_by_hand_over(lines, runs))
    panels = [
        ("success, %", "latency of a chunk, ms", 100.0, [(*style, [_success(x, "latency") for x in own])
                                                         for *style, own in by_chunk]),
        ("jerk, rad/s³", "latency of a chunk, ms", None, [(*style, [_jerk(x) for x in own])
                                                          for *style, own in by_chunk]),
        ("success, %", "latency of a plan, ms", 100.0, list(_by_plan(lines, runs))),
    ]  # fmt: skip
    legend = [*[style for *style, _ in by_chunk], *[style[:3] for style in panels[2][3]]]
    across, down = 3 * (WIDTH + GAP) + LEFT, TOP + HEIGHT + 60 + 20 * -(-len(legend) // 3)
    body = "\n".join(
        _panel(LEFT + i * (WIDTH + GAP), *panel) for i, panel in enumerate(panels) if any(s[-1] for s in panel[3])
    )
    named = "\n".join(
        _legend(LEFT + (i % 3) * (WIDTH + GAP), TOP + HEIGHT + 70 + 20 * (i // 3), *style)
        for i, style in enumerate(legend)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" width="{across}" height="{down}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13">\n<rect width="{across}" height="{down}" '
        f'fill="#ffffff"/>\n{body}\n{named}\n</svg>\n'
    )


def _by_hand_over(lines: Sequence[Line], runs: Sequence[str]) -> Iterator[tuple[str, str, str, list[Line]]]:
    """Name, colour, dashes and lines of each curve; to wait stands for those that are the same at latency 0."""
    for run, dash in zip(runs, DASHES * len(runs), strict=False):
        own = [line for line in lines if line["run"] == run and line["routing"] and not line["planner"]]
        start = [line for line in own if line["hand_over"] == "wait" and not line["latency"]]
        for name, colour in COLOURS.items():
            curve = [line for line in own if line["hand_over"] == name]
            if curve:
                if not any(line["latency"] == 0 for line in curve):
                    curve = start + curve
                yield f"{run}: {name}", colour, dash, curve


def _by_plan(lines: Sequence[Line], runs: Sequence[str]) -> Iterator[tuple[str, str, str, list[Point]]]:
    for run, dash in zip(runs, DASHES * len(runs), strict=False):
        own = [x for x in lines if x["run"] == run and x["hand_over"] == "wait" and not x["latency"]]
        if not any(line["planner"] for line in own):
            continue
        for routing, colour in ((True, "#1f6fb2"), (False, "#c0392b")):
            points = [_success(x, "planner") for x in own if x["routing"] == routing]
            yield f"{run}: plans, " + ("routed" if routing else "not routed"), colour, dash, points


def _success(line: Line, at: str) -> Point:
    count, episodes = sum(line["success"]), len(line["success"])
    low, high = wilson(count, episodes)
    return line[at], 100 * count / episodes, 100 * low, 100 * high


def _jerk(line: Line) -> Point:
    mean = float(np.mean(line["jerk"]))
    half = 1.96 * float(np.std(line["jerk"])) / len(line["jerk"]) ** 0.5
    return line["latency"], mean, mean - half, mean + half


def _panel(
    left: int, title: str, below: str, top: float | None, curves: Sequence[tuple[str, str, str, list[Point]]]
) -> str:
    """Axes and curves of one panel."""
    points = [point for *_, curve in curves for point in curve]
    right = max(point[0] for point in points) or 1
    top = top or 1.05 * max(point[3] for point in points)
    bottom, ticks = TOP + HEIGHT, sorted({point[0] for point in points})

    def x(value: float) -> float:
        return left + WIDTH * value / right

    def y(value: float) -> float:
        return bottom - HEIGHT * value / top

    out = [
        _text(left, TOP - 14, title, "start", ' font-weight="bold"'),
        _text(left + WIDTH / 2, bottom + 42, below, "middle"),
        f'<path d="M{left} {TOP}V{bottom}H{left + WIDTH}" fill="none" stroke="#444"/>',
        *(_text(x(tick), bottom + 20, f"{tick:g}", "middle") for tick in ticks),
        *(_text(left - 8, y(top * i / 4) + 4, f"{top * i / 4:.0f}", "end") for i in range(5)),
        *(f'<path d="M{left} {y(top * i / 4):.1f}h{WIDTH}" stroke="#ddd"/>' for i in range(1, 5)),
    ]
    for number, (_, colour, dash, curve) in enumerate(curves):
        aside = 2 * (number - (len(curves) - 1) / 2)  # so that intervals at one latency do not cover each other
        shown = [(x(at) + aside, *map(y, values)) for at, *values in sorted(curve)]
        path = "L".join(f"{at:.1f} {middle:.1f}" for at, middle, *_ in shown)
        style = f'stroke="{colour}" stroke-width="2" fill="none" stroke-dasharray="{dash}"'
        out.append(f'<path d="M{path}" {style}/>')
        for at, middle, low, high in shown:
            out.append(f'<path d="M{at:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-opacity="0.4"/>')
            out.append(f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="3" fill="{colour}"/>')
    return "\n".join(out)


def _legend(left: float, at: float, name: str, colour: str, dash: str) -> str:
    line = f'<path d="M{left} {at - 4}h28" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    return line + _text(left + 36, at, name, "start")


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"{style}>{escape(text)}</text>'
