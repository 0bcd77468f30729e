"""Chunks that go on from the rest of the one before, over the wire: as in one process, or refused in words."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from ahawam_client.bridge import Bridge, Observation
from ahawam_client.client import PolicyClient
from ahawam_client.guard import Guard
from ahawam_jax.inference.handover import HAND_OVERS, HandOver
from ahawam_jax.inference.policy import Policy, PolicyConfig
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.serving.view import View
from ahawam_jax.serving.wire import pack
from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment, Vector
from data_pipelines.normalization import Normalization
from tests.serving.stub import ACTIONS, CHUNK, EXECUTE, Running, Stub, expected, observation, running
from tests.serving.test_watching import Drawn
from tests.tiny_config import get_config
from tests.tiny_model import random_params

PROMPT, WIDTH, TRAINED, STEPS = "open the drawer", 3, 3, 60
NOTHING = np.full(WIDTH, np.nan, np.float32)
NEWEST = 10  # chunks whose slowest is what the client expects of the next


# ------------------------------------------------------------------------------------------------- against one process
def make_policy() -> Policy:
    """State and action are the same three numbers; 4 of 8 actions are executed, up to 3 were committed in training."""
    config = get_config()
    config.model.update(state_dim=WIDTH, action_dim=WIDTH, chunk=8, horizon=16)
    config.objective.max_delay = TRAINED
    model = AhaWam(ModelConfig.create(config.model))
    how, wide = Normalization(), {"mean": np.zeros(WIDTH), "std": np.full(WIDTH, 0.5)}
    statistics = {kind: wide | how.of(kind, (), WIDTH) for kind in ("state", "action")}
    settings = PolicyConfig(steps=2, execute=4, refresh_every=2)
    return Policy(model, random_params(model.config), config, statistics, settings)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def shown(step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of a control step: views and joints."""
    rng = np.random.default_rng(step)
    images = {camera: rng.integers(0, 256, (16, 16, 3), np.uint8) for camera in CAMERAS}
    return images, rng.normal(size=WIDTH).astype(np.float32)


def in_process(policy: Policy, way: HandOver, lates: Sequence[int], most: int) -> list[np.ndarray]:
    """The command of each control step, NaN before the first chunk.

    Chunks are asked for every `execute` rows that were run and come so many steps late.
    """
    state, commands, took = policy.start([PROMPT]), [], []
    rest, last = None, NOTHING
    for call, late in enumerate(lates):
        images, joints = shown(len(commands))
        seen = policy.encode({name: view[None] for name, view in images.items()}, joints[None], 1)
        if call % policy.config.refresh_every == 0:
            state = policy.refresh(seen, state)
        delay = 0 if rest is None else min(max(took[-NEWEST:]), most, rest.shape[1])
        chunk, state = policy.act(seen, state, None if rest is None else way.ask(rest, delay))
        passed = 0 if rest is None else min(late, rest.shape[1])
        for step in range(late):
            last = rest[0, step] if step < passed else last
            commands.append(last)
        rest = chunk if rest is None else way.join(rest, chunk, delay, passed)
        runs = max(policy.config.execute - passed, 0)
        commands += list(rest[0, :runs])
        rest, last, took = rest[:, runs:], commands[-1], [*took, late]
    return commands


def over_the_wire(url: str, lates: Iterator[int], steps: int) -> list[np.ndarray]:
    """The same by the robot's bridge, of whose clock a step is one."""
    commands, due, chunk = [], -1, None
    with PolicyClient(url) as client:
        guard = Guard([f"#{n}" for n in range(WIDTH)], -1e4, 1e4, 1e4, 1e4)
        bridge = Bridge(client.metadata, guard, wait=False)
        for step in range(steps):
            bridge.observe(Observation(*shown(step), time=float(step)))
            if step == due:
                bridge.answer(*chunk)
            request = bridge.ask()
            if request is not None:
                answer = client.infer(request.images, request.state, PROMPT, request.rest, request.delay)
                chunk, due = (answer["actions"], answer.get("begins", 0)), step + next(lates)
                if step == due:
                    bridge.answer(*chunk)
            command = bridge.tick(float(step))
            commands.append(NOTHING if command is None else np.float32(command.positions))
        assert not bridge.stopped
    return commands


