"""RoboTwin's executor, distilled to two steps (Flash, Table 5): teacher of 16 steps, anchors 0, 1, 2, 4, 8, 12, 16.

Where the release's configuration says it (learning rate 2e-5, 5 epochs, weight decay 1e-2), as there; it draws its
anchors uniformly, which is --config.distillation.noise_weight=1, and deploys one step, here two as in the paper.
Nothing of this has been run at full size.
"""

from ml_collections import ConfigDict

from configs import robotwin


def get_config() -> ConfigDict:
    config = robotwin.get_config()
    config.init = "checkpoints/robotwin"  # the policy to distil: a run of robotwin.py, or a release, imported
    config.distillation = ConfigDict(dict(
        method="teacher", teacher_steps=16, anchors=(0, 1, 2, 4, 8, 12, 16), noise_weight=3.0, draws=1,
    ))  # fmt: skip
    config.optimizer.update(learning_rate=2e-5, freeze="planner|router|observation_queries|state_encoder")
    config.train.update(steps=0, epochs=5.0, checkpoint_every=2500, validate_every=2500)
    config.policy.steps = 2
    return config
