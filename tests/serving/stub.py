"""A policy without a model, whose actions depend on all that its episode has seen, and a server in a thread."""

import asyncio
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.handover import HAND_OVERS, HandOver
from ahawam_jax.serving.server import Limits, PolicyServer
from ahawam_jax.serving.wire import pack, unpack
from data_pipelines.canvas import CAMERAS, Canvas
from data_pipelines.embodiment import Embodiment

CHUNK, EXECUTE, REFRESH_EVERY, STATE, ACTIONS = 4, 3, 2, 5, 3


@dataclasses.dataclass(frozen=True)
class StubState:
    seen: bytes
    calls: int = 0
    elapsed: int = 0
    planned_at: int = 0


class Stub:
    """Fails at the instruction "fail"; waits for `open` where it is cleared."""

    sizes = SimpleNamespace(chunk=CHUNK)
    max_delay, can_guide = 0, True
    config = SimpleNamespace(execute=EXECUTE, refresh_every=REFRESH_EVERY)
    canvas = Canvas((16, 16))
    embodiment = Embodiment.as_recorded(STATE, ACTIONS)

    def __init__(self) -> None:
        self.open, self.busy = threading.Event(), threading.Event()
        self.open.set()
        self.threads: set[str] = set()

    def start(self, instructions: Sequence[str]) -> StubState:
        if instructions == ["unknown"]:
            raise FileNotFoundError("no tokens for 'unknown'.")
        return StubState(instructions[0].encode())

    def __call__(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, state: StubState,
        continued: Continued | None = None,
    ) -> tuple[np.ndarray, StubState]:  # fmt: skip
        self.threads.add(threading.current_thread().name)
        self.busy.set()
        assert self.open.wait(20)
        if state.seen == b"fail":
            raise RuntimeError("the device is gone")
        shown = [state.seen, robot_state.tobytes(), *(images[camera].tobytes() for camera in CAMERAS)]
        if continued is not None:
            shown += [continued.actions.tobytes(), bytes([continued.committed, continued.forward])]
        seen = hashlib.sha256(b"".join(shown)).digest()
        planned_at = state.planned_at if state.calls % REFRESH_EVERY else state.elapsed
        actions = np.random.default_rng(list(seen)).standard_normal((1, CHUNK, ACTIONS), np.float32)
        return actions, StubState(seen, state.calls + 1, state.elapsed + EXECUTE, planned_at)


def observation(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What a client of the stub sends; a change to None leaves a key out."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (16, 16, 3), np.uint8) for camera in CAMERAS}
    found = {"images": images, "state": rng.normal(size=STATE), "prompt": "open the drawer"} | changes
    return {key: value for key, value in found.items() if value is not None}


def expected(
    policy: Any, observations: Sequence[Mapping[str, Any]], hand_over: HandOver = HAND_OVERS["skip"]
) -> list[np.ndarray]:
    """Chunks of one episode, without a server: [chunk, m] each."""
    state, chunks = policy.start([observations[0]["prompt"]]), []
    for shown in observations:
        images = {camera: view[None] for camera, view in shown["images"].items()}
        continued = hand_over.ask(np.float32(shown["rest"])[None], shown["delay"]) if "rest" in shown else None
        actions, state = policy(images, np.float32(shown["state"])[None], state, continued)
        chunks.append(actions[0])
    return chunks


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come about")


@dataclasses.dataclass
class Running:
    """A server in a thread."""

    policy: Any
    port: int
    server: PolicyServer
    log: list[str]
    thread: threading.Thread
    end: Callable[[], None]  # begins its end, as SIGTERM does

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics._registry.get_sample_value(name, labels) or 0.0

    def client(self, **options: Any) -> "Asking":
        return Asking(self.url, **options)

    def ask_at_once(self, sent: Sequence[Sequence[Any]]) -> list[list[np.ndarray]]:
        """A client for each list of messages, all at the same time; the actions that each is answered."""

        def drive(messages: Sequence[Any]) -> list[np.ndarray]:
            with self.client() as client:
                return [client.ask(message)["actions"] for message in messages]

        with ThreadPoolExecutor(len(sent)) as pool:
            return list(pool.map(drive, sent, timeout=20))


class Asking:
    """A client that has read the metadata."""

    def __init__(self, url: str, **options: Any) -> None:
        self._stack = ExitStack()
        connecting = connect(url, compression=None, max_size=None, proxy=None, **options)
        self._connection = self._stack.enter_context(connecting)
        self.metadata = unpack(self._connection.recv(10))

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, message: Any) -> None:
        self._connection.send(message if isinstance(message, bytes | str) else pack(message))

    def receive(self) -> Any:
        """An answer, or the sentence of an error."""
        answer = self._connection.recv(10)
        return answer if isinstance(answer, str) else unpack(answer)

    def refused(self, code: int = 1008) -> str:
        """The sentence that it is told before its connection is closed."""
        sentence = self.receive()
        assert isinstance(sentence, str), sentence
        with pytest.raises(ConnectionClosed) as closed:
            self.receive()
        assert closed.value.rcvd.code == code
        return sentence

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()


@contextmanager
def running(policy: Any = None, limits: Limits | None = None, **settings: Any) -> Iterator[Running]:
    """A server on a free port of this machine."""
    policy, log, started = policy or Stub(), [], threading.Event()
    server = PolicyServer(policy, limits or Limits(rate=10_000), say=log.append, **settings)
    found: dict[str, Any] = {}

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def ready(port: int) -> None:
            found["port"] = port
            started.set()

        found["end"] = lambda: loop.call_soon_threadsafe(stop.set)
        await server.run("127.0.0.1", 0, stop, ready)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield Running(policy, found["port"], server, log, thread, found["end"])
    finally:
        with suppress(RuntimeError):  # it has ended
            found["end"]()
        thread.join(30)
        assert not thread.is_alive()
