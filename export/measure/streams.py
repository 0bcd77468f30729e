"""What a chunk takes while the planner refreshes on the same GPU, each on a stream of its own."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from export.measure.ladder import Call, Captured, Chunk, Ways

# Seconds between two refreshes; back to back, the next one is queued before one ends.
SITUATIONS = {"no refresh": None, "a refresh every 0.5 s": 0.5, "refreshes back to back": 0.0}
CHUNKS_PER_SECOND = 25.0


def measure_streams(ways: Ways, steps: int, calls: Sequence[Call], repeats: int) -> list[dict[str, Any]]:
    """Latency of `repeats` chunks of the compiled twin's graph in every situation, host to host, in milliseconds.

    Once with kernels of the same priority as the refresh's, once with those of the chunk going first.
    """
    m = ways.models
    valid = torch.ones(m.memory_k.shape[1:3], dtype=torch.bool, device=m.device)
    refresh = ways.captured_planning(ways.planning(True, m.memory_k, m.memory_v, valid))
    rows: list[dict[str, Any]] = []
    for label, priority in (("equal", 0), ("the chunk's first", -1)):
        chunk = ways.twin(steps, compiled=True, graph=True, priority=priority)
        idle = None
        for situation, period in SITUATIONS.items():
            took, rate = run_beside(chunk, refresh, calls, period, repeats, priority)
            p50, p99 = np.percentile(took, (50, 99)).tolist()
            idle = idle or p99
            rows.append({
                "kernels": label, "situation": situation, "chunk p50, ms": p50, "p99": p99, "max": max(took),
                "p99 over idle": p99 / idle, "refreshes/s": rate,
            })  # fmt: skip
    return rows


def run_beside(
    chunk: Chunk, refresh: Captured, calls: Sequence[Call], period: float | None, repeats: int, priority: int
) -> tuple[list[float], float]:
    """Milliseconds of every chunk, and the refreshes a second that ran beside them."""
    low, high = torch.cuda.Stream(priority=0), torch.cuda.Stream(priority=priority)
    pending: deque[torch.cuda.Event] = deque()
    took, count, launched = [], 0, -np.inf
    began = time.perf_counter()
    for i in range(repeats):
        while pending and pending[0].query():
            pending.popleft()
        while period is not None and len(pending) < 2 and time.perf_counter() - launched >= period:
            launched, count = time.perf_counter(), count + 1
            with torch.cuda.stream(low):
                refresh()
                pending.append(torch.cuda.Event())
                pending[-1].record()
        asked = time.perf_counter()
        with torch.cuda.stream(high):
            chunk(calls[i % len(calls)])
        took.append(1e3 * (time.perf_counter() - asked))
        time.sleep(max(0.0, began + (i + 1) / CHUNKS_PER_SECOND - time.perf_counter()))
    torch.cuda.synchronize()
    return took, count / (time.perf_counter() - began)
