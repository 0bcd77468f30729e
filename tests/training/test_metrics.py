"""What a run writes down: the lines and boards of its metrics, time by cause, what a crash leaves, a profile."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.training import goodput as goodputs
from ahawam_jax.training.crash import leaves_behind
from ahawam_jax.training.goodput import Goodput
from ahawam_jax.training.metrics import Log, Wandb
from ahawam_jax.training.profiling import Profile, parse_window
from ahawam_jax.training.stopping import Interrupted
from data_pipelines.disk import DiskError


def curve(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_values_that_are_not_finite_are_null_and_no_part_of_a_mean(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, Checkpoints(tmp_path))
    for step, loss in enumerate((2.0, 1.0, np.inf), 1):
        log.add(step, {"loss": np.float32(loss)})
    assert log.flush() == {"loss": 1.5}
    assert [row["loss"] for row in curve(tmp_path)] == [2, 1, None]


def test_logs_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, 0, Checkpoints(tmp_path))
    log.add(1, {"loss": np.float32(1)})
    log.flush()
    (event,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in event.read_bytes() and curve(tmp_path) == [{"step": 1, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.add(2, {"loss": np.float32(1)})
    with pytest.raises(DiskError, match="metrics.jsonl cannot be written: its disk is full.* No step was"):
        log.flush()
    with open("/dev/full", "wb", 0) as full, pytest.raises(DiskError, match="tensorboard cannot be written"):
        monkeypatch.setattr(log._boards[0]._events, "write_event", lambda event: full.write(event.SerializeToString()))
        log.scalars(2, {"loss": 1.0})


class Shown:
    """A board that remembers."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], float] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.values |= {(step, name): value for name, value in values.items()}


def test_vectors_are_named_and_boards_get_means_of_what_is_finite(tmp_path: Path) -> None:
    board = Shown()
    log = Log(tmp_path, 0, Checkpoints(tmp_path), ("a/x", "a/y", "a/z"), [board])
    log.add(1, {"loss": np.float32(1), "parts": np.array([1, np.nan, np.nan], np.float32)})
    log.add(2, {"loss": np.float32(2), "parts": np.array([3, 5, np.nan], np.float32)})
    log.flush()
    assert board.values == {(2, "loss"): 1.5, (2, "a/x"): 2, (2, "a/y"): 5}
    assert curve(tmp_path)[0] == {"step": 1, "loss": 1, "a/x": 1, "a/y": None, "a/z": None}


