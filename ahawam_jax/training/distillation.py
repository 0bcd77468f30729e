"""Distillation of the executor into a sampler of one, two or four steps (Flash): an objective like any other.

Planner, router and state encoder are frozen and run once for a batch; only the executor learns. From x at an anchor
of noise level s it predicts the velocity v whose straight line ends at a goal. The loss is the squared distance of its
end, x - s v, from there, averaged as the joint loss averages it.

"teacher", the paper's and the release's method: the executor as it was at the start takes `teacher_steps` Euler steps
from noise; x is one of the states on its way, the goal is where it ends. Recorded actions are not used.

"self", without a teacher, after shortcut models (Frans et al. 2024, arXiv 2410.12557), whose rule is that one step of
size 2h should end where two of size h end. Theirs is told the size of a step; our executor knows a time alone, so, as
in consistency models (Song et al. 2023, arXiv 2303.01469), a step always goes to the end. x is the recorded action
mixed with noise at an anchor whose share of the sampler's grid is u = 1 - anchor / teacher_steps; the goal is where
the model itself, averaged where an average is kept and without gradient, ends in two steps of half as much: from u to
u/2, and from there to 0. At the last anchor the goal is the recorded action, which the chain of halves hangs from.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax import flow_matching
from ahawam_jax.checkpoints import Checkpoints, find_step
from ahawam_jax.models.aha_wam import AhaWam, abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.sampling import Actor
from ahawam_jax.towers.building import VideoTower
from ahawam_jax.towers.encoding import encode
from ahawam_jax.training.breakdown import SampleLosses
from ahawam_jax.training.objective import ObjectiveConfig, masked_mean
from ahawam_jax.training.observing import Observed, observe
from ahawam_jax.training.optimizer import OptimizerConfig, split

METHODS = ("teacher", "self")
EXECUTOR = ("branch_embedding", "executor")  # names of the parameters that are distilled
FROZEN = "planner|router|observation_queries|state_encoder"  # all others
SAMPLERS = (1, 2, 4)  # steps whose distance to the teacher is told while training


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of `config.distillation`, two of `config.objective`; defaults are the paper's but for noise_weight."""

    method: str = "teacher"
    teacher_steps: int = 16  # Euler steps of the teacher; 16 is also the grid that anchors count
    anchors: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 16)  # steps of the grid where the student may start, and its end
    noise_weight: float = 3.0  # how often anchor 0, pure noise, is drawn for every time another is; the release's is 1
    draws: int = 1  # noise draws per planned observation
    shift: float = 5.0  # of the sampler
    routing: bool = True  # as the policy was trained

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", tuple(self.anchors))  # JSON knows lists alone
        at, end = self.anchors, self.teacher_steps
        if self.method not in METHODS:
            raise ValueError(f"config.distillation.method is {self.method!r}; expected {' or '.join(METHODS)}.")
        if len(at) < 2 or (at[0], at[-1]) != (0, end) or any(a >= b for a, b in zip(at, at[1:], strict=False)):
            raise ValueError(
                f"config.distillation.anchors are {at}; they must rise from 0 to teacher_steps, which is {end}."
            )
        if not self.noise_weight > 0 or self.draws < 1:
            raise ValueError(
                f"config.distillation.noise_weight is {self.noise_weight:g} and draws {self.draws}; expected a weight "
                "above 0 and at least one draw."
            )

    @property
    def levels(self) -> np.ndarray:
        """Noise levels of the teacher's sampler, float64 [teacher_steps + 1]."""
        return flow_matching.noise_levels(self.teacher_steps, self.shift)


Objective = ObjectiveConfig | Distillation


