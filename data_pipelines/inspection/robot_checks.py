"""What the names and the rows of one recorded dataset tell of its robot, as data: grippers, sides, tails, bad rows.

Nothing here judges a dataset; the doctor says it in sentences, the scan of many datasets compares. One pass over the
rows, as they were recorded, and no picture.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.embodiment import Vector
from data_pipelines.episodes import Episodes
from data_pipelines.readers.excerpt import still_end
from data_pipelines.readers.layouts import LAYOUTS, gripper_moves, is_gripper
from data_pipelines.readers.lerobot import LeRobotV21
from data_pipelines.readers.naming import KINDS, SIDES, Span, number_of
from data_pipelines.readers.robocoin import bad_rows

SCALE = "gripper_open_scale_{}"  # the feature in which some datasets repeat their grippers, from 0 closed to 1 open
RELATED = 0.5  # correlation from which on two numbers go together
LAGS = (0, 1, 2, 4, 8)  # rows by which an action may be ahead of the state
CROSSED = 0.5  # actions are of the other arm if they are nearer to it by this factor
APART = 0.02  # rad; arms that differ by less cannot be told apart


# ---------------------------------------------------------------- names
@dataclass(frozen=True)
class NameFindings:
    """What is wrong with the names of a state and an action.

    unnamed: {kind: places without a name}, where others have one.  twice: {kind: {name: its places}}.  misplaced:
    {kind: names of one side that stand among the joints of the other arm}.  opposite: places at which state and action
    name the same number of opposite sides.
    """

    unnamed: Mapping[str, tuple[int, ...]]
    twice: Mapping[str, Mapping[str, tuple[int, ...]]]
    misplaced: Mapping[str, tuple[str, ...]]
    opposite: tuple[int, ...]


def check_names(names: Mapping[str, Sequence[str]]) -> NameFindings:
    """names: {"state" | "action": recorded names, "" where there is none}."""
    twice = {
        kind: {
            name: tuple(place for place, other in enumerate(of) if other == name)
            for name in dict.fromkeys(of)
            if name and of.count(name) > 1
        }
        for kind, of in ((kind, list(of)) for kind, of in names.items())
    }
    numbers = {kind: [number_of(name) for name in of] for kind, of in names.items()}
    pairs = enumerate(zip(*numbers.values(), strict=False))
    return NameFindings(
        {kind: tuple(place for place, name in enumerate(of) if not name) for kind, of in names.items()},
        twice,
        {kind: tuple(_misplaced(of)) for kind, of in numbers.items()},
        tuple(place for place, (one, other) in pairs if one and _other_side(one) == other),
    )


def _other_side(number: str) -> str:
    left, right = SIDES
    side, _, rest = number.partition("_")
    return f"{right if side == left else left}_{rest}"


def _misplaced(numbers: Sequence[str]) -> Iterable[str]:
    """Numbers between two joints of the other arm, and grippers beside that arm alone."""
    known = [number for number in numbers if number]
    joints = [re.fullmatch(r"(\w+)_arm_joint_(\d+)_rad", number) for number in known]
    for place, number in enumerate(known):
        side = number.partition("_")[0]
        beside = [p for p in (place - 1, place + 1) if 0 <= p < len(known)]
        arms = [joints[p] for p in beside if joints[p]]
        if not arms or any(joint[1] == side for joint in arms):
            continue
        if is_gripper(number):
            if len(arms) == len(beside):  # grippers beside each other belong to no arm's block
                yield number
        elif len(arms) == 2 and int(arms[1][2]) - int(arms[0][2]) == 2:  # it stands in place of the one between
            yield number


# ---------------------------------------------------------------- values
@dataclass(frozen=True)
class Range:
    """Of the values of one number: the least, the greatest, what 1% of the rows are below and above, and the standard
    deviation."""

    least: float
    greatest: float
    q01: float
    q99: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Range":
        """Of at least one value."""
        low, high = np.quantile(values, [0.01, 0.99]).tolist()
        return cls(float(values.min()), float(values.max()), low, high, float(values.std(dtype=np.float64)))

    @property
    def moves(self) -> bool:
        """Whether there is more than noise."""
        return gripper_moves(self.least, self.greatest, self.std)


@dataclass(frozen=True)
class Opening:
    """One gripper in the states or the actions.

    place, name: where in the recorded vector, and how it is called there.  unit: what is taken for closed and open.
    recorded: its range.  scale: correlation of the gripper, in the common unit, with the feature
    `gripper_open_scale_*`; None where that is not there or one of the two does not move.
    """

    place: int
    name: str
    unit: Span
    recorded: Range
    scale: float | None = None

    @property
    def common(self) -> Range:
        """Its range from 0 closed to 1 open."""
        closed, opened = self.unit
        low, high, q01, q99 = (
            (x - closed) / (opened - closed)
            for x in (self.recorded.least, self.recorded.greatest, self.recorded.q01, self.recorded.q99)
        )
        std = self.recorded.std / abs(opened - closed)
        return Range(low, high, q01, q99, std) if closed < opened else Range(high, low, q99, q01, std)


@dataclass(frozen=True)
class Gripper:
    """state, action: None where it has no such number.  together: correlation of the two in the common unit, None
    where one is missing or does not move."""

    side: str
    state: Opening | None
    action: Opening | None
    together: float | None

    @property
    def openings(self) -> dict[str, Opening]:
        """{kind: of those that are there}."""
        return {kind: opening for kind in KINDS if (opening := getattr(self, kind))}

    @property
    def ratio(self) -> float | None:
        """How much wider the actions' range is in the common unit than the states', tails left out; None as above."""
        if self.together is None:
            return None
        state, action = (opening.common.q99 - opening.common.q01 for opening in (self.state, self.action))
        return action / state if state > 0 else None


@dataclass(frozen=True)
class RowFindings:
    """What the rows tell; the tuples have one entry per episode.

    episodes: their numbers.  rows: how many each has.  bad: marked as nothing to learn from.  still: rows at the end
    in which no driven number moves.  equal_driven, equal: episodes in which every action is the state of its row, in
    the driven numbers and in all.  own, other: mean distance of the arms' actions from the states of the same and of
    the other arm, rad, at the best of LAGS; None where there are no two arms.
    """

    episodes: tuple[int, ...]
    rows: tuple[int, ...]
    bad: tuple[int, ...]
    still: tuple[int, ...]
    equal_driven: int
    equal: int
    own: float | None
    other: float | None
    grippers: tuple[Gripper, ...]

    @property
    def crossed(self) -> bool:
        """Whether the actions of each arm clearly follow the states of the other."""
        return self.own is not None and self.own > APART and self.other < CROSSED * self.own


@dataclass
class RowChecks:
    """Takes in episode after episode; `finish` tells what they show.

    state, action: the recorded vectors against the numbers of a layout.  What is kept is a few numbers per row.
    """

    state: Vector
    action: Vector
    numbers: Sequence[str]
    _counts: list[tuple[int, int, int, int]] = field(default_factory=list)  # episode, rows, bad, still
    _equal: np.ndarray = field(default_factory=lambda: np.zeros(2, int))  # of the driven numbers, of all
    _values: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)  # [kind, side]: recorded [T]
    _scales: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)  # so of gripper_open_scale_*
    _apart: np.ndarray = field(default_factory=lambda: np.zeros((2, len(LAGS))))  # sums of |action - state|
    _compared: np.ndarray = field(default_factory=lambda: np.zeros(len(LAGS)))  # how many each sum has

    def __post_init__(self) -> None:
        present = self.state.present & self.action.present
        at = {number: d for d, number in enumerate(self.numbers)}
        self._both = np.flatnonzero(present)
        arm = [d for number, d in at.items() if present[d] and not is_gripper(number)]
        pairs = [(d, at[_other_side(self.numbers[d])]) for d in arm]
        self._arm = np.array([pair for pair in pairs if present[pair[1]]], int).reshape(-1, 2)
        self._gripper = {
            (kind, side): at[name]
            for kind in KINDS
            for side in SIDES
            if (name := f"{side}_gripper_open_scale") in at and self._vector(kind).present[at[name]]
        }

    def _vector(self, kind: str) -> Vector:
        return self.state if kind == "state" else self.action

    def add(
        self,
        episode: int,
        states: np.ndarray,
        actions: np.ndarray,
        bad: np.ndarray,
        scales: Mapping[str, np.ndarray],
    ) -> None:
        """One episode as recorded: float32 [T, n] and [T, m], bool [T], and {kind: `gripper_open_scale_*` [T, 1 or 2]}
        where there are such columns."""
        state, action = self.state.to_layout(states), self.action.to_layout(actions)
        still = still_end(np.concatenate([state, action], 1))
        self._counts.append((episode, len(states), int(bad.sum()), still))
        own = {"state": states, "action": actions}
        driven = [own[kind][:, np.array(self._vector(kind).places)[self._both]] for kind in KINDS]
        self._equal += (len(self._both) > 0 and np.array_equal(*driven), np.array_equal(states, actions))
        for (kind, side), d in self._gripper.items():
            # A copy, as a column would hold all the others in memory.
            self._values.setdefault((kind, side), []).append(own[kind][:, self._vector(kind).places[d]].copy())
            if kind in scales:
                column = min(SIDES.index(side), scales[kind].shape[1] - 1)
                self._scales.setdefault((kind, side), []).append(scales[kind][:, column].copy())
        if self._arm.size:
            self._compare(state, action)

    def _compare(self, state: np.ndarray, action: np.ndarray) -> None:
        mine, others = self._arm.T
        for k, lag in enumerate(LAGS):
            ahead = action[: max(0, len(action) - lag), mine]
            for which, columns in enumerate((mine, others)):
                self._apart[which, k] += np.abs(ahead - state[lag:, columns]).sum(dtype=np.float64)
            self._compared[k] += ahead.size

    def finish(self) -> RowFindings:
        """Of at least one episode."""
        episodes, rows, bad, still = zip(*self._counts, strict=True)
        own = other = None
        if self._compared[0]:
            seen = self._compared > 0
            own, other = (self._apart[:, seen] / self._compared[seen]).min(1).tolist()
        equal = [int(count) for count in self._equal]
        there = {side for _, side in self._gripper}
        grippers = tuple(self._of_side(side) for side in SIDES if side in there)
        return RowFindings(episodes, rows, bad, still, *equal, own, other, grippers)

    def _of_side(self, side: str) -> Gripper:
        openings, common = {}, {}
        for kind in KINDS:
            if (kind, side) not in self._gripper:
                continue
            d, vector = self._gripper[kind, side], self._vector(kind)
            values, unit = np.concatenate(self._values[kind, side]), (vector.zero[d], vector.one[d])
            common[kind] = (values.astype(np.float64) - unit[0]) / (unit[1] - unit[0])
            scales = self._scales.get((kind, side), [])
            # A column that some files lack tells nothing.
            scale = _correlation(common[kind], np.concatenate(scales)) if len(scales) == len(self._counts) else None
            place = vector.places[d]
            openings[kind] = Opening(place, vector.names[place], unit, Range.of(values), scale)
        together = _correlation(*common.values()) if len(common) == 2 else None
        return Gripper(side, openings.get("state"), openings.get("action"), together)


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Of two [T]; None where one does not move."""
    if not (Range.of(one).moves and Range.of(other).moves):
        return None
    return float(np.corrcoef(one, other)[0, 1])


