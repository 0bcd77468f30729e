"""ahawam encode-video --config=configs/X.py --config.data.latents=DIR: encode all frames once.

Writes the latents that training with the same config then reads in place of pictures: those of every row's frame and,
with --config.data.latent_clips=True, those of the video that begins at every row. First it says what that costs and
saves; --estimate stops there. What is there already is kept, so a job that was stopped goes on where it ended, and
several jobs share the work: --shard=0/8 .. --shard=7/8. Each uses all devices of its machine.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ahawam_jax.commands.flags import CONFIG, parse_shard, require, run_with_flags
from ahawam_jax.models.config import FRAMES_PER_LATENT, ModelConfig
from ahawam_jax.towers.building import VideoTower, build_video_tower, fingerprint
from ahawam_jax.towers.encoding import pixels
from ahawam_jax.towers.latents import LatentFolders, latent_folders, make_canvas, make_windows
from ahawam_jax.training.data import open_frames_of
from ahawam_jax.training.sharding import batch_sharding, make_mesh, put_batch, replicated
from data_pipelines.caches.frame_cache import BLOCK, Frames
from data_pipelines.caches.keys import pictures_key
from data_pipelines.caches.latent_cache import LatentFolder
from data_pipelines.disk import require_room
from data_pipelines.episodes import Episodes
from data_pipelines.paths import refuse_addresses
from data_pipelines.progress import Progress
from data_pipelines.readers.subset import open_datasets
from data_pipelines.windows import WindowConfig, video_rows

_SHARD = flags.DEFINE_string("shard", "0/1", "Which part of the work this job does, I/N with I from 0 to N-1.")
_BATCH = flags.DEFINE_integer("batch", 8, "Frames or videos encoded at once on every device.", lower_bound=1)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Only say what the cache costs and saves.")


class Encoder:
    """A video tower on all devices of this machine: canvases uint8 [n, frames, H, W, 3] -> latents float16."""

    def __init__(self, tower: VideoTower, batch: int, mesh: jax.sharding.Mesh) -> None:
        self.batch = batch * mesh.size
        self._tower, self._mesh = tower, mesh
        self._apply = jax.jit(
            lambda tower, images: tower.encode(pixels(images)).astype("float16"), out_shardings=batch_sharding(mesh)
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """[n, c, f, h, w]; the last batch is filled up, so that one size is compiled."""
        parts = []
        for low in range(0, len(images), self.batch):
            part = images[low : low + self.batch]
            part = np.concatenate([part, np.zeros((self.batch - len(part), *part.shape[1:]), np.uint8)])
            parts.append(np.asarray(self._apply(self._tower, **put_batch({"images": part}, self._mesh))))
        return np.concatenate(parts)[: len(images)]

    def flops(self, frames: int, canvas: tuple[int, ...]) -> float:
        """Floating point operations for a video of `frames` canvases [H, W, 3]."""

        def counted(frames: int) -> float:
            shape = jax.ShapeDtypeStruct((1, frames, *canvas), np.uint8)
            return jax.jit(lambda t, x: t.encode(pixels(x))).lower(self._tower, shape).cost_analysis()["flops"]

        # XLA counts the body of a loop once, and long videos are encoded in a loop over latents.
        first, later = counted(1), counted(1 + FRAMES_PER_LATENT)
        return first + (frames - 1) / FRAMES_PER_LATENT * (later - first)


def encode_video(config: ConfigDict, shard: str = "0/1", batch: int = 8, estimate_only: bool = False) -> None:
    """Writes this shard's part of the latents that `config` asks for and that are not there yet.

    Raises, in sentences, ValueError for what does not fit or is damaged, DiskError where there is no room.
    """
    refuse_addresses(config.to_dict(), "config.")
    part, parts = parse_shard(shard)
    if not config.data.latents:
        raise ValueError("config.data.latents is empty; give the folder to write to, --config.data.latents=DIR.")
    model = ModelConfig.create(config.model)
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    tower = build_video_tower(config.towers, model, replicated(mesh))
    windows, encode = make_windows(config, model), Encoder(tower, batch, mesh)
    datasets = [part.dataset for part in open_datasets(config.data.path)]
    sizes = [latent_folders(config, model, dataset, "", "") for dataset in datasets]
    print_estimate(config, windows, encode, sizes)
    if estimate_only:
        return
    mark, canvas = fingerprint(tower), make_canvas(config)
    keys = [pictures_key(dataset, canvas, config.data.latents) for dataset in datasets]
    folders = [latent_folders(config, model, x, mark, key) for x, key in zip(datasets, keys, strict=True)]
    works = [
        (source, Work(dataset, rows, found.frames, found.clips if config.data.latent_clips else None))
        for source, (dataset, found) in enumerate(zip(datasets, folders, strict=True))
        for rows in found.frames.parts()
    ]
    own = works[len(works) * part // parts : len(works) * (part + 1) // parts]
    mine = [(source, work) for source, work in own if work.missing()]
    size = sum(folder.row_bytes * len(work.rows) for _, work in mine for folder in work.missing())
    require_room(config.data.latents, size, "choose another folder, cache frames without clips, or nothing")
    print(f"shard {shard}: {len(own)} files of rows, {len(mine)} of them to do", flush=True)
    frames = {source: open_frames_of(datasets[source], config) for source in dict(mine)}
    progress = Progress(sum(len(work.rows) for _, work in mine), "rows")
    with ThreadPoolExecutor(1) as reader:  # the next pictures are decoded while these are encoded
        reads = (reader.submit(work.read, frames[source], windows) for source, work in mine)
        now = next(reads, None)
        for source, work in mine:
            following = next(reads, None)
            work.write(*now.result(), windows, encode)
            progress.add(datasets[source].root.name, len(work.rows))
            now = following


@dataclasses.dataclass(frozen=True)
class Work:
    """One file of each kind: `rows` of a dataset."""

    dataset: Episodes
    rows: range
    frames: LatentFolder
    clips: LatentFolder | None

    def missing(self) -> list[LatentFolder]:
        """The kinds whose file is to be written."""
        return [folder for folder in (self.frames, self.clips) if folder is not None and not folder.has(self.rows)]

    def read(self, frames: Frames, windows: WindowConfig) -> tuple[np.ndarray, np.ndarray]:
        """The dataset rows whose pictures are needed, ascending [n], and these [n, H, W, 3]."""
        rows = np.array(self.rows)
        if self.clips in self.missing():
            rows = np.unique(np.concatenate([rows, video_rows(windows, self.dataset, rows).ravel()]))
        blocks = [frames[rows[low : low + BLOCK]] for low in range(0, len(rows), BLOCK)]
        return rows, np.concatenate(blocks)

    def write(self, read: np.ndarray, pictures: np.ndarray, windows: WindowConfig, encode: Encoder) -> None:
        """Encodes and writes the files that are missing."""

        def latents(rows_of: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:  # [n, f, c, h, w]
            for low in range(self.rows.start, self.rows.stop, encode.batch):
                wanted = rows_of(np.arange(low, min(low + encode.batch, self.rows.stop)))
                yield encode(pictures[np.searchsorted(read, wanted)]).swapaxes(1, 2)

        for folder in self.missing():
            if folder is self.frames:
                folder.write(self.rows, (x[:, 0] for x in latents(lambda rows: rows[:, None])))
            else:
                folder.write(self.rows, (x[:, 1:] for x in latents(partial(video_rows, windows, self.dataset))))


def print_estimate(
    config: ConfigDict, windows: WindowConfig, encode: Encoder, folders: list[LatentFolders]
) -> None:
    """What each choice costs in disk and FLOPs, once and in training."""
    canvas = (*make_canvas(config).size, 3)
    rows, single = sum(found.frames.rows for found in folders), encode.flops(1, canvas)
    video, singles = encode.flops(windows.video_frames, canvas), windows.chunks + windows.history_frames
    disk = sum(found.frames.row_bytes * found.frames.rows for found in folders)
    disk_clips = sum(found.clips.row_bytes * found.clips.rows for found in folders)
    print(
        f"{rows:,} rows. A sample needs a video of {windows.video_frames} frames ({video / 1e12:.3g} TFLOP) and "
        f"{singles} single frames ({single / 1e12:.3g} TFLOP each).\n"
        f"{'cached':24s}{'disk, GB':>12s}{'TFLOP once':>14s}{'TFLOP a sample':>16s}   pays after"
    )
    whole = video + singles * single
    for name, size, once, left in (
        ("nothing", 0, 0.0, whole),
        ("frames", disk, rows * single, video),
        ("frames and clips", disk + disk_clips, rows * (single + video), 0.0),
    ):
        pays = f"{once / (whole - left):,.0f} samples" if once else ""
        print(f"{name:24s}{size / 1e9:12,.2f}{once / 1e12:14,.4g}{left / 1e12:16,.4g}   {pays}")


def _encode(argv: list[str]) -> None:
    require(argv, CONFIG)
    try:
        encode_video(CONFIG.value, _SHARD.value, _BATCH.value, _ESTIMATE.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("the same command goes on with what is missing", file=sys.stderr)
        raise


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_encode, argv)
