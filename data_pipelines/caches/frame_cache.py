"""Canvases of every row of a dataset: decoded once into a memory-mapped file, or on the fly.

Decoding mp4 for every window costs a small CPU machine nearly all its time. The cache is written beside its
final place and moved there in one step when complete, so a build that was interrupted is never read.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress

CACHE_VERSION = 1  # raise it whenever the pixels of a canvas change for the same dataset
BLOCK = 256  # rows decoded at a time, which bounds the memory of long episodes


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
    its `if __name__ == "__main__"` guard. A second process that asks for the same cache waits for the first.
    """
    dataset.require_cameras(canvas.cameras)
    shape = (int(dataset.lengths.sum()), *canvas.size, 3)
    key = pictures_key(dataset, canvas)
    folder = local_path(cache_dir) / f"frames-{key[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _build(dataset, canvas, shape, key, folder, processes)
    return _open(folder, shape, key)


def _open(folder: Path, shape: tuple[int, ...], key: str) -> CachedFrames:
    data, note = folder / "frames.bin", folder / "key.json"
    try:
        stored, size = json.loads(note.read_text()), data.stat().st_size
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder} is not a complete frame cache ({error}); delete the folder.") from error
    expected = int(np.prod(shape))
    if stored != {"key": key, "shape": list(shape)} or size != expected:
        raise DatasetError(
            f"{data} has {size} bytes and the note {stored}, expected {expected} bytes of shape "
            f"{list(shape)} and key {key}; delete the folder, it will be built again."
        )
    return CachedFrames(data, shape)


def _build(
    dataset: Episodes,
    canvas: Canvas,
    shape: tuple[int, ...],
    key: str,
    folder: Path,
    processes: int,
) -> None:
    unfinished = folder.with_suffix(".partial")
    # What an interrupted build left behind; under the lock nobody is writing it.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    data = unfinished / "frames.bin"
    with open(data, "wb") as file:
        file.truncate(int(np.prod(shape)))
    # Whole episodes in order: neighbours share a video file, and every worker decodes forward.
    episodes = range(len(dataset.lengths))
    write = partial(_write_episode, canvas, data, shape)
    progress = Progress(shape[0], f"rows of {folder.name}")
    if processes == 1:
        _set_dataset(dataset)
        for episode in episodes:
            progress.add("", write(episode))
    else:
        with multiprocessing.get_context("spawn").Pool(processes, _set_dataset, [dataset]) as pool:
            for rows in pool.imap_unordered(write, episodes):
                progress.add("", rows)
    with open(data, "rb+") as file:
        os.fsync(file.fileno())
    (unfinished / "key.json").write_text(json.dumps({"key": key, "shape": list(shape)}))
    os.replace(unfinished, folder)


def _set_dataset(dataset: Episodes) -> None:
    """What `_write_episode` reads, given to each worker once."""
    global _dataset
    _dataset = dataset


def _write_episode(canvas: Canvas, data: Path, shape: tuple[int, ...], episode: int) -> int:
    """Decodes one episode into its rows of the file; returns the number of rows. Runs in a worker."""
    dataset = _dataset
    out = np.memmap(data, np.uint8, "r+", shape=shape)
    start, length = dataset.starts[episode], int(dataset.lengths[episode])
    for low in range(0, length, BLOCK):
        rows = np.arange(low, min(low + BLOCK, length))
        out[start + rows[0] : start + rows[-1] + 1] = _canvases(dataset, canvas, episode, rows)
    out.flush()
    return length


def _canvases(dataset: Episodes, canvas: Canvas, episode: int, rows: np.ndarray) -> np.ndarray:
    return canvas.compose({camera: dataset.frames(episode, camera, rows) for camera in canvas.cameras})


def pictures_key(dataset: Episodes, canvas: Canvas) -> str:
    """Hash of all that decides the canvases of a dataset: its pictures, views and size, the version of the code."""
    content = [CACHE_VERSION, list(canvas.head_size), canvas.cameras, dataset.identity()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
