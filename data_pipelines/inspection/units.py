"""What the datasets of one robot show of its grippers: their unit, measured over all of them, and who disagrees."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.inspection.findings import ROOM, Finding, Grip
from data_pipelines.inspection.robot_checks import RELATED
from data_pipelines.readers.naming import KINDS, SIDES, Span, reading_of

SCALES = (1.0, 10.0, 100.0, 1000.0)  # units that recordings use, closed at 0
REACHED = 0.5  # part of a unit that the widest opening of all datasets reaches at least
NEAR = 0.1  # part of a unit, or of a range, that two ends differ by at most to be one
ODD = 5.0  # factor by which a dataset's numbers differ from those of its robot where its unit is another one
STANDS = 0.005  # of the robot's greatest number: a gripper whose range is smaller does not move, and tells nothing

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
    said, odd = reading_of(findings[0].robot), _odd(findings)
    rest = [finding for finding in findings if finding.path not in odd]
    grips = {kind: [g for f in rest for g in f.grippers if g.kind == kind] for kind in KINDS}
    grips = {kind: of for kind, of in grips.items() if of}
    doubt = said.doubtful if grips and not said.gripper else ""
    if not any(g.greatest > g.least for of in grips.values() for g in of):
        return Unit(doubt=doubt, odd=odd)
    measured = " and ".join(f"{kind}s {_range(of)}" for kind, of in grips.items())
    measured += f", in {_count(len(rest), 'dataset')}"
    if said.gripper:
        spans = {kind: getattr(said.gripper, kind) for kind in KINDS}
        if all(_agree(of, spans[kind]) for kind, of in grips.items()):
            return Unit(spans, True, measured, doubt, odd)
        measured += f"; the table of robots says {toml_gripper(spans)}, which does not fit"
    falls = {kind: _falls(of) for kind, of in grips.items()}
    spans = {kind: _turned(_ends(of), falls[kind]) for kind, of in grips.items()}
    if falling := [_which(kind, of) for kind, of in falls.items() if any(of)]:
        measured += f"; {' and '.join(falling)} fall as the gripper opens"
    together = [r for f in rest for r in f.together.values()]
    if not doubt and (None, None) in falls.values() and together and np.median(together) < -RELATED:
        doubt = "its actions fall where its states rise, and nothing tells which of them is greater when open"
    one = next(iter(spans.values()))
    return Unit({kind: spans.get(kind, one) for kind in KINDS}, False, measured, doubt, odd)


def _turned(spans: tuple[Span, Span], falls: Falls) -> tuple[Span, Span]:
    left, right = (span[::-1] if fall else span for span, fall in zip(spans, falls, strict=True))
    return left, right


def _which(kind: str, falls: Falls) -> str:
    """What falls, of a kind of which something does."""
    sides = [side for side, fall in zip(SIDES, falls, strict=True) if fall]
    return f"{kind}s" if len(sides) == len(SIDES) else f"{sides[0]} {kind}s"


def _odd(findings: Sequence[Finding]) -> dict[str, str]:
    """Datasets whose numbers are of another size than those of their robot, or run the other way."""
    found: dict[str, str] = {}
    for kind in KINDS:
        sizes = {f.path: max((g.size for g in f.grippers if g.kind == kind), default=0.0) for f in findings}
        usual = _middle([sizes[f.path] for f in findings], [f.hours for f in findings])
        for finding in findings:
            grips = [g for g in finding.grippers if g.kind == kind]
            size = sizes[finding.path]
            if any(g.greatest - g.least > STANDS * usual for g in grips) and not usual / ODD <= size <= usual * ODD:
                found[finding.path] = (
                    f"its gripper's {kind}s are {_range(grips)}, those of the other datasets of its robot go up to "
                    f"{usual:.4g}. If that is another unit, write it here as gripper = {{ closed = .., open = .. }} "
                    "and delete this line"
                )
    together = {f.path: float(np.mean([*f.together.values()])) for f in findings if f.together}
    usual = _middle([*together.values()], [f.hours for f in findings if f.together]) if together else 0.0
    for path, r in together.items():
        if usual > RELATED and r < -RELATED:
            found[path] = (
                f"its gripper's actions fall where its states rise (correlation {r:.2f}), those of the other datasets "
                "of its robot rise. Write what it records as gripper = { state = { closed = .., open = .. }, "
                "action = { closed = .., open = .. } } and delete this line"
            )
    return found


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
    both = [(min(g.q01 for g in side), max(g.q99 for g in side)) if side else None for side in sides]
    left, right = (span or both[1 - place] for place, span in enumerate(both))
    wide = max(left[1], right[1]) - min(left[0], right[0])
    if max(abs(a - b) for a, b in zip(left, right, strict=True)) <= NEAR * wide:
        left = right = (min(left[0], right[0]), max(left[1], right[1]))
    return left, right


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
    ends = [[float(f"{x:.4g}") for x in pair] for pair in zip(*sides, strict=True)]
    closed, opened = (pair[0] if pair[0] == pair[1] else pair for pair in ends)
    return f"{{ closed = {closed}, open = {opened} }}"
