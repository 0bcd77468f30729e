"""The training step of a configuration on a mesh that need not exist: the real function, with abstract arguments."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.attention import attention_of
from ahawam_jax.models.config import FRAMES_PER_LATENT, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.planning.devices import Device
from ahawam_jax.towers.building import abstract_text, abstract_video_tower
from ahawam_jax.towers.latents import make_canvas, make_windows
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import sharding
from ahawam_jax.training.distillation import Distillation, objective_of
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.step import Batch, create_state, make_train_step

NOMINAL_STEPS = 100_000  # of a run whose length is given in epochs: the schedule's length changes no shape


@dataclasses.dataclass(frozen=True)
class Subject:
    """A step and what it is called with; nothing is allocated.

    boxed: the abstract TrainState with its logical axes.  arguments: state, batch, tower, key as ShapeDtypeStructs
    with shardings.  layout: shardings of the state.
    """

    config: ConfigDict
    model: ModelConfig
    mesh: Mesh | AbstractMesh
    function: Callable[..., Any]
    boxed: Any
    arguments: tuple[Any, Batch, Any, Any]
    layout: Any

    def on(self, mesh: Mesh | AbstractMesh) -> "Subject":
        """The same step on another mesh."""
        _, batch, tower, key = self.arguments
        arguments, layout = _place(self.boxed, batch, tower, key, mesh)
        sharding.check_batch(self.config.data.batch_size, mesh, self.config.optimizer.accumulate)
        return dataclasses.replace(self, mesh=mesh, arguments=arguments, layout=layout)

    def like(self, other: "Subject") -> "Subject":
        """The step of another subject, whose arguments are the same, on this mesh."""
        return dataclasses.replace(self, config=other.config, model=other.model, function=other.function)

    @property
    def state(self) -> Any:
        """The abstract TrainState."""
        return self.arguments[0]

    @property
    def batch(self) -> Batch:
        """The abstract batch of all devices together."""
        return self.arguments[1]

    @property
    def rows_per_device(self) -> int:
        """Samples that a device computes at a time."""
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.optimizer.accumulate
        return self.config.data.batch_size // parts


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh (data, fsdp, tensor) without devices."""
    return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def default_mesh(config: ConfigDict, device: Device, hosts: int) -> tuple[int, int, int]:
    """What config.mesh is on hosts full of a device. Raises ValueError where it does not fit."""
    state = sharding.state_size(_state(config))
    return sharding.mesh_shape(config.mesh, hosts, device.per_host, state, device.memory)


def make_subject(config: ConfigDict, mesh: Mesh | AbstractMesh, boxed: Any = None) -> Subject:
    """The step that `ahawam train` would run with this config on this mesh.

    boxed: of a Subject whose state is the same, as it is with another batch, remat or number of microbatches.
    Raises ValueError where the batch does not divide among the devices, and for fields that fit no model.
    """
    net, optimizer, tx = _training(config)
    sharding.check_batch(config.data.batch_size, mesh, optimizer.accumulate)
    boxed = _state(config) if boxed is None else boxed
    step = make_train_step(net, tx, objective_of(config), optimizer)
    model, key = net.config, jax.eval_shape(lambda: jax.random.key(0))
    arguments, layout = _place(boxed, _batch(config, model), _tower(config, model), key, mesh)
    return Subject(config, model, mesh, step, boxed, arguments, layout)


def _training(config: ConfigDict) -> tuple[AhaWam, OptimizerConfig, optax.GradientTransformation]:
    """Model, optimizer and its update rule."""
    if config.train.steps < 0:
        raise ValueError(f"config.train.steps is {config.train.steps}, expected at least 1, or 0 where epochs count.")
    net, optimizer = AhaWam(ModelConfig.create(config.model)), OptimizerConfig(**config.optimizer)
    return net, optimizer, make_optimizer(optimizer, config.train.steps or NOMINAL_STEPS)


def _state(config: ConfigDict) -> Any:
    """The abstract state with logical axes."""
    net, optimizer, tx = _training(config)
    distilled, ema = isinstance(objective_of(config), Distillation), optimizer.ema_decay > 0
    with without_collector():
        return jax.eval_shape(lambda: create_state(net, tx, jax.random.key(0), ema, optimizer, distilled))


def trace(subject: Subject) -> Any:
    """The step's ClosedJaxpr, arguments and results in the order of the flattened trees.

    With attention in its plain form, whatever this machine has: its products can be counted, those in a kernel cannot.
    """
    with without_collector(), sharding.activation_rules(subject.mesh), attention_of("cpu"):
        return jax.make_jaxpr(subject.function)(*subject.arguments)


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside, nobody looks for what could be freed: a trace only grows, and looking would take half of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _place(boxed: Any, batch: Any, tower: Any, key: Any, mesh: Mesh | AbstractMesh) -> tuple[tuple[Any, ...], Any]:
    """Arguments laid out as in training, and the layout of the state."""

    def placed(tree: Any, where: jax.sharding.Sharding) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    arguments = (sharding.abstract(boxed, mesh), placed(batch, rows), placed(tower, whole), placed(key, whole))
    return arguments, sharding.shardings(boxed, mesh)


def _batch(config: ConfigDict, model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `Windows.gather` for the whole batch, instructions replaced by text tokens."""
    size, windows, canvas = config.data.batch_size, make_windows(config, model), make_canvas(config)
    grid = tuple(side // SPATIAL_STRIDE for side in canvas.size)
    frames, history, rows = windows.video_frames, windows.history_frames, windows.rows
    clip, text = 1 + (frames - 1) // FRAMES_PER_LATENT, abstract_text(config.towers, model, size)
    channels = model.latent_channels

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    cached, clips = bool(config.data.latents), bool(config.data.latents) and config.data.latent_clips
    pictures = {} if clips else {"video": array(jnp.uint8, frames, *canvas.size, 3)}
    if cached:
        pictures |= {
            "obs_latents": array(jnp.float16, windows.chunks, channels, 1, *grid),
            "history_latents": array(jnp.float16, history, channels, 1, *grid),
        }
    else:
        pictures |= {
            "observations": array(jnp.uint8, windows.chunks, *canvas.size, 3),
            "history": array(jnp.uint8, history, *canvas.size, 3),
        }
    if not history:
        pictures = {name: x for name, x in pictures.items() if not name.startswith("history")}
    if clips:
        pictures["input_latents"] = array(jnp.float16, channels, clip, *grid)
    return pictures | {
        "video_history_valid_len": array(jnp.int32),
        "video_history_frame_indices": array(jnp.int32, history),
        "video_temporal_position_ids": array(jnp.int32, clip),
        "image_is_pad": array(bool, frames),
        "context": text,
        "context_mask": array(bool, text.shape[1]),
        "action": array(jnp.float32, rows, model.action_dim),
        "action_is_pad": array(bool, rows),
        "action_present": array(bool, model.action_dim),
        "proprio": array(jnp.float32, rows, model.state_dim),
        "action_offset": array(jnp.int32),
    }


def _tower(config: ConfigDict, model: ModelConfig) -> Any:
    """The video tower, abstract: nothing where no picture is left to encode."""
    if config.data.latents and config.data.latent_clips:
        return BlockTransform()
    return abstract_video_tower(config.towers, model)
