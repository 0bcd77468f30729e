"""What the commands share: flags whose mistakes are sentences, and a progress line."""

import re
import sys
import time
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: its checkpoints and logs.")


def require(argv: list[str], *holders: flags.FlagHolder) -> None:
    """Raises UsageError for an argument that is no flag, and for a flag in `holders` without a value."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.SECTION.FIELD=VALUE.")
    for holder in holders:
        if not holder.value:
            raise app.UsageError(f"--{holder.name} is required.")


def run(main: Callable[[list[str]], None]) -> None:
    """app.run, quiet, and without a traceback for a config field that does not exist or has the wrong type."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv)
        except (AttributeError, KeyError, TypeError, FileNotFoundError) as error:
            message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("'\"")
            sys.exit(f"error: the flags do not fit the config: {message}")

    logging.set_verbosity(logging.ERROR)  # orbax reports every file it writes
    app.run(main, flags_parser=parse)


def parse_shard(text: str) -> tuple[int, int]:
    """Which part of a job's work, out of how many: "2/8" -> (2, 8). Anything else is a ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard is {text!r}, expected I/N with I from 0 to N-1, as in 0/8.")
    return int(match[1]), int(match[2])


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
