"""What a deployment is checked on: short episodes, drawn at random or cut out of a dataset."""

import dataclasses
from pathlib import Path

import numpy as np

from ahawam_jax.towers.latents import make_canvas, make_windows
from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.embodiment import Embodiment
from data_pipelines.episodes import Episodes
from data_pipelines.readers.subset import embodiment_of, open_datasets
from data_pipelines.windows import Windows
from export.exported import Export


@dataclasses.dataclass(frozen=True)
class Sample:
    """A few refreshes, which fill the memory, and one chunk after them."""

    frames: np.ndarray  # uint8 [F, H, W, 3], what the planner sees, oldest first
    positions: np.ndarray  # int [F], their rotary positions
    observation: np.ndarray  # uint8 [H, W, 3], of the chunk
    start: int  # first action of the chunk, counted from the last frame
    state: np.ndarray  # float32 [p], normalised
    noise: np.ndarray  # float32 [T, d]
    text: np.ndarray  # float32 [K, X]
    mask: np.ndarray  # bool [K]
    committed: np.ndarray  # float32 [T, d], of which the first `count` begin the chunk
    count: int  # 0 where the run has no committed actions


def random_samples(export: Export, count: int) -> list[Sample]:
    """Noise everywhere; one frame more than the memory holds, so that it fills and overflows."""
    model, size = export.model, make_canvas(export.config).size
    samples = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        frames = model.memory_frames + 2
        pictures = rng.integers(0, 256, (frames + 1, *size, 3), np.uint8)
        words = export.config.towers.text_length
        samples.append(Sample(
            pictures[:-1], np.cumsum(rng.integers(1, 2 * model.chunk, frames)), pictures[-1],
            model.chunk * int(rng.integers(model.num_chunks)),
            *(np.float32(rng.standard_normal(shape)) for shape in (
                model.state_dim, (model.chunk, model.action_dim), (words, model.text_dim))),
            np.arange(words) < rng.integers(1, words + 1),
            np.float32(rng.standard_normal((model.chunk, model.action_dim))), (seed + 1) % (export.max_delay + 1),
        ))  # fmt: skip
    return samples


def recorded_samples(export: Export, path: str | Path, count: int) -> list[Sample]:
    """Windows of a dataset, evenly spread, through the canvas of the run: history, current frame, one of the chunks.

    path: of the dataset, or of a subset file, out of which the first of the export's robot is taken. Raises ValueError
    where there is none, and for a dataset that lacks a camera.
    """
    model, canvas, stats = export.model, make_canvas(export.config), export.statistics
    dataset = robot_dataset(export, path)
    dataset.require_cameras(canvas.cameras)
    windows = Windows(dataset, DecodingFrames(dataset, canvas), make_windows(export.config, model), stats)
    samples = []
    for i, index in enumerate(np.linspace(0, len(windows) - 1, count).astype(int)):
        batch = {name: x[0] for name, x in windows.gather([index], np.zeros(1, int)).items()}
        chunk = i % model.num_chunks
        past = model.memory_frames - batch["video_history_valid_len"]
        noise = np.random.default_rng(i).standard_normal((model.chunk, model.action_dim), np.float32)
        text, mask = export.text_tower.tokens(dataset.instructions[batch["instruction"]])
        samples.append(Sample(
            np.concatenate([batch["history"][past:], batch["video"][:1]]),
            np.append(batch["video_history_frame_indices"][past:], batch["video_temporal_position_ids"][0]),
            batch["observations"][chunk], chunk * model.chunk, batch["proprio"][chunk * model.chunk], noise,
            np.asarray(text, np.float32), np.asarray(mask, bool),
            batch["action"][chunk * model.chunk :][: model.chunk], i % (export.max_delay + 1),
        ))  # fmt: skip
    return samples


def robot_dataset(export: Export, path: str | Path) -> Episodes:
    """See `recorded_samples`."""
    datasets = [part.dataset for part in open_datasets(path)]
    for dataset in datasets:
        plain = Embodiment.as_recorded(dataset.state_dim, dataset.action_dim)
        if (embodiment_of(dataset) or plain) == export.embodiment:
            return dataset
    found = ", ".join(f"{x.state_dim} and {x.action_dim}" for x in datasets)
    wanted = " and ".join(str(len(x.names)) for x in (export.embodiment.state, export.embodiment.action))
    raise ValueError(
        f"{path} has no dataset of the export's robot, whose own state and action have {wanted} numbers; found "
        f"{found}. Give one that is recorded so, by way of a subset file where the run had one."
    )
