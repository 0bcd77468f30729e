"""The light client: it carries what the server means, and says what the server says."""

import ast
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ahawam_client import wire
from ahawam_client.client import PolicyClient, ServerError
from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.serving.server import Limits
from ahawam_jax.serving.wire import pack, unpack
from tests.conftest import REPOSITORY
from tests.serving.stub import Stub, expected, observation, running, until

PACKAGE = REPOSITORY / "packages" / "ahawam-client"


def test_both_sides_write_and_read_the_same() -> None:
    message = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": [np.float16(0.5), 1, "x", None], "c": np.zeros(()),
        "d": np.array([True, False]), "e": np.arange(3, dtype=">i4"),
    }  # fmt: skip
    for one, two in ((pack, wire.unpack), (wire.pack, unpack)):
        found = two(one(message))
        assert found["b"] == message["b"] and found["b"][0].dtype == np.float16
        for name in "acde":
            np.testing.assert_array_equal(found[name], message[name])
            assert found[name].dtype == message[name].dtype and found[name].shape == message[name].shape
    for refused in (np.array([object()]), np.zeros(1, complex), object()):
        with pytest.raises(TypeError, match="a message cannot hold"):
            wire.pack(refused)


def test_it_drives_and_resets() -> None:
    shown = [observation(seed) for seed in range(3)]
    with running(token="s3cret") as server, PolicyClient(server.url, "s3cret") as client:
        assert client.metadata["chunk"] == 4
        for _ in range(2):
            found = [client.infer(x["images"], x["state"], x["prompt"])["actions"] for x in shown]
            np.testing.assert_array_equal(found, expected(Stub(), shown))
            client.reset()


def test_it_tells_what_is_still_to_be_run() -> None:
    """Nothing of it where nothing is left."""
    way, shown = HAND_OVERS["jacobian-free"], [observation(seed) for seed in range(3)]
    rests = [np.zeros((0, 3)), np.float32([[1, 2, 3]]), np.float32([[4, 5, 6], [7, 8, 9]])]
    told = [x | ({"rest": rest, "delay": 1} if len(rest) else {}) for x, rest in zip(shown, rests, strict=True)]
    with running(hand_over=way) as server, PolicyClient(server.url) as client:
        found = [client.infer(x["images"], x["state"], x["prompt"], rest, np.int64(1))
                 for x, rest in zip(shown, rests, strict=True)]  # fmt: skip
        np.testing.assert_array_equal([answer["actions"] for answer in found], expected(Stub(), told, way))
        assert ["begins" in answer for answer in found] == [False, True, True]
        with pytest.raises(ServerError, match="delay is 2; expected a whole number from 0 to 1, the rows of rest"):
            client.infer(shown[0]["images"], shown[0]["state"], shown[0]["prompt"], rests[1], 2)


def test_it_sends_on_without_waiting() -> None:
    with running() as server, PolicyClient(server.url) as client:
        server.policy.open.clear()
        for seed in range(4):
            shown = observation(seed)
            client.send(shown["images"], shown["state"], shown["prompt"])
            assert seed or server.policy.busy.wait(10)
        with pytest.raises(ServerError, match="gave no answer in time"):
            client.receive(0.01)
        until(lambda: sum(client.received for client in server.server._clients) == 4)
        server.policy.open.set()
        assert [client.receive()["observation"] for _ in range(2)] == [0, 3]


def test_what_the_server_says_is_raised() -> None:
    shown = observation()
    with running(limits=Limits(clients=1), token="s3cret") as server:
        with pytest.raises(ServerError, match="this server asks for Authorization"):
            PolicyClient(server.url)
        with PolicyClient(server.url, "s3cret") as client:
            with pytest.raises(ServerError, match=r"takes 1 client\(s\) at a time"):
                PolicyClient(server.url, "s3cret")
            with pytest.raises(ServerError, match="lacks prompt"):
                client.infer(shown["images"], shown["state"])
            with pytest.raises(ServerError, match="lacks prompt"):  # the reason of the close says it again
                client.infer(shown["images"], shown["state"])
    with pytest.raises(ServerError, match="does not take this client"):
        PolicyClient(server.url)


def test_it_is_light() -> None:
    """Imports of every file: Python's own, and what its pyproject.toml names; the recorder's are an extra."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert [line.partition(">")[0] for line in project["dependencies"]] == ["numpy", "msgpack", "websockets"]
    allowed = {*sys.stdlib_module_names, "ahawam_client", "numpy", "msgpack", "websockets"}
    for path in sorted((PACKAGE / "ahawam_client").glob("*.py")):
        found = {name.partition(".")[0] for name in imported(path)}
        assert found <= allowed | ({"pyarrow", "av"} if path.stem.startswith("record") else set()), path


def imported(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))))
    return [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names] + [
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)
    ]
