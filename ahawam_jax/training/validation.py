"""Validation on held-out windows: sampled chunks against recorded ones, and against those of a teacher."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.towers.building import VideoTower
from ahawam_jax.towers.encoding import encode
from ahawam_jax.training import sharding
from ahawam_jax.training.data import Data
from ahawam_jax.training.distillation import SAMPLERS, Distillation, Objective, make_teacher_distances
from ahawam_jax.training.in_order import in_order
from ahawam_jax.training.observing import observe
from ahawam_jax.training.step import Batch, TrainState
from data_pipelines.loader import evaluation_batches

BATCHES = 4  # at most
ERROR = "open_loop_error"


def make_open_loop_error(model: AhaWam, steps: int, shift: float, routing: bool = True) -> Callable[..., jax.Array]:
    """The jitted function (params, batch, tower, key) -> mean |sampled - recorded| over all
    actions that are not padding, of each over the numbers that its robot has, in the normalised units of the batch."""

    def error(params: Any, batch: Batch, tower: VideoTower, key: jax.Array) -> jax.Array:
        observed = observe(model, params, encode(batch, tower), routing=routing)
        noise = jnp.where(observed.present, jax.random.normal(key, observed.actions.shape), 0.0)
        levels = flow_matching.noise_levels(steps, shift)
        sampled = flow_matching.euler(observed.actor(model, params), noise, levels, model.config.prediction)[0]
        return observed.deviation(sampled, observed.actions)

    return jax.jit(in_order(error))


class Validation:
    """What is measured of a train state on held-out episodes, always the same windows and noise."""

    def __init__(
        self, model: AhaWam, objective: Objective, config: ConfigDict, data: Data, mesh: jax.sharding.Mesh,
        tower: VideoTower,
    ):  # fmt: skip
        self._config, self._data, self._mesh, self._tower = config, data, mesh, tower
        self._error = make_open_loop_error(model, config.policy.steps, objective.shift, objective.routing)
        self._distances = None
        if isinstance(objective, Distillation):
            self._distances = jax.jit(in_order(make_teacher_distances(model, objective)))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """By name: the open-loop error, see `make_open_loop_error`, NaN where nothing is held out.

        Of a distillation also distances to the teacher in 1, 2, 4 steps, and those of the undistilled executor.
        """
        if not self._data.validation:
            return {ERROR: float("nan")}
        params, size = state.deploy, self._config.data.batch_size
        count = min(BATCHES, sum(source.rows for source in self._data.validation) // size)
        batches = evaluation_batches(
            self._data.validation, self._data.windows, size, count, sharding.batch_rows(self._mesh, size)
        )
        errors, distances = [], []
        for number, batch in enumerate(batches):
            inputs, key = self._data.put(batch, self._mesh), jax.random.key(number)
            errors.append(self._error(params, inputs, self._tower, key))
            if self._distances is not None:
                distances.append(self._distances(params, state.teacher, inputs, self._tower, key))
        scores = {ERROR: float(jnp.mean(jnp.stack(errors)))}
        if distances:
            means = np.asarray(jnp.mean(jnp.stack(distances), 0))
            for row, name in zip(means, ("teacher_distance", "undistilled_distance"), strict=True):
                scores |= {f"{name}/{steps}_steps": float(x) for steps, x in zip(SAMPLERS, row, strict=True)}
        return scores


def describe(scores: dict[str, float]) -> str:
    """What `Validation` has found, as a sentence."""

    def listed(name: str) -> str:
        return ", ".join(f"{scores[f'{name}/{steps}_steps']:.4f}" for steps in SAMPLERS)

    text = f"open-loop error {scores[ERROR]:.4f} in normalised units"
    if len(scores) > 1:
        steps = ", ".join(map(str, SAMPLERS))
        text += (
            f"; distance to the teacher in {steps} steps {listed('teacher_distance')}, undistilled "
            f"{listed('undistilled_distance')}"
        )
    return text
