"""What a run writes down as it goes: metrics.jsonl with a line per step, and boards that show scalars."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import Checkpoints
from data_pipelines.disk import writing

# tensorboardX imports PyTorch wherever it is installed, 180 MiB that a training has no use for, and does without else.
_HIDDEN = "torch" not in sys.modules
if _HIDDEN:
    sys.modules["torch"] = None  # as a package that is not installed
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if _HIDDEN:
    del sys.modules["torch"]

Metrics = Mapping[str, jax.Array]


def _unknown(_: ConfigDict) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """What is to be seen of a run besides its metrics."""

    profile: tuple[int, int] | None = None  # first and last step to profile
    wandb: str = ""  # project of Weights & Biases
    # Of a config: operations that a step of the model takes, and those a second that one device here can do at most;
    # None where that is not known, and MFU is left out.
    work: Callable[[ConfigDict], tuple[float, float] | None] = _unknown


PLAIN = Monitoring()


class Board(Protocol):
    """Where scalars are shown."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of one step."""


class TensorBoard:
    """Event files in a folder; what an interrupted run wrote after step `start` is not shown."""

    def __init__(self, folder: Path, start: int, safe: str):
        self._folder, self._safe = folder, safe
        with writing(folder, safe):
            folder.mkdir(exist_ok=True)
            # Not SummaryWriter: its thread dies of a full disk, and then everybody waits for it.
            self._events = EventsWriter(str(folder / "events"))
            self._events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self._folder, self._safe):
            for name, value in values.items():
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._events.flush()


class Wandb:
    """A run of Weights & Biases, which a resumed training goes on with."""

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "--wandb needs the package wandb, which is not installed: pip install wandb, or leave the flag out."
            ) from error
        name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, id=name, name=workdir.name, dir=str(workdir), config=dict(config), resume="allow"
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)


class Log:
    """metrics.jsonl and the boards, written by the first process alone.

    Raises DiskError where they cannot be written; `checkpoints` say what is safe then.
    """

    def __init__(
        self, workdir: Path, start: int, checkpoints: Checkpoints, names: Sequence[str] = (),
        boards: Sequence[Board] = (),
    ):  # fmt: skip
        """names: of the entries of every metric that is a vector.  boards: besides TensorBoard."""
        self._checkpoints, self._names = checkpoints, names
        self._pending: list[tuple[int, Metrics]] = []
        self._last: tuple[int, dict[str, float]] | None = None
        self._boards: list[Board] = []
        if jax.process_index():
            return
        self.path = workdir / "metrics.jsonl"
        kept = []
        if self.path.exists():  # a resumed run writes the steps after its checkpoint again
            kept = [line for line in self.path.read_text().splitlines(True) if _step(line, start)]
        with writing(self.path, checkpoints.safe):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self.path)
        self._boards = [TensorBoard(workdir / "tensorboard", start, checkpoints.safe), *boards]

    def add(self, step: int, metrics: Metrics) -> None:
        """Remembers a step's metrics without waiting for them."""
        self._pending.append((step, metrics))

    def flush(self) -> dict[str, float]:
        """Writes what is pending and returns its means, over finite values. In the file, others are null."""
        rows = [(step, self._flat(metrics)) for step, metrics in self._pending]
        self._pending = []
        if self._boards:
            with writing(self.path, self._checkpoints.safe), self.path.open("a") as file:
                for step, row in rows:
                    file.write(json.dumps({"step": step, **_finite(row)}) + "\n")
        names = rows[0][1] if rows else ()
        finite = {name: [row[name] for _, row in rows if np.isfinite(row[name])] for name in names}
        means = {name: float(np.mean(values)) if values else float("nan") for name, values in finite.items()}
        if rows:
            self._last = rows[-1]
            self.scalars(rows[-1][0], {name: value for name, value in means.items() if finite[name]})
        return means

    def last(self) -> dict[str, Any]:
        """Metrics of the newest step that has them, JSON-ready; waits for nothing, not even for a dead device."""
        found = self._last
        for step, metrics in self._pending:
            try:
                if all(x.is_ready() for x in jax.tree.leaves(metrics)):
                    found = step, self._flat(metrics)
            except Exception:  # what ended the run may be the computation of these
                break
        return {} if found is None else {"step": found[0], **_finite(found[1])}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows scalars of one step on the boards."""
        for board in self._boards:
            board.scalars(step, values)

    def _flat(self, metrics: Metrics) -> dict[str, float]:
        flat: dict[str, float] = {}
        for name, value in jax.device_get(metrics).items():
            flat |= zip(self._names, value.tolist(), strict=True) if np.ndim(value) else {name: float(value)}
        return flat


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in row.items()}


def _step(line: str, start: int) -> bool:
    try:
        return json.loads(line)["step"] <= start
    except (ValueError, TypeError, KeyError):  # the last line of a killed run may be cut off
        return False
