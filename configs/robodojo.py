"""RoboDojo (two ARX X5 arms, joint actions) as its release: RoboTwin's sizes, and the first frame stays in memory.

The planner is refreshed every four chunks, once a horizon, as often as training looked back.
"""

from ml_collections import ConfigDict

from configs import robotwin


def get_config() -> ConfigDict:
    config = robotwin.get_config()
    config.model.memory_anchor = True
    config.towers.text_cache = "data/robodojo/text_tokens"
    config.data.path = "data/robodojo"
    config.optimizer.learning_rate = 3e-5
    config.train.update(steps=0, epochs=20.0)
    config.policy.refresh_every = 4
    return config
