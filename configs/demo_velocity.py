"""The demo with the full-size configuration's action head: it predicts velocities, their errors under the bell.

One Euler step of the demo's clean-chunk head is as good as ten; a velocity head needs its steps, as the full-size one
does, so that there is something to distil (`demo_flash.py`). Noise has to pass through the network: four draws of it
for every planned observation in place of two.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.model.prediction = "velocity"
    config.objective.update(action_loss_weight="bell", action_draws=4)
    config.train.steps = 3600
    return config
