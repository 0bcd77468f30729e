"""The server: one episode per connection, whatever the other connections do; errors in words; an orderly end."""

from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment, Vector
from tests.serving.stub import (
    CHUNK,
    EXECUTE,
    Running,
    Stub,
    expected,
    observation,
    running,
    until,
)


# ------------------------------------------------------------------------------------------------------- episodes
def test_a_connection_is_an_episode() -> None:
    shown = [observation(seed) for seed in range(5)]
    with running() as server:
        for _ in range(2):  # the second connection knows nothing of the first
            with server.client() as client:
                answers = [client.ask(message) for message in shown]
            np.testing.assert_array_equal([answer["actions"] for answer in answers], expected(Stub(), shown))
        assert [answer["plan_age"] for answer in answers] == [0, 3, 0, 3, 0]
        assert [answer["refreshed"] for answer in answers] == [True, False, True, False, True]
        assert [(answer["observation"], answer["dropped"]) for answer in answers] == [(i, 0) for i in range(5)]
        assert server.metric("ahawam_episodes_total") == 2 and server.metric("ahawam_refreshes_total") == 6
        assert server.policy.threads == {"policy_0"}


def test_the_only_array_of_an_answer_has_the_chunk_first() -> None:
    def arrays(value: Any) -> list[np.ndarray]:
        if isinstance(value, dict | list):
            return [found for part in (value.values() if isinstance(value, dict) else value) for found in arrays(part)]
        return [value] if isinstance(value, np.ndarray | np.generic) else []

    with running() as server, server.client() as client:
        assert not arrays(client.metadata)
        assert client.metadata["cameras"] == list(CAMERAS) and client.metadata["held"] == []
        assert (client.metadata["chunk"], client.metadata["execute"]) == (CHUNK, EXECUTE)
        first, second = (client.ask(observation(seed)) for seed in range(2))
        assert [found.shape for found in arrays(first)] == [(CHUNK, 3)] and first["actions"].dtype == np.float32
        assert set(first["server_timing"]) == {"wait_ms", "decode_ms", "infer_ms"}
        assert set(second["server_timing"]) == {"wait_ms", "decode_ms", "infer_ms", "prev_total_ms"}
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


@pytest.mark.parametrize(
    "change", [{"episode": 1}, {"episode": "b"}, {"prompt": "close the drawer"}], ids=["number", "text", "instruction"]
)
def test_another_episode_on_the_same_connection(change: dict[str, Any]) -> None:
    """Begun by another key, and by another instruction: as if the connection were new."""
    before, after = [observation(i) for i in range(3)], [observation(i, **change) for i in range(3)]
    with running() as server, server.client() as client:
        for message in before:
            client.ask(message)
        found = [client.ask(message)["actions"] for message in after]
        np.testing.assert_array_equal(found, expected(Stub(), after))
        # A message without the key goes on in the episode that there is.
        going_on = client.ask({key: value for key, value in observation(3, **change).items() if key != "episode"})
        np.testing.assert_array_equal(going_on["actions"], expected(Stub(), [*after, observation(3, **change)])[-1])
        assert server.metric("ahawam_episodes_total") == 2


def test_the_servers_own_instruction() -> None:
    shown = [observation(seed) for seed in range(2)]
    with running(instruction="open the drawer") as server, server.client() as client:
        found = [client.ask(observation(0, prompt=None))["actions"], client.ask(shown[1])["actions"]]
        np.testing.assert_array_equal(found, expected(Stub(), shown))


def test_colours_may_come_first_and_numbers_in_any_width() -> None:
    plain = observation(0, state=np.arange(5, dtype=np.float32))
    other = plain | {
        "images": {camera: np.moveaxis(view, 2, 0) for camera, view in plain["images"].items()} | {"cam_low": 1},
        "state": np.arange(5).astype(">i2"), "unknown": None,
    }  # fmt: skip
    with running() as server, server.client() as one, server.client() as two:
        np.testing.assert_array_equal(one.ask(plain)["actions"], two.ask(other)["actions"])


def test_clients_do_not_see_each_other() -> None:
    """Four at once, their calls interleaved: each is answered as if it were alone, bit for bit."""
    sent = [[observation(100 * number + call) for call in range(20)] for number in range(4)]
    with running() as server:
        found = server.ask_at_once(sent)
    for answered, messages in zip(found, sent, strict=True):
        np.testing.assert_array_equal(answered, expected(Stub(), messages))


def test_the_newest_observation_wins() -> None:
    """Of five that come while the policy is busy with one, the last is answered."""
    with running() as server, server.client() as client:
        server.policy.open.clear()
        client.send(observation(0))
        assert server.policy.busy.wait(10)
        for seed in range(1, 6):
            client.send(observation(seed))
        until(lambda: server.metric("ahawam_observations_total", outcome="dropped") == 4)
        server.policy.open.set()
        first, last = client.receive(), client.receive()
        assert (first["observation"], first["dropped"], last["observation"], last["dropped"]) == (0, 0, 5, 4)
        np.testing.assert_array_equal(last["actions"], expected(Stub(), [observation(0), observation(5)])[1])


