"""CUDA graphs of functions of tensors."""

import gc
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # runs before a capture: libraries choose kernels and allocate in the first ones


def capture(run: Callable[[], Any], stream: Any) -> tuple[Callable[[], None], Any]:
    """Captures `run`, which then may not be called, on a stream: the function that replays it, and its outputs.

    Other threads of the process may use the GPU meanwhile. PyTorch frees unreferenced memory before every capture, so
    what `run` alone refers to lives as long as the function. RuntimeError if something in it cannot be captured.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # what a collection frees may be a graph or an event, which ends a capture
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
    finally:
        if collecting:
            gc.enable()

    def replay(_: Callable[[], Any] = run) -> None:
        graph.replay()

    return replay, outputs