@pytest.mark.parametrize("name", ["skip", "trained", "jacobian-free", "roll-forward"])
def test_it_commands_what_one_process_does(policy: Policy, name: str) -> None:
    """Bit for bit: chunks are there at once, in time, later than was announced, and after everything has been run."""
    way, most = HAND_OVERS[name], {"trained": TRAINED}.get(name, 4)
    lates = [3, 1, 0, 2, 4, 1, 6, 2, 3, 1, 2, 5] + [1] * 20
    want = in_process(policy, way, lates, most)[:STEPS]
    with running(policy, hand_over=way) as server:
        found = over_the_wire(server.url, iter(lates), STEPS)
        with server.client() as client:
            assert (client.metadata["hand_over"], client.metadata["max_delay"]) == (name, most)
    np.testing.assert_array_equal(found, want)


def test_each_hand_over_commands_something_else(policy: Policy) -> None:
    """Else the test before could not tell them apart."""
    names = ["skip", "trained", "jacobian-free", "roll-forward"]
    runs = [np.stack(in_process(policy, HAND_OVERS[name], [0, 2, 2, 2], TRAINED)) for name in names]
    for one in range(4):
        for other in range(one):
            assert np.abs(runs[one] - runs[other]).max() > 1e-3


@pytest.mark.parametrize("name", ["trained", "jacobian-free"])
def test_nothing_is_compiled_once_it_accepts(name: str) -> None:
    """Programs with a rest and without are there; a rest of any length takes the same one."""
    policy = make_policy()
    with running(policy, hand_over=HAND_OVERS[name]) as server:
        server.server.warm_up()
        made = [program._cache_size() for program in policy._programs]
        assert made[-1] == (2 if name == "jacobian-free" else 1)
        with server.client() as client:
            images, joints = shown(0)
            for rows, delay in ((0, 0), (4, 3), (6, 2), (1, 0)):
                more = {"rest": np.ones((rows, WIDTH)), "delay": delay} if rows else {}
                assert "actions" in client.ask({"images": images, "state": joints, "prompt": PROMPT} | more)
        assert [program._cache_size() for program in policy._programs] == made


