"""Canvases of every row of a dataset: decoded once into a memory-mapped file, or on the fly.

Decoding mp4 for every window costs a small CPU machine nearly all its time. The cache is written beside its
final place, by plain writes, and moved there in one step when complete: a build that was interrupted is never read,
and the next one goes on with the episodes that it lacks.
"""

import json
import os
import re
import shutil
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.caches.keys import pictures_key
from data_pipelines.canvas import Canvas
from data_pipelines.disk import require_room, writing
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.files import read_json
from data_pipelines.ownership import owned
from data_pipelines.paths import local_path
from data_pipelines.processes import worker_pool
from data_pipelines.progress import Progress

BLOCK = 256  # rows decoded at a time, which bounds the memory of long episodes
DATA, ABOUT, FINISHED = "frames.bin", "key.json", "episodes.txt"


class Frames(Protocol):
    """Canvases of all dataset rows: `frames[rows]` with int [n] gives uint8 [n, H, W, 3]."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


class DecodingFrames:
    """Frames decoded when asked for: no disk, no wait, slow. The choice for datasets too big to cache."""

    def __init__(self, dataset: Episodes, canvas: Canvas) -> None:
        dataset.require_cameras(canvas.cameras)
        self._dataset, self._canvas = dataset, canvas
        self.shape = (int(dataset.lengths.sum()), *canvas.size, 3)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(np.asarray(rows), return_inverse=True)
        episodes = np.searchsorted(self._dataset.starts, unique, side="right") - 1
        out = np.empty((len(unique), *self.shape[1:]), np.uint8)
        for episode in np.unique(episodes):
            here = episodes == episode
            rows = unique[here] - self._dataset.starts[episode]
            out[here] = _canvases(self._dataset, self._canvas, episode, rows)
        return out[inverse]


class CachedFrames:
    """Frames read from a whole cache. Another process maps the file itself."""

    def __init__(self, file: Path, shape: tuple[int, ...]) -> None:
        self._file, self.shape = file, shape
        self._map = np.memmap(file, np.uint8, "r", shape=shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFrames, (self._file, self.shape)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._map[rows])


def open_frames(dataset: Episodes, canvas: Canvas, cache_dir: str | Path, processes: int = 1) -> CachedFrames:
    """Composed canvases uint8 [total rows, H, W, 3] in a memory-mapped file, built on first use.

    processes: decoding workers of the build; more than 1 starts new interpreters, so the calling script needs
    its `if __name__ == "__main__"` guard. A second process that asks for the same cache waits for the first. Raises
    DatasetError, DiskError where the disk takes no more, WorkerError where a worker was killed.
    """
    dataset.require_cameras(canvas.cameras)
    shape = (int(dataset.lengths.sum()), *canvas.size, 3)
    key = pictures_key(dataset, canvas, cache_dir)
    folder = local_path(cache_dir) / f"frames-{key[:16]}"
    if not folder.is_dir():
        unfinished = folder.with_suffix(".partial")
        safe = f"The episodes before are kept in {unfinished}; the same command goes on from there."
        with writing(folder, safe), owned(cache_dir, folder.name, wait=True):
            if not folder.is_dir():  # the one before may have built it
                try:
                    _build(dataset, canvas, shape, unfinished, processes, safe)
                    if pictures_key(dataset, canvas, cache_dir) != key:
                        raise DatasetError(f"{dataset.root} changed while its pictures were decoded; start again.")
                except DatasetError:  # once mended, the dataset has another key
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
                (unfinished / ABOUT).write_text(json.dumps({"key": key, "shape": list(shape)}))
                (unfinished / FINISHED).unlink()
                os.replace(unfinished, folder)
    return _open(folder, shape, key)


def _open(folder: Path, shape: tuple[int, ...], key: str) -> CachedFrames:
    data, note = folder / DATA, folder / ABOUT
    stored = read_json(note, DatasetError, "delete the folder, it will be built again")
    size = data.stat().st_size if data.is_file() else 0
    expected = int(np.prod(shape))
    if stored != {"key": key, "shape": list(shape)} or size != expected:
        raise DatasetError(
            f"{data} has {size} bytes and the note {stored}, expected {expected} bytes of shape "
            f"{list(shape)} and key {key}; delete the folder, it will be built again."
        )
    return CachedFrames(data, shape)


def _build(
    dataset: Episodes, canvas: Canvas, shape: tuple[int, ...], folder: Path, processes: int, safe: str
) -> None:
    """Writes the episodes that a build before this one did not finish."""
    folder.mkdir(parents=True, exist_ok=True)
    data, note = folder / DATA, folder / FINISHED
    finished = {int(n) for n in re.findall(r"^(\d+);$", note.read_text(), re.MULTILINE)} if note.exists() else set()
    # Whole episodes in order: neighbours share a video file, and every worker decodes forward.
    episodes = [episode for episode in range(len(dataset.lengths)) if episode not in finished]
    rows = int(dataset.lengths[episodes].sum())
    require_room(folder, rows * int(np.prod(shape[1:])), "make room, choose another folder, or do without this cache")
    write = partial(_write_episode, canvas, data)
    progress = Progress(rows, f"rows of {folder.stem}")

    def add(episode: int) -> None:
        with note.open("ab", 0) as file:
            file.write(f"\n{episode};".encode())  # begun anew, in case the line before was cut off
        progress.add("", int(dataset.lengths[episode]))

    if processes == 1:
        _set_dataset(dataset)
        for episode in episodes:
            write(episode)
            add(episode)
    else:
        with worker_pool(processes, safe, _set_dataset, dataset) as pool:
            for future in as_completed([pool.submit(write, episode) for episode in episodes]):
                add(future.result())


def _set_dataset(dataset: Episodes) -> None:
    """What `_write_episode` reads, given to each worker once."""
    global _dataset
    _dataset = dataset


def _write_episode(canvas: Canvas, data: Path, episode: int) -> int:
    """Decodes one episode into its rows of the file, and returns when they are on the disk. Runs in a worker."""
    dataset = _dataset
    start, length = int(dataset.starts[episode]), int(dataset.lengths[episode])
    descriptor = os.open(data, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for low in range(0, length, BLOCK):
            content = _canvases(dataset, canvas, episode, np.arange(low, min(low + BLOCK, length)))
            _write_at(descriptor, content, (start + low) * content[0].nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return episode


def _write_at(descriptor: int, content: np.ndarray, place: int) -> None:
    # Not through a map: where the disk is full, that would end the process.
    left = memoryview(np.ascontiguousarray(content).reshape(-1))
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


def _canvases(dataset: Episodes, canvas: Canvas, episode: int, rows: np.ndarray) -> np.ndarray:
    return canvas.compose({camera: dataset.frames(episode, camera, rows) for camera in canvas.cameras})