# ---------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hello", "a text came; expected an observation"),
        (b"\xc1", "the message is not msgpack"),
        ([1], "an observation is a map with the keys images, state and prompt; got a list"),
        ({}, "the observation lacks images and state; it has nothing"),
        (observation(images=None), "lacks images; it has 'state', 'prompt'"),
        (observation(images=[1]), "images is a list; expected a map"),
        (observation(images={"cam_high": 0}), "images lacks cam_left_wrist, cam_right_wrist; it has 'cam_high'"),
        (observation(images=dict.fromkeys(CAMERAS, 1)), "the picture of cam_high is a int"),
        (observation(images=dict.fromkeys(CAMERAS, np.zeros((4, 4, 3)))), "is a float64 array [4, 4, 3]"),
        (observation(images=dict.fromkeys(CAMERAS, np.zeros((4, 4), np.uint8))), "is a uint8 array [4, 4]"),
        (observation(images=dict.fromkeys(CAMERAS, np.zeros((1, 8193, 3), np.uint8))), "at most 8192 pixels"),
        (observation(state=np.zeros(4)), "state is a float64 array [4]; expected 5 numbers: #0, #1"),
        (observation(state=[0] * 5), "state is a list"),
        (observation(state=np.zeros(5, bool)), "state is a bool array"),
        (observation(state=np.array([0, np.nan, 0, np.inf, 1e39])), "no finite float32 number for #1, #3, #4"),
        (observation(prompt=None), "lacks prompt"),
        (observation(prompt=7), "prompt is 7; expected the instruction in words"),
        (observation(prompt=" "), "prompt is ' '"),
        (observation(prompt="x" * 1001), "prompt has 1001 characters; expected at most 1000"),
        (observation(prompt="unknown"), "no tokens for 'unknown'"),
        (observation(episode=1.5), "episode is a float; expected a whole number or a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_ends_the_connection(shared: Running, message: Any, said: str) -> None:
    with shared.client() as client:
        client.send(message)
        found = client.refused()
        assert said in found and found.startswith("error: ")


@pytest.fixture(scope="module")
def shared():
    with running() as found:
        yield found


def test_a_failing_policy_is_said_and_survived(capfd: pytest.CaptureFixture[str]) -> None:
    shown = [observation(seed) for seed in range(3)]
    with running() as server, server.client() as other:
        found = [other.ask(shown[0])["actions"]]
        with server.client() as client:
            client.send(observation(prompt="fail"))
            assert "the policy failed (RuntimeError: the device is gone)" in client.refused(1011)
        found += [other.ask(message)["actions"] for message in shown[1:]]
        np.testing.assert_array_equal(found, expected(Stub(), shown))
        assert server.metric("ahawam_observations_total", outcome="failed") == 1
    assert "RuntimeError: the device is gone" in capfd.readouterr().err  # with its traceback, for who runs the server


def test_actions_that_are_no_numbers_never_reach_a_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the policy does not drive them: those are NaN by design, and named in the metadata."""
    policy, call = Stub(), Stub.__call__

    def broken(self: Stub, *arguments: Any) -> Any:
        actions, state = call(self, *arguments)
        actions[0, 1, 2] = np.nan
        return actions, state

    monkeypatch.setattr(Stub, "__call__", broken)
    with running(policy) as server, server.client() as client:
        client.send(observation())
        assert "actions are not finite" in client.refused(1011)
    driven = Vector(("a", "b", "c"), (1, 0), (0.0, 0.0), (1.0, 1.0))
    policy.embodiment = Embodiment(Stub.embodiment.state, driven)
    with running(policy) as server, server.client() as client:
        assert client.metadata["held"] == ["c"]
        assert np.argwhere(np.isnan(client.ask(observation())["actions"])).tolist() == [[1, 2]]


# ------------------------------------------------------------------------------------------------------------- end
def test_the_end_finishes_what_is_under_way() -> None:
    """Of three clients one is being answered, one waits for its turn and one is idle; nobody else is let in."""
    with running() as found, found.client() as busy, found.client() as waiting, found.client() as idle:
        found.policy.open.clear()
        busy.send(observation(0))
        assert found.policy.busy.wait(10)
        waiting.send(observation(1))
        until(lambda: sum(client.received for client in found.server._clients) == 2)
        found.end()
        with pytest.raises(ConnectionClosed) as closed:
            idle.receive()
        assert closed.value.rcvd.code == 1001
        with pytest.raises(OSError):
            connect(found.url, proxy=None)
        found.policy.open.set()
        for number, client in enumerate((busy, waiting)):
            np.testing.assert_array_equal(client.receive()["actions"], expected(Stub(), [observation(number)])[0])
            with pytest.raises(ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd.code == 1001


def test_an_eager_client_does_not_delay_the_end() -> None:
    """What it sends after the end has begun is read and left."""
    with running() as found, found.client() as client:
        found.policy.open.clear()
        client.send(observation(0))
        assert found.policy.busy.wait(10)
        found.end()
        until(lambda: found.server._draining)
        client.send(observation(1))
        assert client._connection.ping().wait(10)  # it has arrived
        found.policy.open.set()
        assert client.receive()["observation"] == 0
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1001
