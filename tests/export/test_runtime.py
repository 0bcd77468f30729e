"""The deployed policy does what the JAX policy does, and keeps its word about engines, states and batches."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from ahawam_jax.inference.policy import Policy, PolicyConfig, load_run
from ahawam_jax.inference.streaming import Chunk, Stream, replay
from ahawam_jax.models.aha_wam import AhaWam
from data_pipelines.canvas import CAMERAS
from export import runtime
from export.exported import load_export
from export.manifest import ExportError
from export.runtime import DeployedPolicy
from export.to_torch import convert
from tests import tiny_config
from tests.conftest import REPOSITORY
from tests.export.test_to_torch import import_random
from tests.tiny_model import assert_close

WORDS = ["open the drawer", "close it"]
# Float32 through encoder, planner, router and two steps, over calls whose memory comes from earlier ones: each alone
# stays below 2e-5.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_random(tiny_config.get_config(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "tiny"
    convert(run, out)
    return out


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of the JAX policy, which is drawn by another generator."""
    monkeypatch.setattr(
        runtime, "draw_noise", lambda seed, call, shape: np.array(
            jax.random.normal(jax.random.fold_in(jax.random.key(seed), call), (shape[0], 1, *shape[1:]))[:, 0]
        ),
    )  # fmt: skip


