"""Latents of every row of a dataset, encoded once by a frozen video tower and read from a memory map.

Two kinds: `frames`, the latent of every row's canvas alone, and `clips`, what follows it in the video that begins at
the row. A window needs nothing else, wherever it starts and whatever its offset: the first latent of a video sees its
first frame alone, so it is that row's `frames`.

A folder per kind is named by a hash of all that decides the numbers. In it, files of ROWS_PER_FILE rows appear whole
or not at all, so that any number of jobs may fill it, be killed and start again. Every row carries a checksum, which
is compared whenever the row is read.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.disk import whole_file, writing
from data_pipelines.episodes import DatasetError
from data_pipelines.ownership import OwnedError, owned
from data_pipelines.paths import local_path

DTYPE = np.dtype(np.float16)  # latents are close to unit variance: finer there than bfloat16
ROWS_PER_FILE = 1024
ABOUT = "about.json"
SAFE = "The files before are kept; the same command goes on with those that are missing."


@dataclass(frozen=True)
class LatentFolder:
    """Where the latents of one kind and one dataset lie, written or not.

    path: the folder.  key: all that decides the numbers.  rows: of the dataset.  shape: of one row's latents.
    """

    path: Path
    key: Mapping[str, str]
    rows: int
    shape: tuple[int, ...]

    @classmethod
    def inside(cls, root: str | Path, kind: str, key: Mapping[str, str], rows: int, shape: tuple[int, ...]):
        """The folder of this content in `root`, named by it."""
        digest = hashlib.sha256(json.dumps([dict(key), rows, shape], sort_keys=True).encode()).hexdigest()
        return cls(local_path(root) / f"{kind}-{digest[:16]}", key, rows, tuple(shape))

    @property
    def row_bytes(self) -> int:
        """On disk, checksum included."""
        return int(np.prod(self.shape)) * DTYPE.itemsize + 4

    def parts(self) -> list[range]:
        """The rows of each file."""
        return [range(low, min(low + ROWS_PER_FILE, self.rows)) for low in range(0, self.rows, ROWS_PER_FILE)]

    def missing(self) -> list[range]:
        """The rows of the files that are not there yet or not whole."""
        return [part for part in self.parts() if not self.has(part)]

    def file(self, part: range) -> Path:
        """Of these rows: their latents one after the other, then a checksum (CRC-32) for each."""
        return self.path / f"rows-{part.start:010d}.bin"

    def write(self, part: range, blocks: Iterable[np.ndarray]) -> None:
        """Writes the rows of a file, given in order as arrays [n, *shape].

        Raises DatasetError for latents that are not finite in float16, DiskError where the disk takes no more,
        OwnedError where another job writes the file.
        """
        path = self.file(part)
        try:
            with writing(path, SAFE):
                self.path.mkdir(parents=True, exist_ok=True)
                self._write_about()
                with owned(self.path, path.name), whole_file(path) as partial, partial.open("wb") as file:
                    self._write_rows(file, part, blocks)
        except OwnedError as error:
            raise OwnedError(f"{error} Or give each job its own --shard.") from None

    def _write_rows(self, file: BinaryIO, part: range, blocks: Iterable[np.ndarray]) -> None:
        sums = []
        for block in blocks:
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(block, DTYPE)
            if values.shape[1:] != self.shape or not np.isfinite(values).all():
                raise DatasetError(
                    f"The latents of rows from {part.start + len(sums)} on are {values.shape[1:]}, expected "
                    f"{self.shape} of finite numbers; look at the tower's weights and the pictures there."
                )
            file.write(values)
            sums += [zlib.crc32(row) for row in values]
        file.write(np.array(sums, np.uint32))
        if len(sums) != len(part):
            raise ValueError(f"{file.name} was given {len(sums)} rows, expected {len(part)}.")

    def _write_about(self) -> None:
        about = self.path / ABOUT
        if not about.exists():
            content = json.dumps({"key": dict(self.key), "rows": self.rows, "shape": self.shape}, indent=1)
            with whole_file(about) as partial:  # several jobs may start at once
                partial.write_text(content)

    def has(self, part: range) -> bool:
        """Whether the file of these rows is there, with as many bytes as it should have."""
        path = self.file(part)
        return path.is_file() and path.stat().st_size == len(part) * self.row_bytes


class Latents:
    """The written latents of a `LatentFolder`: latents[rows] with int [n] gives float16 [n, *folder.shape].

    shape: of all rows. Raises DatasetError where files are missing, and on reading a row that is damaged.
    """

    def __init__(self, folder: LatentFolder) -> None:
        self.folder, self.shape = folder, (folder.rows, *folder.shape)
        if missing := folder.missing():
            raise DatasetError(
                f"{folder.path} holds {len(folder.parts()) - len(missing)} of {len(folder.parts())} files of latents, "
                f"{folder.file(missing[0]).name} is the first that is missing or cut off; write them with "
                "ahawam encode-video and the config of the training."
            )
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        """Another process maps the files itself."""
        return self.__dict__ | {"_maps": {}}

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        out = np.empty((len(rows), *self.folder.shape), DTYPE)
        for place, row in enumerate(rows):
            number, offset = divmod(int(row), ROWS_PER_FILE)
            values, sums = self._map(number)
            out[place] = values[offset]
            if zlib.crc32(out[place]) != sums[offset]:
                path = self.folder.file(self.folder.parts()[number])
                raise DatasetError(
                    f"{path}: the latents of row {row} are damaged, their checksum differs; remove the file and run "
                    "ahawam encode-video again, which writes what is missing."
                )
        return out

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents [n, *shape] and checksums uint32 [n] of a file."""
        if number not in self._maps:
            part = self.folder.parts()[number]
            content = np.memmap(self.folder.file(part), np.uint8, "r")
            sums = content[-4 * len(part) :].view(np.uint32)
            values = content[: -4 * len(part)].view(DTYPE).reshape(len(part), *self.folder.shape)
            self._maps[number] = values, sums
        return self._maps[number]


@dataclass(frozen=True)
class CachedLatents:
    """frames: [rows, c, h, w].  clips: [rows, n, c, h, w] of the n later latents of the video, or None."""

    frames: Latents
    clips: Latents | None = None
