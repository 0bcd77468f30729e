"""The demo with twice the demonstrations and two and a half times the training steps."""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.data.path, config.data.cache = "runs/demo_long/dataset", "runs/demo_long/cache"
    config.data.episodes = 400
    config.optimizer.ema_decay = 0.998
    config.train.steps = 7000
    return config
