"""Which latents a configuration caches, and where: a hash of data, transform and tower names their folder."""

import dataclasses

from ml_collections import ConfigDict

from ahawam_jax.models.config import FRAMES_PER_LATENT, SPATIAL_STRIDE, ModelConfig
from data_pipelines.caches.latent_cache import LatentFolder
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import Episodes
from data_pipelines.windows import WindowConfig


@dataclasses.dataclass(frozen=True)
class LatentFolders:
    """Of one dataset. frames: [c, h, w] a row.  clips: [n, c, h, w], the later latents of the video from a row on."""

    frames: LatentFolder
    clips: LatentFolder


def make_canvas(config: ConfigDict) -> Canvas:
    """The picture of config.data, in training and at deployment."""
    return Canvas(tuple(config.data.head_size), config.data.single_view)


def make_windows(config: ConfigDict, model: ModelConfig) -> WindowConfig:
    """Geometry of the windows of config.data for this model."""
    return WindowConfig(
        model.horizon, model.chunk, model.video_ratio, model.memory_frames if config.objective.memory else 0,
        config.data.history_stride, config.data.max_offset, model.memory_anchor,
    )  # fmt: skip


def latent_folders(
    config: ConfigDict, model: ModelConfig, dataset: Episodes, tower: str, pictures: str
) -> LatentFolders:
    """Where config.data.latents has or will have the latents of a dataset.

    tower: its `fingerprint`. pictures: the dataset's `pictures_key`.
    """
    canvas = make_canvas(config)
    height, width = (size // SPATIAL_STRIDE for size in canvas.size)
    rows, shape = int(dataset.lengths.sum()), (model.latent_channels, height, width)
    key = {"pictures": pictures, "tower": tower}
    frames = LatentFolder.inside(config.data.latents, "frames", key, rows, shape)
    windows = make_windows(config, model)
    later = (windows.video_frames - 1) // FRAMES_PER_LATENT
    key = key | {"video_frames": str(windows.video_frames), "video_ratio": str(windows.video_ratio)}
    return LatentFolders(frames, LatentFolder.inside(config.data.latents, "clips", key, rows, (later, *shape)))
