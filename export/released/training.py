"""Training written the released way: the joint forward pass, its loss, and a step of AdamW, in eager PyTorch.

What is said in `export.released.way` of the forward pass holds here too. One pass over the history without gradient,
trimmed to the longest of the batch; the planner over the clip behind it; the router for every chunk of the horizon;
the executor over all chunks at once; autograd through all of it. Left out, to the benefit of this side, is that the
release computes attention again in the backward pass.

The objective is the release's: velocities, weighted by the bell over times drawn by the shifted uniform law, one draw.

Axis letters as there; F latent frames, J frames of history, M remembered tokens, R action rows, d action width,
p state width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ahawam_jax import flow_matching
from ahawam_jax.flow_matching import NUM_TRAIN_TIMES
from ahawam_jax.models.aha_wam import ACTION_BRANCH
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.training.optimizer import OptimizerConfig
from export.released.way import Cache, ReleasedWay, modulate

SHIFT = 5.0  # of the time law and of the bell
Batch = Mapping[str, Tensor]  # keys as in `ahawam_jax.training.objective.joint_loss`


class Noise(NamedTuple):
    """Everything random in one evaluation of the loss."""

    video: Tensor  # like input_latents
    video_times: Tensor  # [B]
    action: Tensor  # [B, C, T, d]
    action_times: Tensor  # [B, C]


def draw_noise(batch: Batch, config: ModelConfig) -> Noise:
    """From PyTorch's own generator."""
    size, chunks = batch["obs_latents"].shape[:2]

    def times(*shape: int) -> Tensor:
        return NUM_TRAIN_TIMES * flow_matching.shift_level(1 - torch.rand(shape), SHIFT)

    action = torch.randn(size, chunks, config.chunk, config.action_dim)
    return Noise(torch.randn_like(batch["input_latents"]), times(size), action, times(size, chunks))


def loss_weight(times: Tensor) -> Tensor:
    """The bell, mean 1 over its grid."""
    lowest, mean = flow_matching.weight_constants(SHIFT)
    bell = torch.exp(-2 * ((times - NUM_TRAIN_TIMES / 2) / NUM_TRAIN_TIMES).square())
    return (bell - lowest) / mean


def masked_mean(x: Tensor, keep: Tensor) -> Tensor:
    """[B, K] -> [B], 0 where nothing is kept."""
    return (x * keep).sum(1) / keep.sum(1).clamp(min=1)


def window(x: Tensor, start: Tensor, length: int) -> Tensor:
    """x[b, start[b] : start[b] + length]; x [B, R, ...]."""
    return torch.stack([row[at : at + length] for row, at in zip(x, start.tolist(), strict=True)])


def expand_mask(mask: Tensor, tokens: int) -> Tensor:
    """Frame to frame [..., F_q, F_k] -> token to token [..., F_q * S, F_k * S]."""
    return mask.repeat_interleave(tokens, -2).repeat_interleave(tokens, -1)


def causal(frames: int) -> Tensor:
    return torch.ones(frames, frames, dtype=torch.bool).tril()


