"""Episodes of the scripted expert in simulation, where positions of objects are known."""

from collections.abc import Sequence

import numpy as np

from ahawam_jax.analysis.episodes import Seen, seen
from ahawam_jax.inference.policy import Policy
from data_pipelines.recording.record import disturbance
from data_pipelines.simulation.env import EPISODE_STEPS, AlohaSim
from data_pipelines.simulation.expert import plan


def simulated(policy: Policy, task: str, seed: int, rows: Sequence[int], noise: float = 0.01) -> Seen:
    """Rows of an episode as `ahawam record` makes it of a seed, whether it succeeds or not, and without compression.

    noise: standard deviation of the disturbance in rad. Raises ValueError for rows beyond the episode's end.
    """
    rows = sorted(set(rows))
    if not rows or rows[0] < 0 or rows[-1] >= EPISODE_STEPS:
        raise ValueError(f"rows are {rows}; an episode has rows 0 to {EPISODE_STEPS - 1}, take at least one of them.")
    env = AlohaSim(task)
    env.reset(seed)
    actions = plan(env)
    views, states, objects = [], [], []
    for row, executed in enumerate(actions + disturbance(len(actions), noise, seed)):
        if row in rows:
            views.append(env.images())
            states.append(env.state())
            objects.append(env.objects()[:, :3])
        if row == rows[-1]:
            break
        env.step(executed)
    images = {camera: np.stack([view[camera] for view in views]) for camera in views[0]}
    return seen(policy, rows, images, np.stack(states), env.rules.instruction, np.stack(objects))
