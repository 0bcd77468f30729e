"""The scripted expert in closed loop, and experts that know less: what a task needs."""

from collections.abc import Callable, Sequence

import numpy as np

from ahawam_jax.evaluation.rollouts import Actor
from data_pipelines.simulation.env import EPISODE_STEPS, AlohaSim
from data_pipelines.simulation.expert import plan

Knowledge = Callable[[int], dict[str, int]]  # of a seed: what its expert knows, see `plan`


def _coin(seed: int) -> dict[str, int]:
    return {"plate": int(np.random.default_rng([seed, 2]).integers(2))}  # of numbers that the scene does not draw


def _late(delay: int) -> Knowledge:
    return lambda seed: {"delay": delay}


# {task: {what the expert lacks: what it knows}}
CONTROLS: dict[str, dict[str, Knowledge]] = {
    "remember": {"forgets the mark, tosses a coin": _coin},
    "react": {
        **{f"sees the cube {delay} rows late": _late(delay) for delay in (16, 24)},
        "never sees the knock": _late(EPISODE_STEPS),
    },
}


def expert_actor(task: str, seeds: Sequence[int], knowledge: Knowledge = lambda seed: {}) -> Actor:
    """The scripted expert, which is told the true poses: its first call gives the actions of whole episodes."""
    env, plans = AlohaSim(task), []
    for seed in seeds:
        env.reset(seed)
        plans.append(plan(env, **knowledge(seed)))
    actions = np.stack(plans)
    return lambda observation: actions
