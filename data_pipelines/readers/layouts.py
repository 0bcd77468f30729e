"""Layouts: vectors of joints and grippers in fixed order, the same for every robot that is mapped to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipelines.embodiment import Vector
from data_pipelines.readers.naming import SIDES, Span, UnmappableError, number_of, place_of

REST, REST_PART = 0.005, 0.01  # how far a gripper at rest moves at most, and which part of its greatest value that is
# Standard deviation of a gripper that opens and closes, in parts of its range: 0.5 where it does so half of the time,
# 0.2 for 4% of it. Noise about one place has less than 0.15 over a thousand rows.
SHARE = 0.2
UNITS = {"_rad": "rad", "_open_scale": "0 closed .. 1 open"}  # by the end of a number's name


def unit_of(name: str) -> str:
    """Unit of a number in a vector, "" where its name does not tell."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def is_gripper(name: str) -> bool:
    """Whether a number of a layout is a gripper's opening."""
    return name.endswith("_open_scale")


def gripper_moves(least: float, greatest: float, std: float) -> bool:
    """Whether a gripper opens and closes, in whatever unit, or stays about one place; std: standard deviation."""
    way = greatest - least
    return way > max(REST, REST_PART * max(abs(least), abs(greatest))) and std > SHARE * way


@dataclass(frozen=True)
class Layout:
    """names: one per number.  masked: a robot may lack some of them."""

    name: str
    names: tuple[str, ...]
    masked: bool

    @property
    def units(self) -> tuple[str, ...]:
        """What each number is measured in."""
        return tuple(unit_of(name) for name in self.names)

    def vector(
        self, names: Sequence[str], said: Mapping[str, str | int], grippers: Mapping[str, Span], where: str
    ) -> Vector:
        """A recorded vector with these names against the layout.

        said: see `naming.Reading`.  grippers: what "left" and "right" record.  `where` begins the sentence of an
        UnmappableError: the robot lacks a number, has two for one, or has a joint beyond the layout.
        """
        places = [place_of(number, names, said, where) for number in self.names]
        taken = {place for place in places if place >= 0}
        told = f"its names are {', '.join(name or '(none)' for name in names) or 'not recorded'}"
        if len(taken) < sum(place >= 0 for place in places):
            raise UnmappableError(f"{where} has one number for two of the layout; correct it in the subset file.")
        at = dict(zip(self.names, places, strict=True))
        missing = _gaps(at) if self.masked else [name for name, place in at.items() if place < 0]
        free = [number_of(name) for place, name in enumerate(names) if place not in taken]
        beyond = [number for number in free if number and number not in at and number not in said]
        for problem, found in (("lacks", missing), ("has beyond the layout", beyond)):
            if found:
                raise UnmappableError(
                    f"{where} {problem} {', '.join(found)}; {told}. Choose another layout ({', '.join(LAYOUTS)}), say "
                    'which numbers they are, or set if_unmappable = "skip" in the subset file.'
                )
        spans = [grippers[name.partition("_")[0]] if is_gripper(name) else (0.0, 1.0) for name in self.names]
        zero, one = zip(*spans, strict=True)
        return Vector(tuple(names), tuple(places), zero, one)


def _gaps(places: Mapping[str, int]) -> list[str]:
    """What a robot lacks that no robot lacks: a joint below one that it has, or both arms."""
    missing: list[str] = []
    arms = {side: [name for name in places if name.startswith(f"{side}_arm")] for side in SIDES}
    for joints in arms.values():
        has = [places[name] >= 0 for name in joints]
        missing += [name for k, name in enumerate(joints) if not has[k] and any(has[k:])]
    first = [joints[0] for joints in arms.values()]
    return missing or ([] if any(places[name] >= 0 for name in first) else first)


def _two_arms(name: str, joints: int, masked: bool) -> Layout:
    return Layout(
        name,
        tuple(
            f"{side}_{what}"
            for side in SIDES
            for what in (*(f"arm_joint_{n}_rad" for n in range(1, joints + 1)), "gripper_open_scale")
        ),
        masked,
    )


LAYOUTS = {x.name: x for x in (_two_arms("two_6dof_arms", 6, False), _two_arms("two_arms", 7, True))}


def default_layout(vectors: Sequence[Sequence[str]]) -> Layout:
    """The layout of a robot by the names of its state and its action: RoboTwin's for two arms of six joints with
    grippers, else the one that holds all."""
    six = LAYOUTS["two_6dof_arms"]
    fits = all({number_of(name) for name in names} - {""} == {*six.names} for names in vectors)
    return six if fits else LAYOUTS["two_arms"]