class Head(nn.Module):
    """What reads velocities off the planner's tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.planner_dim, config.norm_eps, elementwise_affine=False)
        self.head = nn.Linear(config.planner_dim, PATCH**2 * config.latent_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.planner_dim))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """x and embedded times [B, S, D] -> patches [B, S, 4 * c], each written as (dy, dx, channel)."""
        shift, scale = (y.squeeze(2) for y in (self.modulation + times[:, :, None]).chunk(2, 2))
        return self.head(modulate(self.norm(x), shift, scale))


class ReleasedTraining(ReleasedWay):
    """The joint forward pass."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.video.head = Head(config)

    @classmethod
    def load(cls, state: Mapping[str, Tensor], config: ModelConfig) -> Self:
        """Around float32 tensors by release name, on the host; they are not copied, and change as they learn."""
        return super().load(state, config).requires_grad_()

    def clip(
        self, latents: Tensor, times: Tensor, positions: Tensor, mask: Tensor, memory: Cache | None, batch: Batch
    ) -> tuple[Tensor, Cache, Tensor]:
        """The planner without its head: latents [B, c, F, h, w], times and positions [B, F], mask bool
        [B, F * S, M + F * S] -> what `Transformer` returns."""
        rows, columns = (side // PATCH for side in latents.shape[3:])
        x = self.video.patch_embedding(latents).flatten(2).transpose(1, 2)
        factors = self.video_factors(positions, rows, columns).flatten(1, 2)
        times = times.repeat_interleave(rows * columns, 1)
        return self.video(x, times, factors, memory, mask, batch["context"], batch["context_mask"])

    @torch.no_grad()
    def recall(self, batch: Batch) -> tuple[Cache, Tensor] | None:
        """Keys and values of the history and which frames [B, J] are there; None where no sample has any."""
        length = batch["video_history_valid_len"]
        longest = int(length.max())
        if not longest:
            return None
        latents = batch["history_latents"][:, -longest:].squeeze(3).transpose(1, 2)
        there = torch.arange(longest) >= (longest - length)[:, None]
        tokens = latents.shape[3] * latents.shape[4] // PATCH**2
        mask = expand_mask(causal(longest) & there[:, :, None] & there[:, None], tokens)
        positions = batch["video_history_frame_indices"][:, -longest:]
        return self.clip(latents, torch.zeros(there.shape), positions, mask, None, batch)[1], there

    def plan(self, latents: Tensor, times: Tensor, batch: Batch) -> tuple[Tensor, Cache]:
        """latents [B, c, F, h, w], times [B, F] -> their velocity, and the first frame's keys and values [B, S, A]."""
        size, _, frames, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        tokens = rows * columns
        mask = expand_mask(causal(frames), tokens).expand(size, -1, -1)
        past, memory = self.recall(batch), None
        if past is not None:
            memory, there = past
            mask = torch.cat([expand_mask(there[:, None].expand(-1, frames, -1), tokens), mask], 2)
        x, cache, embedded = self.clip(latents, times, batch["video_temporal_position_ids"], mask, memory, batch)
        patches = self.video.head(x, embedded).unflatten(1, (frames, rows, columns)).unflatten(-1, (PATCH, PATCH, -1))
        velocity = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)
        return velocity, [(k[:, :tokens], v[:, :tokens]) for k, v in cache]

    def act(self, actions: Tensor, times: Tensor, states: Tensor, routed: Cache, batch: Batch) -> Tensor:
        """actions [B, C * T, d], times [B, C], states [B, C, p], routed [B, C, S, A] of every layer -> velocity."""
        chunks, length = states.shape[1], self.config.chunk
        context = torch.cat([batch["context"], self.state(states)], 1)
        own = torch.eye(chunks, dtype=torch.bool).repeat_interleave(length, 0)  # a chunk sees its own state alone
        text = batch["context_mask"][:, None].expand(-1, len(own), -1)
        mask = torch.cat([text, own.expand(len(text), -1, -1)], 2)
        x = self.action.action_encoder(actions) + self.branch[ACTION_BRANCH]
        factors = self.tables[2][: len(own), None]
        prefix = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in routed]
        x, *_ = self.action(x, times.repeat_interleave(length, 1), factors, prefix, None, context, mask)
        return self.action.head(x)

    def forward(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Loss of the video and of the actions, scalars."""
        clean, observations = batch["input_latents"], batch["obs_latents"]
        future = torch.arange(clean.shape[2]) > 0
        noisy = torch.where(future[:, None, None], flow_matching.mix(clean, noise.video, noise.video_times), clean)
        velocity, current = self.plan(noisy, noise.video_times[:, None] * future, batch)
        queries = self.queries(observations.flatten(0, 1).squeeze(2)).unflatten(0, observations.shape[:2])
        routed = self.editor(queries, current)

        length, start = self.config.chunk, batch["action_offset"]
        horizon = observations.shape[1] * length
        actions, kept = window(batch["action"], start, horizon), ~window(batch["action_is_pad"], start, horizon)
        states = window(batch["proprio"], start, horizon)[:, ::length]
        drawn, times = noise.action.flatten(1, 2), noise.action_times.repeat_interleave(length, 1)
        predicted = self.act(flow_matching.mix(actions, drawn, times), noise.action_times, states, routed, batch)

        error = (velocity - (noise.video - clean)).square()[:, :, 1:].mean((1, 3, 4))  # [B, F - 1]
        seen = ~batch["image_is_pad"][:, 1:].unflatten(1, (error.shape[1], -1)).all(2)
        loss_video = (masked_mean(error, seen) * loss_weight(noise.video_times)).mean()
        error = (predicted - (drawn - actions)).square().mean(2) * loss_weight(times)
        return loss_video, masked_mean(error, kept).mean()


class Trainer:
    """A model, and AdamW as `ahawam_jax.training.optimizer` has it for a run of `steps` steps."""

    def __init__(self, model: ReleasedTraining, cfg: OptimizerConfig, steps: int):
        warmup = cfg.warmup(steps)

        def rate(step: int) -> float:
            """Share of the peak."""
            if step < warmup:
                return step / warmup
            done = min((step - warmup) / max(steps - warmup, 1), 1)
            return cfg.final_fraction + (1 - cfg.final_fraction) * (1 + math.cos(math.pi * done)) / 2

        named = list(model.named_parameters())
        matrices = [x for name, x in named if name.endswith("weight") and x.ndim > 1]
        others = [x for name, x in named if not (name.endswith("weight") and x.ndim > 1)]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.model, self.clip_norm = model, cfg.clip_norm
        self.optimizer = torch.optim.AdamW(groups, cfg.learning_rate, (cfg.b1, cfg.b2))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def step(self, batch: Batch, noise: Noise) -> float:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        loss = sum(self.model(batch, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()
