"""A planner refresh in slices: programs of a few layers each, with the tokens between them.

For a device with one queue: a chunk that is asked for during a refresh waits for a slice and not for all layers. A
slice is the planner of so many layers, so slices of one length are one program.
"""

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from ahawam_jax.inference.programs import compiler_options
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.deployment import Deployed, Words, give
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.models.planner import Planner


class SlicedRefresh:
    """`Programs.refresh` in slices."""

    def __init__(self, config: ModelConfig, deployed: Deployed, slices: int) -> None:
        """slices: of about as many layers each. Raises ValueError for more than there are layers."""
        if not 1 <= slices <= config.num_layers:
            raise ValueError(
                f"refresh_slices is {slices}; expected 1 to {config.num_layers}, the layers of the planner."
            )
        ends = [config.num_layers * i // slices for i in range(slices + 1)]
        self._layers = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        params, rows = deployed.params["planner"], deployed.planner_rows[0]
        self._params = [_own(params, layers) for layers in self._layers]
        self._rows = [rows[layers] for layers in self._layers]
        self._run = jax.jit(
            functools.partial(_slice, config), static_argnums=0, donate_argnums=7, compiler_options=compiler_options()
        )

    def __call__(
        self, latents: jax.Array, position: jax.Array, words: Words, memory: PlannerMemory
    ) -> Generator[Any, None, tuple[PlannerContext, PlannerMemory]]:
        """Starts one slice after the other and yields what it makes; see `Programs` for the rest."""
        x, made, held = None, [], []
        for params, rows, layers in zip(self._params, self._rows, self._layers, strict=True):
            last, text = layers.stop == len(memory.k), Words(words.planner[layers], [], words.mask)
            others = memory.replace(k=(), v=())  # not donated: all slices read them
            ring = memory.k[layers], memory.v[layers]
            context, own, x = self._run(last, params, rows, latents, x, position, text, ring, others)
            made.append(context)
            held.append(own)
            yield context, x
        k, v = (sum((getattr(own, part) for own in held), ()) for part in "kv")
        return _joined(made), own.replace(k=k, v=v)


def _slice(
    config: ModelConfig, last: bool, params: Any, rows: jax.Array, latents: jax.Array, x: jax.Array | None,
    position: jax.Array, words: Words, ring: tuple[tuple[jax.Array, ...], ...], others: PlannerMemory,
) -> tuple[PlannerContext, PlannerMemory, jax.Array | None]:  # fmt: skip
    """last: nobody reads the tokens behind it, nor is made what they alone need."""
    planner = Planner(dataclasses.replace(config, num_layers=len(rows)), deployed=True)
    memory, given = others.replace(k=ring[0], v=ring[1]), give(rows, words.planner)
    context, memory, x = planner.apply(
        {"params": params}, latents, position, None, words.mask, memory, given, x, method="refresh"
    )
    return context, memory, None if last else x


def _own(params: Any, layers: slice) -> Any:
    """Parameters of a planner of these layers alone."""
    blocks = {f"blocks_{i}": params[f"blocks_{n}"] for i, n in enumerate(range(layers.start, layers.stop))}
    return {"patch_embedding": params["patch_embedding"], **blocks}


@jax.jit
def _joined(contexts: list[PlannerContext]) -> PlannerContext:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *contexts)
