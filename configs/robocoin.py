"""Pretraining on RoboCOIN (Section 4.1): 45,000 steps of batch 512 from Wan2.2, on the robots of a subset file.

`ahawam robocoin` writes the subset file. A state or action has the 16 numbers of the layout two_arms; numbers that a
robot has not leave the loss. Chunks start up to 15 rows after the planner's frame, as in `robotwin_paper.py`.
"""

from ml_collections import ConfigDict

from configs import robotwin_paper


def get_config() -> ConfigDict:
    config = robotwin_paper.get_config()
    config.model.update(action_dim=16, state_dim=16)
    config.towers.text_cache = "data/robocoin/text_tokens"
    # Two episodes of every dataset are held out. Full speed takes latents made beforehand, see docs/robocoin.md.
    config.data.update(path="data/robocoin/subset.toml", validation_episodes=2)
    config.train.update(steps=45_000, epochs=0.0)
    return config
