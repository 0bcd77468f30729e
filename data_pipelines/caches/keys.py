"""What a cache goes by: the whole content of every file that its pictures come from, and where in it they lie.

Readers name the files, so that links are seen through as they see through them, and a file that nobody reads changes
nothing. A copy of a dataset, wherever it lies and whatever its files' times, has the same key.

Reading terabytes once is little beside decoding them, reading them again at every start is not. So what was read is
noted in `contents.txt` of the cache's folder, by inode, size and times of modification and change. Nothing that writes
to a file, swaps it or points a link elsewhere leaves all four as they were: the last one cannot be set. A file that
changed less than SETTLED seconds ago is not noted, since the clocks of file systems are coarse.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.progress import Progress

CANVAS_VERSION = 1  # raise it whenever the pixels of a canvas change for the same dataset
NOTES = "contents.txt"
NOTE = re.compile(r"^(\d+ \d+ \d+ \d+) ([0-9a-f]{64});$", re.MULTILINE)
SETTLED = 2.0  # seconds
WORTH_TELLING = 10**9  # bytes to read
READERS = 16  # files at a time: of many small ones most of the time is waiting


def pictures_key(dataset: Episodes, canvas: Canvas, folder: str | Path) -> str:
    """Hash of all that decides the canvases of a dataset: its pictures, views and size, the version of the code.

    folder: of the cache, where notes are kept. Raises DatasetError for a file that cannot be read.
    """
    content = [CANVAS_VERSION, list(canvas.head_size), canvas.cameras, recorded(dataset, canvas.cameras, folder)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def recorded(dataset: Episodes, cameras: Sequence[str], folder: str | Path) -> str:
    """Hash of the pictures of these cameras, as they are recorded."""
    episodes = range(len(dataset.lengths))
    places = {camera: [dataset.picture_file(episode, camera) for episode in episodes] for camera in cameras}
    contents = _digests({path for of in places.values() for path, _ in of}, Path(folder))
    pictures = [
        [dataset.cameras[camera], [[contents[path], place] for path, place in places[camera]]] for camera in cameras
    ]
    return hashlib.sha256(json.dumps([dataset.lengths.tolist(), pictures]).encode()).hexdigest()


def _digests(paths: set[Path], folder: Path) -> dict[Path, str]:
    """SHA-256 of every file's content."""
    notes = folder / NOTES
    known = dict(NOTE.findall(notes.read_text())) if notes.is_file() else {}
    found: dict[Path, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        states = dict(zip(paths, pool.map(_state, paths), strict=True))
        unread = sorted(path for path in paths if states[path] not in known)
        found = {path: known[states[path]] for path in paths if states[path] in known}
        sizes = {path: int(states[path].split()[1]) for path in unread}
        total = sum(sizes.values())
        progress = Progress(total, "GB of recordings read once", 10**9)
        for path, digest in zip(unread, pool.map(_digest, unread), strict=True):
            found[path] = digest
            if total > WORTH_TELLING:
                progress.add("", sizes[path])
            _note(notes, states[path], digest)
    return found


def _state(path: Path) -> str:
    """Differs if a file is another one or was written to."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DatasetError(_unreadable(path, error)) from error
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _digest(path: Path) -> str:
    state = _state(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(_unreadable(path, error)) from error
    if _state(path) != state:
        raise DatasetError(f"{path} changed while it was read; start again when the dataset is complete.")
    return digest


def _unreadable(path: Path, error: OSError) -> str:
    real = os.path.realpath(path)
    where = f"{path}, a link to {real}," if real != os.path.abspath(path) else str(path)
    return f"{where} cannot be read ({error.strerror}); copy the dataset again, or correct its links."


def _note(notes: Path, state: str, digest: str) -> None:
    """Adds a line; several jobs may. Where there is no room for it, the file is read again the next time."""
    if time.time() - int(state.split()[3]) / 1e9 < SETTLED:
        return
    with suppress(OSError):
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("ab", 0) as file:
            file.write(f"\n{state} {digest};".encode())  # begun anew, in case the line before was cut off
