"""Converts datasets into ArrayRecord shards, with processes of this machine or with Apache Beam on many.

A worker reads the episodes of a shard and writes its files. TFDS's own Beam writer is not used: it shuffles every
encoded episode between workers before it writes any, and starts anew when interrupted.

A shard gets its name only when it is whole and on disk, so that a run which was stopped at any moment is taken up by
running it again: what is there is kept, what is missing is written. Which episodes are in which shard, and every byte
of it, depend on the dataset and the settings alone; conversion.json remembers those, a hash of all that is recorded
among them, and a rerun that differs is refused. TFDS reads the folder once dataset_info.json is there, which comes
last.

Single pictures take more room than video: about five times as much for h264 of two frames per key frame.

Workers on several machines need this package and a folder mounted on all of them under the same path, for the
datasets and for the result. Only one conversion at a time writes to a folder; others are refused.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from data_pipelines.caches.keys import recorded
from data_pipelines.disk import whole_file, writing
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.files import read_json
from data_pipelines.ownership import owned
from data_pipelines.paths import local_path
from data_pipelines.processes import worker_pool
from data_pipelines.readers.robocoin import subtasks
from data_pipelines.readers.subset import embodiment_of, origin_of
from data_pipelines.tfds import layout
from data_pipelines.tfds.builder import Source, builder, example

SAFE = "The shards before are kept; the same command goes on with those that are missing."
LARGEST_EXAMPLE = 2**31 - 2**24  # bytes of pictures; protocol buffers end at 2 GiB, the rest is for the rows


@dataclass(frozen=True)
class Conversion:
    """One dataset on its way into shards. out: folder above those of all converted datasets."""

    source: Source
    out: Path
    image_format: str
    shards: int

    @property
    def root(self) -> Path:
        """Folder of the converted dataset."""
        return layout.folder(self.out, self.source.name)

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [s for s in range(self.shards) if not layout.shard_path(self.root, s, self.shards).is_file()]


def plan(source: Source, out: Path, image_format: str = "jpeg", episodes_per_shard: int = 50) -> Conversion:
    """Begins a conversion, or takes up one that was stopped.

    Raises DatasetError where the folder holds the conversion of another dataset or with other settings, OwnedError
    where another process is converting into it.
    """
    dataset = source.open()
    shards = -(-len(dataset.lengths) // episodes_per_shard)
    conversion = Conversion(source, local_path(out), image_format, shards)
    with writing(conversion.root, SAFE), owned(conversion.root):
        described = _describe(dataset, image_format, shards)
        described["recording"] = _recording(dataset, conversion.root.parent)
        _take_up(conversion.root / layout.CONVERSION, described)
    return conversion


def _take_up(path: Path, wanted: dict) -> None:
    """Writes conversion.json, or compares what is there."""
    wanted = json.loads(json.dumps(wanted))  # as the file gives it back: tuples are lists
    if path.is_file():
        found = read_json(path, DatasetError, "remove its folder and convert again")
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise DatasetError(
                f"{path} belongs to another conversion ({', '.join(differing)} differ); go on with its dataset as it "
                "was and its settings, or choose another folder or name."
            )
    else:
        _write_whole(path, lambda file: file.write_text(json.dumps(wanted)))


def convert(conversions: Sequence[Conversion], processes: int = 1, beam_options: Sequence[str] = ()) -> None:
    """Writes all missing shards, then what TFDS needs to read them.

    processes: of this machine that write shards; 1 is this one. beam_options: as on Beam's command line, --runner
    among them: then one Beam pipeline writes the shards instead. Errors of workers come out of here. Raises DiskError
    where the disk takes no more, WorkerError where one of `processes` was killed, OwnedError where another process is
    converting into one of the folders.
    """
    _opened.cache_clear()  # datasets may have changed since the last conversion in this process
    with ExitStack() as stack:
        for conversion in conversions:
            stack.enter_context(owned(conversion.root))
            for left in conversion.root.glob(".*.partial"):  # of one that was stopped
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        tasks = [(conversion, shard) for conversion in conversions for shard in conversion.missing()]
        if beam_options and tasks:
            with beam.Pipeline(options=PipelineOptions(list(beam_options))) as pipeline:
                # Without the reshuffle one worker would do all that follows Create.
                _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | "WriteShard" >> beam.MapTuple(write_shard)
        elif processes > 1 and tasks:
            with worker_pool(processes, SAFE) as pool:
                for future in as_completed([pool.submit(write_shard, *task) for task in tasks]):
                    future.result()
        else:
            for task in tasks:
                write_shard(*task)
        for conversion in conversions:
            with writing(conversion.root, SAFE):
                _finish(conversion)


def write_shard(conversion: Conversion, shard: int) -> None:
    """Writes the two files of a shard. The ArrayRecord file gets its name last and stands for both."""
    records, rows = (path(conversion.root, shard, conversion.shards) for path in (layout.shard_path, layout.rows_path))
    dataset, features = _opened(conversion)
    serializer = ExampleSerializer(features.get_serialized_info())
    starts = layout.shard_starts(len(dataset.lengths), conversion.shards)

    def write_records(path: Path) -> None:
        # Readers fetch single episodes, whose pictures are compressed already.
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for episode in range(*starts[shard : shard + 2]):
            content = example(dataset, episode, conversion.image_format)
            size = sum(len(picture) for pictures in content["images"].values() for picture in pictures)
            if size > LARGEST_EXAMPLE:
                raise DatasetError(
                    f"{dataset.root}: the pictures of episode {episode} take {size / 2**30:.2f} GiB, an example holds "
                    f"{LARGEST_EXAMPLE / 2**30:.2f}; use fewer cameras (cameras = ... in a subset file), JPEG instead "
                    "of PNG, or split the episode."
                )
            encoded = features.encode_example(content)
            # TFDS's own serialize_example leaves the order of the features to chance.
            writer.write(serializer.get_tf_example(encoded).SerializeToString(deterministic=True))
        writer.close()

    def write_rows(path: Path) -> None:
        with pq.ParquetWriter(path, _row_schema(dataset)) as writer:
            for episode in range(*starts[shard : shard + 2]):
                writer.write_table(_row_table(dataset, episode), row_group_size=int(dataset.lengths[episode]))

    _write_whole(rows, write_rows)
    _write_whole(records, write_records)
    print(f"{records.name} written", file=sys.stderr, flush=True)


@lru_cache(maxsize=2)
def _opened(conversion: Conversion) -> tuple[Episodes, tfds.features.FeaturesDict]:
    """Kept between the shards that a worker writes."""
    features = builder(conversion.source, conversion.out, conversion.image_format).info.features
    return conversion.source.open(), features


def _describe(dataset: Episodes, image_format: str, shards: int) -> dict:
    """Content of conversion.json: all that the reader needs before it opens a shard."""
    origin = origin_of(dataset).tolist()
    # Only where pieces of an episode may be apart, so that what was converted before stays the same.
    cut = {"origin": origin} if origin != [*range(len(origin))] else {}
    return cut | {
        "version": layout.VERSION,
        "shards": shards,
        "image_format": image_format,
        "robot": dataset.robot,
        "fps": dataset.fps,
        "cameras": {camera: list(size) for camera, size in dataset.cameras.items()},
        "state_dim": dataset.state_dim,
        "action_dim": dataset.action_dim,
        "state_names": list(dataset.state_names),
        "action_names": list(dataset.action_names),
        "embodiment": embodiment.to_json() if (embodiment := embodiment_of(dataset)) else None,
        "instructions": list(dataset.instructions),
        "lengths": dataset.lengths.tolist(),
    }


def _row_schema(dataset: Episodes) -> pa.Schema:
    return pa.schema(
        {
            "state": pa.list_(pa.float32(), dataset.state_dim),
            "action": pa.list_(pa.float32(), dataset.action_dim),
            "timestamp": pa.float32(),
            "instruction": pa.int32(),
            "subtask": pa.string(),
        }
    )


def _row_table(dataset: Episodes, episode: int) -> pa.Table:
    columns = [
        pa.FixedSizeListArray.from_arrays(dataset.states(episode).ravel(), dataset.state_dim),
        pa.FixedSizeListArray.from_arrays(dataset.actions(episode).ravel(), dataset.action_dim),
        dataset.timestamps(episode),
        np.full(dataset.lengths[episode], dataset.instruction_index(episode), np.int32),
        subtasks(dataset, episode),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=_row_schema(dataset))


def _recording(dataset: Episodes, folder: Path) -> str:
    """Hash of all that is converted: every row and the files of all pictures, of which `folder` keeps notes."""
    digest = hashlib.sha256(recorded(dataset, list(dataset.cameras), folder).encode())
    for episode in range(len(dataset.lengths)):
        for rows in (dataset.states(episode), dataset.actions(episode), dataset.timestamps(episode)):
            digest.update(np.ascontiguousarray(rows).data)
        digest.update(json.dumps([dataset.instruction(episode), subtasks(dataset, episode)]).encode())
    return digest.hexdigest()


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written under another name, which it loses only when all of it is on the disk."""
    with writing(path, SAFE), whole_file(path) as partial:  # Beam may run the same shard twice at a time
        write(partial)


def _finish(conversion: Conversion) -> None:
    """Writes TFDS's descriptions of the dataset; the workers have returned, so all shards are there."""
    root, shards = conversion.root, conversion.shards
    missing = conversion.missing()
    if missing:
        raise DatasetError(
            f"{root} lacks the shards {', '.join(map(str, missing))} after the workers ended; check that they see "
            "this folder, and run the conversion again."
        )
    info = builder(conversion.source, conversion.out, conversion.image_format).info
    starts = layout.shard_starts(len(conversion.source.open().lengths), shards)
    split = tfds.core.SplitInfo(
        name=layout.SPLIT,
        shard_lengths=[b - a for a, b in zip(starts, starts[1:], strict=False)],
        num_bytes=sum(layout.shard_path(root, s, shards).stat().st_size for s in range(shards)),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=root, dataset_name=layout.NAME, split=layout.SPLIT, filetype_suffix="array_record"
        ),
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    with tempfile.TemporaryDirectory(dir=root, prefix=".", suffix=".partial") as folder:
        info.write_to_directory(Path(folder))
        # The file that says that the dataset is complete comes last.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == layout.COMPLETE):
            path.replace(root / path.name)
