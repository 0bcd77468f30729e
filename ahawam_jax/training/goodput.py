"""Where the time of a run goes: the device's own idle time, rates, and goodput over all starts of the run."""

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from data_pipelines.disk import whole_file, writing
from data_pipelines.files import read_json
from data_pipelines.progress import clock, say

# steps: the devices compute.  data: they wait for a batch.  start: data are opened, the state is made or restored.
# stopped: between what one start wrote last and the next start, so lost steps too.
CAUSES = ("steps", "data", "compile", "checkpoint", "validation", "log", "profile", "start", "stopped", "other")


class Goodput:
    """Seconds of a run by cause, as the first process sees them; goodput is the share of steps.

    A step begins when its batch lies on the device and the step before is done. So a device waits for data from the
    end of one step until then; that the loop waits for a batch while the device computes costs nothing. A thread
    watches both, as the loop itself is elsewhere by then.
    """

    def __init__(self, path: Path):
        """path: goodput.json, kept by process 0: what the starts before this one came to."""
        self._path, self._writes = path, jax.process_index() == 0
        self._before, self._starts = Counter[str](), 1
        if self._writes and path.exists():
            record = read_json(path, ValueError, "remove it, and goodput is counted anew")
            self._before, self._starts = Counter(record["seconds"]), record["starts"] + 1
            self._before["stopped"] += max(0.0, time.time() - record["until"])
            say(f"before this start: {self.describe(self._before)}")
        self._seconds = Counter[str]()
        self._began = self._free = time.monotonic()
        self._read = (0, self._began, Counter[str]())
        self._queue: queue.Queue[tuple[bool, Any] | None] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)

    @contextmanager
    def spent(self, cause: str) -> Iterator[None]:
        """What the block takes once the devices are done with the steps before it belongs to `cause`."""
        self._queue.join()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._free = time.monotonic()
            self._seconds[cause] += self._free - begin

    def batch(self, batch: Any) -> None:
        """The batch of the next step is on its way to the devices, or there."""
        self._queue.put((True, batch))

    def step(self, outputs: Any) -> None:
        """What that step will return: arrays that nobody donates."""
        self._queue.put((False, outputs))

    def _follow(self) -> None:
        began, done = None, self._began
        while (item := self._queue.get()) is not None:
            begins, arrays = item
            try:
                jax.block_until_ready(arrays)
                now = time.monotonic()
                if begins:
                    self._seconds["data"] += max(0.0, now - max(done, self._free))
                    began = now
                elif began is not None:
                    self._seconds["steps"] += now - max(began, self._free)
                    done = now
            except Exception:  # the loop meets the same one, and says so
                began = None
            finally:
                del item, arrays  # the memory of a batch
                self._queue.task_done()

    def rate(self, step: int) -> tuple[float, float]:
        """Since the last reading, without validation, checkpoints and compiling: seconds a step, and the share of
        them in which the device waited for data."""
        last, since, before = self._read
        now, seconds = time.monotonic(), Counter(self._seconds)
        self._read = step, now, seconds
        spent = {cause: seconds[cause] - before[cause] for cause in CAUSES}
        elapsed = now - since - sum(spent[cause] for cause in CAUSES if cause not in ("steps", "data"))
        return max(elapsed, 1e-9) / max(step - last, 1), min(1.0, spent["data"] / max(elapsed, 1e-9))

    def started(self, step: int) -> None:
        """All is ready for the step after `step`: what went before was the start."""
        self._free = time.monotonic()
        self._seconds["start"] += self._free - self._began
        self._read = step, self._free, Counter(self._seconds)

    def total(self) -> Counter[str]:
        """Seconds by cause, of all starts."""
        here = Counter(self._seconds)
        here["other"] += max(0.0, time.monotonic() - self._began - sum(here.values()))
        return self._before + here

    def write(self, safe: str) -> None:
        """Writes goodput.json. Raises DiskError, which ends with `safe`."""
        if self._writes:
            content = {"starts": self._starts, "until": time.time(), "seconds": dict(self.total())}
            with writing(self._path, safe), whole_file(self._path) as partial:
                partial.write_text(json.dumps(content, indent=1))

    def describe(self, seconds: Counter[str] | None = None) -> str:
        """The sentence of all starts."""
        seconds = self.total() if seconds is None else seconds
        whole = max(sum(seconds.values()), 1e-9)
        parts = ", ".join(f"{cause} {seconds[cause] / whole:.1%}" for cause in CAUSES[1:] if seconds[cause])
        return f"goodput {seconds['steps'] / whole:.1%} of {clock(whole)}; {parts or 'nothing else'}"
