"""What a watcher makes of what it is shown: pictures, joints, ages and times, for whatever draws them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ahawam_jax.serving.wire import unpack

TIMES = ("wait_ms", "decode_ms", "infer_ms", "prev_total_ms")


class Sink(Protocol):
    """Draws. path: parts of a name, from the general to the particular.  step: control steps of the episode."""

    def begin(self, path: Sequence[str], cameras: Sequence[str], joints: Sequence[str]) -> None:
        """Another client's, or another episode: what it will have."""

    def picture(self, path: Sequence[str], step: int, picture: np.ndarray) -> None:
        """uint8 [h, w, 3]."""

    def numbers(self, path: Sequence[str], steps: Sequence[int], values: Sequence[float]) -> None:
        """One curve's values at these steps."""

    def text(self, path: Sequence[str], step: int, words: str) -> None: ...


class View:
    """Turns the frames of `/watch` into what a sink draws.

    Predicted are the actions that are to be run of a chunk, at the steps that they are for; executed is the state that
    the robot then shows. A number of the action that has the name of one of the state is drawn beside it.
    """

    def __init__(self, metadata: Mapping[str, Any], sink: Sink) -> None:
        self._metadata, self._sink = metadata, sink
        self._seen: dict[str, int] = {}  # the newest episode of each client

    def show(self, message: bytes) -> dict[str, Any]:
        """Draws a frame, and returns its answer. Raises WireError for one that is none."""
        frame = unpack(message)
        observation, answer = unpack(frame["observation"]), unpack(frame["answer"])
        client, step = str(frame["client"]), int(answer["step"])
        path = (client, f"episode {answer['episode_number']}")
        cameras, sink = self._metadata["cameras"], self._sink
        if self._seen.get(client) != answer["episode_number"]:
            self._seen[client] = answer["episode_number"]
            joints = list(dict.fromkeys([*self._metadata["state"], *self._metadata["actions"]]))
            sink.begin(path, cameras, joints)
            sink.text((*path, "instruction"), step, str(observation.get("prompt", "(the server's own)")))
        for camera in cameras:
            sink.picture((*path, "cameras", camera), step, _upright(observation["images"][camera]))
        for label, value in zip(self._metadata["state"], observation["state"], strict=True):
            sink.numbers((*path, "joints", label, "executed"), [step], [float(value)])
        rows = np.asarray(answer["actions"])[: self._metadata["execute"]]
        first = step + answer.get("begins", 0)
        steps = list(range(first, first + len(rows)))
        for label, values in zip(self._metadata["actions"], rows.T, strict=True):
            sink.numbers((*path, "joints", label, "predicted"), steps, values.tolist())
        sink.numbers((*path, "plan age", "steps"), [step], [float(answer["plan_age"])])
        for name in TIMES:
            if name in answer["server_timing"]:
                sink.numbers((*path, "latency", name), [step], [float(answer["server_timing"][name])])
        sink.numbers((*path, "lost", "observations dropped"), [step], [float(answer["dropped"])])
        sink.numbers((*path, "lost", "answers not shown"), [step], [float(frame["missed"])])
        return answer


def _upright(picture: np.ndarray) -> np.ndarray:
    """[h, w, 3] of what a client sent, which may have its colours first."""
    if picture.shape[0] == 3 and picture.shape[2] != 3:
        picture = np.moveaxis(picture, 0, 2)
    return np.ascontiguousarray(picture)


