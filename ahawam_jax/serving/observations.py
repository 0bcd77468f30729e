"""What a client is told about a policy, and what an observation must be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.handover import HandOver
from data_pipelines.canvas import Canvas
from data_pipelines.embodiment import Embodiment

MAX_SIDE = 8192  # pixels of a picture
MAX_INSTRUCTION = 1000  # characters


class ServedPolicy(Protocol):
    """What `Policy` and `export.runtime.DeployedPolicy` have in common."""

    sizes: Any  # ModelConfig
    config: Any  # PolicyConfig
    canvas: Canvas
    embodiment: Embodiment
    max_delay: int  # most committed actions of training
    can_guide: bool  # `Continued.guidance` can be followed

    def start(self, instructions: Sequence[str]) -> Any: ...

    def __call__(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, state: Any, continued: Continued | None = None
    ) -> tuple[np.ndarray, Any]: ...


class Refusal(ValueError):
    """An observation that is not acted on; the sentence goes to the client."""


@dataclass(frozen=True)
class Observation:
    """One client's, of one moment.

    images: uint8 [1, h, w, 3] by camera.  state: float32 [1, n], the robot's own.  instruction, episode: None where
    the client sends none.  rest: float32 [1, R, m], the commands that it has still to run, the first of them now; None
    where it sends none.  delay: so many of them will have been run when the answer is there.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str | None
    episode: int | str | None
    rest: np.ndarray | None = None
    delay: int = 0


def cameras_of(policy: ServedPolicy) -> tuple[str, ...]:
    """Views that an observation must have."""
    return tuple(camera for camera in policy.canvas.cameras if camera not in policy.embodiment.absent)


def metadata_of(policy: ServedPolicy, hand_over: HandOver) -> dict[str, Any]:
    """The first message to every client."""
    state, action = policy.embodiment.state, policy.embodiment.action
    return {
        "policy": "AHA-WAM",
        "cameras": list(cameras_of(policy)),
        "state": list(state.labels),
        "actions": list(action.labels),
        "held": list(policy.embodiment.held),
        "chunk": policy.sizes.chunk,
        "execute": policy.config.execute,
        "refresh_every": policy.config.refresh_every,
        "hand_over": hand_over.name,
        "max_delay": hand_over.max_delay(policy),
    }


def read_observation(message: Any, policy: ServedPolicy) -> Observation:
    """Checks an unpacked message: {"images": {camera: array}, "state": array, "prompt": text, "episode": any,
    "rest": array, "delay": number}.

    Other keys and cameras are ignored. Raises Refusal.
    """
    if not isinstance(message, dict):
        raise Refusal(f"an observation is a map with the keys images, state and prompt; got a {_kind(message)}.")
    missing = [key for key in ("images", "state") if key not in message]
    if missing:
        raise Refusal(f"the observation lacks {' and '.join(missing)}; it has {_few(message)}.")
    images, instruction, episode = message["images"], message.get("prompt"), message.get("episode")
    if not isinstance(images, dict):
        raise Refusal(f"images is a {_kind(images)}; expected a map from camera to picture.")
    missing = [camera for camera in cameras_of(policy) if camera not in images]
    if missing:
        raise Refusal(f"images lacks {', '.join(missing)}; it has {_few(images)}.")
    if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
        raise Refusal(f"prompt is {instruction!r:.60}; expected the instruction in words.")
    if instruction is not None and len(instruction) > MAX_INSTRUCTION:
        raise Refusal(f"prompt has {len(instruction)} characters; expected at most {MAX_INSTRUCTION}.")
    if episode is not None and type(episode) not in (int, str):
        raise Refusal(f"episode is a {_kind(episode)}; expected a whole number or a text, another for each episode.")
    pictures = {camera: _picture(camera, images[camera])[None] for camera in cameras_of(policy)}
    state = _state(message["state"], policy.embodiment)[None]
    return Observation(pictures, state, instruction, episode, *_rest(message, policy))


def _picture(camera: str, picture: Any) -> np.ndarray:
    """uint8 [h, w, 3]; colours may also come first, as openpi's ALOHA clients send them."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3:
        if picture.shape[0] == 3 and picture.shape[2] != 3:
            picture = np.ascontiguousarray(np.moveaxis(picture, 0, 2))
        if picture.shape[2] == 3 and max(picture.shape) <= MAX_SIDE:
            return picture
    raise Refusal(
        f"the picture of {camera} is a {_kind(picture)}; expected uint8 [height, width, 3], at most {MAX_SIDE} pixels "
        "a side."
    )


def _state(state: Any, embodiment: Embodiment) -> np.ndarray:
    """float32 [n], finite."""
    labels = embodiment.state.labels
    numbers = isinstance(state, np.ndarray) and state.dtype.kind in "iuf"
    if not numbers or state.shape != (len(labels),):
        raise Refusal(f"state is a {_kind(state)}; expected {len(labels)} numbers: {', '.join(labels)}.")
    with np.errstate(over="ignore"):
        state = state.astype(np.float32)
    if not np.isfinite(state).all():
        wrong = [label for label, number in zip(labels, state, strict=True) if not np.isfinite(number)]
        raise Refusal(f"state has no finite float32 number for {', '.join(wrong)}.")
    return state


def _rest(message: Mapping[str, Any], policy: ServedPolicy) -> tuple[np.ndarray | None, int]:
    """float32 [1, R, m], finite where the policy drives, and the delay; None and 0 where the message has neither."""
    rest, delay = message.get("rest"), message.get("delay")
    if rest is None and delay is None:
        return None, 0
    if rest is None or delay is None:
        there, lacks = ("delay", "rest") if rest is None else ("rest", "delay")
        raise Refusal(
            f"the observation has {there}, but no {lacks}; expected both, the commands that are still to be run and "
            "how many of them will have been run when the answer is there, or neither."
        )
    action, most = policy.embodiment.action, policy.sizes.chunk
    numbers = isinstance(rest, np.ndarray) and rest.dtype.kind in "iuf" and rest.ndim == 2
    if not numbers or rest.shape[1] != len(action.labels) or len(rest) > most:
        raise Refusal(
            f"rest is a {_kind(rest)}; expected the rows that are still to be run, at most the {most} of a chunk, of "
            f"{len(action.labels)} numbers each: {', '.join(action.labels)}."
        )
    with np.errstate(over="ignore"):
        rest = rest.astype(np.float32)
    wrong = [label for place, label in enumerate(action.labels)
             if place in action.places and not np.isfinite(rest[:, place]).all()]  # fmt: skip
    if wrong:
        raise Refusal(f"rest has no finite float32 number for {', '.join(wrong)}.")
    if type(delay) is not int or not 0 <= delay <= len(rest):
        raise Refusal(
            f"delay is {delay!r:.40}; expected a whole number from 0 to {len(rest)}, the rows of rest: how many of "
            "them will have been run when the answer is there."
        )
    return rest[None], delay


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {list(value.shape)}"
    return type(value).__name__


def _few(items: Mapping[str, Any]) -> str:
    """The keys, as many as a sentence holds."""
    return ", ".join(f"{key!r:.40}" for key in list(items)[:8]) or "nothing"
