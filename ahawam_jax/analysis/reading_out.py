"""What a straight line can read off the planner context: ridge regression of object positions, held-out episodes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ahawam_jax.analysis.episodes import Plan, Seen, replan
from ahawam_jax.analysis.routing import LayerRouting, layers
from ahawam_jax.inference.policy import Policy
from ahawam_jax.models.memory import PlannerContext

PENALTIES = 10.0 ** np.arange(-5, 4)  # over the mean square of what the features span
FOLDS = 4
KINDS = ("stale", "routed", "fresh")


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Ridge regression in closed form: trained on x [n, f] and y [n, t], said of new [m, f]. -> float64 [p, m, t].

    In its dual form, whose matrix is [n, n] however many features there are. penalties: p of them above 0, in units of
    the mean eigenvalue of that matrix. Means are taken off and put back.
    """
    x, y, new = (np.asarray(a, np.float64) for a in (x, y, new))
    centre, level = x.mean(0), y.mean(0)
    x = x - centre
    values, vectors = np.linalg.eigh(x @ x.T)
    added = np.asarray(penalties)[:, None] * max(values.mean(), np.finfo(float).tiny)
    dual = vectors @ ((vectors.T @ (y - level)) / (np.maximum(values, 0) + added)[..., None])
    return (new - centre) @ x.T @ dual + level


def explained(y: np.ndarray, said: np.ndarray, level: np.ndarray) -> float:
    """R^2 of y [m, t]: 1 - |y - said|^2 / |y - level|^2, summed over all numbers. level: [t], what is said unseen."""
    return 1 - np.square(y - said).sum() / np.square(y - level).sum()


def read_out(x: np.ndarray, y: np.ndarray, episode: np.ndarray, held_out: Sequence[int]) -> float:
    """R^2 on held-out episodes of a ridge regression from x [n, f] to y [n, t].

    episode: int [n], where each row is from. held_out: episodes that neither the regression nor the choice of its
    penalty sees; the penalty out of PENALTIES is best on folds of the other episodes. Raises ValueError if there are
    fewer than FOLDS of those.
    """
    test, others = np.isin(episode, held_out), np.setdiff1d(episode, held_out)
    if len(others) < FOLDS or not test.any():
        raise ValueError(
            f"there are {len(others)} episodes to train on and {test.sum()} rows held out; expected at least {FOLDS} "
            "episodes and one row."
        )
    errors = np.zeros(len(PENALTIES))
    for fold in range(FOLDS):
        aside = np.isin(episode, others[fold::FOLDS])
        train = ~aside & ~test
        errors += np.square(ridge(x[train], y[train], x[aside], PENALTIES) - y[aside]).sum((1, 2))
    (said,) = ridge(x[~test], y[~test], x[test], PENALTIES[[errors.argmin()]])
    return explained(y[test], said, y[~test].mean(0))


@dataclass(frozen=True)
class Features:
    """What a read-out reads, of n plans that are A ages old.

    contexts: by kind ("stale": the plan; "routed": after routing by what is seen now; "fresh": a plan of now), a list
        of L arrays float32 [n, A, 2*S*N*H], K and V of a layer.
    state: float32 [n, A, p], the robot's own state: what can be told without eyes.
    objects: float64 [n, A, objects * 3], positions in metres.
    episode: int [n].
    """

    contexts: dict[str, list[np.ndarray]]
    state: np.ndarray
    objects: np.ndarray
    episode: np.ndarray


def features(
    policy: Policy, episodes: Sequence[tuple[Seen, Iterable[Plan]]], ages: Sequence[int],
    chosen: Sequence[int] | None = None,
) -> Features:  # fmt: skip
    """Features of the plans of several episodes, whose objects are known.

    ages: rows since a plan. chosen: layers to keep, None for all. A layer of the full size has 2*S*N*H = 737,280
    features, 2.9 MB a plan, age and kind: choose few there.
    """
    kept = range(policy.sizes.num_layers) if chosen is None else chosen
    found: dict[str, list[list[np.ndarray]]] = {kind: [[] for _ in kept] for kind in KINDS}
    states, objects, numbers = [], [], []
    for number, (episode, made) in enumerate(episodes):
        for plan in made:
            for age in ages:
                now = episode.at(plan.row + age)
                fresh = replan(policy, plan.before, now, plan.row).context
                of_layers = zip(layers(policy, plan.after.context, now), fresh.k, fresh.v, strict=True)
                for i, (layer, k, v) in enumerate(of_layers):
                    if i in kept:
                        _keep(found, kept.index(i), layer, PlannerContext(k[0, 0], v[0, 0]))
                states.append(now.robot_state[0])
                objects.append(episode.objects[plan.row + age].ravel())
            numbers.append(number)

    def by_age(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(rows).reshape(len(numbers), len(ages), -1)

    contexts = {kind: [by_age(rows) for rows in of_kind] for kind, of_kind in found.items()}
    return Features(contexts, by_age(states), by_age(objects), np.array(numbers))


def _keep(found: dict[str, list[list[np.ndarray]]], place: int, layer: LayerRouting, fresh: PlannerContext) -> None:
    for kind, context in zip(KINDS, (layer.planned, layer.routed, fresh), strict=True):
        joined = np.concatenate([np.asarray(x, np.float32).ravel() for x in (context.k, context.v)])
        found[kind][place].append(joined)


@dataclass(frozen=True)
class ReadOut:
    """R^2 of object positions on held-out episodes. contexts: by kind, float64 [L, A]. state: float64 [A]."""

    contexts: dict[str, np.ndarray]
    state: np.ndarray


def positions(read: Features, held_out: Sequence[int]) -> ReadOut:
    """Read-outs by kind, layer and age, each trained for its own."""

    def of(x: np.ndarray) -> list[float]:
        return [read_out(x[:, a], read.objects[:, a], read.episode, held_out) for a in range(x.shape[1])]

    contexts = {kind: np.array([of(x) for x in of_layers]) for kind, of_layers in read.contexts.items()}
    return ReadOut(contexts, np.array(of(read.state)))
