"""What the readers of all formats share: rows checked when first read, frames in the order asked for."""

import itertools
import threading
import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes

# A frame's time stamp in a video may be off its place on the fps grid by at most this part of a row; of a row's own
# time stamp, which nothing is read by, more is reported by the doctor.
GRID_TOLERANCE = 0.1
# A row's time stamp that is off by this part of a row lies nearer to another row: rows were lost or fps is wrong.
NEXT_ROW = 0.5
RATE_TOLERANCE = 1e-3  # relative; a rate that differs by less is the labelled one
BLOCK = 64  # frames decoded at a time in search of faults
# Of rows that all readers of a process keep in memory, of the episodes used last: the whole of RoboTwin, or 165 hours
# of RoboCOIN in most forms. Beyond that, episodes are read again, which costs less than decoding their frames.
BYTES_KEPT = 2**32


@dataclass(frozen=True)
class Rows:
    """The rows of one episode.

    file: where they lie.  state: float32 [T, p].  action: float32 [T, d].  timestamp: [T] seconds as recorded, from
    the episode's start or by a clock.
    instruction: place in `instructions`.
    """

    file: Path
    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    instruction: int


class Reader(Episodes):
    """All of `Episodes` but what a format must answer itself: its attributes, `picture_file`, `_read_rows` and
    `_decode`.

    unusable: camera -> why it cannot be read; only who asks for one is told.
    """

    unusable: Mapping[str, str] = MappingProxyType({})

    @property
    def state_present(self) -> np.ndarray:
        """All of them: a recording holds the numbers of one robot."""
        return np.ones(self.state_dim, bool)

    @property
    def action_present(self) -> np.ndarray:
        """See `state_present`."""
        return np.ones(self.action_dim, bool)

    @abstractmethod
    def _read_rows(self, episode: int) -> Rows:
        """The episode's rows as they are on disk, of the promised number and widths."""

    @abstractmethod
    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Decodes the frames of `rows` (ascending, distinct, at least one) into out uint8 [n, h, w, 3], RGB."""

    def states(self, episode: int) -> np.ndarray:
        return self._checked_rows(episode).state

    def actions(self, episode: int) -> np.ndarray:
        return self._checked_rows(episode).action

    def timestamps(self, episode: int) -> np.ndarray:
        return self._checked_rows(episode).timestamp

    def instruction_index(self, episode: int) -> int:
        return self._checked_rows(episode).instruction

    def instruction(self, episode: int) -> str:
        return self.instructions[self.instruction_index(episode)]

    def frames(self, episode: int, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        self.require_cameras([camera])
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < self.lengths[episode]):
            raise IndexError(
                f"frames of episode {episode}: indices {wanted.min()}..{wanted.max()} asked for, the episode "
                f"has rows 0..{self.lengths[episode] - 1}."
            )
        rows, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(rows), *self.cameras[camera], 3), np.uint8)
        if len(rows):
            try:
                self._decode(episode, camera, rows, out)
            except DatasetError as error:
                raise self._first_fault(episode, camera) or error from error
        return out if np.array_equal(rows, wanted) else out[inverse]

    def require_cameras(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.cameras]
        for name in missing:
            if name in self.unusable:
                raise DatasetError(self.unusable[name])
        if missing:
            raise DatasetError(
                f"{self.root} has no camera {', '.join(missing)}; it has: {', '.join(self.cameras) or 'none'}. "
                "Choose another dataset, or rename the camera (LeRobot: observation.images.<name> in meta/info.json)."
            )

    def _first_fault(self, episode: int, camera: str) -> DatasetError | None:
        """What is wrong with an episode's pictures, in the same words whichever rows were asked for."""
        for low in range(0, self.lengths[episode], BLOCK):
            rows = np.arange(low, min(low + BLOCK, self.lengths[episode]))
            try:
                self._decode(episode, camera, rows, np.empty((len(rows), *self.cameras[camera], 3), np.uint8))
            except DatasetError as error:
                return error
        return None

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        """Rows per episode; sets lengths and starts."""
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._rows = _Kept()
        if not len(lengths):
            raise DatasetError(f"{self.root} holds no episode; record one or choose another dataset.")
        if self.lengths.min() < 1:
            raise DatasetError(
                f"{self.root}: episode {self.lengths.argmin()} has {self.lengths.min()} rows, expected at least one; "
                "remove that episode or record it again."
            )

    def _checked_rows(self, episode: int) -> Rows:
        rows = self._rows.get(episode)
        if rows is None:
            rows = self._read_rows(episode)
            _check_finite(rows, "state", rows.state, self.state_names, episode)
            _check_finite(rows, "action", rows.action, self.action_names, episode)
            rows = replace(rows, timestamp=_seconds(rows, self.fps, episode))
            self._rows.put(episode, rows)
        return rows


