"""Whoever watches sees what went by, bit for bit, and nobody notices: neither the clients nor the server's memory."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Opcode

from ahawam_jax.commands import watch
from ahawam_jax.serving import server, watching
from ahawam_jax.serving.view import View
from ahawam_jax.serving.wire import pack, unpack
from benchmarks import hostile
from data_pipelines.canvas import CAMERAS
from tests.serving import stub
from tests.serving.stub import EXECUTE, Asking, Running, Stub, expected, observation, running, until


def watcher(found: Running, **options: Any) -> Asking:
    return Asking(f"{found.url}/watch", **options)


def seen(found: Running, count: int) -> None:
    """Waits until so many frames were sent."""
    until(lambda: found.metric("ahawam_frames_total") >= count)


def test_it_is_shown_what_went_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RATE", 1e4)
    shown = [pack(observation(seed)) for seed in range(4)]
    with running() as found, found.client() as client, watcher(found) as one, watcher(found) as two:
        until(lambda: found.metric("ahawam_watchers") == 2)
        assert one.metadata == client.metadata
        for number, message in enumerate(shown):
            client.send(message)
            answer = client._connection.recv(10)
            for each in (one, two):
                frame = each.receive()
                assert (frame["observation"], frame["answer"]) == (message, answer)
                assert frame["missed"] == 0 and frame["client"].startswith("127.0.0.1:")
            seen(found, 2 * number + 2)
            assert (unpack(answer)["step"], unpack(answer)["episode_number"]) == (EXECUTE * number, 1)
        client.send(pack(observation(0, episode=2)))
        answer = unpack(one.receive()["answer"])
        assert (answer["step"], answer["episode_number"]) == (0, 2)
        assert found.metric("ahawam_clients") == 1
    with running() as found, found.client() as client:  # nobody watches
        np.testing.assert_array_equal(client.ask(shown[0])["actions"], expected(Stub(), [observation(0)])[0])


def test_the_newest_wins_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RATE", 4.0)
    shown = [observation(seed) for seed in range(60)]
    with running() as found, found.client() as client, watcher(found) as other:
        until(lambda: found.metric("ahawam_watchers") == 1)
        answers = [client.ask(message) for message in shown]
        np.testing.assert_array_equal([answer["actions"] for answer in answers], expected(Stub(), shown))
        frames = [other.receive()]
        while unpack(frames[-1]["answer"])["observation"] < 59:
            frames.append(other.receive())
        assert frames[-1]["missed"] == 60 - len(frames) > 0
        numbers = [unpack(frame["answer"])["observation"] for frame in frames]
        assert numbers == sorted(set(numbers))


def test_rules_are_those_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token, no web pages, so many at a time; and it sends nothing."""
    token = {"additional_headers": {"Authorization": "Api-Key s3cret"}}
    with running(token="s3cret") as found:
        for options, status in (({}, 401), (token | {"origin": "http://localhost"}, 403)):
            with pytest.raises(InvalidStatus) as refused:
                watcher(found, **options)
            assert refused.value.response.status_code == status
        until(lambda: found.metric("ahawam_watchers") == 0)
        with watcher(found, **token) as one, watcher(found, **token):
            with pytest.raises(InvalidStatus) as refused:
                watcher(found, **token)
            assert refused.value.response.status_code == 503
            assert b"has 2 watchers already" in refused.value.response.body
            one.send(observation())
            with pytest.raises(ConnectionClosed) as closed:
                one.receive()
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
                1008, "error: a watcher listens; it sends nothing."
            )  # fmt: skip
        until(lambda: found.metric("ahawam_watchers") == 0)
        assert found.metric("ahawam_observations_total", outcome="answered") == 0
        with watcher(found, **token):
            pass
        until(lambda: found.metric("ahawam_watchers") == 0)


