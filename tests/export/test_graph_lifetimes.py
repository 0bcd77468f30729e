"""What a CUDA graph reads must outlive it: PyTorch frees unreferenced memory before every capture."""

import contextlib
import functools
import gc
import weakref
from typing import Any

import pytest
import torch

from export.measure.ladder import Captured
from export.runtime import DeployedPolicy


class Held(torch.nn.Module):
    """Something that only the captured function refers to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Fake:
    """A stream, or a graph, without a GPU."""

    replays: list[str] = []

    def __init__(self, *arguments: Any, **settings: Any): ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def replay(self) -> None:
        self.replays.append("once")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Fake, "replays", [])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: contextlib.nullcontext())


def test_a_captured_function_is_kept(no_gpu: None) -> None:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    held = Held()
    alive = weakref.ref(held)
    captured = Captured(held, torch.zeros(2).as_subclass(OnGpu))
    del held
    gc.collect()
    assert alive() is not None
    captured()
    assert Fake.replays == ["once"]


def test_a_policy_keeps_the_stages_of_its_graphs(no_gpu: None) -> None:
    policy = DeployedPolicy.__new__(DeployedPolicy)
    policy._engines, policy.backends = {}, {}
    held = Held()
    alive = weakref.ref(held)
    replay = policy._captured("chunk", ("vae",), [functools.partial(held, torch.zeros(1))], Fake())
    assert policy.backends == {"vae": "CUDA graph"}
    del held
    gc.collect()
    assert alive() is not None
    replay()