class _Used:
    """Rows of the episodes used last, by reader and episode, BYTES_KEPT together at most; for several threads."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # a reader may end, and be forgotten, in the midst of another's turn
        self.readers = itertools.count()

    def get(self, key: tuple[int, int]) -> Rows | None:
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
            return self._rows.get(key)

    def put(self, key: tuple[int, int], rows: Rows) -> None:
        with self._lock:
            if key in self._rows:  # another thread has read it meanwhile
                return
            self._rows[key] = rows
            self._bytes += _size(rows)
            while self._bytes > BYTES_KEPT and len(self._rows) > 1:
                self._bytes -= _size(self._rows.popitem(last=False)[1])

    def forget(self, reader: int) -> None:
        with self._lock:
            for key in [key for key in self._rows if key[0] == reader]:
                self._bytes -= _size(self._rows.pop(key))


def _size(rows: Rows) -> int:
    return rows.state.nbytes + rows.action.nbytes


_USED = _Used()


def keep_rows(size: int) -> None:
    """From here on all readers of this process keep so many bytes of rows, and always the episode used last."""
    global BYTES_KEPT
    BYTES_KEPT = size


class _Kept:
    """One reader's share of `_USED`, which goes with it. In another process it starts empty."""

    def __init__(self) -> None:
        self._reader = next(_USED.readers)
        weakref.finalize(self, _USED.forget, self._reader)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()

    def get(self, episode: int) -> Rows | None:
        return _USED.get((self._reader, episode))

    def put(self, episode: int, rows: Rows) -> None:
        _USED.put((self._reader, episode), rows)


def _check_finite(rows: Rows, what: str, values: np.ndarray, names: Sequence[str], episode: int) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, place = bad[0]
        name = f" ({names[place]})" if names else ""
        raise DatasetError(
            f"{rows.file}: the {what} of episode {episode} is {values[row, place]} in row {row}, dimension "
            f"{place}{name}; remove that episode or record it again."
        )


def _seconds(rows: Rows, fps: float, episode: int) -> np.ndarray:
    """The rows' time stamps since the episode's start, float32 [T].

    They must rise, and each lie nearer to its own row on the fps grid than to another; both tests fail for NaN.
    """
    times = rows.timestamp.astype(np.float64)
    stuck = np.flatnonzero(~(np.diff(times) > 0))
    if len(stuck):
        row = stuck[0]
        step = np.spacing(rows.timestamp[row])
        reason = "rows were repeated or reordered, record the episode again"
        if times[row] == times[row + 1] and step > 0.5 / fps:
            reason = (
                f"stored as {rows.timestamp.dtype} they count in steps of {step:g} s at this size: write seconds "
                "since the episode's start"
            )
        raise DatasetError(
            f"{rows.file}: the timestamps of episode {episode} do not rise from row {row} ({_exactly(times[row])} s) "
            f"to row {row + 1} ({_exactly(times[row + 1])} s); {reason}."
        )
    start = times[0] if abs(times[0] * fps) >= NEXT_ROW else 0.0  # a clock's, as seconds since 1970
    off = np.flatnonzero(~(np.abs((times - start) * fps - np.arange(len(times))) < NEXT_ROW))
    if len(off):
        row = off[0]
        raise DatasetError(
            f"{rows.file}: row {row} of episode {episode} has timestamp {_exactly(times[row])} s, expected "
            f"{_exactly(start + row / fps)} s at {fps:g} rows per second; {_why_off(times, fps)}."
        )
    return (times - start).astype(np.float32)


def _why_off(times: np.ndarray, fps: float) -> str:
    """What is wrong with time stamps that rise, but not at the labelled rate: the label, or single rows."""
    steps = np.diff(times)
    rate = len(steps) / steps.sum() if len(steps) else np.nan
    if len(steps) > 1 and np.abs(steps * rate - 1).max() < NEXT_ROW and abs(rate / fps - 1) > RATE_TOLERANCE:
        return f"all rows are spaced as at {rate:.5g} per second: correct fps in the metadata"
    return "rows were lost there or the clock jumped: split the episode or record it again"


def _exactly(seconds: float) -> str:
    """To a tenth of a microsecond, whatever its size."""
    return np.format_float_positional(seconds, precision=7, trim="-")
