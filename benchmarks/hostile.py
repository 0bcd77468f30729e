"""Clients that mean harm, or are broken: what a policy server must survive, one message at a time.

`campaign` sends them, each on a connection of its own, while honest clients beside it drive episodes whose answers
are compared, bit for bit, with what the server said before. `benchmarks/serve.py` runs it in full, a test in part.
"""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from ahawam_jax.serving.wire import pack, unpack
from data_pipelines.progress import Progress

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PATIENCE = 60.0  # seconds until a connection of which nothing is heard counts as hung
HELD = 8  # half-open sockets at a time

Message = Mapping[str, Any]


def frame(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    """As clients send it: masked."""
    return Frame(opcode, data, fin).serialize(mask=True)


class RawClient:
    """A socket that has shaken hands and read the metadata, and does by itself nothing more: it answers no ping."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(HANDSHAKE)
        self._file = self.socket.makefile("rb")
        status = self._file.readline()
        while self._file.readline() not in (b"\r\n", b""):
            pass
        if b" 101 " not in status:
            raise ConnectionRefusedError(f"the server answered {status!r}")
        self.read()

    def read(self) -> tuple[Opcode, bytes]:
        """The next frame of the server. Raises EOFError at the end."""
        head = self._exactly(2)
        length = head[1]
        if length >= 126:
            length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
        return Opcode(head[0] & 15), self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def ending(self) -> str:
        """How the server reacts: "answered", "sentence" (and closed) or "closed". Raises TimeoutError for neither."""
        said = False
        try:
            while True:
                opcode, _ = self.read()
                if opcode is Opcode.BINARY:
                    return "answered"
                said |= opcode is Opcode.TEXT
                if opcode is Opcode.CLOSE:
                    self.socket.sendall(frame(Opcode.CLOSE, b""))
        except TimeoutError:
            raise
        except (EOFError, OSError):
            return "sentence" if said else "closed"

    def close(self, reset: bool = False) -> None:
        """reset: as the kernel does for a process that was killed with something unread."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()


# --------------------------------------------------------------------------------------------- messages, one a client
def array(data: bytes = b"1234", dtype: Any = "<f4", shape: Any = (1,)) -> dict[bytes, Any]:
    """An array as the wire has it, whatever it says."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def random_bytes(rng: np.random.Generator, good: Message) -> bytes:
    return rng.bytes(int(rng.integers(0, 3000)))


def flipped(rng: np.random.Generator, good: Message) -> bytes:
    """A good message with a few bytes changed; where those are pixels it stays good."""
    message = bytearray(pack(good))
    for place in rng.integers(0, min(len(message), 300), 4):
        message[place] = rng.integers(256)
    return bytes(message)


def shortened(rng: np.random.Generator, good: Message) -> bytes:
    message = pack(good)
    return message[: rng.integers(len(message))]


def shapes(rng: np.random.Generator, good: Message) -> bytes:
    shape = [[-1], [2**62, 2**62], [0, 2**40], [2**31], [-5, -5], [1] * 60, "x", None, [1.5], [[1]]]
    return msgpack.packb({"state": array(shape=shape[rng.integers(len(shape))]), "images": {}})


def dtypes(rng: np.random.Generator, good: Message) -> bytes:
    names = ["|O", "|V4", "<c8", "<U1", "|S4", "<M8[s]", "f4,f4", "<f4" * 1000, "", 7, None, ["<f4"], "__reduce__"]
    return msgpack.packb({"state": array(dtype=names[rng.integers(len(names))]), "images": {}})


def pickled(rng: np.random.Generator, good: Message) -> bytes:
    return msgpack.packb({"state": array(np.array([print], object).dumps(), "|O"), "images": {}})


def not_finite(rng: np.random.Generator, good: Message) -> bytes:
    state = np.array(good["state"], np.float64)
    state[rng.integers(len(state))] = [np.nan, np.inf, -np.inf, 1e300][rng.integers(4)]
    return pack({**good, "state": state})


def misfits(rng: np.random.Generator, good: Message) -> bytes:
    """Fields of another kind, and pictures of other shapes and numbers."""
    camera = next(iter(good["images"]))
    views = [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((1, 60_000, 3), np.uint8), 3, "x", None]
    wrong = [{"images": {**good["images"], camera: view}} for view in views]
    wrong += [{"images": [1]}, {"state": "x"}, {"state": np.zeros(999)}, {"prompt": 5}, {"prompt": "x" * 4000}]
    return pack({**good, **[*wrong, {"episode": {}}, {"prompt": ""}][rng.integers(len(wrong) + 2)]})


def rests(rng: np.random.Generator, good: Message) -> bytes:
    """A rest, or a delay, that is none, beyond what can be, or without the other."""
    rest, many = np.array(good["rest"]), 2**62
    wrong: list[dict[str, Any]] = [
        {"rest": rest[0]}, {"rest": rest[None]}, {"rest": rest[:, 1:]}, {"rest": np.zeros((1000, rest.shape[1]))},
        {"rest": rest * np.nan}, {"rest": rest + np.inf}, {"rest": np.full(rest.shape, 1e300)}, {"rest": rest > 0},
        {"rest": "x"}, {"rest": {}}, {"rest": array(b"", shape=[many, many])}, {"rest": array(shape=[-1, -1])},
        {"rest": None}, {"delay": None}, {"delay": -1}, {"delay": len(rest) + 1}, {"delay": many}, {"delay": 0.5},
        {"delay": True}, {"delay": "x"}, {"delay": np.nan}, {"delay": array()}, {"delay": [0]},
    ]  # fmt: skip
    return pack({**good, **wrong[rng.integers(len(wrong))]})


def without_keys(rng: np.random.Generator, good: Message) -> bytes:
    gone = ["images", "state", "prompt", next(iter(good["images"]))][rng.integers(4)]
    found = {key: value for key, value in good.items() if key != gone}
    return pack({**found, "images": {k: v for k, v in found.get("images", {}).items() if k != gone}}
                if "images" in found else found)  # fmt: skip


def bombs(rng: np.random.Generator, good: Message) -> bytes:
    """Few bytes that announce, or would become, much memory."""
    row = b"\xdc\x00\x40"
    made = [
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 100_000,
        row * 200 + b"\x80" * 2**20, b"\xdd\x00\x10\x00\x00" + b"\x80" * 2**20, row + (row + b"\x80" * 64) * 64,
        msgpack.packb({"state": array(b"", shape=[2**20, 2**20])}),
    ]  # fmt: skip
    return made[rng.integers(len(made))]


def another_instruction(rng: np.random.Generator, good: Message) -> bytes:
    """Nothing wrong with it: another episode."""
    return pack({**good, "prompt": f"open drawer {rng.integers(9)}", "episode": int(rng.integers(9))})


MESSAGES: dict[str, Callable[[np.random.Generator, Message], bytes]] = {
    maker.__name__.replace("_", " "): maker
    for maker in (random_bytes, flipped, shortened, shapes, dtypes, pickled, not_finite, misfits, rests, without_keys,
                  bombs, another_instruction)
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- ways to misbehave
def text(port: int, rng: np.random.Generator, good: Message) -> str:
    return _after(port, frame(Opcode.TEXT, rng.integers(32, 127, 20, np.uint8).tobytes()))


def broken_frames(port: int, rng: np.random.Generator, good: Message) -> str:
    """Not UTF-8, not masked, an opcode and a length that do not exist, a continuation of nothing, noise."""
    made = [
        frame(Opcode.TEXT, b"\xff\xfe"), Frame(Opcode.BINARY, b"x").serialize(mask=False), b"\x83\x80" + bytes(4),
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(4), frame(Opcode.CONT, b"x"), b"\xff" * 64,
        frame(Opcode.PING, b"x" * 125)[:1] + b"\xfe\x00\xff" + bytes(300), frame(Opcode.CLOSE, b"\x00"),
    ]  # fmt: skip
    return _after(port, made[rng.integers(len(made))])


def too_large(port: int, rng: np.random.Generator, good: Message) -> str:
    return _after(port, b"\x82\xff" + struct.pack(">Q", 2**33) + bytes(4) + bytes(1000))


def empty_pieces(port: int, rng: np.random.Generator, good: Message) -> str:
    return _after(port, frame(Opcode.BINARY, b"", False) + frame(Opcode.CONT, b"", False) * 3000)


def cut_off(port: int, rng: np.random.Generator, good: Message) -> str:
    """Killed in the middle of a message."""
    client, message = RawClient(port), frame(Opcode.BINARY, pack(good))
    client.socket.sendall(message[: rng.integers(1, len(message))])
    client.close(reset=bool(rng.integers(2)))
    return "closed"


def gone_before_the_answer(port: int, rng: np.random.Generator, good: Message) -> str:
    client = RawClient(port)
    client.socket.sendall(frame(Opcode.BINARY, pack(good)) * 2)
    client.close(reset=True)
    return "closed"


def no_handshake(port: int, rng: np.random.Generator, good: Message) -> str:
    made = [
        rng.bytes(400), b"GET / HTTP/1.1\r\n\r\n", HANDSHAKE.replace(b"13", b"99"), HANDSHAKE.replace(b"GET", b"POST"),
        HANDSHAKE[:-2] + b"Origin: http://localhost\r\n\r\n", HANDSHAKE[:-2] + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as raw, suppress(ConnectionError):
        raw.sendall(made[rng.integers(len(made))])
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(2**16):
            pass
    return "closed"


def slow_reader(port: int, rng: np.random.Generator, good: Message) -> str:
    """Asks on without reading, then is gone."""
    client = RawClient(port, receive_buffer=2**12)
    with suppress(ConnectionError):
        client.socket.sendall(frame(Opcode.BINARY, pack(good)) * 5 + frame(Opcode.PING, b"x" * 125) * 500)
    client.close(reset=True)
    return "closed"


WAYS: dict[str, Callable[[int, np.random.Generator, Message], str]] = {
    way.__name__.replace("_", " "): way
    for way in (text, broken_frames, too_large, empty_pieces, cut_off, gone_before_the_answer, no_handshake,
                slow_reader)
}  # fmt: skip


def _after(port: int, data: bytes) -> str:
    """How the server reacts to bytes after the handshake."""
    client = RawClient(port)
    try:
        with suppress(ConnectionError):
            client.socket.sendall(data)
        return client.ending()
    finally:
        client.close()


# ------------------------------------------------------------------------------------------------------------ campaign
@dataclass
class Report:
    """endings: how often each kind of client was answered, told a sentence or cut.  compared: chunks of honest clients
    during the campaign.  differing: those that were not as before it, bit for bit.  memory: of the server in MiB, at
    every tenth of the campaign.
    """

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    compared: int = 0
    differing: int = 0
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """Kinds against endings, as markdown."""
        ways, kinds = ("sentence", "closed", "answered"), sorted({kind for kind, _ in self.endings})
        rows = [[kind, *(self.endings[kind, way] for way in ways)] for kind in kinds]
        rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 4))])
        head = f"| what came | {' | '.join(ways)} |\n|---|---|---|---|"
        return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def campaign(
    port: int, observations: Sequence[Message], messages: int, seed: int = 0, process: int | None = None,
    honest: int = 2,
) -> Report:  # fmt: skip
    """Sends so many hostile messages to a server of this machine, of every kind in turn.

    observations: of an episode, as a client sends them, with a rest and a delay.  process: the server's, for its
    memory.  honest: clients that drive this episode over and over meanwhile. Raises TimeoutError for a connection that
    hangs.
    """
    report, rng, began = Report(), np.random.default_rng(seed), time.perf_counter()
    kinds = [*MESSAGES, *WAYS]
    progress = Progress(messages, "hostile messages")
    with _honest(port, observations, honest, report), _half_open(port, report):
        for number in range(messages):
            if process is not None and number % max(messages // 10, 1) == 0:
                report.memory.append(resident_mib(process))
            kind = kinds[number % len(kinds)]
            if kind in WAYS:
                ending = _again(lambda kind=kind: WAYS[kind](port, rng, observations[0]))
            else:
                data = frame(Opcode.BINARY, MESSAGES[kind](rng, observations[0]))
                ending = _again(lambda data=data: _after(port, data))
            report.endings[kind, ending] += 1
            progress.add(kind, 1)
    if process is not None:
        report.memory.append(resident_mib(process))
    report.seconds = time.perf_counter() - began
    return report


def _again(act: Callable[[], str]) -> str:
    """Where the server has its number of clients, those of the acts before are on their way out."""
    for _ in range(1000):
        try:
            return act()
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise TimeoutError("the server takes no client any more")


@contextmanager
def _honest(port: int, observations: Sequence[Message], count: int, report: Report) -> Iterator[None]:
    """Clients that drive an episode over and over and compare; an error of one ends the block with it."""

    def drive(ended: threading.Event | None, wanted: list[np.ndarray]) -> list[np.ndarray]:
        with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None) as connection:
            connection.recv(PATIENCE)
            episode, chunks = 0, []
            while ended is None or not ended.is_set():
                for number, observation in enumerate(observations):
                    connection.send(pack({**observation, "episode": episode}))
                    chunks = [*chunks[-len(observations) :], unpack(connection.recv(PATIENCE))["actions"]]
                    if wanted:
                        with lock:
                            report.compared += 1
                            report.differing += not np.array_equal(chunks[-1], wanted[number])
                episode += 1
                if ended is None:
                    return chunks
            return chunks

    def guarded() -> None:
        try:
            drive(ended, wanted)
        except BaseException as error:
            errors.append(error)

    lock, ended, errors = threading.Lock(), threading.Event(), []
    wanted = drive(None, [])
    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _half_open(port: int, report: Report) -> Iterator[None]:
    """Sockets that say nothing, stop in the handshake, or answer no ping; all must be cut by the server."""
    silent = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(HELD)]
    for raw in silent[HELD // 2 :]:
        raw.sendall(HANDSHAKE[:40])
    deaf = RawClient(port)
    yield
    report.endings["half-open", deaf.ending()] += 1
    deaf.close()
    for raw in silent:
        with suppress(ConnectionError):
            while raw.recv(2**12):
                pass
        raw.close()
        report.endings["half-open", "closed"] += 1


def resident_mib(process: int) -> float:
    """Memory that a process holds now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
