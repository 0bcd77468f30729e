"""One training step: frozen towers, joint loss or distillation, gradient accumulation, update, average.

A step whose loss or gradient is not finite is skipped: it counts, and changes nothing else.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ahawam_jax.models.aha_wam import AhaWam, abstract_params, init, resident_params
from ahawam_jax.models.partitioning import Axes, constrain
from ahawam_jax.models.products import gradients_in
from ahawam_jax.towers.building import VideoTower
from ahawam_jax.towers.encoding import encode
from ahawam_jax.training.adapters import add_adapters, merged
from ahawam_jax.training.breakdown import batch_sums, breakdown
from ahawam_jax.training.distillation import Distillation, Objective, distillation_loss, executor_of, sample_start
from ahawam_jax.training.objective import joint_loss, sample_noise
from ahawam_jax.training.optimizer import OptimizerConfig, join, split
from ahawam_jax.training.packing import apply_if, pack

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to continue, apart from its configuration and data."""

    step: jax.Array  # int32, steps done, skipped ones among them
    params: Any
    opt_state: optax.OptState
    ema: Any  # like params, or None
    teacher: Any = None  # the executor as it was at the start, see `executor_of`, where it is distilled
    lora_scale: float = flax.struct.field(pytree_node=False, default=1.0)  # of the adapters among params

    @property
    def deploy(self) -> Any:
        """Parameters to deploy: the average, if there is one; adapters merged."""
        return merged(self.params if self.ema is None else self.ema, self.lora_scale)


def create_state(
    model: AhaWam, tx: optax.GradientTransformation, key: jax.Array, ema: bool, lora: OptimizerConfig | None = None,
    distilled: bool = False,
) -> TrainState:  # fmt: skip
    """A fresh state whose leaves are boxed with their logical axes. lora: where adapters are described, if at all."""
    params, scale = init(model, key), 1.0
    teacher = jax.tree.map(jnp.copy, executor_of(params)) if distilled else None
    if lora is not None and lora.lora_targets:
        key = jax.random.fold_in(key, 1)
        params, scale = add_adapters(params, lora.lora_targets, lora.lora_rank, key), lora.lora_scale
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average, teacher, scale)


@dataclasses.dataclass(frozen=True)
class Holding:
    """Between the layout in which parameters are kept and the one in which a whole step may hold them."""

    axes: Mapping[str, Axes]  # logical, by path
    dtypes: Mapping[str, Any]  # in which the model uses them, by path

    @classmethod
    def of(cls, model: AhaWam) -> "Holding":
        boxed = abstract_params(model.config)
        axes = flatten_dict(nn.get_partition_spec(boxed), sep="/")
        dtypes = {path: x.dtype for path, x in flatten_dict(resident_params(model.config), sep="/").items()}
        return cls({path: tuple(spec) for path, spec in axes.items()}, dtypes)

    def gathered(self, params: Any) -> Any:
        """Parameters, or some, whole along fsdp and in the dtype of their products."""
        whole = {path: tuple(None if axis == "embed" else axis for axis in axes) for path, axes in self.axes.items()}
        return self._laid_out(params, lambda path, x: constrain(x.astype(self.dtypes[path]), whole[path]))

    def scattered(self, gradient: Any) -> Any:
        """Their gradient, split as the parameters are kept, float32."""
        return self._laid_out(gradient, lambda path, x: constrain(x, self.axes[path]).astype(jnp.float32))

    @staticmethod
    def _laid_out(tree: Any, one: Callable[[str, jax.Array], jax.Array]) -> Any:
        return unflatten_dict({path: one(path, x) for path, x in flatten_dict(tree, sep="/").items()}, sep="/")


