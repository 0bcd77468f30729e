"""How the planner context ages between two plans, and what routing restores of it: the paper's claim, as curves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.analysis.episodes import Plan, Seen, chunk, replan, rms
from ahawam_jax.analysis.routing import check_routing, layers
from ahawam_jax.inference.policy import Observation, Policy
from ahawam_jax.models.memory import PlannerContext


@dataclass(frozen=True)
class Ageing:
    """Distances |a - b| / |b| of contexts, float64 [P, A, L, 2]: of P plans, A ages, L layers, K and V.

    Fresh is the plan that would be there if the same refresh had come `age` rows later: of the frame of now, from the
    same memory, at the same rotary position, so that nothing differs but what was seen.

    ages: int [A], rows since the plan.
    stale: the plan, against the fresh one; 0 at age 0.
    routed: the plan after routing by the observation of now, against the fresh one after the same routing: what the
        executor reads, and what it would read; 0 at age 0. Below `stale`, routing restores something.
    to_planned: the plan after routing, against the fresh one before it: how far what the executor reads is from any
        plan. At age 0 it is what routing adds to a plan that needs nothing.
    other: [P, L, 2], `stale` with another episode's plan of the same row: how far is far.
    """

    ages: np.ndarray
    stale: np.ndarray
    routed: np.ndarray
    to_planned: np.ndarray
    other: np.ndarray


def ageing(policy: Policy, episode: Seen, made: Iterable[Plan], other: Iterable[Plan], ages: Sequence[int]) -> Ageing:
    """Ageing of an episode's plans.

    made: the plans of `episode`. other: of another episode, at the same rows. ages: rows since a plan; those rows of
    the episode must have been taken in.
    """
    check_routing(policy)
    found, far = [], []
    for plan, foreign in zip(made, other, strict=True):
        far.append(_distances(foreign.after.context, plan.after.context))
        of_plan = []
        for age in ages:
            now = episode.at(plan.row + age)
            fresh = replan(policy, plan.before, now, plan.row).context
            of_plan.append(_to_fresh(policy, plan.after.context, fresh, now))
        found.append(of_plan)
    stale, routed, to_planned = np.moveaxis(np.array(found, np.float64), 2, 0)
    return Ageing(np.array(ages), stale, routed, to_planned, np.stack(far))


def _to_fresh(policy: Policy, stale: PlannerContext, fresh: PlannerContext, now: Observation) -> np.ndarray:
    """The three distances of `Ageing`, float64 [3, L, 2], one layer after the other."""
    both = zip(layers(policy, stale, now), layers(policy, fresh, now), strict=True)
    return np.array([
        [_distance(a.planned, b.planned), _distance(a.routed, b.routed), _distance(a.routed, b.planned)]
        for a, b in both
    ], np.float64).swapaxes(0, 1)  # fmt: skip


@jax.jit
def _distance(a: PlannerContext, b: PlannerContext) -> jax.Array:
    """|a - b| / |b| of K and of V, [2] float32."""

    def relative(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = (z.astype(jnp.float32) for z in (x, y))
        return jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())

    return jnp.stack([relative(a.k, b.k), relative(a.v, b.v)])


def _distances(a: PlannerContext, b: PlannerContext) -> np.ndarray:
    """`_distance` of every layer, float64 [L, 2]."""
    of_layer = [jax.tree.map(lambda x, i=i: x[i], (a, b)) for i in range(len(a.k))]
    return np.array([_distance(*pair) for pair in of_layer], np.float64)


@dataclass(frozen=True)
class ChunkAgeing:
    """How far chunks of an old plan are from those of a fresh one: RMS over actions and numbers, normalised, float64
    [P, A] for P plans and A ages. State of the robot and noise are those of now in all of them.

    ages: int [A], rows since the plan.
    seeing: the router sees the observation of now, as it does at deployment; 0 at age 0.
    blind: the router sees that of the plan's own row, so that nothing of the chunk but the robot's state is of now.
    noise: the fresh plan's, with other noise: what the sampler alone changes.
    """

    ages: np.ndarray
    seeing: np.ndarray
    blind: np.ndarray
    noise: np.ndarray


def ageing_of_chunks(policy: Policy, episode: Seen, made: Iterable[Plan], ages: Sequence[int]) -> ChunkAgeing:
    """The same for what the robot is told. Arguments as of `ageing`."""
    check_routing(policy)
    found = []
    for plan in made:
        of_plan = []
        for age in ages:
            row = plan.row + age
            now = episode.at(row)
            blind = Observation(episode.at(plan.row).latents, now.robot_state)
            # The fresh plan has the row of the stale one, so that a chunk begins at the same position in both.
            fresh = replan(policy, plan.before, now, plan.row)
            wanted = chunk(policy, fresh, now, row)
            chunks = (
                chunk(policy, plan.after, now, row), chunk(policy, plan.after, blind, row),
                chunk(policy, fresh, now, row, draw=1),
            )  # fmt: skip
            of_plan.append([rms(x - wanted) for x in chunks])
        found.append(of_plan)
    return ChunkAgeing(np.array(ages), *np.moveaxis(np.array(found), 2, 0))
