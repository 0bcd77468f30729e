"""Serves a policy over a websocket, for the clients of openpi and for packages/ahawam-client; see docs/serving.md.

    ahawam serve --checkpoint=runs/demo/run --port=8000
    ahawam serve --checkpoint=exports/demo --port=8000        # what ahawam to-torch wrote, in PyTorch or engines

Ctrl-C or SIGTERM finishes the answers under way and ends. It lives here because this house knows both kinds of policy.
"""

import argparse
import asyncio
import ipaddress
import signal
import sys
from pathlib import Path

from absl import logging

from ahawam_jax.commands.flags import add_robot
from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.inference.streaming import LATE, StreamedPolicy, StreamSettings
from ahawam_jax.serving.server import Limits, PolicyServer
from data_pipelines.paths import local_path
from export.loading import is_export, load_policy

MIB = 2**20


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--checkpoint", type=local_path, required=True, help="workdir, checkpoint step or export")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 for any free one")
    p.add_argument("--instruction", help="of clients that send none, and of the first call before any client")
    p.add_argument("--token-file", type=local_path, help="file whose first line every client must present")
    p.add_argument("--clients", type=int, help="at a time (default 4; an export has room for 1)")
    p.add_argument("--max-message", type=float, default=16, help="MiB of an observation (default %(default)s)")
    p.add_argument("--max-rate", type=float, default=100, help="observations a second, of a client (%(default)s)")
    p.add_argument("--refresh-every", type=int, help="R, executor calls per planner refresh")
    p.add_argument("--steps", type=int, help="Euler steps of the executor")
    p.add_argument("--execute", type=int, help="actions of a chunk that a client runs before its next observation")
    p.add_argument("--hand-over", choices=HAND_OVERS, help="what a chunk makes of the rest of the one before, where "
                   "a client sends it (docs/handover.md; default: trained where the checkpoint was, else skip)")
    add_robot(p)
    p.add_argument("--target", help="of an export: use its engines for this GPU")
    streams = p.add_argument_group("two streams (docs/streaming.md)")
    streams.add_argument("--streaming", action="store_true", help="refresh the planner beside the chunks")
    streams.add_argument("--max-age", type=int, help="control steps that a plan may be old (default: as trained)")
    streams.add_argument("--late", choices=LATE, help="where every plan is older: wait (default) or hold")
    streams.add_argument("--planner-device", type=int, help="of a run: number of the JAX device that has the planner")
    streams.add_argument("--refresh-slices", type=int, help="of a run: parts of a refresh, between which chunks run")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # orbax reports every file it reads
    try:
        if not 0 <= options.port < 2**16:
            raise ValueError(f"--port is {options.port}; expected 0 to {2**16 - 1}.")
        exported = is_export(options.checkpoint)
        token = None if options.token_file is None else read_token(options.token_file)
        clients = check_clients(options.clients, exported)
        limits = Limits(clients, int(options.max_message * MIB), options.max_rate)
        names = ("refresh_every", "steps", "execute")
        overrides = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        settings = stream_settings(options, exported)
        places = ("planner_device", "refresh_slices")
        overrides |= {name: getattr(options, name) for name in places if getattr(options, name) is not None}
        policy = load_policy(options.checkpoint, options.robot, options.dataset, options.target, **overrides)
        hand_over = HAND_OVERS.get(options.hand_over)
        if hand_over is not None:
            hand_over.check(policy, 1)
        if settings is not None:
            most, every = settings.bound(policy.sizes), policy.config.refresh_every * policy.config.execute
            policy = StreamedPolicy(policy, settings, several=not exported)
            if every > most:
                print(f"a refresh is due every {every} control steps and a plan may be {most} old, so chunks wait for "
                      "every refresh; lower --refresh-every.", file=sys.stderr, flush=True)  # fmt: skip
        server = PolicyServer(policy, limits, options.instruction, token, hand_over)
        print(f"{options.checkpoint}: the first calls compile ...", flush=True)
        print(f"ready after {server.warm_up():.1f} s", flush=True)
        asyncio.run(serve_until_signalled(server, options.host, options.port, token))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def stream_settings(options: argparse.Namespace, exported: bool) -> StreamSettings | None:
    """Of --streaming; None without it. Raises ValueError for flags that then mean nothing."""
    asked = {name: getattr(options, name) for name in ("max_age", "late", "planner_device", "refresh_slices")}
    given = ["--" + name.replace("_", "-") for name, value in asked.items() if value is not None]
    if given and not options.streaming:
        raise ValueError(f"{', '.join(given)} goes with --streaming; add it, or leave {given[0]} out.")
    if exported and (options.planner_device is not None or options.refresh_slices is not None):
        raise ValueError("--planner-device and --refresh-slices are of a run; an export has a stream for its planner.")
    return StreamSettings(options.max_age, late=options.late or "wait") if options.streaming else None


def check_clients(clients: int | None, exported: bool) -> int:
    """How many clients at a time."""
    if exported and clients not in (None, 1):
        raise ValueError(
            f"--clients is {clients}, but an export holds one episode at a time, in buffers on its device; start one "
            "server for each robot."
        )
    return clients if clients is not None else 1 if exported else Limits.clients


def read_token(path: Path) -> str:
    """The first line of a file, which must be words of ASCII."""
    lines = path.read_text(errors="replace").splitlines()
    token = lines[0].strip() if lines else ""
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"{path} holds no token: expected printable ASCII on its first line.")
    return token


async def serve_until_signalled(server: PolicyServer, host: str, port: int, token: str | None) -> None:
    """Serves; the first SIGTERM or SIGINT ends it in good order, a second one at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        print("finishing the answers under way ...", flush=True)
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    if token is None and not is_loopback(host):
        print(f"{host} can be reached from other machines, and no token is asked for: whoever reaches it can drive; "
              "--token-file closes it.", file=sys.stderr, flush=True)  # fmt: skip
    await server.run(host, port, stop, lambda port: print(f"serving at ws://{host}:{port}", flush=True))


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name other than localhost is not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
