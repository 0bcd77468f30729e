"""The server: websockets in an event loop, the policy on one thread of its own.

Every connection has a reader, which keeps the newest observation and counts those it replaces, and answers one
observation after the other when its turn comes; turns go round. So a client can be slow, fast, hostile or dead, and
what the others are answered does not change.
"""

import asyncio
import hmac
import logging
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State

from ahawam_jax.inference.handover import HandOver, default_hand_over
from ahawam_jax.serving.connections import BoundedConnection
from ahawam_jax.serving.episodes import ClientEpisode
from ahawam_jax.serving.metrics import TYPE, Metrics
from ahawam_jax.serving.observations import Refusal, ServedPolicy, metadata_of
from ahawam_jax.serving.warm_up import warm_up
from ahawam_jax.serving.watching import PATH, Watchers
from ahawam_jax.serving.wire import pack

PATIENCE = 5.0  # seconds that a client may take to read an answer, or to say goodbye
PING = 10.0  # seconds between two signs of life, and without one until a connection counts as dead


@dataclass(frozen=True)
class Limits:
    """clients: at a time.  message: bytes of an observation.  rate: observations per second of one client."""

    clients: int = 4
    message: int = 16 * 2**20
    rate: float = 100.0

    def __post_init__(self) -> None:
        for name in ("clients", "message", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the limit of {name} is {getattr(self, name)}; expected more than 0.")


class _Client:
    """A connection as the event loop sees it: what has arrived, and whether more will come."""

    def __init__(self, connection: ServerConnection, episode: ClientEpisode) -> None:
        self.connection, self.episode = connection, episode
        self.changed = asyncio.Event()  # an observation waits, or there will be no other
        self.gone = False  # the client's end is closed
        self.refusal: Refusal | None = None
        self.received = self.dropped = 0
        self.previous_ms: float | None = None  # from arrival to the answer's sending, of the answer before
        self._message: bytes | None = None
        self._arrived = 0.0

    @property
    def name(self) -> str:
        """Whom a log line is about."""
        host, port, *_ = self.connection.remote_address or ("?", "?")
        return f"{host}:{port}"

    def put(self, message: bytes) -> bool:
        """Keeps an observation in place of the one that waits; whether one did."""
        replaced = self._message is not None
        self._message, self._arrived = message, time.perf_counter()
        self.received += 1
        self.dropped += replaced
        self.changed.set()
        return replaced

    @property
    def waits(self) -> bool:
        """Whether an observation does."""
        return self._message is not None

    def take(self) -> tuple[bytes, float]:
        """The observation that waits and when it arrived."""
        message, self._message = self._message, None
        if self.refusal is None and not self.gone:
            self.changed.clear()
        return message, self._arrived

    def end(self, refusal: Refusal | None = None) -> None:
        """No more observations: the client is gone, or has to go."""
        self.gone, self.refusal = refusal is None, refusal or self.refusal
        self.changed.set()


class _Goodbye(Exception):
    """The server's end of a conversation."""

    def __init__(self, code: CloseCode, sentence: str) -> None:
        self.code, self.sentence = code, sentence


class _Unread(Exception):
    """The client does not take what is sent."""


class PolicyServer:
    """Serves one policy.

    metrics: what it counts.  say: takes a line for the log.
    """

    def __init__(
        self, policy: ServedPolicy, limits: Limits, instruction: str | None = None, token: str | None = None,
        hand_over: HandOver | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:  # fmt: skip
        """instruction: of observations that bring none.  token: that every client must have, None for none.
        hand_over: of observations that bring the rest of a chunk, None for what suits the checkpoint."""
        self.metrics = Metrics()
        self._policy, self._limits, self._instruction, self._say = policy, limits, instruction, say
        self._hand_over = hand_over or default_hand_over(policy)
        self._authorization = None if token is None else f"Api-Key {token}".encode()
        self._metadata = pack(metadata_of(policy, self._hand_over))
        self._worker = ThreadPoolExecutor(1, "policy")
        self._connections: set[ServerConnection] = set()  # admitted and not yet closed
        self._clients: set[_Client] = set()
        self._watchers = Watchers(self._metadata, limits.message, self._send, self.metrics)
        self._draining = False

    def warm_up(self) -> float:
        """Compiles what a chunk and a refresh need, on black pictures; seconds that it took.

        Raises ValueError where the policy knows no instruction to do that with.
        """
        began = time.perf_counter()
        self._worker.submit(self._first_calls).result()
        return time.perf_counter() - began

    def _first_calls(self) -> None:
        try:
            warm_up(self._policy, self._instruction or "warm up", self._hand_over)
        except FileNotFoundError as error:
            raise ValueError(
                "the server begins with a call of its own, for which it needs an instruction whose tokens exist: give "
                f"one with --instruction. {error}"
            ) from error

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serves until `stop` is set, then finishes the answers under way and closes all connections.

        port: 0 for any free one.  ready: called with the port once connections are accepted. Raises OSError where
        the address cannot be had.
        """
        self._turn = asyncio.Lock()  # fair: first come, first served, and a client queues once
        quiet = logging.getLogger("ahawam.websockets")
        quiet.setLevel(logging.CRITICAL)  # it would write a traceback for every broken handshake
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # and a line for every write to who is gone
        server = await serve(
            self._handle, host, port, process_request=self._admit, origins=[None],  # no web page of any origin
            compression=None, max_size=self._limits.message, max_queue=2, open_timeout=PATIENCE, ping_interval=PING,
            ping_timeout=PING, close_timeout=PATIENCE, server_header=None, logger=quiet,
            create_connection=BoundedConnection,
        )  # fmt: skip
        ready(server.sockets[0].getsockname()[1])
        await stop.wait()
        await self._drain(server)

    async def _drain(self, server: Server) -> None:
        self._draining = True
        server.close(close_connections=False)
        for client in self._clients:
            client.changed.set()
        self._watchers.end()
        await server.wait_closed()
        self._worker.shutdown()

    # ------------------------------------------------------------------------------------------------ who comes in
    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP requests, and refuses clients; None lets a client in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(200, "OK\n")
        if self._authorization is not None:
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(errors="replace"), self._authorization):
                self.metrics.connections.labels("unauthorised").inc()
                return connection.respond(401, "error: this server asks for Authorization: Api-Key TOKEN.\n")
        if path == "/metrics":
            response = connection.respond(200, "")
            response.body = self.metrics.page()
            del response.headers["Content-Type"], response.headers["Content-Length"]
            response.headers["Content-Type"] = TYPE
            response.headers["Content-Length"] = str(len(response.body))
            return response
        if path == PATH:
            return self._watchers.admit(connection)
        self._connections = {other for other in self._connections if other.state is not State.CLOSED}
        if len(self._connections) >= self._limits.clients:
            self.metrics.connections.labels("full").inc()
            most = self._limits.clients
            return connection.respond(503, f"error: this server takes {most} client(s) at a time; come back later.\n")
        self._connections.add(connection)
        return None

    # ------------------------------------------------------------------------------------------------- one client
    async def _handle(self, connection: ServerConnection) -> None:
        if connection.request.path.partition("?")[0] == PATH:
            with suppress(ConnectionClosed, _Unread):
                await self._watchers.handle(connection)
            return connection.transport.abort()
        episode = ClientEpisode(self._policy, self._hand_over, self._instruction, self.metrics)
        client = _Client(connection, episode)
        self._clients.add(client)
        self.metrics.connections.labels("accepted").inc()
        self.metrics.clients.inc()
        self._say(f"{client.name} connected")
        reader = asyncio.create_task(self._read(client))
        try:
            await self._converse(client)
        except ConnectionClosed:
            pass
        except _Unread:
            self._say(f"{client.name} does not read its answers; its connection is cut")
            connection.transport.abort()
        finally:
            reader.cancel()
            self._clients.discard(client)
            self.metrics.clients.dec()
            self._say(f"{client.name} gone: {client.received} observations, {client.dropped} dropped")

    async def _read(self, client: _Client) -> None:
        """Keeps the newest observation, until the connection ends or breaks the rules; then reads past the rest."""
        rate, burst = self._limits.rate, max(self._limits.rate, 1.0)
        tokens, filled = burst, time.monotonic()
        with suppress(ConnectionClosed):
            async for message in client.connection:
                if self._draining or client.refusal is not None:
                    continue
                now = time.monotonic()
                tokens, filled = min(tokens + rate * (now - filled), burst) - 1, now
                if tokens < 0:
                    client.end(Refusal(f"this server takes {rate:g} observations per second of a client; more came."))
                elif isinstance(message, str):
                    client.end(Refusal("a text came; expected an observation, a binary message in msgpack."))
                elif client.put(message):
                    self.metrics.observations.labels("dropped").inc()
        client.end()

    async def _converse(self, client: _Client) -> None:
        """Metadata, then answers; where it ends with a sentence, that as a text before the goodbye."""
        await self._send(client.connection, self._metadata)
        try:
            while not client.gone:
                await self._answer_next(client)
        except _Goodbye as goodbye:
            self._say(f"{client.name}: {goodbye.sentence}")
            if goodbye.code != CloseCode.GOING_AWAY:
                await self._send(client.connection, goodbye.sentence)
            await client.connection.close(goodbye.code, goodbye.sentence[:100].encode("ascii", "replace").decode())

    async def _answer_next(self, client: _Client) -> None:
        """Waits for an observation and for its turn. Raises _Goodbye where there is to be no further one."""
        if not self._draining:
            await client.changed.wait()
        if client.waits:
            async with self._turn:
                message, arrived = client.take()
                answer = await self._call(client, message, arrived)
            await self._send(client.connection, answer)
            self._watchers.show(client.name, message, answer)
            total = time.perf_counter() - arrived
            client.previous_ms = 1e3 * total
            self.metrics.stages.labels("total").observe(total)
        elif client.refusal is not None:
            self.metrics.observations.labels("refused").inc()
            raise _Goodbye(CloseCode.POLICY_VIOLATION, f"error: {client.refusal}")
        elif self._draining:
            raise _Goodbye(CloseCode.GOING_AWAY, "the server ends")

    async def _call(self, client: _Client, message: bytes, arrived: float) -> bytes:
        """The answer, computed on the policy's thread."""
        wait = time.perf_counter() - arrived
        self.metrics.stages.labels("wait").observe(wait)
        timing = {"wait_ms": 1e3 * wait}
        if client.previous_ms is not None:
            timing["prev_total_ms"] = client.previous_ms
        facts = {"observation": client.received - 1, "dropped": client.dropped}
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._worker, client.episode.answer, message, facts, timing)
        except Refusal as refusal:
            self.metrics.observations.labels("refused").inc()
            raise _Goodbye(CloseCode.POLICY_VIOLATION, f"error: {refusal}") from None
        except Exception as error:  # of the policy; whoever drives another robot need not notice
            self.metrics.observations.labels("failed").inc()
            traceback.print_exc(file=sys.stderr)
            sentence = f"error: the policy failed ({type(error).__name__}: {error}); connect again to begin anew."
            raise _Goodbye(CloseCode.INTERNAL_ERROR, sentence) from error
        self.metrics.observations.labels("answered").inc()
        return answer

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        """Raises _Unread where the client does not read."""
        try:
            async with asyncio.timeout(PATIENCE):
                await connection.send(message)
        except TimeoutError:
            raise _Unread from None