def objective_of(config: ConfigDict) -> Objective:
    """What a config trains: the joint loss, or, where it has a section `distillation`, the executor's distillation.

    Raises ValueError for values that do not fit, and for a distillation that does not freeze all but the executor.
    """
    joint = ObjectiveConfig(**config.objective)
    joint.check(config.model.chunk)
    joint.check_policy(config.policy)
    if "distillation" not in config:
        return joint
    if joint.max_delay:
        raise ValueError(
            f"config.objective.max_delay is {joint.max_delay}, but a distillation knows no committed actions: what "
            "comes out would not go on from them; set it to 0."
        )
    cfg = Distillation(**config.distillation, shift=joint.shift, routing=joint.routing)
    params = nn.unbox(abstract_params(ModelConfig.create(config.model)))
    trained = split(params, OptimizerConfig(**config.optimizer).freeze)[0]
    if not set(trained) <= set(EXECUTOR):
        raise ValueError(
            f"config.optimizer.freeze is {config.optimizer.freeze!r}, which trains {', '.join(sorted(trained))}; only "
            f"the executor is distilled: set it to {FROZEN!r}."
        )
    return cfg


def read_teacher(config: ConfigDict) -> dict[str, Any]:
    """The record of the checkpoint that config.init names, whose policy is to be distilled.

    Raises ValueError where there is none, where it says nothing of its units, and where it is another model.
    """
    if not config.init:
        raise ValueError(
            "config.init is empty; a distillation starts from the policy to distil: give its workdir or one of its "
            "checkpoint steps."
        )
    workdir, step = find_step(config.init)
    record = Checkpoints(workdir).restore_run(step)
    if "statistics" not in record:
        raise ValueError(
            f"{config.init} has no statistics of states and actions, so it is no policy that could be distilled; "
            "train it first, or import it again with --statistics=dataset_stats.json."
        )
    there, here = record["config"], json.loads(config.to_json())
    pairs = [(f"model.{name}", there["model"].get(name), x) for name, x in here["model"].items()]
    trained = {"routing": True, **there["objective"]}  # records from before there was a choice lack it
    pairs += [(f"objective.{name}", trained[name], here["objective"][name]) for name in ("shift", "routing")]
    other = [
        f"{name}: {before} there, {now} now"
        for name, before, now in pairs
        if before != now and name not in ("model.dtype", "model.remat", "model.initial_gate")
    ]
    if other:
        raise ValueError(
            f"{config.init} is another model than config.model, config.objective.shift and routing describe; take the "
            "config that it was trained with:\n  " + "\n  ".join(other)
        )
    return record


@flax.struct.dataclass
class Start:
    """Where the chunks of a batch start. C counts all draws."""

    noise: jax.Array  # [B, C, T, d]
    anchor: jax.Array  # int32 [B, C], place among the anchors, the last one excluded


def sample_start(key: jax.Array, batch: Mapping[str, jax.Array], model: AhaWam, cfg: Distillation) -> Start:
    """Noise and an anchor for every chunk and draw; a pure function of the key."""
    keys = jax.random.split(key)
    size, chunks = batch["obs_latents"].shape[:2]
    shape = (size, cfg.draws * chunks)
    weights = np.ones(len(cfg.anchors) - 1)
    weights[0] = cfg.noise_weight
    return Start(
        jax.random.normal(keys[0], (*shape, model.config.chunk, model.config.action_dim)),
        jax.random.categorical(keys[1], jnp.log(weights), shape=shape),
    )


def executor_of(params: Any) -> dict[str, Any]:
    """Those of the parameters, or of what is like them, that are distilled."""
    return {name: params[name] for name in EXECUTOR}