Loss = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_loss(model: AhaWam, objective: Objective, robots: int) -> Loss:
    """The pure function (params, reference, encoded batch, key) -> (loss, metrics) of either objective.

    reference: see `distillation_loss`; the joint loss has none.
    """

    def joint(params: Any, _: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        noise = sample_noise(key, batch, model, objective)
        loss, parts = joint_loss(model, params, batch, noise, objective)
        sums = batch_sums(parts["samples"], noise.video_times, noise.action_times, batch, robots)
        return loss, {"loss_video": parts["loss_video"], "loss_action": parts["loss_action"], "parts": sums}

    def distilled(params: Any, reference: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        start = sample_start(key, batch, model, objective)
        loss, parts = distillation_loss(model, params, reference, batch, start, objective)
        nothing = jnp.zeros(len(start.anchor))
        return loss, {"parts": batch_sums(parts["samples"], nothing, parts["times"][None], batch, robots)}

    return distilled if isinstance(objective, Distillation) else joint


def make_train_step(
    model: AhaWam, tx: optax.GradientTransformation, objective: Objective, optimizer: OptimizerConfig,
    robots: Sequence[str] = (), packed: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """The pure function (state, batch, tower, key) -> (state, metrics).

    The randomness of a step is a function of `key` and the step's number alone. metrics["skipped"] is 1 where the step
    was skipped, else 0. metrics["parts"] is a vector, see `breakdown.names`; robots: what `robot` of the batch counts.
    packed: with the update rule of `packing`, see there.
    """

    loss_of = make_loss(model, objective, len(robots))

    def reference_of(state: TrainState) -> Any:
        if not isinstance(objective, Distillation):
            return None
        return state.teacher if objective.method == "teacher" else executor_of(state.deploy)

    def loss_and_gradient(trained, frozen, reference, batch, key):
        def loss_fn(trained):
            params = merged(join(trained, frozen), optimizer.lora_scale)
            with gradients_in(optimizer.reduce_dtype):
                return loss_of(params, reference, batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return {"loss": loss, **metrics}, gradient

    held = Holding.of(model) if optimizer.gather_once else None

    def train_step(state: TrainState, batch: Batch, tower: VideoTower, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        count = optimizer.accumulate
        trained, frozen = split(state.params, optimizer.freeze)
        used = (trained, frozen, reference_of(state))
        if held is not None:
            used = tuple(held.gathered(part) if part else part for part in used)

        def one(micro, index):
            metrics, gradient = loss_and_gradient(*used, encode(micro, tower), jax.random.fold_in(key, index))
            return metrics, gradient if held is None else held.scattered(gradient)

        if count == 1:
            metrics, gradient = one(batch, 0)
        else:
            # Interleaved, so that every device keeps its own rows in every microbatch.
            micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
            once = jax.jit(one)  # traced once, for the shapes of its sums and for the loop
            zeros = jax.eval_shape(lambda: once(jax.tree.map(lambda x: x[0], micro), jnp.int32(0)))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
            total, _ = jax.lax.scan(
                lambda carry, x: (jax.tree.map(jnp.add, carry, once(*x)), None), zeros, (micro, jnp.arange(count))
            )
            metrics, gradient = jax.tree.map(lambda x: x / count, total)

        gradient = pack(gradient) if packed else gradient
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        metrics["parts"] = breakdown(metrics["parts"], gradient, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["skipped"] = 1.0 - finite
        # Early on the average follows closely, so that it is not dominated by the initial values.
        decay = jnp.minimum(optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))

        def learn(before: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            trained, opt_state, average = before
            updates, opt_state = tx.update(gradient, opt_state, trained)
            trained = optax.apply_updates(trained, updates)
            if average is not None:
                average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trained)
            return trained, opt_state, average

        # An average of equal numbers is not always their bits, so that of frozen ones is kept.
        average, kept = (None, None) if state.ema is None else split(state.ema, optimizer.freeze)
        before = trained, state.opt_state, average
        if packed:
            after = apply_if(finite, learn, before)
        else:
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learn(before), before)
        trained, opt_state, average = after
        params, ema = join(trained, frozen), None if average is None else join(average, kept)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return train_step
