"""Inference written the released way: what the benchmark compares with, and nothing else.

The released code runs eager PyTorch, module by module, in one dtype. Restated here, at its size of work: q, k and v
are three products; rotary factors are complex128 numbers that lie on the host, are put together and copied to the
device in every pass and multiply in float64; time is embedded per token, and modulation rows are made per token, in
every pass; the state token joins the text in every step, and text is embedded, and read into keys and values, by
every block of every step; the router is a loop over layers; the memory is a list of frames joined by torch.cat; and
the planner's last block runs to its end. Left out, to the benefit of this side, are all checks of arguments.
`export.released.vae` is the video tower, `export.released.training` the training step.

Parameters have the release's names and shapes, so modules share memory with whoever holds the same weights.

Axis letters: B batch, C chunks, S tokens of one frame, T action tokens, Q queries, K text tokens, L layers,
A = N heads x H head width, D model width, X text width, c latent channels.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import ACTION_BRANCH
from ahawam_jax.models.attention import rotary_rates
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.models.dit import SMALL_NET_EPS

Cache = list[tuple[Tensor, Tensor]]  # keys and values [B, S, A] of every layer
POSITIONS = 1024  # rows of a rotary table
SECTIONS = (
    ("video.", "mot/mixtures.video."), ("action.", "mot/mixtures.action."), ("editor.", "mot/chunk_kv_cache_editor."),
    ("branch", "mot/action_branch_embedding"), ("state.", "proprio_encoder/"), ("look.", "action_obs_visual_proj/"),
    ("ask.", "chunk_obs_query_encoder/"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- functions
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q [B, S, A], k and v [B, K, A], mask bool [S, K] or [B, S, K] -> [B, S, A]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def rotary_table(width: int) -> Tensor:
    """Factors of all positions, complex128 [POSITIONS, width / 2] on the host."""
    angles = torch.outer(torch.arange(POSITIONS, dtype=torch.float64), torch.from_numpy(rotary_rates(width)))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, factors: Tensor, heads: int) -> Tensor:
    """x [B, S, A], factors complex128 [S, 1, H/2] or [B, S, 1, H/2]."""
    cos, sin = factors.real, factors.imag
    even, odd = x.float().unflatten(-1, (heads, -1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2).to(x.dtype)


def sinusoid(times: Tensor, width: int) -> Tensor:
    """Diffusion times [R] -> [R, width], in their dtype."""
    rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=times.device) / (width // 2))
    angles = torch.outer(times.double(), rates)
    return torch.cat([angles.cos(), angles.sin()], 1).to(times.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def small_net(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = nn.LayerNorm(inputs, SMALL_NET_EPS), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)


# ------------------------------------------------------------------------------------------------------ transformers
class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections of self- and cross-attention."""

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.o = nn.Linear(inner, dim)
        self.norm_q, self.norm_k = RmsNorm(inner, config.norm_eps), RmsNorm(inner, config.norm_eps)


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, config: ModelConfig):
        super().__init__()
        self.heads = config.num_heads
        self.self_attn, self.cross_attn = Attention(dim, config), Attention(dim, config)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, config.norm_eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, config.norm_eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self, x: Tensor, rows: Tensor, factors: Tensor, prefix: tuple[Tensor, Tensor] | None, mask: Tensor | None,
        text: Tensor, text_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """x [B, S, D], rows [B, S, 6, D], prefix k, v [B, M, A], text [B, K, D] -> x and its own k, v [B, S, A].

        A prefix of B * C rows is one for every chunk: a chunk sees its own prefix and itself.
        """
        own, cross = self.self_attn, self.cross_attn
        rows = (y.squeeze(2) for y in (self.modulation + rows).chunk(6, 2))
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = rows
        y = modulate(self.norm1(x), shift, scale)
        q, k, v = own.norm_q(own.q(y)), own.norm_k(own.k(y)), own.v(y)
        q, k = rotate(q, factors, self.heads), rotate(k, factors, self.heads)
        keys, values = k, v
        if prefix is not None:
            q, keys, values = (y.reshape(len(prefix[0]), -1, y.shape[2]) for y in (q, k, v))
            keys, values = (torch.cat(parts, 1) for parts in zip(prefix, (keys, values), strict=True))
        x = x + gate * own.o(attention(q, keys, values, self.heads, mask).reshape(k.shape))
        q, text_k, text_v = cross.norm_q(cross.q(self.norm3(x))), cross.norm_k(cross.k(text)), cross.v(text)
        x = x + cross.o(attention(q, text_k, text_v, self.heads, text_mask))
        return x + gate_ffn * self.ffn(modulate(self.norm2(x), shift_ffn, scale_ffn)), k, v


