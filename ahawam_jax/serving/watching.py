"""Who watches: a path that shows every answer with its observation, and that the clients never notice.

Nothing is decoded, copied or encoded for a watcher before it is its turn: it is handed the bytes that came and the
bytes that went. Each keeps the newest pair alone; what it was too slow for, or what came faster than RATE, is counted.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Response
from websockets.protocol import State

from ahawam_jax.serving.connections import MAX_UNREAD, BoundedConnection
from ahawam_jax.serving.metrics import Metrics
from ahawam_jax.serving.wire import pack

PATH = "/watch"
WATCHERS = 2  # at a time
RATE = 10.0  # frames a second, of a watcher

Send = Callable[[ServerConnection, bytes | str], Awaitable[None]]


class _Watcher:
    """One connection, and the newest of what it has not been shown."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()  # there is something to show, or it is over
        self.newest: tuple[str, bytes, bytes] | None = None
        self.missed = 0
        self.gone = False


class Watchers:
    """Of one server; used in its event loop alone."""

    def __init__(self, metadata: bytes, message: int, send: Send, metrics: Metrics) -> None:
        """metadata: the first message.  message: bytes that an observation may have."""
        self._metadata, self._room, self._send, self._metrics = metadata, 2 * message + MAX_UNREAD, send, metrics
        self._connections: set[ServerConnection] = set()  # admitted and not yet gone
        self._watchers: set[_Watcher] = set()
        self._over = False

    def admit(self, connection: BoundedConnection) -> Response | None:
        """Lets a watcher in, or says why not."""
        self._connections = {other for other in self._connections if other.state is not State.CLOSED}
        if len(self._connections) >= WATCHERS:
            return connection.respond(503, f"error: this server has {WATCHERS} watchers already; come back later.\n")
        connection.room = self._room  # a frame, which a pong may find half sent
        self._connections.add(connection)
        return None

    def show(self, client: str, observation: bytes, answer: bytes) -> None:
        """Hands what a client sent, and was answered, to all who watch."""
        for watcher in self._watchers:
            watcher.missed += watcher.newest is not None
            watcher.newest = (client, observation, answer)
            watcher.changed.set()

    def end(self) -> None:
        """Sends all of them away."""
        self._over = True
        for watcher in self._watchers:
            watcher.changed.set()

    async def handle(self, connection: ServerConnection) -> None:
        """One watcher, until it leaves or the server ends.

        Each message is {"client", "observation": bytes, "answer": bytes, "missed"}: how many answers there were that
        it was not shown.
        """
        watcher = _Watcher()
        self._watchers.add(watcher)
        self._metrics.watchers.inc()
        listening = asyncio.create_task(_listen(connection, watcher))
        try:
            await self._send(connection, self._metadata)
            while not self._over and not watcher.gone:
                if watcher.newest is not None:
                    client, observation, answer = watcher.newest
                    watcher.newest = None
                    frame = {"client": client, "observation": observation, "answer": answer, "missed": watcher.missed}
                    await self._send(connection, pack(frame))
                    self._metrics.frames.inc()
                    await asyncio.sleep(1 / RATE)
                else:
                    watcher.changed.clear()
                    await watcher.changed.wait()
            if watcher.gone:
                await connection.close(CloseCode.POLICY_VIOLATION, "error: a watcher listens; it sends nothing.")
            await connection.close(CloseCode.GOING_AWAY, "the server ends")
        finally:
            listening.cancel()
            self._watchers.discard(watcher)
            self._metrics.watchers.dec()


async def _listen(connection: ServerConnection, watcher: _Watcher) -> None:
    """Waits for what must not come, a message, or for the end of the connection."""
    with suppress(ConnectionClosed):
        await connection.recv()
    watcher.gone = True
    watcher.changed.set()
