"""TFDS builder: one example per episode, pictures as JPEG or PNG bytes."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.episodes import Episodes
from data_pipelines.readers.layouts import unit_of
from data_pipelines.readers.robocoin import open_robocoin, subtasks
from data_pipelines.readers.subset import Entry, embodiment_of
from data_pipelines.tfds.layout import NAME, SPLIT, VERSION

# JPEG in full colour resolution and this quality is off by about a grey level on average; PNG keeps every bit.
ENCODINGS = {"jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0}, "png": {"format": "PNG"}}
# Frames decoded at a time, so that a long episode in high resolution does not lie in memory as a whole.
FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class Folder:
    """A dataset to convert as it was recorded. name: what the converted one is called."""

    name: str
    path: Path

    def open(self) -> Episodes:
        """The dataset, with subtasks where they are annotated."""
        return open_robocoin(self.path)


Source = Folder | Entry


@dataclass(eq=False)
class EpisodesConfig(tfds.core.BuilderConfig):
    """source: what to convert.  image_format: "jpeg" or "png"."""

    source: Source | None = None
    image_format: str = "jpeg"


class RobotEpisodes(tfds.core.GeneratorBasedBuilder):
    """The episodes of one dataset, in their order, as the split "train".

    An example of T rows: episode int64, instruction and robot text, subtask [T] texts ("" where none is annotated),
    state float32 [T, p], action float32 [T, d], timestamp float32 [T] seconds, images {camera: [T] pictures}.
    `info.metadata` has what is the same for all: robot, fps, and lists with an entry per number: state_names,
    action_names ([] where they are not recorded), state_units, action_units ("" where the name does not tell),
    state_present, action_present (false for a number that the robot has not, which is 0); absent_cameras are the views
    that it has no camera for, of which there are no pictures.

    `download_and_prepare` converts in this process and keeps nothing when interrupted; `data_pipelines.tfds.convert`
    writes the same examples shard by shard.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        dataset, image_format = self.builder_config.source.open(), self.builder_config.image_format
        image = {
            camera: tfds.features.Sequence(tfds.features.Image(shape=(*size, 3), encoding_format=image_format))
            for camera, size in dataset.cameras.items()
            if camera not in _absent(dataset)
        }
        features = tfds.features.FeaturesDict(
            {
                "episode": np.int64,
                "instruction": tfds.features.Text(),
                "robot": tfds.features.Text(),
                "subtask": tfds.features.Sequence(tfds.features.Text()),
                "state": tfds.features.Tensor(shape=(None, dataset.state_dim), dtype=np.float32),
                "action": tfds.features.Tensor(shape=(None, dataset.action_dim), dtype=np.float32),
                "timestamp": tfds.features.Tensor(shape=(None,), dtype=np.float32),
                "images": image,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Episodes of two-armed robots, one example each.",
            features=features,
            metadata=tfds.core.MetadataDict(
                robot=dataset.robot,
                fps=dataset.fps,
                state_names=list(dataset.state_names),
                action_names=list(dataset.action_names),
                state_units=[unit_of(name) for name in dataset.state_names],
                action_units=[unit_of(name) for name in dataset.action_names],
                state_present=dataset.state_present.tolist(),
                action_present=dataset.action_present.tolist(),
                absent_cameras=list(_absent(dataset)),
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = self.builder_config.source.open()
        for episode in range(len(dataset.lengths)):
            yield episode, example(dataset, episode, self.builder_config.image_format)


def builder(source: Source, out: Path, image_format: str) -> RobotEpisodes:
    """The builder of one dataset below the folder `out`."""
    config = EpisodesConfig(name=source.name, source=source, image_format=image_format)
    return RobotEpisodes(config=config, data_dir=out, file_format="array_record")


def example(dataset: Episodes, episode: int, image_format: str) -> dict[str, Any]:
    """What TFDS stores of an episode; see RobotEpisodes."""
    cameras = [camera for camera in dataset.cameras if camera not in _absent(dataset)]
    return {
        "episode": episode,
        "instruction": dataset.instruction(episode),
        "robot": dataset.robot,
        "subtask": subtasks(dataset, episode),
        "state": dataset.states(episode),
        "action": dataset.actions(episode),
        "timestamp": dataset.timestamps(episode),
        "images": {camera: _pictures(dataset, episode, camera, image_format) for camera in cameras},
    }


def _absent(dataset: Episodes) -> tuple[str, ...]:
    """Views that the robot has no camera for."""
    embodiment = embodiment_of(dataset)
    return embodiment.absent if embodiment else ()


def _pictures(dataset: Episodes, episode: int, camera: str, image_format: str) -> list[bytes]:
    encoded, length = [], int(dataset.lengths[episode])
    for start in range(0, length, FRAMES_AT_ONCE):
        for frame in dataset.frames(episode, camera, range(start, min(start + FRAMES_AT_ONCE, length))):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, **ENCODINGS[image_format])
            encoded.append(buffer.getvalue())
    return encoded
