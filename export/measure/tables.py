"""What `ahawam benchmark` prints: rungs and modes by name, and rows of its tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from export.measure.models import chunk_bytes

TIMES_FLOOR, TIMES_FASTER = 1.6, 15  # the goals for the longest loop
EAGER, COMPILED, GRAPH, BEST = "eager", "compiled", "CUDA graph", "compiled + CUDA graph"
RELEASED, RELEASED_COMPILED = "released way, eager", "released way, compiled"

# Each rung is the one before with one change: its name, how it makes a chunk, and how it refreshes.
LADDER = (
    (RELEASED, RELEASED, RELEASED),
    ("+ CUDA graph of the executor's loop", "loop", RELEASED),
    ("+ CUDA graph of the router", "loop, router", RELEASED),
    ("+ prefill compiled", "loop, router", RELEASED_COMPILED),
    ("+ hoisting: the twin", "hoisted", f"twin, {COMPILED}"),
    ("+ skip-copy: buffers stay on the device", "skip-copy", f"twin, {COMPILED}"),
    ("+ VAE as 2-D convolutions", "flat VAE", f"twin, {COMPILED}"),
    ("+ VAE in the graph: one CUDA graph a chunk", f"twin, {GRAPH}", f"twin, {COMPILED}"),
    ("+ CUDA graph of the refresh", f"twin, {GRAPH}", f"twin, {BEST}"),
    ("+ chunk compiled", f"twin, {BEST}", f"twin, {BEST}"),
)
MODES = (EAGER, COMPILED, GRAPH, BEST)


class Latency(NamedTuple):
    """Milliseconds."""

    mean: float  # of the means of episodes
    p50: float
    p99: float


def cells(prefix: str, took: Latency, floor: float) -> dict[str, float]:
    """Columns of one latency; floor in ms."""
    return {
        f"{prefix}, ms": took.mean, "p50": took.p50, "p99": took.p99, "fraction of floor": floor / took.mean,
    }  # fmt: skip


def tables(
    chunks: dict[tuple[str, int], Latency], refreshes: dict[str, Latency], agreement: dict[Any, float | None],
    floors: dict[str, int], bandwidth: float,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Rows of the ladder, of the modes of the refresh and of the numbers of steps."""
    counts = sorted({n for _, n in chunks})
    floor = {n: chunk_bytes(floors, n) / 1e6 / bandwidth for n in counts}
    plan, last = floors["planner refresh"] / 1e6 / bandwidth, counts[-1]
    ladder = [
        {
            "rung": rung, **cells("L_chunk", chunks[way, last], floor[last]),
            "times faster": chunks[RELEASED, last].mean / chunks[way, last].mean,
            "L_prefill, ms": refreshes[refresh].mean, "prefill p50": refreshes[refresh].p50,
            "prefill p99": refreshes[refresh].p99, "cosine": agreement[way, last],
        }
        for rung, way, refresh in LADDER
        if (way, last) in chunks and refresh in refreshes
    ]  # fmt: skip
    modes = [
        {"way": way, **cells("L_prefill", took, plan), "cosine": agreement[way]} for way, took in refreshes.items()
    ]
    rungs = {way for _, way, _ in LADDER} - {RELEASED} - {f"twin, {mode}" for mode in MODES}
    steps = [
        {
            "way": way, "steps": n, **cells("L_chunk", took, floor[n]),
            "times faster": chunks[RELEASED, n].mean / took.mean, "cosine": agreement[way, n],
        }
        for (way, n), took in sorted(chunks.items(), key=lambda item: item[0][1]) if way not in rungs
    ]  # fmt: skip
    return {"ladder": ladder, "refresh": modes, "steps": steps}


def jax_rows(
    chunks: dict[int, Latency], refreshes: dict[str, Latency], floors: dict[str, int], bandwidth: float
) -> list[dict[str, Any]]:
    """Latencies of the JAX policy by number of steps, and of its refresh."""
    floor = {n: chunk_bytes(floors, n) / 1e6 / bandwidth for n in chunks}
    rows = [{"what": f"chunk, {n} steps", **cells("latency", took, floor[n])} for n, took in chunks.items()]
    plan = floors["planner refresh"] / 1e6 / bandwidth
    return rows + [{"what": name, **cells("latency", took, plan)} for name, took in refreshes.items()]


def written(value: Any) -> str:
    """A cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([written(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(rows: Sequence[dict[str, Any]], steps: int) -> list[str]:
    """What the last rung reached, beside what was asked for."""
    last = rows[-1]
    reached = (
        (f"{1 / last['fraction of floor']:.2f}x the floor", f"<= {TIMES_FLOOR}x",
         last["fraction of floor"] >= 1 / TIMES_FLOOR),
        (f"{last['times faster']:.1f}x faster than the released way in eager PyTorch", f">= {TIMES_FASTER}x",
         last["times faster"] >= TIMES_FASTER),
    )  # fmt: skip
    verdict = {True: "met", False: "missed"}
    return [f"chunk of {steps} steps: {what}, goal {goal}: {verdict[met]}" for what, goal, met in reached]
