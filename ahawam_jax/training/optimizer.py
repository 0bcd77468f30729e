"""AdamW with warm-up and cosine decay, clipping and an exponential moving average of the parameters."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of `config.optimizer`; rates per step."""

    learning_rate: float = 5e-5  # peak
    final_fraction: float = 0.1  # of the peak, at the end of the cosine
    warmup_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-2  # on matrices only
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0 keeps no average
    accumulate: int = 1  # microbatches per step


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to `final_fraction` of it at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps, max(steps, cfg.warmup_steps + 1),
        end_value=cfg.learning_rate * cfg.final_fraction,
    )  # fmt: skip


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_decays),
    )