def test_a_watcher_that_does_not_read_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut; the client's actions are as ever."""
    monkeypatch.setattr(server, "PATIENCE", 1.0)
    monkeypatch.setattr(watching, "RATE", 1e4)
    monkeypatch.setattr(stub, "CHUNK", 30_000)  # 360 kB
    monkeypatch.setattr(hostile, "HANDSHAKE", hostile.HANDSHAKE.replace(b"GET / ", b"GET /watch "))
    shown = [observation(seed) for seed in range(40)]
    with running() as found, found.client() as client:
        raw = hostile.RawClient(found.port, receive_buffer=2**12)
        until(lambda: found.metric("ahawam_watchers") == 1)
        answers = [client.ask(message)["actions"] for message in shown]
        np.testing.assert_array_equal(answers, expected(Stub(), shown))
        until(lambda: found.metric("ahawam_watchers") == 0)
        raw.close()


def test_a_frame_that_is_under_way_is_no_reason_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take more room than answers, and a ping may come while they are being sent."""
    monkeypatch.setattr(hostile, "HANDSHAKE", hostile.HANDSHAKE.replace(b"GET / ", b"GET /watch "))
    big = observation(0, images={camera: np.zeros((900, 1200, 3), np.uint8) for camera in CAMERAS})  # 9.7 MB
    with running() as found, found.client() as client:
        raw = hostile.RawClient(found.port, receive_buffer=2**12)
        until(lambda: found.metric("ahawam_watchers") == 1)
        client.ask(big)
        time.sleep(0.2)
        raw.socket.sendall(hostile.frame(Opcode.PING, b"there?"))
        time.sleep(0.2)
        frame, pong = raw.read(), raw.read()
        assert frame[0] is Opcode.BINARY and len(frame[1]) > 9_000_000 and pong == (Opcode.PONG, b"there?")
        raw.close()


def test_it_ends_with_the_server() -> None:
    with running() as found, watcher(found) as other:
        until(lambda: found.metric("ahawam_watchers") == 1)
        found.end()
        with pytest.raises(ConnectionClosed) as closed:
            other.receive()
        assert closed.value.rcvd.code == 1001
        found.thread.join(10)
        assert not found.thread.is_alive()


# --------------------------------------------------------------------------------------------------------- the view
class Drawn:
    """A sink that keeps what it is given."""

    def __init__(self, save: Path | None = None) -> None:
        self.begun: list[tuple[str, ...]] = []
        self.curves: dict[tuple[str, ...], dict[int, float]] = {}
        self.pictures: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
        self.texts: list[str] = []
        self.closed = False

    def begin(self, path: Sequence[str], cameras: Sequence[str], joints: Sequence[str]) -> None:
        self.begun.append((*path, *cameras, *joints))

    def picture(self, path: Sequence[str], step: int, picture: np.ndarray) -> None:
        self.pictures.setdefault(tuple(path), {})[step] = picture

    def numbers(self, path: Sequence[str], steps: Sequence[int], values: Sequence[float]) -> None:
        self.curves.setdefault(tuple(path), {}).update(zip(steps, values, strict=True))

    def text(self, path: Sequence[str], step: int, words: str) -> None:
        self.texts.append(words)

    def close(self) -> None:
        self.closed = True


def test_what_is_drawn_of_two_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed is the robot's state where it was; predicted what was to be run, at the steps that it was for."""
    monkeypatch.setattr(watching, "RATE", 1e4)
    drawn, shown = Drawn(), [observation(seed) for seed in range(3)]
    shown[1]["images"] = {camera: np.moveaxis(view, 2, 0) for camera, view in shown[1]["images"].items()}
    with running() as found, found.client() as client, watcher(found) as other:
        until(lambda: found.metric("ahawam_watchers") == 1)
        view, answers = View(other.metadata, drawn), []
        for number, message in enumerate([*shown, observation(9, prompt="close the drawer")]):
            answers.append(client.ask(message))
            view.show(other._connection.recv(10))
            seen(found, number + 1)
    (client_name,) = {path[0] for path in drawn.curves}
    first, second = (client_name, "episode 1"), (client_name, "episode 2")
    labels = [f"#{n}" for n in range(5)]
    assert drawn.begun == [(*episode, *CAMERAS, *labels) for episode in (first, second)]
    assert drawn.texts == ["open the drawer", "close the drawer"]
    for joint in range(5):
        executed = drawn.curves[(*first, "joints", f"#{joint}", "executed")]
        assert executed == {EXECUTE * n: float(shown[n]["state"][joint]) for n in range(3)}
    for joint in range(3):
        chunks = np.concatenate([answer["actions"][:EXECUTE, joint] for answer in answers[:3]])
        assert drawn.curves[(*first, "joints", f"#{joint}", "predicted")] == dict(enumerate(chunks.tolist()))
    assert drawn.curves[(*first, "plan age", "steps")] == {0: 0, 3: 3, 6: 0}
    assert list(drawn.curves[(*first, "latency", "prev_total_ms")]) == [3, 6]
    assert set(drawn.curves[(*second, "lost", "answers not shown")]) == {0}
    view = observation(1)["images"]["cam_high"]
    np.testing.assert_array_equal(drawn.pictures[(*first, "cameras", "cam_high")][3], view)


