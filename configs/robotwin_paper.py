"""RoboTwin as the paper trains it (Table 4, Sections 3.3 and 4.1), where that is another than the release.

Noise times are logit-normal and errors count alike at all of them; chunks start up to 15 rows after the planner's
frame with the horizon still 64, so 80 rows a window, of which the video spans 64 (9 frames); learning rate 1e-4, batch
512, 5% warm-up, 5 epochs of the dataset: about 60,000 steps of RoboTwin's 6.1 million rows. What the paper does not
say (weight decay, clipping, the end of the cosine, held-out episodes) is as in `robotwin.py`.
"""

from ml_collections import ConfigDict

from configs import robotwin


def get_config() -> ConfigDict:
    config = robotwin.get_config()
    config.objective.update(
        time_law="logit_normal", action_time_law="logit_normal", loss_weight="uniform", action_loss_weight="uniform"
    )
    config.data.update(max_offset=15, batch_size=512)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=0, warmup_fraction=0.05)
    config.train.update(steps=0, epochs=5.0)
    return config
