"""The control loop: a robot, a policy and a bridge, at a fixed rate."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ahawam_client.bridge import Bridge, Observation, Request
from ahawam_client.client import PolicyClient


class Robot(Protocol):
    """What a bridge drives. Both calls return at once."""

    def read(self) -> Observation | None:
        """The newest of everything; None before all of it was there once."""

    def write(self, positions: np.ndarray) -> None:
        """Sends a command, [n]."""


def drive(
    robot: Robot, policy: PolicyClient, bridge: Bridge, rate: float, prompt: str | None = None,
    seconds: float = float("inf"), over: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Runs control steps, `rate` a second, until the bridge stops, `over` says so, or `seconds` have passed.

    The policy is asked in a thread of its own, so no step waits for it. Nothing is printed in here: whatever is slow
    on this path is felt by the robot.
    """
    asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    answered: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
    thread = threading.Thread(target=_ask, args=(policy, prompt, asked, answered), daemon=True)
    thread.start()
    began, step = time.monotonic(), 0
    try:
        while not bridge.stopped and not over() and time.monotonic() - began < seconds:
            seen = robot.read()
            if seen is not None:
                bridge.observe(seen)
            while not answered.empty():
                answer = answered.get()
                if isinstance(answer, Exception):
                    bridge.stop(f"the policy is gone: {answer}")
                else:
                    bridge.answer(answer["actions"], answer.get("begins", 0))
            request = bridge.ask()
            if request is not None:
                asked.put(request)
            command = bridge.tick(time.monotonic())
            if command is not None:
                robot.write(command.positions)
            step += 1
            time.sleep(max(0.0, began + step / rate - time.monotonic()))
            step = max(step, int((time.monotonic() - began) * rate))  # a late step is not made up for
    finally:
        asked.put(None)
        thread.join(1.0)


def _ask(policy: PolicyClient, prompt: str | None, asked: queue.SimpleQueue, answered: queue.SimpleQueue) -> None:
    while (request := asked.get()) is not None:
        try:
            answer = policy.infer(request.images, request.state, prompt, request.rest, request.delay)
        except Exception as error:  # whatever it is, the robot has to stop
            answered.put(error)
            return
        answered.put(answer)
