"""The one door: `ahawam COMMAND`, the same as `python -m ahawam_jax COMMAND`."""

import difflib
import importlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from ahawam_jax.compilation_cache import keep_compiled
from data_pipelines.processes import REQUEUE, Terminated
from data_pipelines.progress import finish_line


class Command(NamedTuple):
    """module: has `main(argv)`, returning an exit status or None.  extra: of pyproject.toml, where it needs one."""

    group: str
    module: str
    about: str
    extra: str = ""


_COMMANDS = "ahawam_jax.commands"
COMMANDS = {
    "record": Command("data", f"{_COMMANDS}.record", "demonstrations of the scripted expert, as a dataset", "sim"),
    "doctor": Command("data", f"{_COMMANDS}.doctor", "one page on a dataset: contents, faults, speed"),
    "view": Command("data", f"{_COMMANDS}.view", "one episode as a video with its curves"),
    "robocoin": Command("data", f"{_COMMANDS}.robocoin", "many datasets, looked through into a subset to train on"),
    "convert": Command("data", f"{_COMMANDS}.convert", "datasets to ArrayRecord shards for TFDS and grain", "tfds"),
    "encode-text": Command("data", f"{_COMMANDS}.encode_text", "instructions through umT5, once, into a cache"),
    "encode-video": Command("data", f"{_COMMANDS}.encode_video", "frames through the VAE, once, into a cache"),
    "plan": Command("train", f"{_COMMANDS}.plan", "memory, traffic and time of a run on a cluster, before it"),
    "train": Command("train", f"{_COMMANDS}.train", "train, or go on where a run was stopped"),
    "distill": Command("train", f"{_COMMANDS}.distill", "a trained policy into one of two steps instead of ten"),
    "demo": Command("train", f"{_COMMANDS}.demo", "record, train and evaluate the demo in one go", "sim"),
    "import-weights": Command("train", f"{_COMMANDS}.import_weights", "a release or Wan2.2 as a run to start from"),
    "export-weights": Command("train", f"{_COMMANDS}.export_weights", "a run as a release .pt or as safetensors"),
    "inspect": Command("look", f"{_COMMANDS}.inspect", "what a checkpoint, a weights file or a config holds"),
    "verify": Command("look", f"{_COMMANDS}.verify", "recompute the fixtures of the released code here"),
    "imagine": Command("look", f"{_COMMANDS}.imagine", "the future that the planner expects, as a video"),
    "film": Command("look", f"{_COMMANDS}.film", "a rollout, and what planner, router and executor do in it", "sim"),
    "ablation": Command("look", f"{_COMMANDS}.ablation", "which mechanism helps where: variants on tasks", "study"),
    "to-torch": Command("deploy", "export.to_torch", "a run as a folder for PyTorch, ONNX and TensorRT", "export"),
    "to-tensorrt": Command("deploy", "export.to_tensorrt", "that folder as engines for one kind of GPU", "export"),
    "validate": Command("deploy", "export.validate", "compare a deployment with JAX, graph by graph", "export"),
    "benchmark": Command("deploy", "export.benchmark", "latency of a deployment against its floor", "export"),
    "compile-policy": Command("serve", f"{_COMMANDS}.compile_policy", "trace a policy ahead of time for one device"),
    "evaluate": Command("serve", f"{_COMMANDS}.evaluate", "a run in closed loop in simulation", "sim"),
    "latency-study": Command("serve", f"{_COMMANDS}.latency_study", "what latency costs, by hand-over", "sim"),
    "evaluate-export": Command("serve", "export.evaluate", "a deployment in the same simulation", "export"),
    "robotwin": Command("serve", f"{_COMMANDS}.robotwin", "RoboTwin's tasks over devices, beside published numbers"),
    "expert": Command("serve", f"{_COMMANDS}.expert", "the scripted expert there, and what a task needs", "sim"),
    "serve": Command("serve", "export.serve", "a run or an export to clients, over a websocket"),
    "watch": Command("serve", f"{_COMMANDS}.watch", "what a server's robots see and do, live, in Rerun's viewer"),
}


def overview() -> str:
    """All commands, a line each, by group."""
    lines = ["usage: ahawam COMMAND ... (or python -m ahawam_jax COMMAND ...); each has --help"]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", group]
        lines.append(f"  {name:16s} {command.about}")
    return "\n".join(lines)


def _make_output_possible() -> None:
    """Without a terminal stdout may be closed, and its encoding may lack the letters of an instruction."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(*_: object) -> NoReturn:
    raise Terminated


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """In the block SIGTERM, which schedulers send, is a Terminated; who cannot press Ctrl-C is told so."""
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if blocked or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            print(f"Ctrl-C cannot reach this job, started in the background; to stop it: kill {os.getpid()}",
                  file=sys.stderr, flush=True)  # fmt: skip
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Whether stdout led to a program that has seen enough, as in `ahawam doctor DIR | head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # an error is always reported
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
    return gone


def _run(name: str, argv: list[str]) -> int:
    """Imports the command and runs it. argv: with its name."""
    command = COMMANDS[name]
    keep_compiled()
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").partition(".")[0] in ("ahawam_jax", "data_pipelines", "export"):
            raise
        if {"-h", "--help"} & set(argv):
            print(f"ahawam {name}: {command.about}. Its options are listed where {error.name} is installed.")
            return 0
        print(
            f"error: ahawam {name} needs the package {error.name}, which is not installed; "
            f"pip install 'ahawam-jax[{command.extra}]' or make install-dev brings it.",
            file=sys.stderr,
        )
        return 1
    _make_output_possible()
    return int(module.main(argv[1:]) or 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status, after SIGTERM REQUEUE."""
    argv = sys.argv[1:] if arguments is None else arguments
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else 2
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else "ahawam --help lists them."
        print(f"error: {argv[0]!r} is no command; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"ahawam {name}", *argv[1:]]
    try:
        with _stopped_by_signals():
            return _run(name, argv)
    except KeyboardInterrupt as stop:
        print("\nstopped", file=sys.stderr)
        return REQUEUE if isinstance(stop, Terminated) else 128 + signal.SIGINT
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    finally:
        finish_line()  # so that an error gets a line of its own


if __name__ == "__main__":
    sys.exit(main())
