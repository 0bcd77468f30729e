"""A robot's own vectors, and how they meet a layout that many robots share.

Between the two lies an affine map of each number, so that what was trained in the layout's order and units can be
answered in the robot's own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.episodes import DatasetError


@dataclass(frozen=True)
class Vector:
    """A state or action as a robot records it, of n numbers, against a layout of d.

    names: of the robot's numbers, n of them, "" where the recording names none.  places: where in the robot's vector
    each number of the layout lies, d of them, -1 where the robot has none.  zero, one: what the robot records where
    the layout says 0 and 1, d of each: 0 and 1 for a joint, closed and open for a gripper.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]
    zero: tuple[float, ...]
    one: tuple[float, ...]

    @property
    def present(self) -> np.ndarray:
        """Which numbers of the layout the robot has, bool [d]."""
        return np.array(self.places) >= 0

    @property
    def labels(self) -> tuple[str, ...]:
        """What a sentence calls the robot's numbers, n of them: by name, or by place as "#16" where they have none."""
        return tuple(name or f"#{place}" for place, name in enumerate(self.names))

    def to_layout(self, own: np.ndarray) -> np.ndarray:
        """own [..., n] in the robot's order and units -> float32 [..., d], 0 for what the robot has not."""
        taken = np.asarray(own, np.float64)[..., np.maximum(self.places, 0)]
        zero, one = np.array(self.zero), np.array(self.one)
        return np.where(self.present, (taken - zero) / (one - zero), 0).astype(np.float32)

    def from_layout(self, x: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """x [..., d] -> float32 [..., n] in the robot's order and units.

        rest: what stands for the numbers that the layout has not, [..., n], as many leading axes as x or fewer.
        """
        zero, one = np.array(self.zero), np.array(self.one)
        values = (np.asarray(x, np.float64) * (one - zero) + zero)[..., self.present]
        own = np.array(np.broadcast_to(rest, (*values.shape[:-1], len(self.names))), np.float32)
        own[..., np.array(self.places)[self.present]] = values
        return own


@dataclass(frozen=True)
class Embodiment:
    """How one robot is read and answered.

    state, action: its vectors.  absent: views that it has no camera for; they are black.
    """

    state: Vector
    action: Vector
    absent: tuple[str, ...] = ()

    @property
    def held(self) -> tuple[str, ...]:
        """Numbers of an action that a policy does not drive, as `Vector.labels` calls them."""
        return tuple(label for place, label in enumerate(self.action.labels) if place not in self.action.places)

    def act(self, x: np.ndarray, own_state: np.ndarray) -> np.ndarray:
        """Actions x [B, T, d] of the layout -> float32 [B, T, n] of the robot that is in own_state [B, m].

        The numbers in `held` repeat the state's number of the same name; where the state has none, they are NaN,
        which no driver takes for a command.
        """
        names = self.state.names
        rest = np.full((len(own_state), 1, len(self.action.names)), np.nan, np.float32)
        for place, name in enumerate(self.action.names):
            if name and names.count(name) == 1:
                rest[:, 0, place] = own_state[:, names.index(name)]
        return self.action.from_layout(x, rest)

    def views(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`images` uint8 [..., h, w, 3] by view, and a black one for each view that the robot has not."""
        some = next(iter(images.values()), np.zeros((1, 1, 3), np.uint8))
        return {**images, **{view: np.zeros((*np.shape(some)[:-3], 2, 2, 3), np.uint8) for view in self.absent}}

    @classmethod
    def as_recorded(cls, state_dim: int, action_dim: int) -> "Embodiment":
        """Of a robot whose own vectors, so wide, are the layout: nothing is changed on the way."""
        return cls(*(Vector(("",) * n, tuple(range(n)), (0.0,) * n, (1.0,) * n) for n in (state_dim, action_dim)))

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Embodiment":
        """What `to_json` gave, also after a journey through a file."""
        vectors = {
            kind: Vector(**{name: tuple(values) for name, values in record[kind].items()})
            for kind in ("state", "action")
        }
        return cls(**vectors, absent=tuple(record["absent"]))


def pick_embodiment(
    robots: Mapping[str, Sequence[Mapping[str, Any]]], robot: str | None, dataset: str | None = None
) -> Embodiment | None:
    """The embodiment of a robot out of what a run records, None for robots that are read as they are.

    robots: {robot: [{"datasets": names of those that are recorded so, **Embodiment.to_json()}]}.  robot: None for the
    only one there is.  dataset: name of one of its datasets, needed where they differ in the robot's own vector.
    Raises DatasetError where the choice is open.
    """
    if robot is None and len(robots) == 1:
        robot = next(iter(robots))
    ways = robots.get(robot, ()) if robot is not None else ()
    if dataset is not None:
        ways = [way for way in ways if dataset in way["datasets"]]
        if not ways:
            known = sorted(name for way in robots.get(robot, ()) for name in way["datasets"])
            raise DatasetError(
                f"The robot {robot!r} has no dataset {dataset!r}; it has {', '.join(known) or 'none by name'}."
            )
    if len(ways) > 1:
        told = "; ".join(
            f"{len(way['action']['names'])} numbers in {', '.join(way['datasets'][:3])}"
            + (f" and {len(way['datasets']) - 3} more" if len(way["datasets"]) > 3 else "")
            for way in ways
        )
        raise DatasetError(
            f"The datasets of the robot {robot!r} differ in its own vector or units ({told}); name the dataset whose "
            "form the robot takes."
        )
    return Embodiment.from_json({k: v for k, v in ways[0].items() if k != "datasets"}) if ways else None
