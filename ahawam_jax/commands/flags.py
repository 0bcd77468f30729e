"""What the commands share: flags whose mistakes are sentences."""

import argparse
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines.paths import AddressError, local_path, refuse_addresses

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file in configs/.")
FLAGS = flags.FLAGS
# Absl ends these with 1, as if they were mistakes.
HELP = {"-h", "-?", *(dashes + name for dashes in ("-", "--") for name in ("help", "helpshort", "helpfull"))}
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: its checkpoints and logs.")


def require(argv: list[str], *holders: flags.FlagHolder) -> None:
    """Raises UsageError for an argument that is no flag, and for a flag in `holders` without a value."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.SECTION.FIELD=VALUE.")
    for holder in holders:
        if not holder.value:
            raise app.UsageError(f"--{holder.name} is required.")


def run_with_flags(main: Callable[[list[str]], None], arguments: list[str] | None) -> None:
    """app.run, quiet, and without a traceback for a config field that does not exist or has the wrong type.

    main: called with the name of the program and the arguments that are no flags.  arguments: None for sys.argv's.
    """

    def parse(argv: list[str]) -> list[str]:
        if HELP & set(argv):
            print(sys.modules[main.__module__].__doc__)
            print(FLAGS.module_help(__name__), FLAGS.module_help(main.__module__), sep="\n")
            sys.exit(0)
        try:
            return FLAGS(argv)
        except (AttributeError, KeyError, TypeError, FileNotFoundError) as error:
            message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("'\"")
            sys.exit(f"error: the flags do not fit the config: {message}")
        except flags.Error as error:
            sys.exit(f"error: {error}")

    def run(argv: list[str]) -> None:
        try:
            _refuse_addresses(argv, main.__module__)
            main(argv)
        except (app.UsageError, AddressError) as error:
            sys.exit(f"error: {error}")

    logging.set_verbosity(logging.ERROR)  # orbax reports every file it writes
    app.run(run, sys.argv if arguments is None else [sys.argv[0], *arguments], flags_parser=parse)


def _refuse_addresses(argv: list[str], module: str) -> None:
    """No flag, argument or field of the config is an address where files are read and written."""
    for argument in argv[1:]:
        local_path(argument)
    own = FLAGS.flags_by_module_dict()
    refuse_addresses({flag.name: flag.value for name in (__name__, module) for flag in own.get(name, ())}, "--")
    if CONFIG.value is not None:
        try:
            config = CONFIG.value.to_dict()
        except OSError:  # told only now that it is asked for
            path = local_path(config_flags.get_config_filename(FLAGS["config"]))
            raise app.UsageError(f"--config is {path}, which cannot be loaded; give a file of configs/.") from None
        refuse_addresses(config, "config.")


def add_robot(parser: argparse.ArgumentParser) -> None:
    """--robot and --dataset, of commands that load a policy."""
    parser.add_argument("--robot", help="to run on, where the run was trained on several")
    parser.add_argument("--dataset", help="name of one of its datasets, where they differ in the robot's own vector")


def parse_shard(text: str) -> tuple[int, int]:
    """Which part of a job's work, out of how many: "2/8" -> (2, 8). Anything else is a ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard is {text!r}, expected I/N with I from 0 to N-1, as in 0/8.")
    return int(match[1]), int(match[2])