def test_wandb_is_a_board_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb needs the package wandb"):
        Wandb("project", tmp_path, {})
    begun: list[dict[str, Any]] = []
    shown: list[tuple[dict, int]] = []
    run = SimpleNamespace(log=lambda values, step: shown.append((values, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: begun.append(how) or run))
    for _ in range(2):
        Wandb("project", tmp_path, {"seed": 1}).scalars(3, {"loss": 1.0})
    assert shown == [({"loss": 1.0}, 3)] * 2
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow"  # a resumed training goes on with the same run
    assert begun[0]["project"] == "project" and begun[0]["config"] == {"seed": 1}


# ---------------------------------------------------------------------------------------------------- time by cause
class Device:
    """Arrays that are there when the test says so, on a clock that it moves: what Goodput's thread waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(goodputs.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(goodputs.jax, "block_until_ready", self.wait)
        self.asked: threading.Event | None = None

    def wait(self, event: threading.Event) -> None:
        self.asked = event
        event.wait()

    def at(self, seconds: float, event: threading.Event, goodput: Goodput) -> None:
        """At that time, `event` is ready, and the thread has gone on to one that is not."""
        self.now = 100 + seconds
        event.set()
        while goodput._queue.unfinished_tasks and (self.asked is None or self.asked.is_set()):
            time.sleep(0.001)


def test_only_a_device_that_has_nothing_to_do_waits_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second batch is there while the first step runs: no wait. The third comes 3 s after the second step."""
    device = Device(monkeypatch)
    with Goodput(tmp_path / "goodput.json") as goodput:
        events = [(threading.Event(), threading.Event()) for _ in range(3)]

        def enqueue(number: int) -> None:
            goodput.batch(events[number][0])
            goodput.step(events[number][1])

        device.now = 110
        goodput.started(0)
        enqueue(0)
        device.at(12, events[0][0], goodput)  # waited 2 s for the first batch
        events[1][0].set()
        enqueue(1)
        device.at(17, events[0][1], goodput)  # 5 s of the first step
        device.at(21, events[1][1], goodput)  # 4 s of the second
        enqueue(2)
        device.at(24, events[2][0], goodput)
        device.at(25, events[2][1], goodput)
        assert goodput.rate(3) == pytest.approx((5.0, 5 / 15))
        with goodput.spent("checkpoint"):
            device.now += 10
        device.now += 5
        expected = {"start": 10, "steps": 10, "data": 5, "checkpoint": 10, "other": 5}
        assert goodput.total() == pytest.approx(expected)
        goodput.write("")
        assert goodput.describe().startswith("goodput 25.0% of 0:00:40; data 12.5%, checkpoint 25.0%, start 25.0%")
    record = json.loads((tmp_path / "goodput.json").read_text())
    monkeypatch.setattr(goodputs.time, "time", lambda: record["until"] + 40)
    with Goodput(tmp_path / "goodput.json") as again:
        assert again.total() == pytest.approx(expected | {"stopped": 40})
        assert "before this start: goodput 12.5% of 0:01:20" in capsys.readouterr().out
        again.write("")
    assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 2


def test_a_computation_that_fails_does_not_hold_up_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(goodputs.jax, "block_until_ready", fail)
    with Goodput(tmp_path / "goodput.json") as goodput:
        goodput.batch({})
        goodput.step({})
        with goodput.spent("checkpoint"):
            pass
        assert not goodput.total()["steps"]


# ---------------------------------------------------------------------------------------------------- a crash
def test_a_crash_leaves_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, 0, Checkpoints(tmp_path))
    log.add(1, {"loss": jax.numpy.float32(2)})
    log.flush()
    log.add(2, {"loss": jax.numpy.float32(np.nan)})
    facts = {"config": {"seed": 7}, "mesh": "data 1", "hosts": ["a", "b"]}
    for number, name in enumerate(("crash.json", "crash.1.json")):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(FloatingPointError), leaves_behind(tmp_path, facts, log):
            raise FloatingPointError("not finite")
        left = json.loads((tmp_path / name).read_text())
        assert facts.items() <= left.items()
        assert left["last_metrics"] == {"step": 2, "loss": None}
        assert left["error"].endswith("FloatingPointError: not finite\n") and "Traceback" in left["error"]
        assert left["versions"]["jax"] == jax.__version__ and left["versions"]["code (sum of its files)"]


def test_a_run_that_is_stopped_has_not_crashed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), leaves_behind(tmp_path, {}, Log(tmp_path, 0, Checkpoints(tmp_path))):
        raise Interrupted
    assert not (tmp_path / "crash.json").exists()


# ---------------------------------------------------------------------------------------------------- a profile
def test_a_window_of_steps_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    goodput = Goodput(tmp_path / "goodput.json")
    with goodput, Profile(parse_window("3:4"), tmp_path, goodput) as profile:
        for step in range(1, 7):
            profile.before(step)
            calls.append(step)
            profile.after(step, ())
    assert calls == [1, 2, tmp_path, 3, 4, "stop", 5, 6]
    calls.clear()
    goodput = Goodput(tmp_path / "goodput.json")
    with goodput, Profile((2, 9), tmp_path, goodput) as profile:  # the run ends before
        profile.before(2)
    assert calls == [tmp_path, "stop"]
    assert parse_window("") is None
    for text in ("3", "4:3", "0:2", "a:b"):
        with pytest.raises(ValueError, match="expected FIRST:LAST"):
            parse_window(text)
