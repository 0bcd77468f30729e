"""What the planner predicts, beside what came. The prediction itself is `ahawam imagine`'s."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import build_video_tower
from ahawam_jax.towers.encoding import pixels


def given_back(config: ConfigDict, sizes: ModelConfig, clip: np.ndarray) -> np.ndarray:
    """What the video tower gives back of a clip, as far as a prediction can be right: uint8 [1 + 4k, H, W, 3] -> uint8
    [1 + n, H, W, 3], n = 4k or, of a tower that keeps one frame a latent, k."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tower = build_video_tower(config.towers, sizes, device, decoder=True)
    images = jax.jit(lambda tower, clip: tower.decode(tower.encode(pixels(clip[None])))[0])(tower, clip)
    return np.asarray(jnp.round((images + 1) * 127.5).astype(jnp.uint8))


@dataclass(frozen=True)
class PredictionError:
    """Mean error of each later frame in grey levels of 255, float64 [n].

    predicted: of the planner's frames. still: of the frame of now, had nothing moved.
    """

    predicted: np.ndarray
    still: np.ndarray


def prediction_error(predicted: np.ndarray, came: np.ndarray) -> PredictionError:
    """Of clips uint8 [1 + n, H, W, 3], whose first is the frame of now. Raises ValueError for clips that differ in
    shape."""
    if predicted.shape != came.shape or len(came) < 2:
        raise ValueError(
            f"the clips have shapes {predicted.shape} and {came.shape}; expected the same, of two frames or more: "
            "take of the recording the frames that the tower hands back."
        )
    a, b = predicted.astype(np.float64), came.astype(np.float64)
    errors = [np.abs(x - b[1:]).mean((1, 2, 3)) for x in (a[1:], b[:1])]
    return PredictionError(*errors)
