"""A policy's programs compiled for a GPU that is not here: what they move, beside what they must move at least."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ahawam_jax.inference.programs import DONATED, abstract_arguments, make_programs, tokens_of
from ahawam_jax.models.aha_wam import resident_params
from ahawam_jax.models.attention import ABSENT_GPU, attention_of
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.deployment import abstract_deployed
from ahawam_jax.planning.compiling import absent_devices, with_compilers
from ahawam_jax.planning.devices import Cluster
from ahawam_jax.planning.kernels import Kernel, kernels
from ahawam_jax.towers.building import VideoTower, abstract_text, abstract_video_tower
from ahawam_jax.towers.latents import make_canvas
from data_pipelines.progress import Progress


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a policy."""

    name: str
    floor: int  # bytes that it must move at least
    kernels: list[Kernel]


def compile_policy(config: ConfigDict, cluster: Cluster, steps: Sequence[int], episodes: int) -> list[Program]:
    """The chunk by each number of Euler steps and the refresh, of so many episodes at once, for one GPU.

    Each with the encoding of the image before it. The functions are those that `Policy` runs, with abstract arguments;
    each takes a minute or less. Raises ValueError for other devices and for a config that fits no model, PlugInError
    where the compiler is missing.
    """
    if cluster.device.platform != "cuda":
        raise ValueError(f"--policy is for GPUs, as h100, h200 and 5090d; --device is {cluster.device.name}.")
    model, length = ModelConfig.create(config.model), config.towers.text_length
    tower, tokens = abstract_video_tower(config.towers, model), tokens_of(make_canvas(config).size)
    floor = Floor(model, tower, tokens, length, episodes)
    *chunks, refresh = with_compilers(cluster, _compile, config, cluster, steps, episodes)
    found = [
        Program(f"chunk, {count} step{'s' * (count > 1)}", floor.chunk(count), moved)
        for count, moved in zip(steps, chunks, strict=True)
    ]
    return [*found, Program("refresh", floor.refresh(), refresh)]


def _compile(config: ConfigDict, cluster: Cluster, steps: Sequence[int], episodes: int) -> list[list[Kernel]]:
    """Of the chunk by each number of steps, and of the refresh."""
    model, size = ModelConfig.create(config.model), make_canvas(config).size
    tower, text = abstract_video_tower(config.towers, model), abstract_text(config.towers, model, episodes)
    programs = make_programs(model, config.objective.shift, config.policy.routing)
    progress = Progress(2 + len(steps), "programs")
    device = jax.sharding.SingleDeviceSharding(absent_devices(cluster)[0])

    def compiled(name: str, part: str, given: Any) -> list[Kernel]:
        function = jax.jit(getattr(programs, part), donate_argnums=getattr(DONATED, part))
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), given)
        with attention_of(ABSENT_GPU):
            text = function.lower(*placed).compile().as_text()
        progress.add(name, 1)
        return kernels(text)

    def of_steps(count: int) -> Any:
        committed = config.objective.get("max_delay", 0) > 0
        return abstract_arguments(model, abstract_deployed(model, count, committed), tower, size, text)

    one = of_steps(1)
    seen = compiled("encoding", "encode", one.encode)
    found = [seen + compiled(f"chunk, steps: {count}", "act", of_steps(count).act) for count in steps]
    return [*found, seen + compiled("refresh", "refresh", one.refresh)]


class Floor:
    """Bytes that a policy's programs must move at least, by its config alone.

    Weights once for every use, in the dtypes in which a policy holds them, the executor's once a step; keys and values
    of planner context, memory and text once where they are read, those of the frame and of its routing once where they
    are written. What changes with nothing but the instruction or the diffusion time is not made again.
    """

    def __init__(self, model: ModelConfig, tower: VideoTower, tokens: int, text_length: int, episodes: int):
        """tokens: of a planner frame."""
        self.model = model
        params = flatten_dict(resident_params(model), sep="/")
        self._weights = {path: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for path, x in params.items()}
        inner = model.num_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
        self._token = 2 * model.num_layers * episodes * inner  # keys and values of one token in all layers
        self._frame, self._text = tokens * self._token, text_length * self._token
        # One image: of the taps of a convolution over time, the last.
        shapes = (x.shape[1:] if x.ndim == 5 else x.shape for x in jax.tree.leaves(tower))
        self._tower = sum(map(math.prod, shapes)) * jnp.dtype(model.dtype).itemsize

    def chunk(self, steps: int) -> int:
        """Of encoding, routing, the state's keys and values, and the steps."""
        made_once = "text_embedding|blocks/cross_[kv]"
        routing = self._of("router|observation_queries") + 2 * self._frame
        state = self._of(f"state_encoder|executor/({made_once})")
        step = self._of(f"executor/(?!{made_once}|time_embedding)") + self._frame + self._text + self._token
        return self._tower + routing + state + steps * step

    def refresh(self) -> int:
        """Of encoding and the planner, up to the keys and values of its last layer."""
        layers = self.model.num_layers
        weights = self._of("planner/(?!head|text_embedding|time_embedding|blocks/cross_[kv])")
        last = self._of("planner/blocks/(q|o/|cross_(norm|q|o)|ffn)") // layers
        text = self._text * (layers - 1) // layers
        return self._tower + weights - last + (self.model.memory_frames + 1) * self._frame + text

    def _of(self, pattern: str) -> int:
        return sum(size for path, size in self._weights.items() if re.match(pattern, path))