def distillation_loss(
    model: AhaWam, params: Any, reference: Any, batch: Mapping[str, jax.Array], start: Start, cfg: Distillation
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss of either method: a scalar, and by name its parts and what it was made of.

    reference: parameters of the executor that the goal is made with, the teacher's or the averaged ones, as of
    `executor_of`; no gradient reaches them, nor any but the executor's.  batch: as in `joint_loss`.
    """
    frozen = jax.lax.stop_gradient(params)
    observed = observe(model, frozen, batch, cfg.draws, cfg.routing)
    student = observed.actor(model, frozen | executor_of(params))
    reference = observed.actor(model, jax.lax.stop_gradient(frozen | reference))
    # Level by level as `euler` has them, so that the student is asked about the very states of the teacher.
    level = jnp.asarray(cfg.levels, jnp.float32)[np.array(cfg.anchors)][start.anchor]  # [B, C]
    kind = model.config.prediction
    if cfg.method == "teacher":
        states = trajectory(reference, observed, start.noise, cfg, kind)
        x = jnp.take_along_axis(states, start.anchor[None, ..., None, None], 0)[0]
        goal, parts = states[-1], {"states": states}
    else:
        x = jnp.where(observed.present, flow_matching.mix(observed.actions, start.noise, _times(level)), 0.0)
        last = start.anchor == len(cfg.anchors) - 2
        goal = jnp.where(last[..., None, None], observed.actions, _two_halves(reference, x, start, cfg, kind))
        parts = {}
    goal = jax.lax.stop_gradient(goal)
    reached, velocity = _step(student, x, level, jnp.zeros_like(level), kind)

    error = masked_mean(jnp.square(reached - goal), observed.present)  # [B, C, T]
    size = len(error)
    by_sample = masked_mean(error.reshape(size, -1), observed.keep.reshape(size, -1))
    nothing = jnp.zeros(size)
    return by_sample.mean(), parts | {
        "observed": observed, "start": x, "times": _times(level), "velocity": velocity, "reached": reached,
        "goal": goal,
        "samples": SampleLosses(
            nothing, by_sample, nothing, nothing > 0, masked_mean(error, observed.keep)[None], observed.keep.any(2)
        ),
    }  # fmt: skip


def trajectory(
    act: Actor, observed: Observed, noise: jax.Array, cfg: Distillation, kind: str
) -> jax.Array:
    """States of the teacher's Euler steps at every anchor, the end being the last: [anchors, B, C, T, d]."""
    end, (before, _) = flow_matching.euler(act, jnp.where(observed.present, noise, 0.0), cfg.levels, kind)
    return jnp.concatenate([before, end[None]])[np.array(cfg.anchors)]


def _two_halves(
    act: Actor, x: jax.Array, start: Start, cfg: Distillation, kind: str
) -> jax.Array:
    """Where two steps of half the grid's rest end: u to u/2, u/2 to 0."""
    share = 1 - np.array(cfg.anchors) / cfg.teacher_steps
    whole, half, none = (
        jnp.asarray(flow_matching.shift_level(u, cfg.shift), jnp.float32)[start.anchor]
        for u in (share, share / 2, 0 * share)
    )
    between, _ = _step(act, x, whole, half, kind)
    return _step(act, between, half, none, kind)[0]


def _step(
    act: Actor, x: jax.Array, level: jax.Array, after: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """One Euler step of every chunk from a level of its own, [B, C], to another; and the velocity."""
    delta = (after - level)[..., None, None]
    return flow_matching.euler_step(act(x, _times(level)), x, level[..., None, None], delta, kind)


def _times(level: jax.Array) -> jax.Array:
    return flow_matching.NUM_TRAIN_TIMES * level


def make_teacher_distances(model: AhaWam, cfg: Distillation) -> Callable[..., jax.Array]:
    """The function (params, teacher, batch, tower, key) -> [2, len(SAMPLERS)]: mean distance of chunks sampled in so
    few steps from those that the teacher reaches from the same noise in all of its steps, in normalised units; of
    `params`, and of the executor `teacher` itself, which is what they were before."""

    def distances(params: Any, teacher: Any, batch: Any, tower: VideoTower, key: jax.Array) -> jax.Array:
        observed = observe(model, params, encode(batch, tower), routing=cfg.routing)
        noise = jnp.where(observed.present, jax.random.normal(key, observed.actions.shape), 0.0)

        def end(params: Any, steps: int) -> jax.Array:
            levels = flow_matching.noise_levels(steps, cfg.shift)
            return flow_matching.euler(observed.actor(model, params), noise, levels, model.config.prediction)[0]

        before = params | teacher
        goal = end(before, cfg.teacher_steps)
        return jnp.stack([
            jnp.stack([observed.deviation(end(of, steps), goal) for steps in SAMPLERS]) for of in (params, before)
        ])  # fmt: skip

    return distances
