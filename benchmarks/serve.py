"""Latency and throughput of `ahawam serve`, and the hostile campaign against it, in one run on this machine.

    python -m benchmarks.serve                          # the demo's model with random weights
    python -m benchmarks.serve --checkpoint runs/demo/run
    python -m benchmarks.serve --watched                # with and without somebody who watches
    python -m benchmarks.serve --hostile 10000

The server has a process of its own, its clients another. Numbers of clients alternate, so that a busy machine slows
all alike; each client sends its next observation, three cameras of 240x320 pixels and the rest of a chunk, as soon as
it has its answer.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import platform
import threading
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from websockets.sync.client import connect

from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.inference.policy import Policy, PolicyConfig
from ahawam_jax.models.aha_wam import AhaWam, init
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.serving.server import Limits, PolicyServer
from ahawam_jax.serving.wire import pack, unpack
from benchmarks.hostile import campaign
from configs import demo
from data_pipelines.normalization import Normalization
from data_pipelines.paths import local_path

CLIENTS, ROUNDS, SECONDS = (1, 4, 16), 3, 5.0
SIZE = (240, 320)
PROMPT = "open the drawer"


def random_policy(**where: Any) -> Policy:
    """The demo's model, every parameter random, so that no part is silent. where: to `Policy`."""
    config = demo.get_config()
    model = AhaWam(ModelConfig.create(config.model))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), nn.unbox(init(model, jax.random.key(0)))
    )
    how, statistics = Normalization(), {}
    for kind, width in (("state", config.model.state_dim), ("action", config.model.action_dim)):
        statistics[kind] = {"mean": np.zeros(width), "std": np.ones(width)} | how.of(kind, (), width)
    return Policy(model, params, config, statistics, PolicyConfig(**config.policy.to_dict()), **where)


def serve(pipe: Connection, checkpoint: str | None, limits: Limits, hand_over: str | None) -> None:
    """The server's process: sends its port once it accepts clients, and serves until it is ended."""
    policy = random_policy() if checkpoint is None else Policy.load(checkpoint)
    server = PolicyServer(policy, limits, hand_over=HAND_OVERS.get(hand_over), say=lambda line: None)
    server.warm_up()
    asyncio.run(server.run("127.0.0.1", 0, asyncio.Event(), pipe.send))


def episode(port: int, steps: int) -> list[dict[str, Any]]:
    """Observations as the server at this port wants them."""
    rng = np.random.default_rng(0)
    with connect(f"ws://127.0.0.1:{port}", max_size=None, proxy=None) as connection:
        wanted = unpack(connection.recv())
    left = max(wanted["chunk"] - wanted["execute"], 1), len(wanted["actions"])
    return [
        {"images": {camera: rng.integers(0, 256, (*SIZE, 3), np.uint8) for camera in wanted["cameras"]},
         "state": rng.normal(size=len(wanted["state"])).astype(np.float32), "prompt": PROMPT,
         "rest": rng.normal(size=left).astype(np.float32), "delay": wanted["max_delay"]}
        for _ in range(steps)
    ]  # fmt: skip


def drive(port: int, message: bytes, seconds: float, answers: list[tuple[float, dict[str, float]]]) -> None:
    """One client: round trips in seconds, with what the server says of each."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None) as connection:
        connection.recv()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            connection.send(message)
            timing = unpack(connection.recv())["server_timing"]
            answers.append((time.perf_counter() - began, timing))


def look(port: int, over: threading.Event) -> None:
    """A watcher that takes all that it is shown."""
    with connect(f"ws://127.0.0.1:{port}/watch", compression=None, max_size=None, proxy=None) as connection:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                connection.recv(0.2)


def measure(
    port: int, clients: int, seconds: float, message: bytes, watchers: int
) -> list[tuple[float, dict[str, float]]]:
    """All clients at once; the answers of all."""
    found: list[list[tuple[float, dict[str, float]]]] = [[] for _ in range(clients)]
    threads = [threading.Thread(target=drive, args=(port, message, seconds, answers)) for answers in found]
    over = threading.Event()
    looking = [threading.Thread(target=look, args=(port, over)) for _ in range(watchers)]
    for thread in looking + threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    for thread in looking:
        thread.join()
    return [answer for answers in found for answer in answers]


def latencies(port: int, rounds: int, seconds: float, cases: dict[str, tuple[int, int]]) -> None:
    """Prints the table. cases: numbers of clients and of watchers."""
    message = pack(episode(port, 1)[0])
    found: dict[str, list[tuple[float, dict[str, float]]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, (clients, watchers) in cases.items():
            found[case] += measure(port, clients, seconds, message, watchers)
    print("| clients | p50, ms | p99, ms | max, ms | policy call, ms | beside call and wait, ms | chunks/s |")
    print("|---|---|---|---|---|---|---|")
    for case, answers in found.items():
        trips = 1e3 * np.array([trip for trip, _ in answers])
        calls = np.array([timing["infer_ms"] for _, timing in answers])
        beside = trips - calls - [timing["wait_ms"] for _, timing in answers]
        columns = [*np.percentile(trips, (50, 99, 100)), np.median(calls), np.median(beside)]
        rate = len(answers) / (rounds * seconds)
        print(f"| {case} | {' | '.join(f'{x:.1f}' for x in columns)} | {rate:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=local_path, help="of a run (default: the demo's model, random weights)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each number of clients in each round "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument("--hostile", type=int, default=0, metavar="N", help="send so many hostile messages instead")
    parser.add_argument("--hand-over", choices=HAND_OVERS, help="as of ahawam serve")
    parser.add_argument("--watched", action="store_true", help="one client, with nobody and with watchers at /watch")
    options = parser.parse_args()
    limits = Limits(clients=64 if options.hostile else max(CLIENTS), rate=1e6)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, options.checkpoint, limits, options.hand_over),
                              daemon=True)  # fmt: skip
    process.start()
    theirs.close()
    port = ours.recv()
    print(f"{platform.machine()}, {os.cpu_count()} cores, JAX {version('jax')}, websockets {version('websockets')}")
    if options.hostile:
        report = campaign(port, episode(port, 3), options.hostile, process=process.pid)
        print(report.table())
        print(f"{report.compared} chunks of honest clients meanwhile, {report.differing} not as before, bit for bit")
        print(f"memory of the server, MiB: {', '.join(f'{x:.0f}' for x in report.memory)}; {report.seconds:.0f} s")
    else:
        cases = {str(clients): (clients, 0) for clients in CLIENTS}
        if options.watched:
            cases = {"1": (1, 0), "1, one watches": (1, 1), "1, two watch": (1, 2)}
        latencies(port, options.rounds, options.seconds, cases)
    assert process.is_alive(), "the server has died"
    process.kill()


if __name__ == "__main__":
    main()
