"""The first calls of a policy, which compile, before anybody waits for them."""

import numpy as np

from ahawam_jax.inference.handover import HAND_OVERS, HandOver
from ahawam_jax.serving.observations import ServedPolicy, cameras_of


def warm_up(policy: ServedPolicy, instruction: str, hand_over: HandOver = HAND_OVERS["wait"]) -> None:
    """Calls all that an episode needs, up to its second refresh, on black pictures; chunks with a rest and without.

    Raises FileNotFoundError where the instruction was never encoded.
    """
    policy = getattr(policy, "policy", policy)  # of two streams the one that they run, whose calls wait
    height, width = policy.canvas.head_size
    images = {camera: np.zeros((1, height, width, 3), np.uint8) for camera in cameras_of(policy)}
    robot_state = np.zeros((1, len(policy.embodiment.state.names)), np.float32)
    state = policy.start([instruction])
    rest = np.zeros((1, 1, len(policy.embodiment.action.names)), np.float32)
    for call in range(policy.config.refresh_every + 1):
        _, state = policy(images, robot_state, state, hand_over.ask(rest, 0) if call else None)
