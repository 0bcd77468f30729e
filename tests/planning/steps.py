"""A configuration small enough to compile, whose sizes eight devices divide."""

from ml_collections import ConfigDict

from tests import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config.get_config()
    config.model.update(
        num_heads=4, planner_dim=32, planner_ffn_dim=64, executor_dim=32, executor_ffn_dim=64, remat="full"
    )
    config.optimizer.ema_decay = 0.0
    return config
