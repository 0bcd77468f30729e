"""The flash demo's distillation at the size of `tests/tiny_config.py`."""

from ml_collections import ConfigDict

from configs import demo_flash
from tests import tiny_config


def get_config() -> ConfigDict:
    config, flash = tiny_config.get_config(), demo_flash.get_config()
    config.model.prediction = flash.model.prediction
    config.distillation = flash.distillation
    config.optimizer.update(freeze=flash.optimizer.freeze, learning_rate=3e-3)
    return config
