"""The demo: transfer cube in simulation, from scratch, on two CPU cores. Read this file first.

Everything the full-size configuration has is here, only smaller: a planner with a rolling memory, the router, an
executor, the joint loss over video and actions, and offsets between the planner's frame and the chunk.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init = ""  # workdir or checkpoint step to start from; empty: from scratch

    # Sizes. One latent is 16x16 pixels, a planner token 2x2 latents: the 96x128 canvas gives 12 tokens a frame.
    config.model = ConfigDict(dict(
        num_layers=4, num_heads=4, head_dim=24,
        planner_dim=96, planner_ffn_dim=384, executor_dim=96, executor_ffn_dim=384,
        latent_channels=48, text_dim=96, freq_dim=64, action_dim=14, state_dim=14, num_queries=8, initial_gate=-4.0,
        chunk=16, horizon=16, memory_frames=2, memory_anchor=False, video_ratio=8,
        prediction="sample", dtype="float32", remat="dots",
    ))  # fmt: skip

    # Frozen towers that need no weights.
    config.towers = ConfigDict(dict(
        video="block_transform", video_weights="", text="hashed_words", text_cache="", text_length=20
    ))  # fmt: skip

    # The joint loss (Eq. 6-7). Predicting the clean chunk makes the first step a plain regression.
    config.objective = ConfigDict(dict(
        shift=5.0, time_law="shifted_uniform", action_time_law="shifted_uniform", action_times="per_chunk",
        video_weight=0.05, action_weight=1.0, loss_weight="bell", action_loss_weight="uniform", action_draws=2,
        max_delay=0, memory=True, routing=True,
    ))  # fmt: skip

    # Windows of the recording. History frames are 16 rows apart, as often as the planner is refreshed.
    config.data = ConfigDict(dict(
        path="runs/demo/dataset", episodes=200, cache="runs/demo/cache", latents="", latent_clips=False, workers=0,
        head_size=(64, 128), single_view=False, history_stride=16, max_offset=15, batch_size=16, validation_episodes=8,
        normalization=dict(state="z-score", action="z-score"), clip=5.0,
        augmentation=dict(crop=0.0, colour=0.0, erased=0),  # of training pictures, see data_pipelines/augmentation.py
    ))  # fmt: skip

    config.optimizer = ConfigDict(dict(
        learning_rate=1e-3, final_fraction=0.02, warmup_steps=100, warmup_fraction=0.0, b1=0.9, b2=0.95,
        weight_decay=1e-2, clip_norm=1.0, ema_decay=0.995, accumulate=1, gather_once=False,
        reduce_dtype="bfloat16", freeze="", moment_dtype="float32", lora_targets="", lora_rank=16, lora_alpha=16.0,
    ))  # fmt: skip

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    # The length is given in steps or in epochs, the other is 0. Saved is by steps and by minutes; kept are the newest,
    # one every so many steps, and the best by open-loop error: 0 for no matter how many. Steps that are not finite are
    # skipped, and the run ends after so many in a row.
    config.train = ConfigDict(dict(
        steps=3400, epochs=0.0, log_every=100, validate_every=850, checkpoint_every=850, checkpoint_minutes=0.0,
        keep=2, keep_every=0, keep_best=0, max_bad_steps=10,
    ))  # fmt: skip

    # Deployment: the planner is refreshed every `refresh_every` executor calls, `execute` of the 16 actions are run.
    config.policy = ConfigDict(dict(refresh_every=2, steps=10, execute=8, memory=True, routing=True))
    return config
