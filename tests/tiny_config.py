"""The demo's configuration at a size that compiles in seconds, for `tests/data_pipelines/tiny_dataset.py`."""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.model.update(
        num_layers=2, num_heads=2, head_dim=12, planner_dim=24, planner_ffn_dim=32, executor_dim=16,
        executor_ffn_dim=24, text_dim=16, freq_dim=16, action_dim=3, state_dim=5, num_queries=2, chunk=4, horizon=8,
        video_ratio=1,
    )  # fmt: skip
    config.data.update(head_size=(64, 64), history_stride=4, max_offset=0, batch_size=8, validation_episodes=1)
    config.optimizer.update(warmup_steps=2)
    config.train.update(steps=10, log_every=1, validate_every=1000, checkpoint_every=3)
    config.policy.update(refresh_every=2, steps=2, execute=4)
    return config
