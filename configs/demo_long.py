"""The demo with twice the demonstrations and about four times the training: an hour on two cores."""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.data.path, config.data.cache = "runs/demo_long/dataset", "runs/demo_long/cache"
    config.data.episodes = 400
    config.train.steps = 8000
    return config
