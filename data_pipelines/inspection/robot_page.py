"""What the doctor says of a dataset's robot: how its vectors are driven, its views, its grippers, what is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment, Vector
from data_pipelines.episodes import Episodes
from data_pipelines.inspection.checks import check_rows as readable
from data_pipelines.inspection.checks import listed, some
from data_pipelines.inspection.robot_checks import (
    CROSSED,
    RELATED,
    NameFindings,
    Opening,
    RowFindings,
    check_names,
    check_rows,
    vector_by_name,
)
from data_pipelines.readers.excerpt import Excerpt, still_rows
from data_pipelines.readers.layouts import LAYOUTS, is_gripper
from data_pipelines.readers.naming import KINDS, Reading, number_of, reading_of
from data_pipelines.readers.subset import as_recorded, embodiment_of

TAIL = 1.0  # seconds that an episode may stand still at its end before that is worth a warning
OUTSIDE = 0.05  # how far grippers may lie outside 0..1
SCALED = 3.0  # ranges of states and actions that differ by this factor are not in one unit


@dataclass(frozen=True)
class Robot:
    """The robot of a dataset.

    dataset: as training reads it.  recorded: what it was made of.  embodiment: None where numbers are used as they are
    recorded.  unit_from: who says what the grippers record.  lead: see `naming.Reading`.  still: rows at the end of
    each episode of `dataset` in which nothing moves.
    """

    dataset: Episodes
    recorded: Episodes
    embodiment: Embodiment | None
    unit_from: str
    lead: int
    names: NameFindings
    rows: RowFindings
    still: np.ndarray


def look(dataset: Episodes, healthy: Sequence[int], said: Reading | None) -> Robot | None:
    """The robot of a dataset that names joints or grippers of two arms, None of another.

    healthy: its episodes with rows that can be read.  said: what a subset file says of it, None where there is none.
    Raises DatasetError for what is annotated beside the rows and cannot be read.
    """
    (recorded, _), embodiment = as_recorded(dataset), embodiment_of(dataset)
    if embodiment and said is not None:
        state, action, numbers = embodiment.state, embodiment.action, dataset.state_names
    else:
        state, action = (_by_name(recorded, kind) for kind in KINDS)
        numbers = LAYOUTS["two_arms"].names
    if not (state.present.any() and action.present.any()):
        return None
    episodes = [e for e in range(len(recorded.lengths)) if not readable(recorded, e).problem]
    if not episodes:
        return None
    fine = set(healthy)
    if said is None:
        unit_from = "of its conversion" if embodiment else "for a subset file to say"
    elif said.gripper:
        unit_from = "by the subset file"
    else:
        unit_from = "by the table of robots" if reading_of(recorded.robot).gripper else "by its name"
    return Robot(
        dataset,
        recorded,
        embodiment,
        unit_from,
        said.lead if said else 0,
        check_names({"state": recorded.state_names, "action": recorded.action_names}),
        check_rows(recorded, state, action, numbers, episodes),
        np.array([still_rows(dataset, e) if e in fine else 0 for e in range(len(dataset.lengths))]),
    )


def _by_name(recorded: Episodes, kind: str) -> Vector:
    """Numbers that a converted dataset's robot has not are zeros there."""
    names, present = getattr(recorded, f"{kind}_names"), getattr(recorded, f"{kind}_present")
    return vector_by_name([name if has else "" for name, has in zip(names, present, strict=False)])


# ---------------------------------------------------------------- the page
def describe(robot: Robot) -> Iterator[str]:
    """Lines of the page."""
    if robot.embodiment:
        yield from _driven(robot)
        absent = robot.embodiment.absent
        if absent:
            are = "is" if len(absent) == 1 else "are"
            yield f"views         {len(absent)} of {len(CAMERAS)} views {are} absent, black: {', '.join(absent)}"
    yield from _left_out(robot)
    grippers = [(gripper.side, kind, x) for gripper in robot.rows.grippers for kind, x in gripper.openings.items()]
    if grippers:
        yield f"grippers      {'recorded':>20}{'1% .. 99%':>20}{'0 closed .. 1 open':>20}   unit, {robot.unit_from}"
    for side, kind, x in grippers:
        own, common = x.recorded, x.common if robot.embodiment else None
        yield (
            f"  {f'{side} {kind}':12}{_span(own.least, own.greatest):>20}{_span(own.q01, own.q99):>20}"
            f"{_span(common.least, common.greatest) if common else 'unknown':>20}   {_unit(robot, x)}"
        )


