"""Progress: one line that overwrites itself on a terminal, plain lines elsewhere."""

import fcntl
import os
import pty
import struct
import termios
from contextlib import suppress
from typing import TextIO

import pytest

from data_pipelines import progress
from data_pipelines.progress import Progress, StatusLine, finish_line, say


class Clock:
    """Time that passes when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


class Terminal:
    """A terminal of 40 columns. stream: what a program writes to."""

    def __init__(self) -> None:
        self._screen, program = pty.openpty()
        fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        self.stream: TextIO = os.fdopen(program, "w")

    def read(self) -> str:
        """What has arrived on the screen; the program is over then."""
        self.stream.close()
        seen = b""
        with suppress(OSError):  # how the other end learns of it
            while more := os.read(self._screen, 65536):
                seen += more
        os.close(self._screen)
        return seen.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_unfinished", None)
    return Terminal()


def test_a_log_gets_plain_lines_every_few_seconds(time: Clock, capsys: pytest.CaptureFixture) -> None:
    job = Progress(100, "rows")
    for done in range(100):
        time.now += 0.3
        job.add(f"loss {done}", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  17 of 100 rows, 3.33 per second, ETA 0:00:25, loss 16"
    assert lines[-1] == "  100 of 100 rows, 3.33 per second, took 0:00:30, loss 99"
    assert len(lines) == 6 and not any(mark in line for line in lines for mark in "\r\x1b")


def test_a_job_that_goes_on_counts_its_own_rate(time: Clock, capsys: pytest.CaptureFixture) -> None:
    job = Progress(4 * 2**30, "GiB", 2**30, done=2 * 2**30)
    job.add("before any time", 0)
    time.now += 10
    job.add("kernel", 2**30)
    assert capsys.readouterr().out == "  3 of 4 GiB, 0.1 per second, ETA 0:00:10, kernel\n"


def test_large_numbers_are_written_out(time: Clock, capsys: pytest.CaptureFixture) -> None:
    job = Progress(31_000, "rows")
    time.now += 15.3
    job.add("", 31_000)
    assert capsys.readouterr().out == "  31,000 of 31,000 rows, 2,026 per second, took 0:00:15\n"


def test_a_terminal_shows_one_line(time: Clock, terminal: Terminal) -> None:
    job = Progress(3, "rows", stream=terminal.stream)
    for _ in range(3):
        time.now += 1
        job.add("loss 0.12345, gradient norm 1.2, and much more", 1)
    seen = terminal.read()
    assert seen.count("\n") == 1 and seen.endswith("\n") and seen.count("\r") == seen.count("\x1b[K") == 3
    for line in seen.replace("\x1b[K", "").strip().split("\r"):
        assert len(line) <= 39
    assert "3 of 3 rows, 1 per second, took 0:00:\x1b[K" in seen


def test_a_terminal_is_not_written_to_more_often_than_one_can_read(time: Clock, terminal: Terminal) -> None:
    line = StatusLine(terminal.stream)
    for number in range(100):
        time.now += 0.01
        line.show(f"step {number}")
    assert 4 <= terminal.read().count("\r") <= 6


def test_what_is_said_meanwhile_has_a_line_of_its_own(
    time: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", terminal.stream)
    line = StatusLine(terminal.stream)
    line.show("step 1")
    say("open-loop error 0.1")
    time.now += 1
    line.show("step 2")
    finish_line()
    finish_line()  # once is enough
    assert terminal.read() == "\rstep 1\x1b[K\nopen-loop error 0.1\n\rstep 2\x1b[K\n"


def test_a_terminal_that_cannot_overwrite(time: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    line = StatusLine(terminal.stream)
    time.now += 5
    line.show("step 1")
    assert terminal.read() == "step 1\n"


def test_the_door_ends_the_line_before_an_error(
    time: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ahawam_jax import __main__ as door
    from ahawam_jax.commands import verify

    def stopped(_: list[str]) -> None:
        StatusLine(terminal.stream).show("fixture 1")
        raise SystemExit("error: a sentence")

    monkeypatch.setattr(verify, "main", stopped)
    monkeypatch.setattr("sys.argv", ["ahawam"])
    with pytest.raises(SystemExit):
        door.main(["verify"])
    assert terminal.read() == "\rfixture 1\x1b[K\n"
