"""Which of the frames in its memory the planner reads (Sec. 3.4, Eq. 13)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.analysis.episodes import Plan
from ahawam_jax.analysis.routing import attention_weights
from ahawam_jax.inference.policy import Observation, Policy
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.deployment import Deployed, Words, give
from ahawam_jax.models.memory import PlannerMemory


def memory_mass(policy: Policy, plan: Plan, observation: Observation) -> np.ndarray:
    """How the tokens of a plan's frame share their attention between frames, float32 [L, N, W + 1], sums to 1.

    The last is the frame itself, before it the newest one that it remembers, and so on; 0 where nothing is remembered.
    Mean over the frame's tokens. observation: that of the plan. A layer's map, [N, S, (W + 1) S], is summed up within
    that layer. Raises ValueError for a policy without memory.
    """
    if not policy.config.memory:
        raise ValueError(
            "This policy forgets before every refresh (config.policy.memory=False), so there is nothing that it could "
            "read; load it with memory=True if it was trained so."
        )
    position = np.full(1, plan.row // policy.sizes.video_ratio, np.int32)
    memory = plan.before.memory
    mass = _mass(
        policy.sizes, policy.deployed, observation.latents, position, plan.before.planner_words, memory
    )
    return np.asarray(mass)[..., slots(policy.sizes, memory)]


def slots(config: ModelConfig, memory: PlannerMemory) -> list[int]:
    """Places of W + 1 frames in the ring at the refresh that follows on a memory: the oldest first, its own last."""
    written, count = int(memory.written), memory.valid.shape[1]
    newest = {slot: -slot - 1 for slot in range(count)}  # of those that hold nothing, any order, before all others
    for number in range(written + 1):
        newest[int(memory.replace(written=np.int32(number)).slot(config.memory_anchor))] = number
    return sorted(newest, key=newest.__getitem__)


@partial(jax.jit, static_argnums=0)
def _mass(
    config: ModelConfig, deployed: Deployed, latents: jax.Array, position: jax.Array, words: Words,
    memory: PlannerMemory,
) -> jax.Array:  # fmt: skip
    """[L, N, W + 1] by place in the ring."""
    count = memory.valid.shape[1]

    def watch(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        made = call(*args, **kwargs)
        if context.method_name == "self_attention":
            q, condition, (_, (k, _)) = args[0], args[4], made
            weights = attention_weights(q.reshape(len(q), -1, *q.shape[3:]), k, condition.mask)[0]  # [N, S, (W + 1) S]
            mass = weights.reshape(*weights.shape[:2], count, -1).sum(-1).mean(1)
            context.module.sow("intermediates", "mass", mass)
        return made

    with nn.intercept_methods(watch):
        given = give(deployed.planner_rows[0], words.planner)
        _, recorded = AhaWam(config, deployed=True).apply(
            {"params": deployed.params}, latents, position, None, words.mask, memory, given, method="refresh",
            mutable=["intermediates"],
        )  # fmt: skip
    blocks = recorded["intermediates"]["planner"]
    return jnp.stack([blocks[f"blocks_{i}"]["mass"][0] for i in range(config.num_layers)])