def observations(batch: int, calls: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(5)
    views = [{camera: rng.integers(0, 256, (batch, 40, 48, 3), np.uint8) for camera in CAMERAS} for _ in range(calls)]
    return [(images, rng.normal(size=(batch, 5)).astype(np.float32)) for images in views]


def drive(policy: Any, batch: int, calls: int) -> np.ndarray:
    """Actions [calls, B, T, d]."""
    state, out = policy.start(WORDS[:batch]), []
    for images, joints in observations(batch, calls):
        actions, state = policy(images, joints, state)
        out.append(actions)
    return np.stack(out)


@pytest.mark.parametrize("changes", [{}, {"memory": False}, {"routing": False}, {"refresh_every": 1, "steps": 3}])
@pytest.mark.parametrize("batch", [1, 2])
def test_acts_as_jax_does(run: Path, exported: Path, same_noise: None, batch: int, changes: dict) -> None:
    """Seven calls: the memory of two frames fills and overflows."""
    with jax.default_matmul_precision("highest"):
        expected = drive(Policy.load(run, **changes), batch, 7)
    policy = DeployedPolicy.load(exported, device="cpu", **changes)
    assert_close(drive(policy, batch, 7), expected, TOLERANCE)
    assert policy.backends == dict.fromkeys(("vae", "planner", "router", "executor"), "eager")


@pytest.mark.parametrize("changes", [{"refresh_every": 1}, {"refresh_every": 1, "memory": False}])
def test_keeps_the_first_frame_as_jax_does(run: Path, exported: Path, same_noise: None, changes: dict) -> None:
    """Two episodes of five refreshes, memory of two: the second begins with its own first frame."""
    model, params, record = load_run(run)
    config, export = ConfigDict(record["config"]), load_export(exported)
    anchored = dataclasses.replace(model.config, memory_anchor=True)
    settings = PolicyConfig(steps=2, execute=4, **changes)
    ours = Policy(AhaWam(anchored), params, config, export.statistics, settings)
    plain = Policy(model, params, config, export.statistics, settings)
    theirs = DeployedPolicy(dataclasses.replace(export, model=anchored), settings, torch.device("cpu"))
    with jax.default_matmul_precision("highest"):
        expected = [drive(policy, 2, 5) for policy in (ours, ours, plain)]
    assert_close([drive(theirs, 2, 5) for _ in range(2)], expected[:2], TOLERANCE)
    np.testing.assert_array_equal(expected[0], expected[1])
    same = np.abs(expected[0] - expected[2]).max() < 1e-4  # a sum in another order: the frame lies in another slot
    assert same == (not settings.memory)


def test_a_new_episode_forgets_the_last(exported: Path) -> None:
    policy = DeployedPolicy.load(exported, device="cpu")
    first = drive(policy, 1, 3)
    np.testing.assert_array_equal(drive(policy, 1, 3), first)
    drive(policy, 2, 3)  # buffers of another batch
    np.testing.assert_array_equal(drive(policy, 1, 3), first)
    assert not np.array_equal(first[0], first[1])


def test_states_of_the_past_are_refused(exported: Path) -> None:
    policy = DeployedPolicy.load(exported, device="cpu")
    (images, joints), (again, _) = observations(1, 2)
    early = policy.start(WORDS[:1])
    _, late = policy(images, joints, early)
    with pytest.raises(ValueError, match="The state is of refresh 0 of batch 1, the memory of refresh 1"):
        policy(images, joints, early)
    with pytest.raises(ValueError, match="finite numbers, one row per episode"):
        policy(images, joints * np.nan, late)
    policy(again, joints, late)  # a refused call changes nothing
    policy.start(WORDS[1:])
    with pytest.raises(ValueError, match="of batch 1, this policy is at batch 2.*load a second policy"):
        policy(images, joints, late)


def test_a_refresh_beside_chunks(exported: Path) -> None:
    """In threads: plans come late, a start waits for what still writes in the buffers, the log replays bit for bit."""
    policy = DeployedPolicy.load(exported, device="cpu", execute=2)
    events: list[dict] = []
    stream, shown, actions = Stream(policy, log=events.append), {}, []

    def call(number: int) -> Chunk:
        images, joints = observations(1, 5)[number]
        seen = stream.observe(images, joints, 2 * number)
        shown[seen.episode, seen.number] = images, joints
        chunk = stream.act(seen)
        actions.append(chunk.actions)
        return chunk

    stream.start(WORDS[:1])
    assert call(0).age_rows == 0
    plan, entered, may = policy._plan, threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert may.wait(20)
        plan()

    policy._plan = slow
    late = [call(number) for number in (1, 2, 3)]  # one is due at the second
    assert [(chunk.plan, chunk.age_rows) for chunk in late] == [(0, 2), (0, 4), (0, 6)]
    may.set()
    stream._background.wait()
    may.clear(), entered.clear()
    assert call(4).plan_row == 4
    assert entered.wait(20)
    threading.Timer(0.2, may.set).start()
    stream.start(WORDS[1:])
    assert may.is_set()
    assert call(0).plan_row == 0
    assert [event["event"] for event in events].count("dropped") == 1
    again = replay(DeployedPolicy.load(exported, device="cpu", execute=2), events, shown)
    np.testing.assert_array_equal(again, actions)


def test_a_lost_memory_is_as_none(exported: Path) -> None:
    """Also where the refresh has failed midway."""
    policy = DeployedPolicy.load(exported, device="cpu", refresh_every=1)
    seen = [policy.encode(*shown, 1) for shown in observations(1, 3)]
    state = policy.start(WORDS[:1])
    for observation in seen[:2]:
        state = policy.refresh(observation, state)
    forgotten = policy.refresh(seen[2], policy.forget(state))
    new = policy.refresh(seen[2], policy.start(WORDS[:1]))
    for got, want in zip(forgotten.context, new.context, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(new.context[0], state.context[0])


def test_without_a_gpu_engines_are_replaced(exported: Path) -> None:
    said: list[str] = []
    policy = DeployedPolicy.load(exported, target="rtx5090d", device="cpu", say=said.append)
    assert len(said) == 1 and said[0].startswith("without engines: engines run on a GPU")
    assert set(policy.backends.values()) == {"eager"}
    assert np.isfinite(drive(policy, 1, 1)).all()


def test_engines_one_by_one(exported: Path, same_noise: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs whose engine loads run there, the others in PyTorch, from the same buffers. Stand-ins for engines run
    the float32 modules of the twin."""
    expected = drive(DeployedPolicy.load(exported, device="cpu"), 1, 3)
    modules = DeployedPolicy.load(exported, device="cpu")._graphs

    class StandIn:
        def __init__(self, library: Any, plan: bytes, name: str) -> None:
            if name == "router":
                raise ExportError("tensorrt_rtx cannot load the engine of the router")
            self.graph = modules[name]

        def bind(self, **places: torch.Tensor) -> None:
            self.places = places

        def launch(self) -> None:
            for name, x in self.graph(**{name: self.places[name] for name in self.graph.inputs}).items():
                self.places[name].copy_(x)

    class Folder:
        trt, manifest = None, {"steps": 2}

        def plan(self, graph: str) -> bytes:
            return b""

    monkeypatch.setattr(runtime, "Engine", StandIn)
    monkeypatch.setattr(runtime, "find_engines", lambda folder, target: Folder())
    said: list[str] = []
    policy = DeployedPolicy.load(exported, target="rtx5090d", device="cpu", say=said.append)
    assert said == ["router in PyTorch: tensorrt_rtx cannot load the engine of the router"]
    assert policy.backends == {"vae": "engine", "planner": "engine", "router": "eager", "executor": "engine"}
    assert {name for name, _ in policy._planner.named_children()} == {"text"}  # weights are held once
    np.testing.assert_array_equal(drive(policy, 1, 3), expected)
    with pytest.raises(ValueError, match="The engines are built for one episode at a time, 2 were started"):
        policy.start(WORDS)
    said.clear()
    DeployedPolicy.load(exported, target="rtx5090d", device="cpu", say=said.append, steps=3)
    assert said == ["without engines: they take 2 steps, 3 were asked for."]


def test_no_jax_backend_is_started(exported: Path) -> None:
    """It would take most of the GPU's memory for itself."""
    code = (
        "import sys, numpy as np; from export.runtime import DeployedPolicy\n"
        "policy = DeployedPolicy.load(sys.argv[1], device='cpu'); state = policy.start(['open it'])\n"
        "images = {c: np.zeros((1, 32, 48, 3), np.uint8) for c in ('cam_high', 'cam_left_wrist', 'cam_right_wrist')}\n"
        "policy(images, np.zeros((1, 5)), state)\n"
        "from jax._src import xla_bridge; sys.exit(xla_bridge.backends_are_initialized())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(exported)], cwd=REPOSITORY, check=True)
