"""The PyTorch twin of AHA-WAM's inference: planner refresh, router and executor, as three graphs of static shapes.

Plain modules for CUDA graphs, torch.compile, torch.export and ONNX: tensors in, tensors out, no complex numbers, no
control flow that depends on data, no state of their own. With `export.twin.vae` in front, a chunk is

    latents = vae(canvas)
    k, v = planner(latents, *planner.rotary(frame), *text, text_mask, memory_k, memory_v, valid)    # at a refresh
    routed_k, routed_v = router(latents, k, v)
    actions = executor(noise, *executor.rotary(start), *text, text_mask, *executor.state(state), routed_k, routed_v)

where planner.text and executor.text have made keys and values of the instruction once an episode.

Axis letters: B batch, S tokens of one frame, T action tokens, K text tokens, Q queries, L layers, N heads, H head
width, D model width, W memory frames, X text width, c latent channels, d action width, p state width.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import ACTION_BRANCH, abstract_params
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.models.dit import SMALL_NET_EPS
from ahawam_jax.weights.convert import check_names
from ahawam_jax.weights.release import TABLE, release_shapes
from export.twin.layers import (
    Block,
    CrossContext,
    KeyValue,
    Linear,
    Norm,
    SmallNet,
    Stacked,
    StackedNorm,
    Views,
    as_torch,
    attention,
    check_dtype,
    fill,
    modulation,
    parameter,
    rotary_1d,
)

VIDEO, ACTION, EDITOR = "mot/mixtures.video.", "mot/mixtures.action.", "mot/chunk_kv_cache_editor."


# -------------------------------------------------------------------------------------------------------- planner
class PlannerRefresh(nn.Module):
    """One planner refresh (Eq. 2, 13): the new frame, clean and at time 0, reads the memory and the text.

    Only the keys and values of every layer are wanted, so the last block stops behind them and there is no head; what
    is not needed is not held.
    """

    def __init__(self, config: ModelConfig, grid: tuple[int, int], dtype: torch.dtype = torch.float32):
        """grid: height and width of the latents."""
        super().__init__()
        dim, last = config.planner_dim, config.num_layers - 1
        self.config = config
        self.patch_embedding = Linear(config.latent_channels * PATCH**2, dim, dtype)
        self.text = CrossContext(range(last), dim, config, dtype)  # [B, K, X] -> k, v [L - 1, B, K, N, H]
        self.blocks = nn.ModuleList(Block(dim, config.planner_ffn_dim, config, dtype) for _ in range(last))
        self.last = KeyValue(dim, config, dtype)
        self.register_buffer("rows", torch.empty(config.num_layers, 6, dim))
        rows, columns = np.indices((grid[0] // PATCH, grid[1] // PATCH)).reshape(2, -1)
        tables = zip(*(rotary_1d(place, config.head_dim // 3) for place in (rows, columns)), strict=True)
        for name, parts in zip(("space_cos", "space_sin"), tables, strict=True):
            self.register_buffer(name, torch.cat(parts, -1).to(self.rows.device))  # [S, H/3]

    @classmethod
    def from_release(
        cls, state: Mapping[str, Any], config: ModelConfig, grid: tuple[int, int],
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ) -> "PlannerRefresh":  # fmt: skip
        """With the weights of `state`, tensors by name of the release's layout. Raises WeightsError."""
        with torch.device(device):
            planner = cls(config, grid, dtype)
        fill(planner.views(), state)
        planner.rows.copy_(modulation(state, VIDEO, np.zeros(1, np.float32), config)[0])
        return planner

    def rotary(self, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """Real elapsed frames [B] -> cos, sin [B, Ht/2] float32 on the host, Ht = H - 2 floor(H / 3)."""
        return rotary_1d(np.asarray(frames), self.config.head_dim - 2 * (self.config.head_dim // 3))

    def forward(
        self, latents: Tensor, cos: Tensor, sin: Tensor, text_k: Tensor, text_v: Tensor, text_mask: Tensor,
        memory_k: Tensor, memory_v: Tensor, valid: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The new frame's context.

        latents [B, c, h, w] float32; cos, sin [B, Ht/2] of `rotary`; text k, v [L - 1, B, K, N, H] of `text`, mask
        [B, K] bool; memory k, v [L, B, W, S, N, H], its slots in any order (rotary positions are in the keys), valid
        [B, W] bool -> k, v [L, B, S, N, H].
        """
        batch, channels, height, width = latents.shape
        x = latents.unflatten(3, (width // PATCH, PATCH)).unflatten(2, (height // PATCH, PATCH))
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)  # a patch is read as (c, dy, dx)
        x = self.patch_embedding(x)
        tokens = x.shape[1]
        cos, sin = (
            torch.cat([time[:, None].expand(-1, tokens, -1), space.expand(batch, -1, -1)], -1)
            for time, space in ((cos, self.space_cos), (sin, self.space_sin))
        )
        seen = valid[:, :, None].expand(-1, -1, tokens).flatten(1)  # [B, W*S]
        mask = torch.cat([seen, seen.new_ones(batch, tokens)], 1)[:, None, None]
        text_mask = text_mask[:, None, None]
        memory_k, memory_v = memory_k.flatten(2, 3), memory_v.flatten(2, 3)
        made = []
        for i, block in enumerate(self.blocks):
            x, *own = block(
                x, self.rows[i], cos, sin, memory_k[i], memory_v[i], mask, text_k[i], text_v[i], text_mask
            )
            made.append(own)
        made.append(self.last.project(x, self.rows[-1], cos, sin))
        k, v = zip(*made, strict=True)
        return torch.stack(k), torch.stack(v)

    def views(self) -> Views:
        for name, place in self.patch_embedding.views(f"{VIDEO}patch_embedding."):
            patch = (self.config.latent_channels, 1, PATCH, PATCH)
            yield name, place.unflatten(1, patch) if place.ndim == 2 else place
        yield from self.text.views(VIDEO)
        for i, block in enumerate((*self.blocks, self.last)):
            yield from block.views(f"{VIDEO}blocks.{i}.")


def empty_memory(
    config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Buffers of a memory without frames: k, v [L, B, W, S, N, H] and valid [B, W] bool."""
    shape = (config.num_layers, batch, config.memory_frames, tokens, config.num_heads, config.head_dim)
    k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    return k, v, torch.zeros(shape[1:3], dtype=torch.bool, device=device)


def remember(
    memory_k: Tensor, memory_v: Tensor, valid: Tensor, k: Tensor, v: Tensor, refresh: int, anchor: bool
) -> None:  # fmt: skip
    """Puts frame number `refresh` (0, 1, ...) of an episode, k and v [L, B, S, N, H], in place of the oldest one.

    In place, so that the buffers of a captured graph keep their addresses: the memory is a ring, and nothing shifts.
    anchor (`ModelConfig.memory_anchor`): frame 0 keeps slot 0, and the ring is that of the other slots.
    """
    kept = int(anchor and refresh > 0)
    ring = valid.shape[1] - kept
    if not ring:
        return
    slot = kept + (refresh - kept) % ring
    memory_k[:, :, slot] = k
    memory_v[:, :, slot] = v
    valid[:, slot] = True


# --------------------------------------------------------------------------------------------------------- router
class Router(nn.Module):
    """Observation queries and OVCR (Eq. 8-10).

    All layers run at once, on weights stacked over L: a layer's routing does not depend on the layer before it, and
    thirty small products one after another leave most of a GPU idle, while one batched product reads the same bytes
    at full bandwidth and the graph is thirty times smaller.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        layers, width, inner = config.num_layers, config.text_dim, config.num_heads * config.head_dim
        self.config = config
        self.projection = SmallNet(config.latent_channels, width, width, dtype)
        self.base_queries = parameter(config.num_queries, width, dtype=dtype)
        self.key_norm, self.key = Norm(width, SMALL_NET_EPS), Linear(width, width, dtype)
        self.value, self.query = (SmallNet(width, width, width, dtype) for _ in range(2))
        self.query_norm, self.layer_query = StackedNorm(layers, width), Stacked(layers, width, inner, dtype)
        self.delta_norm, self.delta_hidden = StackedNorm(layers, inner), Stacked(layers, inner, inner, dtype)
        self.delta_out = Stacked(layers, inner, 2 * inner, dtype)
        self.gate = parameter(layers)

    @classmethod
    def from_release(
        cls, state: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Router":  # fmt: skip
        """With the weights of `state`, tensors by name of the release's layout. Raises WeightsError."""
        with torch.device(device):
            router = cls(config, dtype)
        fill(router.views(), state)
        return router

    def forward(self, latents: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, c, h, w] float32 of now, context k, v [L, B, S, N, H] -> routed k, v [L, B, S, N, H]."""
        layers, batch, tokens, *heads = k.shape
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # [L*B, S, N, H]
        q = self.query_norm(self.queries(latents).flatten(0, 1)[None])  # [L, B*Q, X]
        q = self.layer_query(q).reshape(layers * batch, -1, *heads)
        gathered = attention(q, k, v)  # queries read the frame
        returned = attention(k, gathered, gathered)  # the frame's tokens read the queries
        y = self.delta_norm(returned.reshape(layers, batch * tokens, -1))
        change = self.delta_out(F.gelu(self.delta_hidden(y))).reshape(layers, batch, tokens, 2, *heads)
        gate = torch.sigmoid(self.gate).to(k.dtype).reshape(-1, 1, 1, 1, 1)
        delta_k, delta_v = change.unbind(3)
        return k.unflatten(0, (layers, batch)) + gate * delta_k, v.unflatten(0, (layers, batch)) + gate * delta_v

    def queries(self, latents: Tensor) -> Tensor:
        """Routing queries of an observation (Eq. 8): latents [B, c, h, w] -> [B, Q, X]."""
        seen = self.projection(latents.flatten(2).transpose(1, 2))
        keys, values = self.key(self.key_norm(seen)), self.value(seen)
        base = self.base_queries.expand(len(seen), -1, -1)
        return self.query(attention(base.unsqueeze(2), keys.unsqueeze(2), values.unsqueeze(2)).squeeze(2))

    def views(self) -> Views:
        yield from self.projection.views("action_obs_visual_proj/")
        encoder = "chunk_obs_query_encoder/"
        yield f"{encoder}base_queries", self.base_queries[None, None]
        yield from self.key_norm.views(f"{encoder}obs_key_proj.0.")
        yield from self.key.views(f"{encoder}obs_key_proj.1.")
        yield from self.value.views(f"{encoder}obs_value_proj.")
        yield from self.query.views(f"{encoder}query_proj.")
        yield f"{EDITOR}delta_gate", self.gate
        stacks = (self.query_norm, self.layer_query, self.delta_norm, self.delta_hidden, self.delta_out)
        names = ("query_proj.{i}.0", "query_proj.{i}.1", "delta_proj.{i}.0", "delta_proj.{i}.1", "delta_proj.{i}.3")
        for stack, name in zip(stacks, names, strict=True):
            yield from stack.views(f"{EDITOR}layer_{name}.")


# ------------------------------------------------------------------------------------------------------- executor
class Executor(nn.Module):
    """The executor (Eq. 3) and its Euler loop (Eq. 5), unrolled. The modulation of all steps is a table."""

    def __init__(
        self, config: ModelConfig, steps: int, shift: float, dtype: torch.dtype = torch.float32,
        present: np.ndarray | None = None, committed: bool = False,
    ):  # fmt: skip
        """steps: Euler steps of the loop; shift: of the noise levels, config.objective.shift. present: bool [d], which
        numbers of an action the robot has; the others are 0 at every step. None for all, which costs nothing.
        committed: chunks may begin with committed actions, for a checkpoint with config.objective.max_delay."""
        super().__init__()
        dim = config.executor_dim
        levels = flow_matching.noise_levels(steps, shift)
        self.config = config
        # Level and change of level of every step, as the float32 numbers that the JAX sampler has.
        self.schedule = tuple(zip(*np.float32([levels[:-1], np.diff(levels)]).tolist(), strict=True))
        self.action_encoder = Linear(config.action_dim, dim, dtype)
        self.branch = parameter(2, dim, dtype=dtype)
        self.state_encoder = Linear(config.state_dim, config.text_dim, dtype)
        self.text = CrossContext(range(config.num_layers), dim, config, dtype)  # [B, K, X] -> k, v [L, B, K, N, H]
        self.blocks = nn.ModuleList(
            Block(dim, config.executor_ffn_dim, config, dtype) for _ in range(config.num_layers)
        )
        self.head = Linear(dim, config.action_dim, torch.float32)
        self.register_buffer("rows", torch.empty(steps, config.num_layers, 6, dim))
        self.register_buffer("clean_rows", torch.empty(config.num_layers, 6, dim) if committed else None)
        factor = None if present is None or present.all() else torch.tensor(present.tolist(), dtype=torch.float32)
        self.register_buffer("present", factor, persistent=False)

    @classmethod
    def from_release(
        cls, state: Mapping[str, Any], config: ModelConfig, steps: int, shift: float,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", present: np.ndarray | None = None,
        committed: bool = False,
    ) -> "Executor":  # fmt: skip
        """With the weights of `state`, tensors by name of the release's layout. Raises WeightsError."""
        with torch.device(device):
            executor = cls(config, steps, shift, dtype, present, committed)
        fill(executor.views(), state)
        times = np.float32(flow_matching.NUM_TRAIN_TIMES) * np.float32([level for level, _ in executor.schedule])
        executor.rows.copy_(modulation(state, ACTION, times, config))
        if committed:
            executor.clean_rows.copy_(modulation(state, ACTION, np.zeros(1, np.float32), config)[0])
        return executor

    def rotary(self, start: int) -> tuple[Tensor, Tensor]:
        """cos, sin [T, H/2] float32 on the host, for a chunk whose first action is `start` after the refresh."""
        return rotary_1d(start + np.arange(self.config.chunk), self.config.head_dim)

    def state(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised robot state [B, p] -> keys and values of its token, k, v [L, B, 1, N, H]; once a chunk."""
        return self.text(self.state_encoder(state[:, None]))

    def forward(
        self, noise: Tensor, cos: Tensor, sin: Tensor, text_k: Tensor, text_v: Tensor, text_mask: Tensor,
        state_k: Tensor, state_v: Tensor, routed_k: Tensor, routed_v: Tensor, committed: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """From noise to actions in all steps.

        noise [B, T, d] float32; cos, sin [T, H/2] of `rotary`; text k, v [L, B, K, N, H] of `text`, mask [B, K] bool;
        state k, v [L, B, 1, N, H] of `state`; routed k, v [L, B, S, N, H] -> normalised actions [B, T, d] float32.
        With clean_rows: committed [B, T, d] float32, which stand, clean, where first, bool [B, T], is true.
        """
        cross_k, cross_v = torch.cat([text_k, state_k], 2), torch.cat([text_v, state_v], 2)
        cross_mask = torch.cat([text_mask, text_mask.new_ones(len(text_mask), 1)], 1)[:, None, None]
        x, known = self.only_present(noise), None
        if self.clean_rows is not None:
            known, first = self.only_present(committed), first.unsqueeze(-1)
            x = torch.where(first, known, x)
        for step, (level, change) in enumerate(self.schedule):
            rows = self.rows[step]
            if known is not None:  # [L, 6, B, T, D]
                rows = torch.where(first, self.clean_rows[:, :, None, None], rows[:, :, None, None])
            prediction = self.predict(x, rows, cos, sin, cross_k, cross_v, cross_mask, routed_k, routed_v)
            prediction = self.only_present(prediction)
            velocity = flow_matching.to_velocity(prediction, x, level, self.config.prediction)
            x = x + velocity * change
            if known is not None:
                x = torch.where(first, known, x)
        return x

    def only_present(self, x: Tensor) -> Tensor:
        """x [B, T, d], 0 where the robot has no such number."""
        return x if self.present is None else x * self.present

    def predict(
        self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, cross_k: Tensor, cross_v: Tensor, cross_mask: Tensor,
        routed_k: Tensor, routed_v: Tensor,
    ) -> Tensor:  # fmt: skip
        """What the head says of noisy actions x [B, T, d] at one time, [B, T, d] float32: config.prediction.

        rows [L, 6, (B, T,) D] of that time; cross k, v [L, B, K + 1, N, H], text and state, with mask
        [B, 1, 1, K + 1] bool.
        """
        y = self.action_encoder(x) + self.branch[ACTION_BRANCH]
        cos, sin = cos[None], sin[None]
        for i, block in enumerate(self.blocks):
            y, _, _ = block(
                y, rows[i], cos, sin, routed_k[i], routed_v[i], None, cross_k[i], cross_v[i], cross_mask
            )
        return self.head(y)

    def views(self) -> Views:
        yield "mot/action_branch_embedding", self.branch
        yield from self.action_encoder.views(f"{ACTION}action_encoder.")
        yield from self.text.views(ACTION)
        for i, block in enumerate(self.blocks):
            yield from block.views(f"{ACTION}blocks.{i}.")
        yield from self.head.views(f"{ACTION}head.")
        yield from self.state_encoder.views("proprio_encoder/")


# --------------------------------------------------------------------------------------------------------- release
@dataclasses.dataclass(frozen=True)
class Twin:
    """Planner, router and executor of one checkpoint, and the checkpoint they were made of."""

    planner: PlannerRefresh
    router: Router
    executor: Executor
    source: Mapping[str, Any]  # by release name, as given: what only loading reads is looked up here, not held twice

    def views(self) -> Iterator[tuple[str, Tensor]]:
        """Every release name that a module holds, with its place."""
        for module in (self.planner, self.router, self.executor):
            yield from module.views()


def from_release(
    state: Mapping[str, Any], config: ModelConfig, grid: tuple[int, int], steps: int, shift: float,
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", present: np.ndarray | None = None,
    committed: bool = False,
) -> Twin:  # fmt: skip
    """The twin of a checkpoint in the release's layout.

    state: torch tensors, arrays, or tensors that still lie in a file (`weights.files.open_weights`), by name
    '<payload section>/<name>'; they are copied one at a time. grid: height and width of the latents. steps, shift,
    present, committed: of the executor's loop. dtype: float32 or bfloat16. Raises one WeightsError that lists every
    missing, surplus and misshapen tensor, and one for the first tensor of another dtype or with NaN or infinity.
    """
    check_dtype(dtype)
    check_names(state, TABLE, abstract_params(config))
    return Twin(
        PlannerRefresh.from_release(state, config, grid, dtype, device),
        Router.from_release(state, config, dtype, device),
        Executor.from_release(state, config, steps, shift, dtype, device, present, committed),
        state,
    )


def release_state_dict(twin: Twin) -> dict[str, Tensor]:
    """Back to the release's layout, on the host, in the dtypes of the source: bit for bit what was loaded.

    Weights come out of the modules, un-fused and un-stacked; a source in float32 comes back exactly from a float32
    twin only. What inference reads only while loading (time embeddings, modulation tables), or not at all (the
    planner's head and what lies behind the keys and values of its last block), is handed on from the source.
    """
    held = dict(twin.views())
    out = {}
    for name in release_shapes(twin.planner.config):
        source = as_torch(twin.source[name])
        out[name] = held[name].to("cpu", source.dtype, copy=True) if name in held else source
    return out
