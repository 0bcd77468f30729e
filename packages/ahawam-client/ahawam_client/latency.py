"""How long a chunk takes, from this computer to a policy server and back: L_chunk, and what that is in control steps.

    python -m ahawam_client.latency ws://gpu:8000 --rate 25 --instruction "pick up the cube"

Sends black pictures, and zeros for the state and for the rest of a chunk; no robot is needed, and none is moved.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

from ahawam_client.client import PolicyClient, ServerError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ahawam_client.latency", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("server", metavar="URL", help="of ahawam serve")
    parser.add_argument("--rate", type=float, required=True, help="control steps a second of the robot")
    parser.add_argument("--instruction", help="default: the server's own")
    parser.add_argument("--token-file", type=Path, help="file whose first line is the server's token")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"),
                        help="of a picture (default 480 640)")  # fmt: skip
    parser.add_argument("--calls", type=int, default=100, help="default %(default)s")
    options = parser.parse_args(argv)
    try:
        if not options.rate > 0 or options.calls < 2:
            raise ValueError("expected a --rate above 0 and at least 2 --calls.")
        token = options.token_file.read_text().partition("\n")[0].strip() if options.token_file else None
        with PolicyClient(options.server, token) as policy:
            for line in measure(policy, options.rate, options.calls, tuple(options.size), options.instruction):
                print(line)
    except (ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(
    policy: PolicyClient, rate: float, calls: int, size: tuple[int, int], prompt: str | None
) -> list[str]:
    """Asks at the pace of a robot that runs `execute` actions of each chunk, and says what came of it."""
    says = policy.metadata
    images = {camera: np.zeros((*size, 3), np.uint8) for camera in says["cameras"]}
    state, trips, timings, fresh = np.zeros(len(says["state"]), np.float32), [], [], []
    spare, covered = says["chunk"] - says["execute"], says["max_delay"]
    rest = np.zeros((spare, len(says["actions"])), np.float32)
    for _ in range(calls):
        began = time.perf_counter()
        answer = policy.infer(images, state, prompt, rest, covered)
        trips.append(1e3 * (time.perf_counter() - began))
        timings.append(answer["server_timing"])
        fresh.append(answer["refreshed"])
        time.sleep(max(0.0, began + says["execute"] / rate - time.perf_counter()))
    computing = np.array([timing["infer_ms"] for timing in timings])
    trip, refreshed = np.array(trips), np.array(fresh)
    steps = math.ceil(np.percentile(trip, 99) * rate / 1e3)
    lines = [
        f"L_chunk, round trip of {calls} calls: {_spread(trip)} ms",
        f"  of it computing: {_spread(computing)} ms; on the way and waiting: {_spread(trip - computing)} ms",
    ]
    if refreshed.any() and not refreshed.all():
        lines.append(f"  with a planner refresh {_spread(trip[refreshed])} ms, without {_spread(trip[~refreshed])} ms")
    lines.append(
        f"at {rate:g} control steps a second 99 of 100 chunks are there within {steps} step(s); a chunk has "
        f"{says['chunk']} actions, of which {says['execute']} are run before the next is asked for"
    )
    way = "fewer --steps, or a faster machine"
    if steps < says["chunk"]:
        way = f"serve with --execute={says['chunk'] - steps} or less, {way}"
    lines.append(f"that hides {spare} step(s): {'enough' if steps <= spare else f'the robot will hold; {way}'}")
    hand_over = says["hand_over"]
    held = "the robot holds" if hand_over == "wait" else "enough" if steps <= covered else "later ones will jump"
    lines.append(f"the server's hand-over, {hand_over}, is for chunks that come up to {covered} step(s) late: {held}")
    return lines


def _spread(values: np.ndarray) -> str:
    median, high, most = np.percentile(values, (50, 99, 100))
    return f"{median:.1f} (median), {high:.1f} (p99), {most:.1f} (most)"


if __name__ == "__main__":
    sys.exit(main())
