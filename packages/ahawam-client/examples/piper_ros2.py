"""Drives two AgileX Piper arms under ROS 2 by a policy that `ahawam serve` serves: the thin part that knows ROS.

    python piper_ros2.py ws://gpu:8000 --instruction "pick up the cube" --dry-run     # first; publishes nothing
    python piper_ros2.py ws://gpu:8000 --instruction "pick up the cube"

Expects a driver for each arm that publishes and takes sensor_msgs/JointState (six radians and the gripper in metres),
as agilexrobotics/piper_ros does in a namespace of its own, and cameras as sensor_msgs/Image: docs/robot.md.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import piper

from ahawam_client.bridge import Observation

CAMERAS = {
    "cam_high": "/cam_high/color/image_raw", "cam_left_wrist": "/cam_left_wrist/color/image_raw",
    "cam_right_wrist": "/cam_right_wrist/color/image_raw",
}  # fmt: skip


def picture_of(message: Any) -> np.ndarray:
    """uint8 [h, w, 3], red first, of a sensor_msgs/Image. Raises ValueError for encodings other than rgb8 and bgr8."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"a camera sends {message.encoding}; expected rgb8 or bgr8.")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    picture = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(picture[..., ::-1] if message.encoding == "bgr8" else picture)


class Newest:
    """The newest message of each topic, and when it came by this computer's clock. Safe to use from any thread."""

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics, self._found, self._lock = list(topics), {}, threading.Lock()

    def put(self, topic: str, message: Any) -> None:
        with self._lock:
            self._found[topic] = message, time.monotonic()

    def take(self) -> tuple[dict[str, Any], float] | None:
        """All of them, and the time of the oldest; None before each has come once."""
        with self._lock:
            if len(self._found) < len(self._topics):
                return None
            return {topic: found[0] for topic, found in self._found.items()}, min(t for _, t in self._found.values())

    def missing(self) -> list[str]:
        with self._lock:
            return [topic for topic in self._topics if topic not in self._found]


class Arms:
    """Both arms and the cameras, over a node's topics; a `driving.Robot`."""

    def __init__(self, node: Any, messages: Any, options: argparse.Namespace, cameras: Sequence[str]) -> None:
        """messages: the module sensor_msgs.msg."""
        unknown = options.camera.keys() - set(cameras)
        if unknown:
            raise ValueError(f"--camera names {', '.join(unknown)}; the policy looks at {', '.join(cameras)}.")
        self._message, self._gripper = messages.JointState, options.gripper
        self._cameras = {camera: options.camera.get(camera, CAMERAS.get(camera, f"/{camera}")) for camera in cameras}
        self._states = [f"{arm}/joint_states_single" for arm in (options.left, options.right)]
        self.newest = Newest([*self._states, *self._cameras.values()])
        for topic in self._states:
            node.create_subscription(messages.JointState, topic, lambda m, t=topic: self.newest.put(t, m), 1)
        for topic in self._cameras.values():
            node.create_subscription(messages.Image, topic, lambda m, t=topic: self.newest.put(t, m), 1)
        # Depth 1: the driver is to run the newest command, never a queue of old ones.
        self._writers = [
            node.create_publisher(messages.JointState, f"{arm}/joint_ctrl_single", 1)
            for arm in (options.left, options.right)
        ]

    def read(self) -> Observation | None:
        found = self.newest.take()
        if found is None:
            return None
        messages, when = found
        images = {camera: picture_of(messages[topic]) for camera, topic in self._cameras.items()}
        left, right = (messages[topic].position for topic in self._states)
        return Observation(images, piper.from_driver(left, right, self._gripper), when)

    def write(self, positions: np.ndarray) -> None:
        for writer, values in zip(self._writers, piper.to_driver(positions, self._gripper), strict=True):
            writer.publish(self._message(position=values))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    piper.add_options(p)
    p.add_argument("--dry-run", action="store_true", help="publish nothing; print what would be sent")
    p.add_argument("--left", default="/left", help="namespace of the left arm's driver (default %(default)s)")
    p.add_argument("--right", default="/right", help="namespace of the right arm's driver (default %(default)s)")
    p.add_argument("--camera", action="append", default=[], metavar="NAME=TOPIC", help="where a view comes from; "
                   "again for each (default: /NAME/color/image_raw)")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    wrong = [pair for pair in options.camera if "=" not in pair]
    if wrong:
        parser().error(f"--camera is {wrong[0]}; expected NAME=TOPIC.")
    options.camera = dict(pair.split("=", 1) for pair in options.camera)
    try:
        import rclpy
        from sensor_msgs import msg
    except ImportError as error:
        print(f"error: ROS 2 is not in reach ({error}); source its setup.bash first.", file=sys.stderr)
        return 1
    rclpy.init()
    node = rclpy.create_node("ahawam_bridge")
    spinning = threading.Thread(target=rclpy.spin, args=(node,), daemon=True)

    def make(cameras: Sequence[str]) -> Arms:
        arms = Arms(node, msg, options, cameras)
        spinning.start()
        limit = time.monotonic() + 10
        while arms.newest.missing():
            if time.monotonic() > limit:
                raise OSError(f"nothing comes from {', '.join(arms.newest.missing())} (ros2 topic hz TOPIC).")
            time.sleep(0.1)
        return arms

    try:
        return piper.run(make, options, options.dry_run, over=lambda: not rclpy.ok())
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
