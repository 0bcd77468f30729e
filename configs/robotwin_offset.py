"""RoboTwin with horizon-adaptive offsets (Eq. 12): chunks start up to 15 rows after the planner's frame.

97 rows a window: horizon 80 (5 chunks), 13 video frames.
"""

from ml_collections import ConfigDict

from configs import robotwin


def get_config() -> ConfigDict:
    config = robotwin.get_config()
    config.model.horizon = 80
    config.data.history_stride = 80
    config.data.max_offset = 15
    return config
