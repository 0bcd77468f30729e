"""AdamW with warm-up and cosine decay, clipping, and parameters that are not trained."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ahawam_jax.training.adapters import A, B

DTYPES = ("float32", "bfloat16")


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
    gather_once: bool = False  # weights split over fsdp are gathered once a step and held, not twice a microbatch
    reduce_dtype: str = "bfloat16"  # in which kernels' gradients are summed over devices, if products are as narrow
    freeze: str = ""  # regular expression: parameters whose path it matches from the start are not trained
    moment_dtype: str = "float32"  # of Adam's two moments in memory; arithmetic is float32
    lora_targets: str = ""  # regular expression: kernels whose path it matches are trained as adapters
    lora_rank: int = 16
    lora_alpha: float = 16.0  # adapters count lora_alpha / lora_rank

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"config.optimizer.warmup_steps is {self.warmup_steps} and warmup_fraction {self.warmup_fraction:g}: "
                "give one of them, and 0 for the other."
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"config.optimizer.warmup_fraction is {self.warmup_fraction:g}, expected 0 to below 1.")
        if self.lora_targets and self.ema_decay:
            raise ValueError(
                f"config.optimizer.ema_decay is {self.ema_decay:g} with lora_targets: an average of adapters is not "
                "that of the kernels that they make; set ema_decay to 0."
            )
        if self.lora_targets and self.gather_once:
            raise ValueError(
                "config.optimizer.gather_once is set with lora_targets: adapters are merged with their kernels in "
                "every microbatch, so there is nothing to hold; set gather_once to False."
            )
        for name in ("freeze", "lora_targets"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"config.optimizer.{name} {getattr(self, name)!r} is no regular expression: {error}."
                ) from None
        if self.accumulate < 1:
            raise ValueError(f"config.optimizer.accumulate is {self.accumulate}, expected at least 1 microbatch.")
        if self.lora_rank < 1:
            raise ValueError(f"config.optimizer.lora_rank is {self.lora_rank}, expected at least 1.")
        for name in ("moment_dtype", "reduce_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"config.optimizer.{name} is {getattr(self, name)!r}, expected {' or '.join(DTYPES)}."
                )
        if self.gather_once and self.reduce_dtype == "float32":
            raise ValueError(
                "config.optimizer.gather_once holds weights in the dtype of their products, in which their gradients "
                "come then; with reduce_dtype float32 set gather_once to False."
            )
        if self.moment_dtype == "bfloat16" and self.b2 > 0.99:
            raise ValueError(
                f"config.optimizer.b2 is {self.b2:g} and moment_dtype bfloat16, whose steps of 1/256 are larger than "
                "what one step changes of the second moment; take b2 of 0.99 at most, or float32."
            )

    @property
    def lora_scale(self) -> float:
        """What adapters are multiplied with when they are merged."""
        return self.lora_alpha / self.lora_rank

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


def split(params: Any, freeze: str) -> tuple[Any, Any]:
    """The parameters to train and the frozen ones, each without the other's branches; `join` puts them together.

    Kernels with adapters are frozen, the adapters never.

    Raises ValueError for an expression that matches no path, or all of them.
    """
    leaves = flatten_dict(params, sep="/")
    frozen = {path: x for path, x in leaves.items() if freeze and re.match(freeze, path)}
    if freeze and len(frozen) in (0, len(leaves)):
        raise ValueError(
            f"config.optimizer.freeze {freeze!r} matches {'all' if frozen else 'none'} of the parameters' paths; they "
            f"begin with {', '.join(sorted({path.partition('/')[0] for path in leaves}))}."
        )
    frozen |= {path: x for path, x in leaves.items() if path.removesuffix("kernel") + A in leaves}
    frozen = {path: x for path, x in frozen.items() if not path.endswith((A, B))}
    trained = {path: x for path, x in leaves.items() if path not in frozen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def join(trained: Any, frozen: Any) -> Any:
    """The whole tree of what `split` took apart."""
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")


def stored_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same rule, whose state between two steps is kept in dtype, counters excepted."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradient, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` steps: of all parameters it makes the state of those to train.

    Gradients, and the parameters beside them, are those of `split`'s first part.
    """
    adam = optax.adamw(learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_decays)
    if cfg.moment_dtype != "float32":
        adam = stored_in(cfg.moment_dtype, adam)
    rule = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adam)
    return optax.GradientTransformation(lambda params: rule.init(split(params, cfg.freeze)[0]), rule.update)
