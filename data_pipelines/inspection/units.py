"""What the datasets of one robot show of its grippers: their unit, measured over all of them, and who disagrees."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.inspection.findings import ROOM, Finding, Grip
from data_pipelines.inspection.robot_checks import RELATED
from data_pipelines.readers.layouts import gripper_moves
from data_pipelines.readers.naming import KINDS, SIDES, Span, reading_of
from data_pipelines.statistics import UNLIKE as ODD

SCALES = (1.0, 10.0, 100.0, 1000.0)  # units that recordings use, closed at 0
REACHED = 0.5  # part of a unit that the widest opening of all datasets reaches at least
NEAR = 0.1  # part of a unit, or of a range, that two ends differ by at most to be one

Spans = dict[str, tuple[Span, Span]]  # {kind: (closed, open) of the left and the right gripper}
Falls = tuple[bool | None, bool | None]  # of the left and the right gripper


@dataclass(frozen=True)
class Unit:
    """Of the grippers of one robot.

    spans: what is recorded closed and open; None for a robot without grippers, or whose grippers do not move.  stated:
    whether the table of robots says so already.  measured: of what it is, in words.  doubt: why the direction has to
    be said by somebody who knows, "" where it need not.  odd: {path: why the dataset does not fit the others}.
    """

    spans: Spans | None = None
    stated: bool = False
    measured: str = ""
    doubt: str = ""
    odd: dict[str, str] = field(default_factory=dict)

    def span(self, grip: Grip) -> Span:
        """Of one gripper; there must be spans."""
        return self.spans[grip.kind][SIDES.index(grip.side)]


def unit_of(findings: Sequence[Finding]) -> Unit:
    """findings: all datasets of a robot that could be read, of one recorded type."""
    odd = _unlike(findings) | _against(findings)
    unit = _measured(findings[0].robot, [finding for finding in findings if finding.path not in odd])
    if unit.spans is not None:
        odd |= _unlike([finding for finding in findings if finding.path not in odd], unit.spans)
    return dataclasses.replace(unit, odd=odd)


def _measured(robot: str, findings: Sequence[Finding]) -> Unit:
    """The unit of datasets that agree in it. robot: as recorded."""
    said = reading_of(robot)
    grips = {kind: [g for f in findings for g in f.grippers if g.kind == kind] for kind in KINDS}
    grips = {kind: of for kind, of in grips.items() if of}
    doubt = said.doubtful if grips and not said.gripper else ""
    if not any(g.greatest > g.least for of in grips.values() for g in of):
        return Unit(doubt=doubt)
    ranges = {f"{kind}s": _range(of) for kind, of in grips.items()}
    told = " and ".join(f"{kind} {ends}" for kind, ends in ranges.items())
    measured = told if len({*ranges.values()}) > 1 else _range([g for of in grips.values() for g in of])
    measured += f", in {_count(len(findings), 'dataset')}"
    if said.gripper:
        spans = {kind: getattr(said.gripper, kind) for kind in KINDS}
        if all(_agree(of, spans[kind]) for kind, of in grips.items()):
            return Unit(spans, True, measured, doubt)
        measured += f"; the table of robots says {toml_gripper(spans)}, which does not fit"
    falls = {kind: _falls(of) for kind, of in grips.items()}
    spans = {kind: _turned(_ends(of), falls[kind]) for kind, of in grips.items()}
    if falling := [_which(kind, of) for kind, of in falls.items() if any(of)]:
        measured += f"; {' and '.join(falling)} fall as the gripper opens"
    together = [r for f in findings for r in f.together.values()]
    if not doubt and (None, None) in falls.values() and together and np.median(together) < -RELATED:
        doubt = "its actions fall where its states rise, and nothing tells which of them is greater when open"
    one = next(iter(spans.values()))
    return Unit({kind: spans.get(kind, one) for kind in KINDS}, False, measured, doubt)


def _turned(spans: tuple[Span, Span], falls: Falls) -> tuple[Span, Span]:
    left, right = (span[::-1] if fall else span for span, fall in zip(spans, falls, strict=True))
    return left, right


def _which(kind: str, falls: Falls) -> str:
    """What falls, of a kind of which something does."""
    sides = [side for side, fall in zip(SIDES, falls, strict=True) if fall]
    return f"{kind}s" if len(sides) == len(SIDES) else f"{sides[0]} {kind}s"


def _unlike(findings: Sequence[Finding], spans: Spans | None = None) -> dict[str, str]:
    """Datasets whose numbers are of another size than those of most hours of their robot, as statistics refuse them.

    spans: the unit that they are compared in, None for as they were recorded. One that does not move tells no size.
    """
    found: dict[str, str] = {}
    hours = {finding.path: finding.hours for finding in findings}
    for kind, side in ((kind, side) for kind in KINDS for side in SIDES):
        grips = {f.path: g for f in findings for g in f.grippers if (g.kind, g.side) == (kind, side)}
        ends = {path: _ends_of(grip, spans) for path, grip in grips.items()}
        sizes = {path: max(abs(low), abs(high)) for path, (low, high, _) in ends.items()}
        if not sizes:
            continue
        usual = 1.0 if spans else _middle([*sizes.values()], [hours[path] for path in sizes]) or 1.0
        moving = {path: size for path, size in sizes.items() if gripper_moves(*(x / usual for x in ends[path]))}
        fitting = _most_hours(moving, hours)
        for path in moving.keys() - fitting:
            found[path] = (
                f"its {side} gripper's {kind}s are {_range([grips[path]])}, in the other datasets of its robot "
                f"{_range([grips[other] for other in fitting])}. If that is another unit, write it here as gripper = "
                "{ closed = .., open = .. } and delete this line."
            )
    return found


def _ends_of(grip: Grip, spans: Spans | None) -> tuple[float, float, float]:
    """Least and greatest value, and the standard deviation."""
    if spans is None:
        return grip.least, grip.greatest, grip.std
    closed, opened = spans[grip.kind][SIDES.index(grip.side)]
    low, high = sorted((x - closed) / (opened - closed) for x in (grip.least, grip.greatest))
    return low, high, grip.std / abs(opened - closed)


def _most_hours(sizes: Mapping[str, float], hours: Mapping[str, float]) -> set[str]:
    """Those of the most hours together whose sizes do not differ by more than ODD."""
    windows = ({path for path, size in sizes.items() if low <= size <= ODD * low} for low in sorted(sizes.values()))
    return max(windows, key=lambda paths: sum(hours[path] for path in sorted(paths)), default=set())


def _against(findings: Sequence[Finding]) -> dict[str, str]:
    """Datasets whose actions run against their states, in a robot where they run with them."""
    together = {f.path: float(np.mean([*f.together.values()])) for f in findings if f.together}
    if not together or _middle([*together.values()], [f.hours for f in findings if f.together]) < RELATED:
        return {}
    return {
        path: (
            f"its gripper's actions fall where its states rise (correlation {r:.2f}), those of the other datasets of "
            "its robot rise. Write what it records as gripper = { state = { closed = .., open = .. }, action = "
            "{ closed = .., open = .. } } and delete this line."
        )
        for path, r in together.items()
        if r < -RELATED
    }


def _middle(values: Sequence[float], weights: Sequence[float]) -> float:
    """The value that half of the weight is at or below."""
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(np.array(weights)[order])
    return float(np.array(values)[order][np.searchsorted(sums, sums[-1] / 2)])


def _agree(grips: Sequence[Grip], spans: tuple[Span, Span]) -> bool:
    """Whether all stay within a unit and some use it; all of it, no single dataset has to show."""
    reached = 0.0
    for grip in grips:
        closed, opened = spans[SIDES.index(grip.side)]
        low, high = sorted((x - closed) / (opened - closed) for x in (grip.q01, grip.q99))
        if low < -NEAR or high > ROOM:
            return False
        reached = max(reached, high)
    ways = zip(_falls(grips), spans, strict=True)
    return reached >= REACHED and all(fall in (None, closed > opened) for fall, (closed, opened) in ways)


def _falls(grips: Sequence[Grip]) -> Falls:
    """Whether they fall as the opening that was recorded beside them rises. A side beside which none was is taken to
    go as the other, None where both are."""

    def fall(side: str) -> bool | None:
        related = [g.scale for g in grips if g.side == side and g.scale is not None and abs(g.scale) > RELATED]
        return bool(np.median(related) < 0) if related else None

    left, right = map(fall, SIDES)
    return right if left is None else left, left if right is None else right


def _ends(grips: Sequence[Grip]) -> tuple[Span, Span]:
    """Least and greatest end of the left and the right gripper: a power of ten where the range is one's, else what 1%
    of the rows of a dataset are below and above."""
    least, greatest = min(g.least for g in grips), max(g.greatest for g in grips)
    for scale in SCALES:
        if REACHED * scale <= greatest <= ROOM * scale and abs(least) <= NEAR * scale:
            return (0.0, scale), (0.0, scale)
    sides = [[g for g in grips if g.side == side and g.greatest > g.least] for side in SIDES]
    both = [_span(side) if side else None for side in sides]
    left, right = (span or both[1 - place] for place, span in enumerate(both))
    wide = max(left[1], right[1]) - min(left[0], right[0])
    if max(abs(a - b) for a, b in zip(left, right, strict=True)) <= NEAR * wide:
        left = right = (min(left[0], right[0]), max(left[1], right[1]))
    return left, right


def _span(grips: Sequence[Grip]) -> Span:
    """Of one side; with the outermost rows where the others hardly move, as of a gripper that is seldom used."""
    low, high = min(g.q01 for g in grips), max(g.q99 for g in grips)
    least, greatest = min(g.least for g in grips), max(g.greatest for g in grips)
    return (low, high) if high - low > (greatest - least) / 2 else (least, greatest)


def _range(grips: Sequence[Grip]) -> str:
    return f"{min(g.least for g in grips):.4g} to {max(g.greatest for g in grips):.4g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def toml_gripper(spans: Spans) -> str:
    """The value of `gripper` in a subset file."""
    kinds = [_toml_spans(spans[kind]) for kind in KINDS]
    if kinds[0] == kinds[1]:
        return kinds[0]
    return f"{{ {', '.join(f'{kind} = {value}' for kind, value in zip(KINDS, kinds, strict=True))} }}"


def _toml_spans(sides: tuple[Span, Span]) -> str:
    ends = [[float(f"{x:.6g}") for x in pair] for pair in zip(*sides, strict=True)]
    closed, opened = (pair[0] if pair[0] == pair[1] else pair for pair in ends)
    return f"{{ closed = {closed}, open = {opened} }}"