class Transformer(nn.Module):
    """Embeddings and blocks of the planner or the executor."""

    def __init__(self, dim: int, ffn_dim: int, config: ModelConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, config) for _ in range(config.num_layers))

    def forward(
        self, x: Tensor, times: Tensor, factors: Tensor, prefix: Cache | None, mask: Tensor | None, text: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Cache, Tensor]:  # fmt: skip
        """x [B, S, D], times [B, S], text [B, K, X], text_mask [B, K] or [B, S, K] -> x, every layer's keys and
        values, and the embedded times [B, S, D]."""
        embedded = self.time_embedding(sinusoid(times.flatten(), self.freq_dim))
        rows = self.time_projection(embedded).view(*times.shape, 6, -1)
        if text_mask.ndim == 2:
            text_mask = text_mask[:, None].expand(-1, x.shape[1], -1)
        text, cache = self.text_embedding(text), []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, rows, factors, prefix[i] if prefix else None, mask, text, text_mask)
            cache.append((k, v))
        return x, cache, embedded.view(*times.shape, -1)


class QueryEncoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.text_dim
        self.base_queries = nn.Parameter(torch.empty(1, 1, config.num_queries, width))
        self.obs_key_proj = nn.Sequential(nn.LayerNorm(width, SMALL_NET_EPS), nn.Linear(width, width))
        self.obs_value_proj, self.query_proj = small_net(width, width, width), small_net(width, width, width)

    def forward(self, seen: Tensor) -> Tensor:
        """[B, P, X] -> queries [B, Q, X]."""
        scores = self.base_queries[0] @ self.obs_key_proj(seen).transpose(1, 2) / math.sqrt(seen.shape[-1])
        return self.query_proj(scores.softmax(-1) @ self.obs_value_proj(seen))


class CacheEditor(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        inner, layers = config.num_heads * config.head_dim, range(config.num_layers)
        self.heads = config.num_heads
        self.layer_query_proj = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.text_dim, SMALL_NET_EPS), nn.Linear(config.text_dim, inner))
            for _ in layers
        )
        self.layer_delta_proj = nn.ModuleList(small_net(inner, inner, 2 * inner) for _ in layers)
        self.delta_gate = nn.Parameter(torch.empty(config.num_layers))

    def forward(self, queries: Tensor, cache: Cache) -> Cache:
        """queries [B, C, Q, X]; every layer's keys and values, changed for every chunk, [B, C, S, A]."""
        edited = []
        for i, (frame_k, frame_v) in enumerate(cache):
            q = self.layer_query_proj[i](queries)
            q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, frame_k, frame_v))
            root = math.sqrt(q.shape[-1])
            weights = (torch.einsum("bcqnh,bsnh->bncqs", q, k) / root).softmax(-1)
            gathered = torch.einsum("bncqs,bsnh->bcqnh", weights, v)
            weights = (torch.einsum("bsnh,bcqnh->bncsq", k, gathered) / root).softmax(-1)
            returned = torch.einsum("bncsq,bcqnh->bcsnh", weights, gathered).flatten(3)
            delta_k, delta_v = self.layer_delta_proj[i](returned).chunk(2, -1)
            gate = torch.sigmoid(self.delta_gate[i]).to(delta_k.dtype)
            edited.append((frame_k[:, None] + gate * delta_k, frame_v[:, None] + gate * delta_v))
        return edited