def _driven(robot: Robot) -> Iterator[str]:
    for kind in KINDS:
        vector: Vector = getattr(robot.embodiment, kind)
        has, width = vector.present, len(vector.names)
        lacks = [name for name, is_there in zip(robot.dataset.state_names, has, strict=True) if not is_there]
        yield (
            f"{kind:13} {has.sum()} of the layout's {len(has)} numbers"
            + (f", without {', '.join(lacks)}" if lacks else "")
            + (f"; {width - has.sum()} of {width} recorded numbers are not used" if width > has.sum() else "")
        )
    if held := robot.embodiment.held:
        yield f"held          {len(held)} numbers of the action are not driven: {listed(held)}"
    if robot.lead:
        yield f"lead          the action of a row is the one recorded {robot.lead} row{'s' * (robot.lead > 1)} later"


def _left_out(robot: Robot) -> Iterator[str]:
    excerpt = robot.dataset
    while not isinstance(excerpt, Excerpt) and hasattr(excerpt, "source"):
        excerpt = excerpt.source
    if not isinstance(excerpt, Excerpt):
        return
    lengths = robot.recorded.lengths
    kept = np.bincount(excerpt.origin, excerpt.lengths, len(lengths)).astype(int)
    whole, cut = np.flatnonzero(kept == 0).tolist(), np.flatnonzero((0 < kept) & (kept < lengths)).tolist()
    told = [f"all of {some('episode', whole)}"] * bool(whole) + [f"parts of {some('episode', cut)}"] * bool(cut)
    yield (
        f"left out      {lengths.sum() - kept.sum()} of {lengths.sum()} rows: {', '.join(told)}; "
        f"{sum(robot.rows.bad)} rows are marked as bad; {len(excerpt.lengths)} pieces are left, of "
        f"{(kept > 0).sum()} episodes"
    )


def _span(low: float, high: float) -> str:
    return f"{low + 0.0:.4g} to {high + 0.0:.4g}"  # 0.0: of an inverted unit comes -0


def _unit(robot: Robot, opening: Opening) -> str:
    closed, opened = opening.unit
    if not robot.embodiment:
        return opening.name
    return f"{opening.name}, closed {closed:g}, open {opened:g}"


# ---------------------------------------------------------------- warnings
def warnings(robot: Robot) -> Iterator[str]:
    """What training would take without a word."""
    yield from _of_names(robot)
    yield from _of_sides(robot)
    yield from _of_grippers(robot)
    yield from _of_rows(robot)


def _of_names(robot: Robot) -> Iterator[str]:
    for kind in KINDS:
        names = getattr(robot.recorded, f"{kind}_names")
        if places := robot.names.unnamed[kind]:
            yield (
                f"The {kind} has {len(names)} numbers and {len(names) - len(places)} names; they are taken for the "
                f"first ones, and {some('place', places)} for numbers without a name, which nobody drives."
            )
        for name, places in robot.names.twice[kind].items():
            yield f"The {kind} calls {len(places)} numbers {name}, at {some('place', places)}; one of them is another."
        if wrong := robot.names.misplaced[kind]:
            yield (
                f"The {kind} has {listed(wrong)} among the joints of the other arm; look at its films and say in the "
                f"subset file which number it is, as in {kind} = {{ {wrong[0]} = 3 }}."
            )


def _of_sides(robot: Robot) -> Iterator[str]:
    rows, places = robot.rows, robot.names.opposite
    names = [(robot.recorded.state_names[place], robot.recorded.action_names[place]) for place in places]
    arms = any(not is_gripper(number_of(name)) for name, _ in names)
    if rows.crossed:
        yield (
            f"The actions of each arm follow the states of the other: they are {rows.own:.2g} rad away from those of "
            f"their own arm and {rows.other:.2g} from the other's; look at its films and exchange the sides of the "
            "state or the action in the subset file, by place."
        )
    elif places and not (arms and rows.own is not None and rows.own < CROSSED * rows.other):
        yield (
            f"State and action name opposite sides at {some('place', places)}, as {' and '.join(names[0])}, and the "
            "rows do not tell whether one is wrong; look at its films."
        )