# ------------------------------------------------------------------------------------------------------------ messages
def rest(rows: int = 1, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """An observation of the stub's with a rest of so many rows, of which it will have run one."""
    commands = np.random.default_rng(seed).normal(size=(rows, ACTIONS))
    return observation(seed, **({"rest": commands, "delay": 1} | changes))


def test_who_sends_none_is_answered_as_ever() -> None:
    """Under every hand-over the same bytes but for the times; with a rest one key more."""
    plain = [observation(seed) for seed in range(3)]
    for way in (HAND_OVERS["skip"], HAND_OVERS["jacobian-free"]):
        with running(hand_over=way) as server, server.client() as client:
            answers = [client.ask(message) for message in plain]
            np.testing.assert_array_equal([answer["actions"] for answer in answers], expected(Stub(), plain))
            assert set(answers[0]) == {"actions", "plan_age", "refreshed", "episode_number", "step", "observation",
                                       "dropped", "server_timing"}  # fmt: skip
            assert set(client.ask(rest())) == {*answers[0], "begins"}


def test_a_hand_over_without_a_rest_leaves_it() -> None:
    shown = [rest(seed=seed) for seed in range(3)]
    for name in ("skip", "wait"):
        with running(hand_over=HAND_OVERS[name]) as server, server.client() as client:
            answers = [client.ask(message) for message in shown]
            np.testing.assert_array_equal([answer["actions"] for answer in answers], expected(Stub(), shown))
            assert [answer["begins"] for answer in answers] == [0, 0, 0]
            assert client.metadata["max_delay"] == (1 if name == "skip" else 0)


def test_clients_do_not_see_each_others_rests() -> None:
    way = HAND_OVERS["jacobian-free"]
    sent = [[rest(1 + (n + call) % 3, 100 * n + call) for call in range(10)] for n in range(4)]
    with running(hand_over=way) as server:
        found = server.ask_at_once(sent)
    for answered, messages in zip(found, sent, strict=True):
        np.testing.assert_array_equal(answered, expected(Stub(), messages, way))
    assert not np.array_equal(found[0], expected(Stub(), sent[0])), "the rest counts"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (rest(rest=None), "the observation has delay, but no rest; expected both"),
        (rest(delay=None), "the observation has rest, but no delay; expected both"),
        (rest(rest=[[0.0] * ACTIONS]), "rest is a list; expected the rows that are still to be run"),
        (rest(rest=np.zeros(ACTIONS)), "rest is a float64 array [3]"),
        (rest(rest=np.zeros((1, 1, ACTIONS))), "rest is a float64 array [1, 1, 3]"),
        (rest(rest=np.zeros((2, ACTIONS + 1))), "rest is a float64 array [2, 4]; expected the rows"),
        (rest(rest=np.zeros((2, ACTIONS), bool)), "rest is a bool array [2, 3]"),
        (rest(CHUNK + 1), f"at most the {CHUNK} of a chunk, of 3 numbers each: #0, #1, #2"),
        (rest(rest=np.array([[0, np.nan, 0], [0, 0, -np.inf]])), "rest has no finite float32 number for #1, #2"),
        (rest(rest=np.array([[1e39, 0, 0]])), "rest has no finite float32 number for #0"),
        (rest(delay=-1), "delay is -1; expected a whole number from 0 to 1, the rows of rest"),
        (rest(2, delay=3), "delay is 3; expected a whole number from 0 to 2"),
        (rest(delay=1.0), "delay is 1.0; expected a whole number"),
        (rest(delay=True), "delay is True; expected a whole number"),
        (rest(delay="1"), "delay is '1'; expected a whole number"),
        (rest(delay=np.ones(1, int)), "delay is array([1]); expected a whole number"),
        (rest(4, delay=2), "comes 2 rows late cannot be handed over in motion: with policy.execute 3 of 4 actions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_ends_the_connection(shared: Running, message: Any, said: str) -> None:
    with shared.client() as client:
        client.send(message)
        found = client.refused()
        assert found.startswith("error: ") and said in found


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running(hand_over=HAND_OVERS["jacobian-free"]) as found:
        yield found


def test_more_than_was_trained_is_refused(policy: Policy) -> None:
    images, joints = shown(0)
    message = {"images": images, "state": joints, "prompt": PROMPT, "rest": np.zeros((5, WIDTH))}
    with running(policy) as server:  # `trained`, of itself
        with server.client() as client:
            assert client.metadata["hand_over"] == "trained"
            assert "actions" in client.ask(message | {"delay": TRAINED})
            client.send(message | {"delay": TRAINED + 1})
            assert "4 committed actions was asked for, but this checkpoint was trained with at" in client.refused()


def test_numbers_that_are_not_driven_may_be_none() -> None:
    """A policy's answer holds NaN there, and comes back as the rest."""
    policy, driven = Stub(), Vector(("a", "b", "c"), (1, 0), (0.0, 0.0), (1.0, 1.0))
    policy.embodiment = Embodiment(Stub.embodiment.state, driven)
    with running(policy, hand_over=HAND_OVERS["jacobian-free"]) as server, server.client() as client:
        assert "actions" in client.ask(rest(rest=np.array([[1, 2, np.nan]])))
        client.send(rest(rest=np.array([[1, np.nan, np.nan]])))
        assert "rest has no finite float32 number for b." in client.refused()


def test_a_rolled_forward_chunk_says_where_it_begins() -> None:
    """Whoever watches sees its actions at the steps that they are for."""
    policy, drawn = Stub(), Drawn()
    policy.embodiment = Embodiment.as_recorded(ACTIONS, ACTIONS)
    with running(policy, hand_over=HAND_OVERS["roll-forward"]) as server, server.client() as client:
        view = View(client.metadata, drawn)
        sent = [rest(4, number, delay=delay, state=np.zeros(ACTIONS)) for number, delay in enumerate((0, 1))]
        answers = [client.ask(message) for message in sent]
        assert [answer["begins"] for answer in answers] == [0, 1]
        for message, answer in zip(sent, answers, strict=True):
            view.show(pack({"client": "c", "observation": pack(message), "answer": pack(answer), "missed": 0}))
    curve = drawn.curves[("c", "episode 1", "joints", "#0", "predicted")]
    assert list(curve) == [0, 1, 2, 4, 5, 6] and EXECUTE == 3
