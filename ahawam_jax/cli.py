"""Command lines with --config: every mistake in the flags is a sentence."""

import sys
from collections.abc import Callable

from absl import app, logging


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
