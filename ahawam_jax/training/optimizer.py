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
    warmup_fraction: float = 0.0  # of all steps, in place of warmup_steps
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-2  # on matrices only
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0 keeps no average
    accumulate: int = 1  # microbatches per step

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"config.optimizer.warmup_steps is {self.warmup_steps} and warmup_fraction {self.warmup_fraction:g}: "
                "give one of them, and 0 for the other."
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"config.optimizer.warmup_fraction is {self.warmup_fraction:g}, expected 0 to below 1.")

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps` steps."""
        return self.warmup_steps or round(self.warmup_fraction * steps)


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to `final_fraction` of it at `steps`."""
    warmup = cfg.warmup(steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, max(steps, warmup + 1),
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
