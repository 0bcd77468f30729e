"""How far a long job has come, in lines."""

import time


class Progress:
    """Says every few seconds how far a job over `total` units has come: done, rate, time left."""

    def __init__(self, total: int, unit: str, scale: int = 1):
        self.total, self.unit, self.scale = total, unit, scale
        self.done, self._began, self._shown = 0, time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self._began

    def add(self, name: str, count: int) -> None:
        """`count` more units are done; `name` is what they were."""
        self.done += count
        if time.monotonic() - self._shown < 5 and self.done < self.total:
            return
        self._shown = time.monotonic()
        rate = self.done / max(self.seconds, 1e-9)
        print(
            f"  {self.done / self.scale:.4g} of {self.total / self.scale:.4g} {self.unit}, "
            f"{rate / self.scale:.3g} per second, {max(self.total - self.done, 0) / rate:.0f} s left  {name}".rstrip(),
            flush=True,
        )
