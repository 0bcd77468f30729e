"""The data of a run, from its config: one dataset, or the mixture that a subset file names."""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import TextTower, VideoTower, fingerprint
from ahawam_jax.towers.latents import latent_folders, make_canvas, make_windows
from ahawam_jax.training import sharding
from ahawam_jax.training.resuming import Record, accept
from data_pipelines.augmentation import Augmentation
from data_pipelines.caches.frame_cache import DecodingFrames, Frames, open_frames
from data_pipelines.caches.keys import pictures_key
from data_pipelines.caches.latent_cache import CachedLatents, Latents
from data_pipelines.episodes import Episodes
from data_pipelines.fingerprint import changes, describe, hold_out, pair
from data_pipelines.loader import Batch, Source, instructions
from data_pipelines.normalization import Normalization
from data_pipelines.readers.subset import Part, embodiment_of, open_datasets
from data_pipelines.statistics import Statistics, compute_by_robot, pick_robot, to_lists
from data_pipelines.windows import WindowConfig


@dataclasses.dataclass
class Data:
    """The data as the loop needs it."""

    train: list[Source]
    validation: list[Source]  # held-out episodes of the same datasets, none where none are held out
    windows: WindowConfig
    statistics: dict[str, Statistics]  # by robot
    record: Record  # what a checkpoint says of all this, JSON-ready
    texts: list[str]  # what `instruction` of a batch counts
    text_tower: TextTower
    robot: np.ndarray  # int32 [I], of every text, its place among `robots`
    robots: list[str]  # of a mixture of robots; of one alone, none
    augment: Callable[[Batch, list[tuple[int, ...]]], None] | None = None  # of training batches, see `make_loader`

    @property
    def sums(self) -> dict[str, str]:
        """What tells these data from others: a checksum of every dataset and of what the towers make of it."""
        parts = {f"data of {part['name'] or part['path']}": part for part in self.record["data"]}
        parts["towers"] = self.record["towers"]
        return {name: f"{zlib.crc32(json.dumps(part, sort_keys=True).encode()):08x}" for name, part in parts.items()}

    def put(self, batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
        """This process's rows of a loader batch on the devices, their instructions replaced by text tokens."""
        rows = {name: x for name, x in batch.items() if name != "instruction"}
        rows["robot"] = self.robot[batch["instruction"]]
        return sharding.put_batch(rows | self.context(batch["instruction"]), mesh)

    def context(self, instruction: np.ndarray) -> dict[str, np.ndarray]:
        """Text tokens [B, K, X] and their mask [B, K] of instructions, int [B].

        Read for each batch: those of all instructions of a large mixture would take tens of GB in every process.
        """
        texts = [self.texts[number] for number in instruction]
        read = {text: self.text_tower.tokens(text) for text in {*texts}}
        tokens, mask = zip(*(read[text] for text in texts), strict=True)
        return {"context": np.stack(tokens), "context_mask": np.stack(mask)}


def open_frames_of(dataset: Episodes, config: ConfigDict) -> Frames:
    """Its canvases: decoded now into config.data.cache, or, where that is empty, whenever they are asked for."""
    canvas = make_canvas(config)
    if config.data.cache:
        return open_frames(dataset, canvas, config.data.cache, processes=min(8, os.cpu_count() or 1))
    return DecodingFrames(dataset, canvas)


def open_data(
    config: ConfigDict, model: ModelConfig, text_tower: TextTower, video_tower: VideoTower,
    before: Record | None = None, accepted: bool = False, teacher: Record | None = None,
) -> Data:  # fmt: skip
    """Opens config.data and checks that it fits the model; every misfit is one sentence.

    before: the record of the run that goes on; its statistics and held-out episodes stay. Whatever else has changed
    since then is a ValueError, unless `accepted`.
    teacher: the record of a policy whose statistics a run takes, since it is to act in the same units.
    """
    augment = _augment(config)
    parts, canvas, count = open_datasets(config.data.path), make_canvas(config), config.data.validation_episodes
    for part in parts:
        part.dataset.require_cameras(canvas.cameras)
        _check_fits(part.dataset, model, count)
    windows = make_windows(config, model)
    described = [describe(part, canvas.cameras) for part in parts]
    known = before["data"] if before else []
    for of_part in described:
        hold_out(of_part, count, pair(known, of_part, len(parts)))
    words = dict.fromkeys(text for of_part in described for text in of_part["texts"])
    sums = {text: _sum(*text_tower.tokens(text)) for text in words}
    mark = fingerprint(video_tower)
    record = _record(described, sums, mark, before, accepted)
    statistics = _statistics([part.dataset for part in parts], config, before, teacher)
    record["statistics"] = to_lists(statistics)
    record["robots"] = _embodiments(parts)

    train, validation = [], []
    for part, of_part in zip(parts, described, strict=True):
        dataset, held_out = part.dataset, of_part["held_out"]
        latents = _open_latents(config, model, dataset, mark) if config.data.latents else None
        frames = None if latents and latents.clips else open_frames_of(dataset, config)
        rest = sorted({*range(len(dataset.lengths))} - {*held_out})
        train.append(Source(dataset, frames, statistics[dataset.robot], part.weight, rest, latents))
        if held_out:
            validation.append(dataclasses.replace(train[-1], episodes=held_out))
    rows = sum(source.rows for source in validation)
    if 0 < rows < config.data.batch_size:
        raise ValueError(
            f"The episodes held out of {config.data.path} have {rows} rows, fewer than config.data.batch_size "
            f"{config.data.batch_size}; hold out more or none."
        )
    robots = sorted({source.dataset.robot for source in train})
    robot = [robots.index(source.dataset.robot) for source in train for _ in source.dataset.instructions]
    return Data(
        train, validation, windows, statistics, record, instructions(train), text_tower, np.array(robot, np.int32),
        robots if len(robots) > 1 else [], augment,
    )  # fmt: skip


def _augment(config: ConfigDict) -> Callable[[Batch, list[tuple[int, ...]]], None] | None:
    how = Augmentation(**config.data.augmentation)
    if how and config.data.latents:
        raise ValueError(
            f"config.data.augmentation is {how}, but config.data.latents, {config.data.latents}, holds what unchanged "
            "pictures were encoded to: set all of augmentation to 0, or latents to '', which encodes while training."
        )
    return functools.partial(how.apply, canvas=make_canvas(config)) if how else None


def _record(
    described: list[Record], sums: dict[str, int], mark: str, before: Record | None, accepted: bool
) -> Record:
    """What a checkpoint is to say of the data but for their statistics.

    sums: of every instruction's text tokens.  mark: of the video tower.
    Raises ValueError for changes that are not accepted.
    """
    towers = {"video": mark, "text": sums}
    record = {"data": described, "towers": towers, "accepted": [], "instructions": list(sums)}
    if before:
        found = changes(before["data"], described) + _tower_changes(before["towers"], towers)
        record["accepted"] = before["accepted"] + accept(found, accepted, before["data_position"]["batches"])
        record["instructions"] = list(dict.fromkeys([*before["instructions"], *sums]))
    return record


def _statistics(
    datasets: list[Episodes], config: ConfigDict, before: Record | None, teacher: Record | None
) -> dict[str, Statistics]:
    """By robot: those of the run that goes on, and of robots that it did not have; a teacher's has all it can do."""
    if teacher:
        known = teacher["statistics"]  # an import's are of its one robot, by no name
        return {of.robot: pick_robot(known, None if list(known) == [""] else of.robot) for of in datasets}
    kept = {robot: pick_robot(before["statistics"], robot) for robot in before["statistics"]} if before else {}
    how = Normalization(**config.data.normalization, clip=config.data.clip)
    return kept | compute_by_robot([dataset for dataset in datasets if dataset.robot not in kept], how)


def _embodiments(parts: list[Part]) -> dict[str, list[Record]]:
    """{robot: its own vectors and the datasets that are recorded so}, of those whose numbers were mapped."""
    found: dict[str, list[Record]] = {}
    for part in parts:
        embodiment = embodiment_of(part.dataset)
        if embodiment is None:
            continue
        ways, record = found.setdefault(part.dataset.robot, []), embodiment.to_json()
        for way in ways:
            if record.items() <= way.items():
                way["datasets"].append(part.name)
                break
        else:
            ways.append({"datasets": [part.name], **record})
    return found


def _sum(tokens: np.ndarray, mask: np.ndarray) -> int:
    return zlib.crc32(mask.tobytes(), zlib.crc32(np.ascontiguousarray(tokens).view(np.uint8)))


def _tower_changes(before: Record, now: Record) -> list[str]:
    """What else the model is shown: a sentence for each tower that is another one."""
    found = []
    if before["video"] != now["video"]:
        found.append("the video tower has other weights or another dtype (config.towers.video_weights)")
    other = [text for text, tokens in now["text"].items() if before["text"].get(text, tokens) != tokens]
    if other:
        found.append(
            f"the text tokens of {len(other)} of {len(now['text'])} instructions are others "
            f"(config.towers.text_cache), first those of {other[0]!r}"
        )
    return found


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
