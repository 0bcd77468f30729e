"""A model small enough for a test: sizes, random parameters, a random batch and its noise."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.training.objective import Noise

CONFIG = ModelConfig(
    num_layers=2, num_heads=2, head_dim=12, planner_dim=16, planner_ffn_dim=24, executor_dim=14, executor_ffn_dim=20,
    latent_channels=3, text_dim=10, freq_dim=8, action_dim=3, state_dim=4, num_queries=3, chunk=2, horizon=4,
    memory_frames=3, video_ratio=2, dtype="float32",
)  # fmt: skip
BATCH, FRAMES, HEIGHT, WIDTH, TEXT, MAX_OFFSET = 2, 3, 2, 4, 5, 2
TOKENS = HEIGHT * WIDTH // 4

Batch = dict[str, np.ndarray]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(config: ModelConfig = CONFIG, seed: int = 0) -> Any:
    """Every leaf random, also heads that start at zero and the gate, so that nothing hides behind a zero.

    Scales of norms lie around 1, so that what enters a layer also leaves it.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        is_scale = path[-1].key.endswith(("scale", "_norm"))
        return np.float32(is_scale + 0.3 * rng.standard_normal(x.shape))

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(abstract_params(config)))


def narrowed(params: Any, keep: np.ndarray) -> Any:
    """Parameters, or what is like them, of a model of fewer numbers: those that `keep`, bool [d], has, of state and
    action alike."""
    cut = {
        "executor/action_encoder/kernel": 0, "executor/head/kernel": 1, "executor/head/bias": 0,
        "state_encoder/kernel": 0,
    }  # fmt: skip

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        axis = cut.get("/".join(key.key for key in path))
        return x if axis is None else np.compress(keep, x, axis)

    return jax.tree_util.tree_map_with_path(leaf, params)


def random_batch(seed: int = 1) -> Batch:
    """The batch of `joint_loss`: three history frames (two valid in the first sample), offsets 0 and 1, no padding."""
    chunks, rows = CONFIG.num_chunks, CONFIG.horizon + MAX_OFFSET
    image = (CONFIG.latent_channels, 1, HEIGHT, WIDTH)
    return {
        "input_latents": normal(seed, BATCH, CONFIG.latent_channels, FRAMES, HEIGHT, WIDTH),
        "obs_latents": normal(seed + 1, BATCH, chunks, *image),
        "history_latents": normal(seed + 2, BATCH, CONFIG.memory_frames, *image),
        "video_history_valid_len": np.array([2, 3], np.int32),
        "video_history_frame_indices": np.array([[0, 0, 2], [0, 2, 4]], np.int32),
        "video_temporal_position_ids": np.array([[4, 5, 6], [6, 7, 8]], np.int32),
        "image_is_pad": np.zeros((BATCH, 1 + 4 * (FRAMES - 1)), bool),
        "context": normal(seed + 3, BATCH, TEXT, CONFIG.text_dim),
        "context_mask": np.arange(TEXT) < np.array([[3], [4]]),
        "action": normal(seed + 4, BATCH, rows, CONFIG.action_dim),
        "action_is_pad": np.zeros((BATCH, rows), bool),
        "proprio": normal(seed + 5, BATCH, rows, CONFIG.state_dim),
        "action_offset": np.array([0, 1], np.int32),
    }


def random_noise(seed: int = 11, draws: int = 1) -> Noise:
    """Noise at times where no loss weight is zero."""
    chunks = CONFIG.num_chunks
    times = np.random.default_rng(seed).uniform(100, 900, BATCH + draws * BATCH * chunks).astype(np.float32)
    return Noise(
        video=normal(seed + 1, BATCH, CONFIG.latent_channels, FRAMES, HEIGHT, WIDTH),
        video_times=times[:BATCH],
        action=normal(seed + 2, draws, BATCH, chunks, CONFIG.chunk, CONFIG.action_dim),
        action_times=times[BATCH:].reshape(draws, BATCH, chunks),
    )


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """The largest deviation of every leaf over its largest entry stays within `tolerance`.

    The divisor is at least 0.01: a leaf that is zero but for rounding, such as the gradient of a bias that softmax
    ignores, has no relative error.
    """

    def check(path: Any, a: Any, b: Any) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (jax.tree_util.keystr(path), a.shape, b.shape)
        error = np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-2)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)  # NaN fails, too

    jax.tree_util.tree_map_with_path(check, got, want)


def differs(a: Any, b: Any) -> bool:
    """Whether two arrays differ by more than rounding."""
    a, b = np.asarray(a), np.asarray(b)
    return bool(np.abs(a - b).max() > 1e-4 * np.abs(b).max())
