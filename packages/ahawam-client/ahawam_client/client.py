"""A connection to `ahawam serve`."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from ahawam_client.wire import pack, unpack


class ServerError(RuntimeError):
    """The server refused, failed or is gone; the message is its sentence."""


class PolicyClient:
    """One robot's connection, and its episodes.

    metadata: what the server says of its policy: "cameras", "state", "actions", "chunk", "execute", ...
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60.0) -> None:
        """url: as ws://127.0.0.1:8000.  timeout: seconds, of connecting and of an answer. Raises ServerError."""
        self._url, self._timeout, self._episode = url, timeout, 0
        headers = {"Authorization": f"Api-Key {token}"} if token is not None else None
        self._stack = contextlib.ExitStack()
        try:
            self._connection = self._stack.enter_context(
                connect(url, compression=None, max_size=None, additional_headers=headers, open_timeout=timeout)
            )
            self.metadata: dict[str, Any] = unpack(self._connection.recv(timeout))
        except (OSError, ConnectionClosed, InvalidHandshake, InvalidURI) as error:
            body = getattr(getattr(error, "response", None), "body", None)
            said = body.decode(errors="replace").strip() if body else str(error)
            self._stack.close()
            raise ServerError(f"{url} does not take this client: {said}") from error

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it the episode."""
        self._stack.close()

    def reset(self) -> None:
        """The next observation begins another episode."""
        self._episode += 1

    def infer(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str | None = None,
        rest: np.ndarray | None = None, delay: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """The answer to an observation, {"actions": float32 [chunk, m], ...}; see `send`. Raises ServerError."""
        self.send(images, state, prompt, rest, delay)
        return self.receive()

    def send(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str | None = None,
        rest: np.ndarray | None = None, delay: int = 0,
    ) -> None:  # fmt: skip
        """Sends an observation and does not wait. One that waits at the server is replaced and gets no answer.

        images: uint8 [h, w, 3] by camera, those of metadata["cameras"].  state: [n], the robot's own.  prompt: the
        instruction, None for the server's own.  rest: [rows, m], the commands that are still to be run, the first of
        them now, for a robot that moves while it waits.  delay: so many of them will have been run when the answer is
        there, metadata["max_delay"] at most.
        """
        message = {"images": dict(images), "state": np.asarray(state), "episode": self._episode}
        if rest is not None and len(rest):
            message |= {"rest": np.asarray(rest, np.float32), "delay": int(delay)}
        try:
            self._connection.send(pack(message if prompt is None else {**message, "prompt": prompt}))
        except ConnectionClosed:
            self.receive()  # which finds what the server said before it closed

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next answer; its "observation" says to which one, counted from 0. Raises ServerError."""
        try:
            answer = self._connection.recv(self._timeout if timeout is None else timeout)
        except TimeoutError:
            raise ServerError(f"{self._url} gave no answer in time.") from None
        except ConnectionClosed as error:
            said = error.rcvd.reason or error.rcvd.code if error.rcvd else "the connection was cut"
            raise ServerError(f"{self._url} is gone: {said}") from error
        if isinstance(answer, str):
            raise ServerError(answer)
        return unpack(answer)
