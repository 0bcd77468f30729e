"""What float32 JAX computes for a sample: inputs and outputs of every graph, call by call."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ahawam_jax.inference.policy import load_run
from ahawam_jax.models.aha_wam import AhaWam, empty_memory
from ahawam_jax.models.config import PATCH
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.sampling import Committed, denoise
from ahawam_jax.towers.building import STAND_INS, VideoTower
from ahawam_jax.towers.encoding import pixels
from ahawam_jax.towers.vae import VaeConfig, WanVae, abstract_vae_params
from ahawam_jax.weights.convert import flatten, load
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import from_release
from export.checks.samples import Sample
from export.exported import Export, latent_grid
from export.manifest import MODEL, VAE, ExportError
from export.twin.vae import encoder_table


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a graph. Without the text's keys and values, which JAX has inside."""

    graph: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Reference:
    """The model of an export in JAX, in float32."""

    def __init__(self, export: Export, checkpoint: str | Path | None = None):
        """checkpoint: workdir or step to take the weights from; None for those of the export, made float32 again.

        Raises ExportError for a checkpoint of other sizes.
        """
        self.config = dataclasses.replace(export.model, dtype="float32", remat="none")
        if checkpoint is None:
            self.params = from_release(open_weights(export.folder / MODEL).tensors, self.config)
        else:
            model, params, _ = load_run(checkpoint)
            if dataclasses.replace(model.config, dtype="float32", remat="none") != self.config:
                raise ExportError(f"{checkpoint} is a model of other sizes than {export.folder}; give the one it was "
                                  "exported from.")  # fmt: skip
            self.params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        height, width = latent_grid(export.config)
        self._tokens = height * width // PATCH**2
        self._tower = video_tower(export)
        self._rotary = (export.planner.rotary, export.executor.rotary)
        model, shift, steps = AhaWam(self.config), export.config.objective.shift, len(export.executor.schedule)
        self._encode = jax.jit(lambda tower, x: tower.encode(pixels(x[:, None])))

        def apply(method: str) -> Any:
            return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method=method))

        self._refresh, self._route = apply("refresh"), apply("route")
        present, self._delays = export.embodiment.action.present, export.max_delay > 0
        self._act = jax.jit(
            lambda params, committed, *inputs: denoise(model, params, *inputs, steps, shift, present, committed)
        )

    def __call__(self, sample: Sample) -> list[Call]:
        """vae and planner for every frame, then vae, router and executor for the chunk."""
        with jax.default_matmul_precision("highest"):
            return self._run(sample)

    def _run(self, sample: Sample) -> list[Call]:
        turn_planner, turn_executor = self._rotary
        text, mask = sample.text[None], sample.mask[None]
        memory, calls = empty_memory(self.config, 1, self._tokens), []

        def encode(canvas: np.ndarray) -> np.ndarray:
            latents = np.asarray(self._encode(self._tower, canvas[None]))[:, :, 0]
            calls.append(Call("vae", {"canvas": canvas[None]}, {"latents": latents}))
            return latents

        for frame, position in zip(sample.frames, sample.positions, strict=True):
            latents = encode(frame)
            cos, sin = (x.numpy() for x in turn_planner([position]))
            slot = int(memory.slot(self.config.memory_anchor))  # the graph's memory has none for the frame it plans
            past_k, past_v = (np.delete(np.stack(x), slot, 2) for x in (memory.k, memory.v))
            inputs = {
                "latents": latents, "cos": cos, "sin": sin, "text_mask": mask, "memory_k": past_k, "memory_v": past_v,
                "valid": np.delete(memory.valid, slot, 1),
            }  # fmt: skip
            position = jnp.full(1, position, jnp.int32)
            context, memory = self._refresh(self.params, latents[:, :, None], position, text, mask, memory)
            calls.append(_call("planner", inputs, _frame(context, "")))
        latents = encode(sample.observation)
        routed = self._route(self.params, context, latents[:, None, :, None])
        calls.append(_call("router", {"latents": latents} | _frame(context, ""), _frame(routed, "routed_")))
        positions = sample.start + np.arange(self.config.chunk)[None]
        noise, state = sample.noise[None], sample.state[None]
        committed = Committed(sample.committed[None, None], np.int32([[sample.count]])) if self._delays else None
        actions = self._act(self.params, committed, noise[:, None], positions, text, mask, state[:, None], routed)
        cos, sin = (x.numpy() for x in turn_executor(sample.start))
        inputs = {"noise": noise, "cos": cos, "sin": sin, "text_mask": mask, "state": state}
        if self._delays:
            first = np.arange(self.config.chunk) < sample.count
            inputs |= {"committed": sample.committed[None], "first": first[None]}
        calls.append(_call("executor", inputs | _frame(routed, "routed_"), {"actions": actions[:, 0]}))
        return calls


def _frame(context: PlannerContext, prefix: str) -> dict[str, Any]:
    """[L, B, 1, S, N, H] -> k, v [L, B, S, N, H]."""
    return {f"{prefix}k": context.k[:, :, 0], f"{prefix}v": context.v[:, :, 0]}


def _call(graph: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> Call:
    return Call(graph, *({name: np.asarray(x) for name, x in part.items()} for part in (inputs, outputs)))


def video_tower(export: Export) -> VideoTower:
    """The export's video tower in JAX, in float32; of a VAE, the encoder."""
    if export.manifest["vae"] is None:
        return STAND_INS[export.config.towers.video]
    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in export.manifest["vae"].items()}
    config = VaeConfig(**sizes | {"dtype": "float32"})
    leaves, rows = flatten(abstract_vae_params(config)), encoder_table(config)
    like = unflatten_dict({path: leaves[path] for _, path, _ in rows}, sep="/")
    return WanVae(load(open_weights(export.folder / VAE).tensors, rows, like), config)
