"""Shows what a policy server's robots see and do, live, in Rerun's viewer.

    ahawam watch ws://gpu:8000 [--token-file FILE]
    ahawam watch ws://gpu:8000 --save driven.rrd          # into a file, which `rerun driven.rrd` opens

Cameras, the joints that were asked for against those that the robot has, the plan's age, and where the time goes, by
control step. It only looks: the server's clients do not notice. Ctrl-C ends it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from ahawam_jax.serving.view import View
from ahawam_jax.serving.watching import PATH
from ahawam_jax.serving.wire import WireError, unpack
from data_pipelines.paths import local_path
from data_pipelines.progress import StatusLine

TIMEOUT = 10.0  # seconds to connect


class WatchError(RuntimeError):
    """There is nothing to watch; the message says why."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("server", metavar="URL", help="of ahawam serve, as ws://127.0.0.1:8000")
    p.add_argument("--token-file", type=local_path, help="file whose first line is the server's token")
    p.add_argument("--save", type=local_path, metavar="FILE", help="write a file (.rrd); no viewer opens")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        token = None if options.token_file is None else options.token_file.read_text().partition("\n")[0].strip()
        if options.save is not None and (options.save.suffix != ".rrd" or not options.save.parent.is_dir()):
            raise WatchError(f"--save is {options.save}; expected a name that ends in .rrd, in a folder that exists.")
        with _connected(options.server, token) as connection:
            return _watch(connection, options.save)
    except (WatchError, WireError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _connected(url: str, token: str | None) -> ClientConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.path.rstrip("/") not in ("", PATH):
        raise WatchError(f"{url} is no address of a server; expected one as ws://127.0.0.1:8000.")
    headers = {"Authorization": f"Api-Key {token}"} if token else None
    try:
        return connect(
            f"{parts.scheme}://{parts.netloc}{PATH}", compression=None, max_size=None, additional_headers=headers,
            open_timeout=TIMEOUT,
        )  # fmt: skip
    except (OSError, InvalidHandshake, InvalidURI, ConnectionClosed, EOFError) as error:
        body = getattr(getattr(error, "response", None), "body", None)
        said = body.decode(errors="replace").strip() if body else str(error)
        raise WatchError(f"{url} lets nobody watch: {said}") from error


def _watch(connection: ClientConnection, save: Path | None) -> int:
    try:
        from ahawam_jax.serving.rerun_sink import RerunSink
    except ModuleNotFoundError as error:
        raise WatchError(
            f"the package {error.name} is not installed; pip install 'ahawam-jax[watch]' brings it."
        ) from error
    sink, line, shown, answer = RerunSink(save), StatusLine(), 0, None
    try:
        view = View(unpack(connection.recv(TIMEOUT)), sink)
        print(f"watching{'' if save is None else f' into {save}'}; Ctrl-C ends it", flush=True)
        for message in connection:
            answer, shown = view.show(message), shown + 1
            line.show(_status(shown, answer))
        print(f"the server ended the connection: {connection.close_reason or 'without a reason'}")
    except KeyboardInterrupt:
        pass
    except ConnectionClosed as error:
        raise WatchError(f"the connection was cut after {shown} frames.") from error
    finally:
        sink.close()
    print(f"{shown} frames shown")
    return 0


def _status(shown: int, answer: dict[str, Any]) -> str:
    return (
        f"  {shown} frames, episode {answer['episode_number']}, step {answer['step']}, "
        f"plan {answer['plan_age']} steps old, {answer['server_timing']['infer_ms']:.0f} ms"
    )
