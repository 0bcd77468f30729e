"""Where a policy's streams run changes nothing: slices, two devices and threads give the bits of plain calls."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import pytest

from ahawam_jax.inference.policy import Observation, Policy, PolicyConfig, PolicyState
from ahawam_jax.inference.streaming import Stream, StreamSettings, replay
from ahawam_jax.models.aha_wam import AhaWam
from tests.conftest import REPOSITORY
from tests.inference.test_policy import CONFIG, INSTRUCTIONS, MODEL, STATISTICS, observation
from tests.tiny_model import random_params

LAYERS = 3
SIZES = dataclasses.replace(MODEL.config, num_layers=LAYERS, horizon=24)
PARAMS = random_params(SIZES)
SETTINGS = PolicyConfig(steps=1, execute=4, refresh_every=2)


def policy(**where: Any) -> Policy:
    return Policy(AhaWam(SIZES), PARAMS, CONFIG, STATISTICS, SETTINGS, **where)


@pytest.fixture(scope="module")
def whole() -> Policy:
    return policy()


def drive(policy: Policy, calls: int = 9) -> list[Any]:
    """Actions, and in the end plan and memory."""
    state, out = policy.start(INSTRUCTIONS), []
    for call in range(calls):
        actions, state = policy(*observation(call), state)
        out.append(actions)
    return [out, state.context, state.memory]


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def compare_slices() -> None:
    """Five refreshes, memory of two: the ring goes round."""
    want = drive(policy())
    for slices in (2, LAYERS):
        assert_same(drive(policy(refresh_slices=slices)), want)


def test_slices_change_nothing() -> None:
    """Bit for bit as XLA compiles for CPUs; the flag with which the tests compile faster fuses over layers."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    code = "from tests.inference import test_placing; test_placing.compare_slices()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_refresh_goes_on_slice_by_slice() -> None:
    sliced = policy(refresh_slices=2)
    slices = sliced.refreshing(sliced.encode(*observation(0), 2), sliced.start(INSTRUCTIONS))
    assert len(list(slices)) == 2


def test_two_devices_change_nothing(whole: Policy) -> None:
    first, second = jax.devices()[:2]
    apart = policy(planner_device=second)
    assert not apart.one_queue and whole.one_queue
    want, got = drive(whole), drive(apart)
    assert_same(got, want)
    state = apart.refresh(apart.encode(*observation(0), 2), apart.start(INSTRUCTIONS))
    for tree, device in (
        (state.context, first), (state.words, first), (apart.deployed, first),
        (state.memory, second), (state.planner_words, second), (apart._deployed_planner, second),
    ):  # fmt: skip
        assert {x.device for x in jax.tree.leaves(tree)} == {device}
    planners = {str(path) for path, _ in jax.tree.leaves_with_path(apart.deployed.params) if "planner" in str(path)}
    assert not planners  # weights lie on one device


def test_the_synchronous_schedule_is_the_stream_that_waits(whole: Policy) -> None:
    stream = Stream(whole, StreamSettings(max_age=4), say=lambda line: None)
    stream.start(INSTRUCTIONS)
    chunks = [stream.act(stream.observe(*observation(call), 4 * call)) for call in range(9)]
    assert [chunk.age_rows for chunk in chunks] == [0, 4] * 4 + [0]
    assert_same([chunk.actions for chunk in chunks], drive(whole)[0])


class Unlucky(Policy):
    """Whose refreshes are slow now and then, or fail."""

    begun = 0

    def refreshing(self, observation: Observation, state: PolicyState) -> Generator[None, None, PolicyState]:
        self.begun += 1
        time.sleep(0.01 * (self.begun % 4))
        if self.begun % 5 == 3:
            raise RuntimeError("out of luck")
        return (yield from super().refreshing(observation, state))


@pytest.mark.parametrize("place", ["slices", "two devices"])
def test_threads(place: str) -> None:
    """Random pauses, episodes and failures: ages keep their bound, and the log replays bit for bit."""
    where = {"refresh_slices": 2} if place == "slices" else {"planner_device": jax.devices()[1]}
    made = Unlucky(AhaWam(SIZES), PARAMS, CONFIG, STATISTICS, SETTINGS, **where)
    events: list[dict] = []
    said: list[str] = []
    stream = Stream(made, StreamSettings(max_age=15), log=events.append, say=said.append)
    shown, actions, row, episode = {}, [], 0, 0
    rng = np.random.default_rng(0)
    for step in range(60):
        if step % 20 == 0:
            stream.start(INSTRUCTIONS)
            row, episode = 0, episode + 1
        seen = stream.observe(*observation(step), row)
        shown[episode, seen.number] = observation(step)
        chunk = stream.act(seen)
        assert 0 <= chunk.age_rows <= 15 and not chunk.held
        actions.append(chunk.actions)
        row += int(rng.integers(1, 6))
        time.sleep(0.01 * rng.random())
    stream._background.wait()
    kinds = [event["event"] for event in events]
    assert kinds.count("planned") > 5 and kinds.count("failed") > 1
    assert any("failed (RuntimeError: out of luck). Its memory is lost" in line for line in said)
    assert_same(replay(policy(**where), events, shown), actions)


def test_places_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="refresh_slices is 6; expected 1 to 3, the layers of the planner"):
        policy(refresh_slices=6)
    with pytest.raises(ValueError, match="planner_device is 8, but JAX has 8 device"):
        Policy.load("nowhere", planner_device=8)
    with pytest.raises(ValueError, match="compiled functions are of one device and one slice"):
        Policy.load("nowhere", compiled_in="nowhere", refresh_slices=2)