# ------------------------------------------------------------------------------------------------------------- model
class ReleasedWay(nn.Module):
    """Planner prefill, routing and denoising."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.video = Transformer(config.planner_dim, config.planner_ffn_dim, config)
        window = (1, PATCH, PATCH)
        self.video.patch_embedding = nn.Conv3d(config.latent_channels, config.planner_dim, window, window)
        self.action = Transformer(config.executor_dim, config.executor_ffn_dim, config)
        self.action.action_encoder = nn.Linear(config.action_dim, config.executor_dim)
        self.action.head = nn.Linear(config.executor_dim, config.action_dim)
        self.editor, self.ask = CacheEditor(config), QueryEncoder(config)
        self.look = small_net(config.latent_channels, config.text_dim, config.text_dim)
        self.state = nn.Linear(config.state_dim, config.text_dim)
        self.branch = nn.Parameter(torch.empty(2, config.executor_dim))

    @classmethod
    def names(cls, config: ModelConfig) -> dict[str, str]:
        """What the modules hold, by their own name: the release's name. Planner head and the like never run."""
        with torch.device("meta"):
            own = cls(config).state_dict()
        return {name: release_name(name) for name in own}

    @classmethod
    def load(cls, state: Mapping[str, Tensor], config: ModelConfig) -> Self:
        """Around tensors by release name, all in one dtype and on one device; they are not copied."""
        with torch.device("meta"):
            model = cls(config).requires_grad_(False)
        model.load_state_dict({name: state[release] for name, release in cls.names(config).items()}, assign=True)
        side = config.head_dim // 3
        model.tables = [rotary_table(width) for width in (config.head_dim - 2 * side, side, config.head_dim)]
        return model

    def video_factors(self, frames: int | Tensor, rows: int, columns: int) -> Tensor:
        """Rotary factors of the tokens of frames int [...], complex128 [..., S, 1, H/2] on the host."""
        time, side, _ = self.tables
        time = time[frames][..., None, None, :]
        grid = (*time.shape[:-3], rows, columns, -1)
        parts = time.expand(grid), side[:rows, None].expand(grid), side[:columns].expand(grid)
        return torch.cat(parts, -1).flatten(-3, -2).unsqueeze(-2)

    def action_factors(self, start: int) -> Tensor:
        """Rotary factors of a chunk whose first action is at `start`, complex128 [T, 1, H/2] on the host."""
        return self.tables[2][start : start + self.config.chunk, None]

    def prefill(
        self, latents: Tensor, factors: Tensor, text: Tensor, text_mask: Tensor, memory: Cache | None
    ) -> Cache:
        """One frame, latents [B, c, h, w], behind the joined memory, k and v [B, M, A] of every layer."""
        x = self.video.patch_embedding(latents[:, :, None].to(self.branch.dtype)).flatten(2).transpose(1, 2)
        times = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
        seen = x.shape[1] + (memory[0][0].shape[1] if memory else 0)
        mask = torch.ones(x.shape[1], seen, dtype=torch.bool, device=x.device)
        return self.video(x, times, factors, memory, mask, text, text_mask)[1]

    def route(self, latents: Tensor, cache: Cache) -> Cache:
        """Keys and values changed by the observation of now, latents [B, c, h, w]."""
        edited = self.editor(self.queries(latents)[:, None], cache)
        return [(k[:, 0], v[:, 0]) for k, v in edited]

    def queries(self, latents: Tensor) -> Tensor:
        """latents [B, c, h, w] -> [B, Q, X]."""
        return self.ask(self.look(latents.flatten(2).transpose(1, 2).to(self.branch.dtype)))

    def denoise(
        self, noise: Tensor, state: Tensor, start: int, levels: Sequence[float], text: Tensor, text_mask: Tensor,
        cache: Cache, factors: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Euler steps: noise [B, T, d], normalised state [B, p] -> normalised actions [B, T, d].

        levels: of noise, n + 1 from 1 to 0. factors: of `action_factors` on the device; None makes and copies them in
        every step, as released, which no CUDA graph can hold.
        """
        dtype = self.branch.dtype
        x = noise.to(dtype)
        for now, after in pairwise(levels):
            turned = self.action_factors(start).to(x.device) if factors is None else factors
            context = torch.cat([text, self.state(state.to(dtype))[:, None]], 1)
            mask = torch.cat([text_mask, text_mask.new_ones(len(text_mask), 1)], 1)
            times = torch.full(x.shape[:2], flow_matching.NUM_TRAIN_TIMES * now, dtype=dtype, device=x.device)
            y = self.action.action_encoder(x) + self.branch[ACTION_BRANCH]
            y, *_ = self.action(y, times, turned, cache, None, context, mask)
            velocity = flow_matching.to_velocity(self.action.head(y), x, now, self.config.prediction)
            x = x + velocity * (after - now)
        return x


def release_name(name: str) -> str:
    """Of a parameter of ReleasedWay."""
    ours, release = next((ours, release) for ours, release in SECTIONS if name.startswith(ours))
    return release + name.removeprefix(ours)


def join(memory: Sequence[Cache]) -> Cache:
    """Frames of the memory, oldest first, as one prefix for every layer."""
    return [tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True)) for layer in zip(*memory, strict=True)]
