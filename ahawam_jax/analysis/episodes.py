"""What a policy sees of one episode, and the plans and chunks that it makes of it. Batches of one throughout."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.inference.policy import Observation, Policy, PolicyState
from ahawam_jax.models.config import PATCH
from data_pipelines.episodes import Episodes
from data_pipelines.normalization import normalize


@dataclass(frozen=True)
class Seen:
    """Rows of one episode as a policy sees them.

    All by row: canvas uint8 [H, W, 3]; observations, B = 1; objects, positions in metres, float64 [objects, 3], empty
    where nobody knows them.
    """

    instruction: str
    canvas: dict[int, np.ndarray]
    observations: dict[int, Observation]
    objects: dict[int, np.ndarray]

    def at(self, row: int) -> Observation:
        """What is seen at a row. Raises ValueError for one that was not taken in."""
        if row not in self.observations:
            known = sorted(self.observations)
            raise ValueError(
                f"Row {row} of the episode was not taken in, only {len(known)} rows from {known[0]} to {known[-1]}; "
                "name it among the rows when the episode is read."
            )
        return self.observations[row]


def seen(
    policy: Policy, rows: Sequence[int], images: Mapping[str, np.ndarray], states: np.ndarray, instruction: str,
    objects: np.ndarray | None = None,
) -> Seen:  # fmt: skip
    """An episode from its views uint8 [n, h, w, 3] by camera and the robot's own states [n, p], in n `rows`.

    objects: positions [n, objects, 3] in metres. The video tower encodes one frame after the other.
    """
    canvas, observations = {}, {}
    for i, row in enumerate(rows):
        views = {camera: view[i : i + 1] for camera, view in images.items()}
        canvas[row] = policy.canvas.compose(policy.embodiment.views(views))[0]
        observations[row] = policy.encode(views, states[i : i + 1], 1)
    places = {} if objects is None else dict(zip(rows, objects, strict=True))
    return Seen(instruction, canvas, observations, places)


def recorded(policy: Policy, dataset: Episodes, episode: int, rows: Sequence[int]) -> Seen:
    """Rows of a recorded episode. Raises ValueError for an episode or a row that the dataset has not."""
    if not 0 <= episode < len(dataset.lengths):
        raise ValueError(f"There is no episode {episode}; {dataset.root} has {len(dataset.lengths)} episodes.")
    rows, length = sorted(set(rows)), int(dataset.lengths[episode])
    if not rows or rows[0] < 0 or rows[-1] >= length:
        raise ValueError(f"rows are {rows}; episode {episode} has rows 0 to {length - 1}, take at least one of them.")
    cameras = [camera for camera in policy.canvas.cameras if camera not in policy.embodiment.absent]
    images = {camera: dataset.frames(episode, camera, rows) for camera in cameras}
    return seen(policy, rows, images, dataset.states(episode)[rows], dataset.instruction(episode))


@dataclass(frozen=True)
class Plan:
    """One planner refresh: at which row, the state that it began from and the one that it left."""

    row: int
    before: PolicyState
    after: PolicyState


def replan(policy: Policy, state: PolicyState, observation: Observation, row: int) -> PolicyState:
    """The state with a plan of an observation at a row. The state given, whose memory is copied, is good as before."""
    return policy.refresh(observation, state.replace(memory=jax.tree.map(jnp.copy, state.memory), elapsed=row))


def plans(policy: Policy, episode: Seen, rows: Sequence[int]) -> Iterator[Plan]:
    """The plans of an episode at `rows`, one after the other, each with the memory that those before it left."""
    state = policy.start([episode.instruction])
    for row in rows:
        before, state = state, replan(policy, state, episode.at(row), row)
        yield Plan(row, before, state)


def period(policy: Policy) -> int:
    """Rows between two plans."""
    return policy.config.refresh_every * policy.config.execute


def chunk(policy: Policy, state: PolicyState, observation: Observation, row: int, draw: int = 0) -> np.ndarray:
    """The chunk that a state's plan gives at a row, normalised, float32 [T, d]. draw: number of its noise."""
    actions, _ = policy.act(observation, state.replace(elapsed=row, calls=draw))
    statistics = dict(policy.statistics["action"], clip=np.zeros(policy.sizes.action_dim))  # nothing is cut
    return normalize(policy.embodiment.action.to_layout(actions[0]), statistics)


def rms(x: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def grid_of(observation: Observation) -> tuple[int, int]:
    """Rows and columns of the planner's tokens on the canvas."""
    height, width = observation.latents.shape[-2:]
    return height // PATCH, width // PATCH
