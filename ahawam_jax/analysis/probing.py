"""What a chunk depends on: one part of what it is made of is exchanged for another episode's."""

from collections.abc import Iterable

import numpy as np

from ahawam_jax.analysis.episodes import Plan, Seen, chunk, replan
from ahawam_jax.inference.policy import Observation, Policy

# The plan's context; the memory that the plan was made with; the observation that routes; the robot's state; all of
# them; and nothing but the noise.
PARTS = ("context", "memory", "observation", "state", "all", "noise")


def probe(
    policy: Policy, episode: Seen, other: Seen, made: Iterable[Plan], foreign: Iterable[Plan], age: int
) -> np.ndarray:
    """How the chunk `age` rows after each plan changes when one part is another episode's.

    made, foreign: plans of `episode` and `other` at the same rows; both must have been taken in at row + age.
    -> float64 [P, 6, T], P plans, PARTS, T actions: RMS over the numbers of an action, normalised units. Exchanged
    with the same episode, nothing changes but by the noise.
    """
    found = []
    for plan, strange in zip(made, foreign, strict=True):
        row = plan.row + age
        now, then = episode.at(row), other.at(row)
        remembering = replan(
            policy, plan.before.replace(memory=strange.before.memory), episode.at(plan.row), plan.row
        )
        chunks = (
            chunk(policy, plan.after.replace(context=strange.after.context), now, row),
            chunk(policy, remembering, now, row),
            chunk(policy, plan.after, Observation(then.latents, now.robot_state), row),
            chunk(policy, plan.after, Observation(now.latents, then.robot_state), row),
            chunk(policy, strange.after, then, row),
            chunk(policy, plan.after, now, row, draw=1),
        )
        own = chunk(policy, plan.after, now, row)
        found.append(np.sqrt(np.square(np.stack(chunks) - own, dtype=np.float64).mean(-1)))
    return np.stack(found)
