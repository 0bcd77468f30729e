"""RoboTwin 2.0 at full size (Table 4): horizon 64, chunks of 16, six history frames, 384x320 canvas."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.init = "checkpoints/wan"  # what import_weights made of Wan2.2-TI2V-5B

    # Wan2.2-TI2V-5B as planner, a 1B executor of the same depth.
    config.model = ConfigDict(dict(
        num_layers=30, num_heads=24, head_dim=128,
        planner_dim=3072, planner_ffn_dim=14336, executor_dim=1024, executor_ffn_dim=4096,
        latent_channels=48, text_dim=4096, freq_dim=256, action_dim=14, state_dim=14, num_queries=32,
        initial_gate=-4.0, chunk=16, horizon=64, memory_frames=6, memory_anchor=False, video_ratio=8,
        prediction="velocity", dtype="bfloat16", remat="full",
    ))  # fmt: skip

    # The frozen towers of the release.
    config.towers = ConfigDict(dict(
        video="wan2.2_vae", video_weights="checkpoints/Wan2.2-TI2V-5B", text="umt5",
        text_cache="data/robotwin/text_tokens", text_length=128,
    ))  # fmt: skip

    config.objective = ConfigDict(dict(
        shift=5.0, time_law="shifted_uniform", action_time_law="shifted_uniform", action_times="per_chunk",
        video_weight=1.0, action_weight=1.0, loss_weight="bell", action_loss_weight="bell", action_draws=1,
        max_delay=0, memory=True, routing=True,
    ))  # fmt: skip

    # 65 rows a window: 64 actions, 9 video frames; history one horizon apart. Every number may have a rule of its own,
    # as "z-score, left_gripper=min-max"; |z| is cut at clip.
    config.data = ConfigDict(dict(
        path="data/robotwin", cache="", latents="", latent_clips=False, workers=0, head_size=(256, 320),
        single_view=False, history_stride=64, max_offset=0, batch_size=256, validation_episodes=50,
        normalization=dict(state="z-score", action="z-score"), clip=5.0,
        augmentation=dict(crop=0.0, colour=0.0, erased=0),  # of training pictures, see data_pipelines/augmentation.py
    ))  # fmt: skip

    config.optimizer = ConfigDict(dict(
        learning_rate=5e-5, final_fraction=0.1, warmup_steps=1000, warmup_fraction=0.0, b1=0.9, b2=0.95,
        weight_decay=1e-2, clip_norm=1.0, ema_decay=0.0, accumulate=1, gather_once=False,
        reduce_dtype="bfloat16", freeze="", moment_dtype="float32", lora_targets="", lora_rank=16, lora_alpha=16.0,
    ))  # fmt: skip

    # Parameters are split over the devices of a host and copied between hosts, if a host holds the state.
    config.mesh = ConfigDict(dict(data=-1, fsdp=-1, tensor=1))
    config.train = ConfigDict(dict(
        steps=60_000, epochs=0.0, log_every=20, validate_every=2000, checkpoint_every=2000, checkpoint_minutes=30.0,
        keep=3, keep_every=20_000, keep_best=1, max_bad_steps=10,
    ))  # fmt: skip
    config.policy = ConfigDict(dict(refresh_every=2, steps=10, execute=16, memory=True, routing=True))
    return config
