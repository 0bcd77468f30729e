"""The joint objective: video and action flow matching on one sample (Eq. 6-7, 12)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.planner import History
from ahawam_jax.training.breakdown import SampleLosses

ACTION_TIMES = ("per_chunk", "shared")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Noise laws and weights of the joint loss; defaults are the release's."""

    shift: float = 5.0
    time_law: str = "shifted_uniform"  # of the video; see flow_matching.TIME_LAWS
    action_time_law: str = "shifted_uniform"
    action_times: str = "per_chunk"  # each chunk draws its own time, or "shared": one for the horizon
    video_weight: float = 1.0  # lambda of the video loss
    action_weight: float = 1.0  # lambda of the action loss
    loss_weight: str = "bell"  # over video times
    action_loss_weight: str = "bell"  # over action times
    action_draws: int = 1  # noise draws of the executor per planned observation
    max_delay: int = 0  # a chunk begins with 0 to so many committed actions, given clean at time 0; 0: with none
    memory: bool = True  # the planner looks back on earlier frames (Eq. 13); False trains a planner that never does
    routing: bool = True  # the executor reads the context as routed (Eq. 8-10); False trains it on the planner's own

    def __post_init__(self) -> None:
        for name, allowed in (
            ("time_law", flow_matching.TIME_LAWS),
            ("action_time_law", flow_matching.TIME_LAWS),
            ("action_times", ACTION_TIMES),
            ("loss_weight", flow_matching.LOSS_WEIGHTS),
            ("action_loss_weight", flow_matching.LOSS_WEIGHTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"objective.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}."
                )
        if self.max_delay < 0:
            raise ValueError(f"objective.max_delay is {self.max_delay}; expected 0, for none, or a number of actions.")

    def check(self, chunk: int) -> None:
        """Raises ValueError for committed actions that leave nothing of a chunk of so many to learn."""
        if self.max_delay >= chunk:
            raise ValueError(
                f"objective.max_delay is {self.max_delay}, but a chunk has {chunk} actions (config.model.chunk); "
                "committed actions must leave some to predict, half a chunk is a good choice."
            )

    def check_policy(self, policy: Mapping[str, Any]) -> None:
        """Raises ValueError if config.policy runs the model with a part that this objective does not train."""
        for part in ("memory", "routing"):
            if policy[part] and not getattr(self, part):
                raise ValueError(
                    f"config.policy.{part} is set, but config.objective.{part} is not: the policy would run with what "
                    f"was not trained; set config.policy.{part}=False, or train it."
                )


@flax.struct.dataclass
class Noise:
    """Everything random in one evaluation of the loss."""

    video: jax.Array  # like input_latents
    video_times: jax.Array  # [B]
    action: jax.Array  # [draws, B, C, T, d]
    action_times: jax.Array  # [draws, B, C]
    committed: jax.Array | None = None  # int32 [draws, B, C], actions that are given; None where max_delay is 0


def sample_noise(key: jax.Array, batch: dict[str, jax.Array], model: AhaWam, cfg: ObjectiveConfig) -> Noise:
    """Draws noise and times for a batch; a pure function of the key."""
    keys = jax.random.split(key, 4)
    latents = batch["input_latents"]
    size, chunks, length = latents.shape[0], batch["obs_latents"].shape[1], model.config.chunk
    drawn = chunks if cfg.action_times == "per_chunk" else 1
    times = flow_matching.sample_times(keys[3], (cfg.action_draws, size, drawn), cfg.action_time_law, cfg.shift)
    committed = None
    if cfg.max_delay:  # of a key of its own: the other draws are as without
        shape = (cfg.action_draws, size, chunks)
        committed = jax.random.randint(jax.random.fold_in(key, 4), shape, 0, cfg.max_delay + 1)
    return Noise(
        video=jax.random.normal(keys[0], latents.shape),
        video_times=flow_matching.sample_times(keys[1], (size,), cfg.time_law, cfg.shift),
        action=jax.random.normal(keys[2], (cfg.action_draws, size, chunks, length, model.config.action_dim)),
        action_times=jnp.broadcast_to(times, (cfg.action_draws, size, chunks)),
        committed=committed,
    )


def masked_mean(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Mean over the last axis of the kept entries, 0 where nothing is kept. x [..., K], keep broadcasts -> [...]."""
    return jnp.where(keep, x, 0.0).sum(-1) / jnp.maximum(keep.sum(-1), 1)


def window(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """Horizon-adaptive offset (Eq. 12): x[b, start[b] : start[b] + length]. x [B, R, ...], start [B]."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length))(x, start)


def present_numbers(batch: dict[str, jax.Array]) -> jax.Array:
    """Which numbers of an action each sample's robot has, bool [B, 1, 1, d]. Keys as in joint_loss."""
    size, _, width = batch["action"].shape
    return batch.get("action_present", jnp.ones((size, width), bool))[:, None, None]


def history_of(batch: dict[str, jax.Array]) -> History | None:
    """What the planner looks back on in a batch (Sec. 3.4), if it has a history. Keys as in joint_loss."""
    if "history_latents" not in batch:
        return None
    latents = batch["history_latents"][:, :, :, 0].swapaxes(1, 2)  # [B, c, W, h, w]
    frames = latents.shape[2]
    valid = jnp.arange(frames) >= frames - batch["video_history_valid_len"][:, None]
    return History(latents, batch["video_history_frame_indices"], valid)


def read_by_executor(
    apply: Callable[..., Any], context: PlannerContext, latents: jax.Array, routing: bool
) -> PlannerContext:
    """What the executor reads in each chunk, [L, B, C, S, N, H], layer by layer.

    apply: calls a method of the model. context [L, B, 1, S, N, H]. latents: of each chunk's observation,
    [B, C, c, 1, h, w]. routing: through the router (Eq. 8-10), or else the planner's context as it is.
    """
    if routing:
        return apply("route", context, latents, scanned=True)
    return jax.tree.map(lambda x: jnp.repeat(x, latents.shape[1], 2), context)


def joint_loss(
    model: AhaWam,
    params: Any,
    batch: dict[str, jax.Array],
    noise: Noise,
    cfg: ObjectiveConfig,
    capture: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """L = video_weight * L_video + action_weight * L_action (Eq. 6-7), averaged over the batch.

    Batch keys (c latent channels, F latent frames, R action rows >= horizon + largest offset):
      input_latents [B, c, F, h, w]; obs_latents [B, C, c, 1, h, w]; history_latents [B, W, c, 1, h, w] (optional)
      with video_history_valid_len [B] and video_history_frame_indices [B, W], right-aligned;
      video_temporal_position_ids [B, F]; image_is_pad [B, 1 + 4(F-1)]; context [B, K, X]; context_mask [B, K];
      action [B, R, d]; action_is_pad [B, R]; proprio [B, R, p]; action_offset [B]; action_present [B, d] bool, which
      numbers of an action the sample's robot has (optional: all).

    A latent frame is dropped from the loss if all four of its images are padding; a fully padded sample gives 0. An
    action's error is the mean over the numbers that the sample's robot has; the others enter the executor as 0. With
    noise.committed, the first actions of a chunk enter clean, at time 0, and the loss is over the others: a chunk
    learns to go on from what a robot runs while it is computed.

    Returns the scalar loss and, by name, its parts and the predictions; with `capture` also the
    planner output, the routed context and what the modules recorded on the way ("intermediates", by method).
    """
    clean = batch["input_latents"]
    chunks, length = batch["obs_latents"].shape[1], model.config.chunk
    text, text_mask = batch["context"], batch["context_mask"]

    recorded = {}

    def apply(method, *args, **options):
        if not capture:
            return model.apply({"params": params}, *args, **options, method=method)
        out, state = model.apply({"params": params}, *args, **options, method=method, mutable=["intermediates"])
        recorded[method] = state["intermediates"]
        return out

    # Planner: the current frame is given, the future is noised.
    future = jnp.arange(clean.shape[2]) > 0
    noisy = jnp.where(
        future[:, None, None], flow_matching.mix(clean, noise.video, noise.video_times), clean
    )
    times = noise.video_times[:, None] * future
    positions = batch["video_temporal_position_ids"]
    planned = apply(
        "plan", noisy, times, positions, text, text_mask, history=history_of(batch), current_only=True
    )

    # Router, then executor: every chunk of the horizon at once, and every draw. To the executor the chunks of all
    # draws are one long horizon; `jax.vmap` over draws, of which text and context know nothing, is more than the rules
    # of fused attention can do (JAX 0.10.2).
    routed = read_by_executor(apply, planned.context, batch["obs_latents"], cfg.routing)
    draws, horizon = len(noise.action), chunks * length
    start = batch["action_offset"]
    action = window(batch["action"], start, horizon).reshape(-1, chunks, length, model.config.action_dim)
    states = window(batch["proprio"], start, horizon)[:, ::length]
    keep, present = ~window(batch["action_is_pad"], start, horizon), present_numbers(batch)
    positions = jnp.arange(horizon).reshape(chunks, length)

    def in_a_row(x: jax.Array) -> jax.Array:
        """[draws, B, C, ...] -> [B, draws*C, ...]."""
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    def for_each_draw(x: jax.Array, axis: int) -> jax.Array:
        return jnp.concatenate([x] * draws, axis)

    noisy, committed = flow_matching.mix(action[None], noise.action, noise.action_times), None
    if noise.committed is not None:
        first = jnp.arange(length) < noise.committed[..., None]  # [draws, B, C, T]
        noisy, committed = jnp.where(first[..., None], action, noisy), in_a_row(noise.committed)
        keep = keep & ~first.reshape(draws, -1, horizon)
    x = jnp.where(present, noisy, 0.0)
    acted = apply(
        "act", in_a_row(x), in_a_row(noise.action_times), for_each_draw(positions, 0), text, text_mask,
        for_each_draw(states, 1), jax.tree.map(lambda y: for_each_draw(y, 2), routed), committed,
    )  # fmt: skip
    predictions = acted.reshape(acted.shape[0], draws, chunks, *acted.shape[2:]).swapaxes(0, 1)
    target = noise.action - action if model.config.prediction == "velocity" else action
    error = masked_mean(jnp.square(predictions - target), present)  # [draws, B, C, T]
    weight = flow_matching.loss_weight(noise.action_times, cfg.shift, cfg.action_loss_weight)
    weighted = (error * weight[..., None]).reshape(draws, -1, horizon)
    by_sample, keep = masked_mean(weighted, keep), keep.reshape(*keep.shape[:-1], chunks, length)
    by_chunk = masked_mean(error, keep)
    loss_action = cfg.action_weight * by_sample.mean()

    frame_error = jnp.square(planned.velocity - (noise.video - clean))[:, :, 1:].mean((1, 3, 4))  # [B, F-1]
    pad = batch["image_is_pad"][:, 1:].reshape(*frame_error.shape, -1).all(2)
    per_sample = masked_mean(frame_error, ~pad)
    weight = flow_matching.loss_weight(noise.video_times, cfg.shift, cfg.loss_weight)
    weighted_video = per_sample * weight
    loss_video = cfg.video_weight * weighted_video.mean()
    parts = {
        "loss_video": loss_video,
        "loss_action": loss_action,
        "loss_video_per_sample_unweighted": per_sample,
        "pred_video": planned.velocity,
        "pred_action": predictions,
        "samples": SampleLosses(
            cfg.video_weight * weighted_video, cfg.action_weight * by_sample.mean(0), per_sample, ~pad.all(1),
            by_chunk, keep.any(-1),
        ),
    }
    if capture:
        parts |= {"planned": planned, "routed": routed, "intermediates": recorded}
    return loss_video + loss_action, parts
