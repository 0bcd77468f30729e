"""The demo, whose chunks also learn to go on from actions that the robot runs while they are computed.

Half a chunk at most: as many as the demo executes of one. What it is good for: `ahawam latency-study`.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.objective.max_delay = 8
    return config
