"""A command that ends with the process that started it, and whatever the command started with it.

Scripts start servers and simulators of their own, in the background too. A scheduler that is killed cannot end them,
so each job runs under a keeper, which holds the other end of a pipe.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

PATIENCE = 10.0  # seconds between the signal to end and the one that cannot be refused
_CODE = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import keep; keep(sys.argv[2:])"
_ROOT = Path(__file__).resolve().parents[1]


def start(command: Sequence[str], folder: Path, variables: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen:
    """Starts a command under a keeper; closing `stdin` of what is returned ends the command and all that it began.

    Its exit status is the command's, or it dies of the signal that the command died of.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, str(_ROOT), *command], cwd=folder, env=dict(variables), stdin=subprocess.PIPE,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def keep(command: Sequence[str]) -> None:
    """Runs the command in a group of its own until it ends, or until nobody holds the pipe."""
    # A handler, not SIG_IGN: the child would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"error: {command[0]} cannot be started: {error.strerror}", flush=True)
        os._exit(127)

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: this is the pipe's end
        end(child)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(child)  # what it left in the background
    if code < 0:
        with suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def end(child: subprocess.Popen) -> None:
    """Ends the group of a process: with SIGTERM, and what is left of it after PATIENCE with SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            child.poll()  # a zombie would count as alive
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
