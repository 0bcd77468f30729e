"""The velocity demo's executor, distilled to two steps: `ahawam distill --config=configs/demo_flash.py --workdir=DIR`.

config.init is the policy to distil, a workdir of `ahawam train --config=configs/demo_velocity.py`.
--config.distillation.method=self is the other method, without a teacher.
"""

from ml_collections import ConfigDict

from configs import demo_velocity


def get_config() -> ConfigDict:
    config = demo_velocity.get_config()
    config.init = "runs/demo_velocity"
    config.distillation = ConfigDict(dict(
        method="teacher", teacher_steps=16, anchors=(0, 1, 2, 4, 8, 12, 16), noise_weight=3.0, draws=2,
    ))  # fmt: skip
    config.optimizer.update(
        learning_rate=5e-4, warmup_steps=50, freeze="planner|router|observation_queries|state_encoder"
    )
    config.train.update(steps=1000, validate_every=250, checkpoint_every=250)
    config.policy.steps = 2
    return config
