"""From the units of a recording to numbers of about unit size and back, by a rule for each number of state and action.

z = (x - shift) / scale, cut off at -clip and clip:

    z-score    shift is the mean, scale the standard deviation, at least 0.001
    min-max    the smallest recorded value becomes -1, the largest 1
    quantile   q01 becomes -1, q99 becomes 1

The release takes the z-score of every number and cuts it at 5. A cut cannot be undone, so a run says what it loses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.episodes import DatasetError

Z_SCORE = "z-score"
SPANS = {"min-max": ("min", "max"), "quantile": ("q01", "q99")}  # rule: what becomes -1 and 1
RULES = (Z_SCORE, *SPANS)
CLIP = 5.0
# A joint that never moves has std near 0; dividing by it would blow sensor noise up to huge inputs.
STD_FLOOR = 1e-3
TOLD = 0.01  # share of a number's range from which on a loss is worth a warning
ROUNDING = 1e-6  # a number that varies by less, relative to the largest of its vector, is constant up to float32
NAMED = 6  # numbers described in a warning

Scaling = Mapping[str, np.ndarray]  # of a state or action: mean, std, min, max, q01, q99, normalization, clip


@dataclass(frozen=True)
class Normalization:
    """How a run normalises.

    state, action: rules as `choose` reads them.  clip: |z| is cut off there, 0 for no cut. Raises ValueError for a
    clip that is negative or not finite.
    """

    state: str = Z_SCORE
    action: str = Z_SCORE
    clip: float = CLIP

    def __post_init__(self) -> None:
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"config.data.clip is {self.clip}; expected a number above 0, or 0 to cut nothing.")

    def of(self, kind: str, names: Sequence[str], width: int) -> dict[str, np.ndarray]:
        """What the statistics of `kind`, "state" or "action", record of it: normalization str [width], clip float64
        [width]."""
        rules = choose(getattr(self, kind), kind, names, width)
        return {"normalization": rules, "clip": np.full(width, float(self.clip))}


RELEASED = Normalization()


def choose(text: str, kind: str, names: Sequence[str], width: int) -> np.ndarray:
    """The rule of each of `width` numbers, str [width].

    text: as "min-max", or "gripper=min-max, 3=quantile": names or places with their rules; a rule that stands alone is
    that of all other numbers, by default the z-score. Raises DatasetError for anything else.
    """
    field = f"config.data.normalization.{kind}"
    rules: dict[int, str] = {}
    others: set[str] = set()
    for word in filter(None, map(str.strip, text.split(","))):
        number, _, rule = map(str.strip, word.rpartition("="))
        if rule not in RULES:
            raise DatasetError(f"{field} asks for {rule!r}; expected one of {', '.join(RULES)}.")
        if "=" not in word:
            others.add(rule)
            continue
        place = names.index(number) if number in names else int(number) if number.isdecimal() else width
        if (count := names.count(number)) > 1:
            raise DatasetError(f"{field} names {number!r}, which {count} numbers are called; give places.")
        if place >= width:
            known = f"0 to {width - 1}" + (f", {', '.join(names)}" if names else ", which have no names")
            raise DatasetError(f"{field} names {number!r}; the numbers of the {kind} are {known}.")
        if rules.setdefault(place, rule) != rule:
            raise DatasetError(f"{field} gives {number!r} two rules, {rules[place]} and {rule}; keep one.")
    if len(others) > 1:
        raise DatasetError(f"{field} gives all numbers the rules {' and '.join(sorted(others))}; keep one.")
    rest = others.pop() if others else Z_SCORE
    return np.array([rules.get(place, rest) for place in range(width)])


def normalize(x: np.ndarray, stats: Scaling) -> np.ndarray:
    """x [..., d] in the units of the recording -> float32 [..., d], unitless, cut off at stats["clip"].

    The release cuts states and actions alike, so that a rare outlier cannot dominate a batch.
    """
    shift, scale, limit = _scaling(stats)
    return np.clip((x - shift) / scale, -limit, limit).astype(np.float32)


def denormalize(x: np.ndarray, stats: Scaling) -> np.ndarray:
    """Undoes `normalize` but for its cut: [..., d] unitless -> float32 [..., d] in the units of the recording."""
    shift, scale, _ = _scaling(stats)
    return (x * scale + shift).astype(np.float32)


def recoverable(x: np.ndarray, stats: Scaling) -> np.ndarray:
    """What comes back of x [..., d], in its units: x itself where nothing is cut."""
    shift, scale, limit = _scaling(stats)
    return np.clip(x, shift - limit * scale, shift + limit * scale)


def _scaling(stats: Scaling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """shift, scale and the largest |z|, float64 [d]."""
    shift, scale = np.array(stats["mean"], np.float64), np.maximum(stats["std"], STD_FLOOR)
    for rule, (low, high) in SPANS.items():
        chosen = stats["normalization"] == rule
        if not chosen.any():
            continue
        a, b = stats[low][chosen], stats[high][chosen]
        shift[chosen], scale[chosen] = (a + b) / 2, np.where(a < b, (b - a) / 2, STD_FLOOR)
    return shift, scale, np.where(stats["clip"] > 0, stats["clip"], np.inf)


# ---------------------------------------------------------------- in words
def describe(stats: Mapping[str, Scaling]) -> str:
    """As "state z-score cut at 5, action z-score cut at 5 but 6 min-max"."""
    words = []
    for kind in ("state", "action"):
        rules, clips = stats[kind]["normalization"].tolist(), np.unique(stats[kind]["clip"])
        most = max(RULES, key=rules.count)
        cut = f"cut at {' and '.join(f'{clip:g}' for clip in clips)}" if clips.any() else "not cut"
        rest = " and ".join(f"{place} {rule}" for place, rule in enumerate(rules) if rule != most)
        words.append(f"{kind} {most} {cut}" + (f" but {rest}" if rest else ""))
    return ", ".join(words)


def label(names: Sequence[str], place: int) -> str:
    """How a sentence calls one number of a state or action."""
    return f"{place} ({names[place]})" if names else f"dimension {place}"


def losses(kind: str, names: Sequence[str], stats: Scaling, ends: np.ndarray, share: np.ndarray) -> Iterator[str]:
    """What normalising takes from the recorded numbers of a `kind`, in sentences; none where it takes nothing.

    ends: least and greatest value of each number, [2, d], towards which a loss grows.  share: of the rows in which it
    is cut, [d].
    """
    span, back = ends[1] - ends[0], recoverable(ends, stats)
    off = np.abs(ends - back)
    worst = off.argmax(0)
    share_lost = off.max(0) / np.maximum(span, np.finfo(np.float64).tiny)
    cut = [int(d) for d in np.argsort(-share_lost, kind="stable") if share_lost[d] > TOLD]
    if cut:
        told = [
            f"{label(names, d)} in {100 * share[d]:.2g}% of the rows, where {ends[worst[d], d]:.4g} comes back as "
            f"{back[worst[d], d]:.4g}, {off[worst[d], d]:.3g} off"
            for d in cut[:NAMED]
        ]
        clip = " and ".join(f"{x:g}" for x in np.unique(stats["clip"][cut]))
        yield (
            f"Normalised, the {kind} is cut at {clip}: {_listed(told, len(cut))}. A policy cannot learn what is cut: "
            f"keep commands with {_flag(kind, names, cut)}, long tails with a larger --config.data.clip (0 cuts "
            "nothing); only glitches are best cut."
        )
    small = (stats["normalization"] == Z_SCORE) & (stats["std"] < STD_FLOOR) & (span > ROUNDING * np.abs(ends).max())
    if small.any():
        places = np.flatnonzero(small).tolist()
        told = [f"{label(names, d)} by {stats['std'][d]:.2g}" for d in places[:NAMED]]
        yield (
            f"The {kind} varies by less than the {STD_FLOOR:g} that a z-score divides by at least (standard "
            f"deviation): {_listed(told, len(places))}. The policy would hardly tell its values apart; if they are "
            f"more than noise, take {_flag(kind, names, places)} or record them in a smaller unit."
        )


def _listed(told: Sequence[str], count: int) -> str:
    return "; ".join(told) + (f"; and {count - len(told)} more" if count > len(told) else "")


def _flag(kind: str, names: Sequence[str], places: Sequence[int]) -> str:
    """The flag that normalises these numbers by min-max."""
    own = {d for d in places if names and names.count(names[d]) == 1 and not set(names[d]) & set(",=")}
    chosen = ", ".join(f"{names[d] if d in own else d}=min-max" for d in places)
    return f'--config.data.normalization.{kind}="{chosen}"'