# ---------------------------------------------------------------- of a dataset
def vector_by_name(names: Sequence[str]) -> Vector:
    """A recorded vector against the layout two_arms, also where it does not fit: the first number of each name, and
    grippers as if they were recorded from 0 to 1."""
    numbers = LAYOUTS["two_arms"].names
    found = [number_of(name) for name in names]
    places = tuple(found.index(number) if number in found else -1 for number in numbers)
    return Vector(tuple(names), places, (0.0,) * len(numbers), (1.0,) * len(numbers))


def gripper_scales(recorded: Episodes, episode: int) -> dict[str, np.ndarray]:
    """{kind: its feature `gripper_open_scale_*`, float32 [T, 1 or 2]} of what an episode's file holds of them."""
    if not isinstance(recorded, LeRobotV21):
        return {}
    found = {kind: recorded.column(episode, SCALE.format(kind)) for kind in KINDS}
    return {kind: column for kind, column in found.items() if column is not None and column.shape[1] <= 2}


def check_rows(
    recorded: Episodes, state: Vector, action: Vector, numbers: Sequence[str], episodes: Iterable[int]
) -> RowFindings:
    """Reads the rows of some episodes, at least one, of a dataset as it was recorded.

    numbers: of the layout that `state` and `action` are told against. Raises DatasetError for rows that are damaged.
    """
    checks = RowChecks(state, action, numbers)
    for episode in episodes:
        states, actions = recorded.states(episode), recorded.actions(episode)
        checks.add(episode, states, actions, bad_rows(recorded, episode), gripper_scales(recorded, episode))
    return checks.finish()