def _of_grippers(robot: Robot) -> Iterator[str]:
    for gripper in robot.rows.grippers:
        who = f"The {gripper.side} gripper"
        for kind, opening in gripper.openings.items():
            common = opening.common
            if robot.embodiment and (common.q01 < -OUTSIDE or common.q99 > 1 + OUTSIDE):
                own, (closed, opened) = opening.recorded, opening.unit
                yield (
                    f"{who}'s {kind} goes from {_span(common.q01, common.q99)} where 0 is closed and 1 open (1% of "
                    f"the rows below and above), recorded from {_span(own.q01, own.q99)}; its unit, closed {closed:g} "
                    f"and open {opened:g}, is {robot.unit_from}: write what it records as gripper = {{ closed = .., "
                    "open = .. } in the subset file."
                )
        together, ratio = gripper.together, gripper.ratio
        if together is not None and together < -RELATED:
            yield (
                f"{who} closes in the action where it opens in the state (correlation {together:.2f}): one of them is "
                "recorded the other way round; give each its unit in the subset file, as in gripper = { state = { .. "
                "}, action = { .. } }."
            )
        if ratio is not None and not 1 / SCALED < ratio < SCALED:
            state, action = gripper.state.recorded, gripper.action.recorded
            yield (
                f"{who} is recorded from {_span(state.q01, state.q99)} in the state and from "
                f"{_span(action.q01, action.q99)} in the action, in the common unit {max(ratio, 1 / ratio):.3g} times "
                "as far in one as in the other; give each its unit in the subset file, as in gripper = { state = { .. "
                "}, action = { .. } }."
            )
    yield from _of_scales(robot)


def _of_scales(robot: Robot) -> Iterator[str]:
    """Of gripper_open_scale_*, which repeats the grippers from 0 closed to 1 open."""
    for kind in KINDS:
        found = {g.side: x.scale for g in robot.rows.grippers if (x := g.openings.get(kind)) and x.scale is not None}
        if falling := [f"{side} {scale:.2f}" for side, scale in found.items() if scale < -RELATED]:
            yield (
                f"gripper_open_scale_{kind} opens where the {kind}'s gripper closes (correlation {', '.join(falling)})"
                ": one is recorded the other way round; look at its films and exchange closed and open in the subset "
                "file."
            )
        # One column may stand for either gripper.
        elif found and all(scale < RELATED for scale in found.values()):
            told = ", ".join(f"{side} {scale:.2f}" for side, scale in found.items())
            yield f"gripper_open_scale_{kind} does not go with the {kind}'s grippers (correlation {told})."


def _of_rows(robot: Robot) -> Iterator[str]:
    rows, episodes = robot.rows, len(robot.rows.episodes)
    if 0 < rows.equal_driven < episodes and not robot.lead:
        yield (
            f"In {rows.equal_driven} of {episodes} episodes every action equals the state of its row: the policy "
            "would learn to stand still there."
        )
    long = np.flatnonzero(robot.still > TAIL * robot.dataset.fps)
    if len(long):
        yield (
            f"{len(long)} of {len(robot.still)} episodes end with more than {TAIL:g} s in which nothing moves, "
            f"{robot.still[long].sum()} rows together, most in episode {robot.still.argmax()} ({robot.still.max()}): "
            f"{some('episode', long.tolist())}. Where the task is done, cut them by still_tail = {TAIL:g} in the "
            "subset file."
        )


def gripper_ranges(dataset: Episodes, healthy: Sequence[int]) -> dict[str, tuple[float, float, float]]:
    """Least and greatest value and standard deviation of each of the layout's grippers, as training reads it."""
    found = {}
    for kind, read in (("state", dataset.states), ("action", dataset.actions)):
        places = {name: d for d, name in enumerate(getattr(dataset, f"{kind}_names")) if is_gripper(name)}
        rows = np.concatenate([read(episode)[:, list(places.values())] for episode in healthy])
        ends = zip(rows.min(0).tolist(), rows.max(0).tolist(), rows.std(0, dtype=np.float64).tolist(), strict=True)
        found |= {f"{name} ({kind})": of for name, of in zip(places, ends, strict=True)}
    return found
