"""How far a long job has come: on a terminal one line that overwrites itself, in a log a line every few seconds."""

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

LOG_SECONDS = 5.0  # between two lines of a log
REDRAW_SECONDS = 0.2  # between two states of the line on a terminal

_unfinished: "StatusLine | None" = None  # the line that a terminal shows and that may still be overwritten


class StatusLine:
    """The newest state of a job, in a line.

    stream: where to, sys.stdout by default. On a terminal the line overwrites itself and is cut at the terminal's
    width. Anything else (a file, a pipe, TERM=dumb) gets plain lines, LOG_SECONDS apart.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._overwrites = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shown = float("-inf") if self._overwrites else time.monotonic()

    def show(self, text: str, last: bool = False) -> None:
        """Shows `text` unless the line before is too young; the last one always, and it stays."""
        now = time.monotonic()
        if not last and now - self._shown < (REDRAW_SECONDS if self._overwrites else LOG_SECONDS):
            return
        self._shown = now
        global _unfinished
        if not self._overwrites:
            print(text, file=self._stream, flush=True)
            return
        if _unfinished is not self:
            finish_line()
        self._stream.write(f"\r{text[: self._width() - 1]}\x1b[K" + "\n" * last)
        self._stream.flush()
        _unfinished = None if last else self

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80


def finish_line() -> None:
    """Lets the line on the terminal stay as it is: what is printed next gets a line of its own."""
    global _unfinished
    if _unfinished is not None:
        line, _unfinished = _unfinished, None
        with suppress(RuntimeError):  # a signal came in the midst of a write, and its handler is here
            line._stream.write("\n")
            line._stream.flush()


def say(text: str) -> None:
    """Prints a line that stays on stdout, whatever is being overwritten."""
    finish_line()
    print(text, flush=True)


class Progress:
    """A job over `total` units: how many are done, how fast, how long the rest takes, and the number that matters.

    unit: what is counted, in units of `scale`.  done: counted already when the job begins, as where it goes on after
    a stop.
    """

    def __init__(self, total: int, unit: str, scale: int = 1, done: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.unit, self.scale, self.done = total, unit, scale, done
        self._first, self._began, self._line = done, time.monotonic(), StatusLine(stream)

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self._began

    def add(self, note: str, count: int) -> None:
        """`count` more units are done. note: what they were, or a number to watch."""
        self.done += count
        rate, last = (self.done - self._first) / max(self.seconds, 1e-9), self.done >= self.total
        parts = [f"{_number(self.done / self.scale)} of {_number(self.total / self.scale)} {self.unit}"]
        if rate:
            when = f"took {clock(self.seconds)}" if last else f"ETA {clock((self.total - self.done) / rate)}"
            parts += [f"{_number(rate / self.scale)} per second", when]
        parts += [note] if note else []
        self._line.show(f"  {', '.join(parts)}", last)


def _number(x: float) -> str:
    """Three digits, or all in front of the point: 0.531, 12, 31,000."""
    return f"{x:,.0f}" if x >= 100 or x == round(x) else f"{x:.3g}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3723 -> "1:02:03"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
