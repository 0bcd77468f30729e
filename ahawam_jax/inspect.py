"""python -m ahawam_jax.inspect --config=configs/X.py: parameters by component, without allocating any."""

import math

import flax.linen as nn
import jax
from absl import app
from ml_collections import config_flags

from ahawam_jax import cli
from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file in configs/.")

COMPONENTS = (
    ("planner", "planner"),
    ("executor", "executor"),
    ("layerwise router", "router"),
    ("query encoder", "observation_queries/encoder"),
    ("observation projection", "observation_queries/projection"),
    ("state encoder", "state_encoder"),
    ("branch embedding", "branch_embedding"),
)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each component, by the names of Table 4's model, from shapes alone."""
    params = nn.unbox(abstract_params(config))
    counts = {}
    for name, path in COMPONENTS:
        part = params
        for key in path.split("/"):
            part = part[key]
        counts[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(part))
    return counts


def main(argv: list[str]) -> None:
    if len(argv) > 1 or _CONFIG.value is None:
        raise app.UsageError("--config is required, for example --config=configs/robotwin.py, and nothing else.")
    config = ModelConfig.create(_CONFIG.value.model)
    counts = count_parameters(config)
    total = sum(counts.values())
    for name, count in counts.items():
        print(f"{name:24s}{count:>16,d}  {count / total:6.1%}")
    print(f"{'total':24s}{total:>16,d}  {total * 4 / 2**30:.1f} GiB in float32, {total * 2 / 2**30:.1f} in bfloat16")
    print(
        f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim}; horizon {config.horizon}, "
        f"{config.num_chunks} chunks of {config.chunk}; memory {config.memory_frames} frames; predicts "
        f"{config.prediction}"
    )


if __name__ == "__main__":
    cli.run(main)
