"""The data of a run, from its config: one dataset, or the mixture that a subset file names."""

import dataclasses
import os
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import TextTower, VideoTower, fingerprint
from ahawam_jax.towers.latents import latent_folders, make_canvas, make_windows
from ahawam_jax.training import sharding
from data_pipelines.caches.frame_cache import DecodingFrames, Frames, open_frames
from data_pipelines.caches.keys import pictures_key
from data_pipelines.caches.latent_cache import CachedLatents, Latents
from data_pipelines.episodes import Episodes
from data_pipelines.loader import Source, instructions
from data_pipelines.normalization import Normalization
from data_pipelines.readers.subset import open_datasets
from data_pipelines.statistics import Statistics, compute_by_robot
from data_pipelines.windows import WindowConfig


@dataclasses.dataclass
class Data:
    """The data as the loop needs it."""

    train: list[Source]
    validation: list[Source]  # held-out episodes of the same datasets, none where none are held out
    windows: WindowConfig
    statistics: dict[str, Statistics]  # by robot
    instructions: list[str]
    context: np.ndarray  # [I, K, X] text tokens of every instruction
    context_mask: np.ndarray  # [I, K]

    def put(self, batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
        """This host's rows of a loader batch on the devices, their instructions replaced by text tokens."""
        rows = {name: x for name, x in batch.items() if name != "instruction"}
        index = batch["instruction"]
        rows |= {"context": self.context[index], "context_mask": self.context_mask[index]}
        return sharding.put_batch(rows, mesh)


def open_frames_of(dataset: Episodes, config: ConfigDict) -> Frames:
    """Its canvases: decoded now into config.data.cache, or, where that is empty, whenever they are asked for."""
    canvas = make_canvas(config)
    if config.data.cache:
        return open_frames(dataset, canvas, config.data.cache, processes=min(8, os.cpu_count() or 1))
    return DecodingFrames(dataset, canvas)


def open_data(config: ConfigDict, model: ModelConfig, text_tower: TextTower, video_tower: VideoTower) -> Data:
    """Opens config.data and checks that it fits the model; every misfit is one sentence."""
    datasets = [(part.dataset, part.weight) for part in open_datasets(config.data.path)]
    canvas = make_canvas(config)
    for dataset, _ in datasets:
        dataset.require_cameras(canvas.cameras)
        _check_fits(dataset, model, config.data.validation_episodes)
    windows = make_windows(config, model)
    how = Normalization(**config.data.normalization, clip=config.data.clip)
    statistics = compute_by_robot([dataset for dataset, _ in datasets], how)
    mark = fingerprint(video_tower) if config.data.latents else ""
    train, validation = [], []
    for dataset, weight in datasets:
        latents = _open_latents(config, model, dataset, mark) if config.data.latents else None
        frames = None if latents and latents.clips else open_frames_of(dataset, config)
        count, held_out = len(dataset.lengths), config.data.validation_episodes
        source = Source(dataset, frames, statistics[dataset.robot], weight, range(count - held_out), latents)
        train.append(source)
        if held_out:
            validation.append(dataclasses.replace(source, episodes=range(count - held_out, count)))
    rows = sum(source.rows for source in validation)
    if 0 < rows < config.data.batch_size:
        raise ValueError(
            f"The episodes held out of {config.data.path} have {rows} rows, fewer than config.data.batch_size "
            f"{config.data.batch_size}; hold out more or none."
        )
    texts = instructions(train)
    context, mask = zip(*(text_tower.tokens(text) for text in texts), strict=True)
    return Data(train, validation, windows, statistics, texts, np.stack(context), np.stack(mask))


def _check_fits(dataset: Episodes, model: ModelConfig, held_out: int) -> None:
    for name, width, expected in (
        ("action", dataset.action_dim, model.action_dim),
        ("state", dataset.state_dim, model.state_dim),
    ):
        if width != expected:
            raise ValueError(
                f"{dataset.root} has {name}s {width} wide, the model expects {expected}; set "
                f"config.model.{name}_dim={width} or choose another dataset."
            )
    if not 0 <= held_out < len(dataset.lengths):
        raise ValueError(
            f"config.data.validation_episodes is {held_out}, but {dataset.root} has {len(dataset.lengths)} episodes; "
            "hold out fewer."
        )


def _open_latents(config: ConfigDict, model: ModelConfig, dataset: Episodes, tower: str) -> CachedLatents:
    pictures = pictures_key(dataset, make_canvas(config), config.data.latents)
    folders = latent_folders(config, model, dataset, tower, pictures)
    return CachedLatents(Latents(folders.frames), Latents(folders.clips) if config.data.latent_clips else None)
