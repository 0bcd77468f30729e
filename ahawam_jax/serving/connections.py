"""A websocket connection that cannot be made to hold more than a message: what the library itself does not bound."""

from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CTRL_OPCODES, Frame

MAX_FRAGMENTS = 1024  # of one message; empty ones add nothing to its size, but each takes memory
MAX_UNREAD = 2**20  # bytes of answers and pongs that a client has not taken


class BoundedConnection(ServerConnection):
    """Cuts a connection whose message never ends, and one that asks and does not read."""

    room = 0  # bytes that may be unread, in place of MAX_UNREAD
    _fragments = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # answers every ping, whether anybody reads the answers or not
        if self.transport.get_write_buffer_size() > (self.room or MAX_UNREAD):
            self.transport.abort()

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and event.opcode not in CTRL_OPCODES:
            self._fragments = 0 if event.fin else self._fragments + 1
            if self._fragments > MAX_FRAGMENTS:
                self.transport.abort()
                return
        super().process_event(event)
