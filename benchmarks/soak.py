"""Two streams on the real clock for minutes, with pauses in all places: how old do plans get?

    python -m benchmarks.soak --minutes 10                    # the demo's model with random weights
    python -m benchmarks.soak --minutes 10 --checkpoint runs/demo/run --refresh-slices 4

A loop asks for a chunk whenever a robot would have run the one before. Now and then the loop stands still, the planner
does, a refresh fails, or an episode ends. The exit status is 1 if a chunk was made of a plan older than its bound.
"""

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from ahawam_jax.inference.policy import Policy
from ahawam_jax.inference.streaming import LATE, Chunk, Stream, StreamSettings
from benchmarks.serve import SIZE, random_policy
from data_pipelines.paths import local_path

PAUSES, EPISODES, FAILURES = 0.03, 0.01, 0.03  # chances: of a chunk, of a chunk, of a refresh
STANDS, DRAGS = 2.0, 1.0  # seconds at most, of the loop and of a refresh


def troubled(policy: Any, rng: np.random.Generator) -> None:
    """Makes the policy's refreshes last longer, and fail, at random."""
    refreshing: Callable[..., Any] = policy.refreshing

    def slow(observation: Any, state: Any) -> Generator[None, None, Any]:
        time.sleep(DRAGS * rng.random() ** 2)
        if rng.random() < FAILURES:
            raise RuntimeError("a failure of this soak")
        return (yield from refreshing(observation, state))

    policy.refreshing = slow


def soak(stream: Stream, policy: Any, seconds: float, rate: float, rng: np.random.Generator) -> list[Chunk]:
    """Drives the stream for a time; all chunks. rate: control steps a second."""
    cameras = [camera for camera in policy.canvas.cameras if camera not in policy.embodiment.absent]
    shown = [
        ({camera: rng.integers(0, 256, (1, *SIZE, 3), np.uint8) for camera in cameras},
         rng.normal(size=(1, len(policy.embodiment.state.names))).astype(np.float32))
        for _ in range(4)
    ]  # fmt: skip
    chunks: list[Chunk] = []
    row, execute = 0, policy.config.execute
    stream.start(["open the drawer"])
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        if rng.random() < EPISODES:
            stream.start(["open the drawer"])
            row = 0
        chunks.append(stream.act(stream.observe(*shown[len(chunks) % len(shown)], row)))
        row += execute
        time.sleep(max(0.0, began + execute / rate - time.monotonic()))
        if rng.random() < PAUSES:
            time.sleep(STANDS * rng.random())
    return chunks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, help="default %(default)s")
    parser.add_argument("--checkpoint", type=local_path, help="of a run (default: the demo's model, random weights)")
    parser.add_argument("--refresh-slices", type=int, default=2, help="default %(default)s")
    parser.add_argument("--refresh-every", type=int, default=1, help="chunks (default %(default)s)")
    parser.add_argument("--execute", type=int, default=4, help="actions of a chunk (default %(default)s)")
    parser.add_argument("--rate", type=float, default=8.0, help="control steps a second (default %(default)s)")
    parser.add_argument("--max-age", type=int, help="control steps (default: as trained)")
    parser.add_argument("--max-age-ms", type=float, default=2000.0, help="default %(default)s")
    parser.add_argument("--late", choices=LATE, default="wait", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    options = parser.parse_args()
    where = {"refresh_slices": options.refresh_slices}
    policy = random_policy(**where) if options.checkpoint is None else Policy.load(options.checkpoint, **where)
    policy.config = dataclasses.replace(policy.config, refresh_every=options.refresh_every, execute=options.execute)
    policy.config.check(policy.sizes)
    settings = StreamSettings(options.max_age, options.max_age_ms, options.late)
    kinds: Counter[str] = Counter()
    stream = Stream(policy, settings, log=lambda event: kinds.update([event["event"]]), say=lambda line: None)
    rng = np.random.default_rng(options.seed)
    soak(stream, policy, 10, options.rate, rng)  # compiles
    kinds.clear()
    troubled(policy, np.random.default_rng(options.seed + 1))
    chunks = soak(stream, policy, 60 * options.minutes, options.rate, rng)
    print(", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    acted = [chunk for chunk in chunks if not chunk.held]
    waited = [chunk.waited_ms for chunk in acted if chunk.waited_ms > 1]
    told = sum(chunk.error is not None for chunk in chunks)
    print(f"held {len(chunks) - len(acted)}, waited {len(waited)}, told of a failure {told}")
    print("| | p50 | p90 | p99 | max | bound |\n|---|---|---|---|---|---|")
    beyond = False
    for name, values, bound in (
        ("age, control steps", [chunk.age_rows for chunk in acted], stream.max_age),
        ("age, ms", [chunk.age_ms for chunk in acted], options.max_age_ms),
        ("waited for a plan, ms, where one did", waited or [0.0], None),
    ):
        columns = " | ".join(f"{x:.0f}" for x in np.percentile(values, (50, 90, 99, 100)))
        print(f"| {name} | {columns} | {'-' if bound is None else f'{bound:g}'} |")
        beyond |= bound is not None and max(values) > bound
    if beyond:
        sys.exit("a chunk was made of a plan older than its bound.")


if __name__ == "__main__":
    main()
