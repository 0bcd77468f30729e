"""Reads a converted dataset back as `Episodes`."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines.embodiment import Embodiment
from data_pipelines.episodes import DatasetError
from data_pipelines.files import disguised, read_json
from data_pipelines.readers.base import Reader, Rows
from data_pipelines.tfds import layout

FIELDS = {
    "version": str, "shards": int, "robot": str, "fps": float, "cameras": dict, "state_dim": int, "action_dim": int,
    "state_names": list, "action_names": list, "embodiment": (dict, type(None)), "instructions": list,
    "lengths": list,
}  # fmt: skip


class Converted(Reader):
    """A folder <out>/robot_episodes/<name>/1.0.0 that `ahawam convert` has written to the end.

    Rows come from the parquet files; pictures from the ArrayRecord files, where fetching one frame reads its episode.
    embodiment: how the robot's own vectors were brought to these, None where they are as recorded; views that it has
    no camera for are black.  origin: int64 [E] the recorded episode that each is from.
    """

    def __init__(self, root: Path, content: dict[str, Any]) -> None:
        self.root, self.robot, self.fps = root, content["robot"], content["fps"]
        self.cameras = {camera: tuple(size) for camera, size in content["cameras"].items()}
        self.state_dim, self.action_dim = content["state_dim"], content["action_dim"]
        self.state_names, self.action_names = tuple(content["state_names"]), tuple(content["action_names"])
        self.instructions = content["instructions"]
        self.embodiment = _embodiment(root, content.get("embodiment"))
        self._set_lengths(content["lengths"])
        self.origin = np.array(content.get("origin", range(len(self.lengths))), np.int64)
        self._shards = content["shards"]
        self._starts = layout.shard_starts(len(self.lengths), self._shards)
        missing = [path.name for path in self._files() if not path.is_file()]
        if missing:
            raise DatasetError(
                f"{root} lacks {', '.join(missing)}; copy the dataset again or convert what is missing."
            )

    @property
    def state_present(self) -> np.ndarray:
        return self.embodiment.state.present if self.embodiment else super().state_present

    @property
    def action_present(self) -> np.ndarray:
        return self.embodiment.action.present if self.embodiment else super().action_present

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        shard, place = self._place(episode)
        return layout.shard_path(self.root, shard, self._shards), f"{place} {camera}"

    def subtasks(self, episode: int) -> list[str]:
        """What the robot is doing in each row, "" where nothing was annotated."""
        path, table = self._table(episode)
        return _column(table, "subtask", path).to_pylist()

    def _files(self) -> list[Path]:
        of = (layout.shard_path, layout.rows_path)
        return [path(self.root, shard, self._shards) for shard in range(self._shards) for path in of]

    def _place(self, episode: int) -> tuple[int, int]:
        """The episode's shard and its place in it."""
        shard = int(np.searchsorted(self._starts, episode, side="right")) - 1
        return shard, int(episode) - self._starts[shard]

    def _table(self, episode: int) -> tuple[Path, pa.Table]:
        shard, place = self._place(episode)
        path = layout.rows_path(self.root, shard, self._shards)
        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(place)
        except (pa.ArrowException, OSError, IndexError) as error:
            found = disguised(path, own=b"PAR1") or f"cannot be read as parquet ({error}); convert the shard again"
            raise DatasetError(f"{path} {found}.") from error
        if len(table) != self.lengths[episode]:
            raise DatasetError(
                f"{path} holds {len(table)} rows of episode {episode}, {layout.CONVERSION} promises "
                f"{self.lengths[episode]}; convert the dataset again."
            )
        return path, table

    def _read_rows(self, episode: int) -> Rows:
        path, table = self._table(episode)
        vectors = {
            name: _column(table, name, path).combine_chunks().flatten().to_numpy().reshape(-1, width)
            for name, width in (("state", self.state_dim), ("action", self.action_dim))
        }
        timestamp, instruction = (_column(table, name, path).to_numpy() for name in ("timestamp", "instruction"))
        return Rows(path, vectors["state"], vectors["action"], timestamp, int(instruction[0]))

    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        if self.embodiment and camera in self.embodiment.absent:
            out[:] = 0
            return
        shard, place = self._place(episode)
        path = layout.shard_path(self.root, shard, self._shards)
        try:
            state = path.stat()
            features = _example(path, (state.st_ino, state.st_ctime_ns), place).features.feature
            pictures = features[f"images/{camera}"].bytes_list.value
            for to, row in zip(out, rows, strict=True):
                with Image.open(io.BytesIO(pictures[row])) as image:
                    to[:] = np.asarray(image.convert("RGB"))
        # The protocol buffer library has an error of its own, the record library throws several kinds.
        except Exception as error:
            where = f"{path}: the pictures of camera {camera!r} in episode {episode} cannot be read"
            if found := disguised(path):
                raise DatasetError(f"{where}: the file {found}.") from error
            raise DatasetError(
                f"{where} ({error!r}); copy the file again, or remove it and convert again."
            ) from error


# The views of a window are asked for one after the other, and lie in one record.
@lru_cache(maxsize=2)
def _example(path: Path, state: tuple[int, int], place: int) -> Any:
    """The tf.train.Example of a record. state: of the file, so that another one is read anew."""
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    reader = ArrayRecordReader(str(path))
    try:
        return tf_example_pb2.Example.FromString(reader.read([place])[0])
    finally:
        reader.close()


def open_converted(root: str | Path) -> Converted:
    """The converted dataset in a folder. Raises DatasetError where the conversion was not brought to its end."""
    root = Path(root)
    path = root / layout.CONVERSION
    if not path.is_file() or not (root / layout.COMPLETE).is_file():
        raise DatasetError(
            f"{root} is not a whole converted dataset: expected {layout.CONVERSION} and {layout.COMPLETE}; run "
            "`ahawam convert` to the end."
        )
    content = read_json(path, DatasetError, "copy it again")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]
    if not isinstance(content.get("origin", []), list):
        wrong.append("origin")
    if wrong or content["version"] != layout.VERSION:
        names = ", ".join(wrong) or "version"
        raise DatasetError(f"{path}: {names} is missing or of another kind; copy or convert it again.")
    return Converted(root, content)


def _embodiment(root: Path, record: dict[str, Any] | None) -> Embodiment | None:
    """What is recorded of it; datasets that were converted before that say nothing."""
    try:
        return Embodiment.from_json(record) if record else None
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{root / layout.CONVERSION}: the embodiment is not whole ({error!r}); copy or convert it again."
        ) from error


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DatasetError(f"{path} lacks the column {name}; convert the dataset again.")
    return table[name]
