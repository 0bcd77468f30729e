"""What a chunk goes on from: the rest of the one before it, whose first actions the robot runs while it is computed.

Three ways for an executor to take it into account: as committed actions, which it must have been trained with
(`objective.max_delay`); as guidance of its Euler steps; or as the state that it leads to. `inference/handover.py`
chooses.
"""

import dataclasses
from typing import Any

import numpy as np

from ahawam_jax.flow_matching import Guide
from ahawam_jax.sampling import Committed
from data_pipelines.embodiment import Embodiment
from data_pipelines.normalization import Scaling, normalize


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Settings of guidance; the default is that of its authors."""

    limit: float = 5.0  # of its factor, see `flow_matching.guidance`
    jacobian: bool = True  # False: the estimate's change with x is taken for 1, and no backward pass is needed


@dataclasses.dataclass(frozen=True)
class Continued:
    """The rest of a chunk, and how the next one goes on from it: as committed actions, if nothing else is said."""

    actions: np.ndarray  # [B, R, m] in the robot's own order and units; row 0 is run as the observation is taken
    committed: int  # of these rows, so many are run before the next chunk is there
    guidance: Guidance | None = None
    forward: bool = False  # the next chunk begins behind the committed rows, from the state that they lead to

    @property
    def begins(self) -> int:
        """Rows from the observation to the one that the next chunk's first action is for."""
        return self.committed if self.forward else 0


def normalised(
    continued: Continued, embodiment: Embodiment, statistics: Scaling, episodes: int, chunk: int, max_delay: int
) -> np.ndarray:
    """The rows as the executor takes them, float32 [B, T, d]: the first T, cut as in training, then 0.

    max_delay: most committed actions of training. Raises ValueError for rows that do not fit, for a command that is
    not finite, and for more committed actions than there are or were in training.
    """
    own, count = checked_rows(continued, embodiment, episodes)
    if continued.guidance is None and count > max_delay:
        raise ValueError(told_max_delay(count, max_delay))
    x = embodiment.action.to_layout(own)
    x = np.where(embodiment.action.present, normalize(x, statistics), 0)[:, :chunk]
    return np.pad(x, ((0, 0), (0, chunk - x.shape[1]), (0, 0))).astype(np.float32)


def checked_rows(continued: Continued, embodiment: Embodiment, episodes: int) -> tuple[np.ndarray, int]:
    """Its rows, float32, and how many are committed. Raises ValueError as `normalised` says."""
    own, labels = np.asarray(continued.actions, np.float32), embodiment.action.labels
    if own.ndim != 3 or (own.shape[0], own.shape[2]) != (episodes, len(labels)):
        raise ValueError(
            f"the actions that a chunk goes on from have shape {own.shape}; expected ({episodes}, rows, "
            f"{len(labels)}), those of the chunk before that are still to be run."
        )
    count = continued.committed
    if not 0 <= count <= own.shape[1]:
        raise ValueError(
            f"{count} actions are committed, but {own.shape[1]} of the chunk before are left; ask for the next chunk "
            "earlier, or execute fewer actions of each."
        )
    if not np.isfinite(embodiment.action.to_layout(own)).all():
        raise ValueError("the actions that a chunk goes on from hold NaN or infinity; expected commands that are run.")
    return own, count


def told_max_delay(delay: int, max_delay: int) -> str:
    """Why a delay is refused."""
    trained = f"with at most {max_delay} (config.objective.max_delay)" if max_delay else "without any"
    return (
        f"A chunk with {delay} committed actions was asked for, but this checkpoint was trained {trained}; make "
        f"chunks faster, train with config.objective.max_delay={delay} or more, or take another hand-over: guided, "
        "skip or wait."
    )


def condition(
    continued: Continued | None, embodiment: Embodiment, statistics: Scaling, episodes: int, chunk: int, max_delay: int
) -> Committed | Guide | None:
    """What the chunk's program is given, of B episodes and a chunk of T; errors as in `normalised`.

    None, for a checkpoint trained without committed actions, is the program as it was before there were any.
    """
    if continued is None or continued.forward:
        if not max_delay:
            return None
        width = len(embodiment.action.places)
        return Committed(np.zeros((episodes, 1, chunk, width), np.float32), np.zeros((episodes, 1), np.int32))
    x = normalised(continued, embodiment, statistics, episodes, chunk, max_delay)[:, None]
    if continued.guidance is None:
        return Committed(x, np.full((episodes, 1), continued.committed, np.int32))
    weight = prefix_weights(continued.committed, min(continued.actions.shape[1], chunk), chunk)
    return Guide(x, weight[:, None], np.float32(continued.guidance.limit), continued.guidance.jacobian)


def prefix_weights(committed: int, left: int, chunk: int) -> np.ndarray:
    """How much each of T actions is held to the chunk before (arXiv 2506.07339, Eq. 5), float32 [T].

    1 for committed ones; then c (e^c - 1) / (e - 1), where c falls evenly towards 0 at the first row that the chunk
    before has no action for; 0 from there on.
    """
    rows = np.arange(chunk)
    c = np.clip((left - rows) / (left - committed + 1), 0, 1)
    weight = np.where(rows < committed, 1, c * np.expm1(c) / np.expm1(1))
    return np.where(rows < left, weight, 0).astype(np.float32)


def expected_state(
    continued: Continued | None, embodiment: Embodiment, robot_state: np.ndarray
) -> tuple[np.ndarray, int]:
    """State [B, n] from which a chunk begins, and how many rows after its observation.

    That of now, but for `Continued.forward`; errors as in `normalised`.
    """
    if continued is None or not continued.forward:
        return robot_state, 0
    own, count = checked_rows(continued, embodiment, len(robot_state))
    return (state_after(embodiment, own[:, :count], robot_state) if count else robot_state), count


def state_after(embodiment: Embodiment, actions: np.ndarray, robot_state: np.ndarray) -> np.ndarray:
    """The state [B, n] that actions [B, d, m] lead to from robot_state [B, n]: it moves as far as their target does.

    Not the target itself: a joint under load stays short of it, a gripper on an object too, and a policy has only seen
    states that were measured so. Numbers that no action drives stay as they are; robots whose actions are not targets
    of what the state measures are `told_unlike`.
    """
    first, last = (embodiment.action.to_layout(actions[:, row]) for row in (0, -1))
    return embodiment.state.from_layout(embodiment.state.to_layout(robot_state) + last - first, robot_state)


def told_unlike(embodiment: Embodiment) -> str | None:
    """Why an action of this robot says no state; None where it does: the same numbers, by place and by name."""
    state, action = embodiment.state, embodiment.action

    def named(vector: Any) -> list[str]:
        return [vector.names[place] if place >= 0 else "" for place in vector.places]

    pairs = list(zip(named(state), named(action), strict=False))
    unlike = [f"{a or 'none'} against {b or 'none'}" for a, b in pairs if a != b]
    if len(state.places) == len(action.places) and not unlike and (state.present == action.present).all():
        return None
    what = f"{len(state.places)} numbers of a state, {len(action.places)} of an action"
    return (
        "Rolling the state forward takes an action for the state that it leads to, but here they are not the same "
        f"numbers ({'; '.join([what, *unlike[:3]])}); take another hand-over."
    )