def test_the_command_draws_until_the_server_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sinks: list[Drawn] = []
    module = SimpleNamespace(RerunSink=lambda save: sinks.append(Drawn()) or sinks[-1])
    monkeypatch.setitem(sys.modules, "ahawam_jax.serving.rerun_sink", module)
    status: list[int] = []
    with running() as found, found.client() as client:
        thread = threading.Thread(target=lambda: status.append(watch.main([found.url])))
        thread.start()
        until(lambda: found.metric("ahawam_watchers") == 1)
        client.ask(observation())
        seen(found, 1)
        found.end()
        thread.join(20)
    assert status == [0] and sinks[0].closed and len(sinks[0].begun) == 1
    said = capsys.readouterr().out
    assert "the server ended the connection: the server ends" in said and "1 frames shown" in said


def test_the_commands_mistakes_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.delitem(sys.modules, "ahawam_jax.serving.rerun_sink", raising=False)
    with running(token="s3cret") as found:
        (tmp_path / "token").write_text("s3cret\n")
        for arguments, said in (
            (["127.0.0.1:8000"], "is no address of a server; expected one as ws://127.0.0.1:8000"),
            (["ws://127.0.0.1:1"], "lets nobody watch: "),
            ([found.url], "lets nobody watch: error: this server asks for Authorization"),
            ([found.url, "--save", str(tmp_path / "x.mp4")], "expected a name that ends in .rrd"),
            ([found.url, "--token-file", str(tmp_path / "none")], "No such file"),
            ([found.url, "--token-file", str(tmp_path / "token")], "pip install 'ahawam-jax[watch]' brings it"),
        ):
            assert watch.main(arguments) == 1
            error = capsys.readouterr().err
            assert error.startswith("error: ") and said in error, error


def test_rerun_itself(tmp_path: Path) -> None:
    """What is written into Rerun's file is there when it is read: needs the extra `watch`."""
    reading = pytest.importorskip("rerun.chunk")
    from ahawam_jax.serving.rerun_sink import RerunSink

    sink = RerunSink(tmp_path / "x.rrd")
    path = ("127.0.0.1:1", "episode 1")
    sink.begin(path, ["cam_high"], ["#0", "left/elbow"])
    sink.text((*path, "instruction"), 0, "open the drawer")
    for step in range(0, 9, 3):
        sink.picture((*path, "cameras", "cam_high"), step, np.full((48, 64, 3), 10 * step, np.uint8))
        sink.numbers((*path, "joints", "left/elbow", "predicted"), range(step, step + 3), [1.0, np.nan, 3.0])
    sink.close()
    found: dict[str, list[tuple[int, Any]]] = {}
    for chunk in reading.RrdReader(str(tmp_path / "x.rrd")).stream().to_chunks():
        table = chunk.to_record_batch()
        if "step" in table.schema.names:
            name = next(name for name in table.schema.names if ":" in name)
            rows = zip(table.column("step").to_pylist(), table.column(name).to_pylist(), strict=True)
            found.setdefault(chunk.entity_path.replace("\\", ""), []).extend(rows)
    predicted = sorted(found["/127.0.0.1:1/episode 1/joints/left/elbow/predicted"])
    assert [step for step, _ in predicted] == list(range(9))
    np.testing.assert_array_equal([value[0] for _, value in predicted], [1.0, np.nan, 3.0] * 3)
    assert [step for step, _ in sorted(found["/127.0.0.1:1/episode 1/cameras/cam_high"])] == [0, 3, 6]
    assert found["/127.0.0.1:1/episode 1/instruction"] == [(0, ["open the drawer"])]
