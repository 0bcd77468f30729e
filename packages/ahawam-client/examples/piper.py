"""Two AgileX Piper arms: their numbers, limits and units, and the run of an episode; see docs/robot.md.

The policy has 14 numbers: joints 1 to 6 of the left arm in radians, its gripper, the same of the right arm.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ahawam_client.bridge import Bridge, Observation
from ahawam_client.client import PolicyClient, ServerError
from ahawam_client.driving import Robot, drive
from ahawam_client.guard import Guard, GuardError

# Of piper_sdk's table, radians; joint 2 and joint 3 move to one side only.
LOWER = (-2.6179, 0.0, -2.967, -1.745, -1.22, -2.09439)
UPPER = (2.6179, 3.14, 0.0, 1.745, 1.22, 2.09439)
FASTEST = 3.0  # rad/s, the most that the SDK lets a joint be set to
GRIPPER = 0.07  # metres, open; the driver's unit
JUMP = 0.2  # radians, or of the gripper's way: how far the first command may be from where the arm is
NAMES = [f"{side} {part}" for side in ("left", "right") for part in (*(f"joint {n}" for n in range(1, 7)), "gripper")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every way to run it has."""
    parser.add_argument("server", metavar="URL", help="of ahawam serve, as ws://gpu:8000")
    parser.add_argument("--instruction", help="in words (default: the server's own)")
    parser.add_argument("--token-file", type=Path, help="file whose first line is the server's token")
    parser.add_argument("--rate", type=float, default=25.0, help="control steps a second (default %(default)s); "
                        "that of the recordings")  # fmt: skip
    parser.add_argument("--speed", type=float, default=0.5, help="most of a joint, rad/s (default %(default)s)")
    parser.add_argument("--gripper", choices=("scale", "metres"), default="scale",
                        help="the policy's gripper: 0 closed to 1 open (default), or metres as the driver has it")
    parser.add_argument("--overlap", action="store_true",
                        help="go on with the old chunk while the next is computed, in place of holding, by the "
                        "server's hand-over")  # fmt: skip
    parser.add_argument("--state-of-commands", action="store_true",
                        help="show the policy the last command as the state, where feedback lags")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--record", type=Path, metavar="DIR", help="keep what is driven as a LeRobot dataset (needs "
                        "ahawam-client[record])")  # fmt: skip
    parser.add_argument("--wide-limits", action="store_true",
                        help="no Piper's: for a dry run with a policy of another robot")


def guard(labels: Sequence[str], rate: float, speed: float, gripper: str, wide: bool = False) -> Guard:
    """Limits of both arms, in the policy's units. Raises GuardError for a policy of another number of numbers."""
    if len(labels) != len(NAMES):
        raise GuardError(f"the policy has {len(labels)} numbers ({', '.join(labels)}); two Pipers have {len(NAMES)}.")
    if not 0 < speed <= FASTEST:
        raise GuardError(f"--speed is {speed:g} rad/s; expected more than 0 and at most {FASTEST:g}.")
    if not rate > 0:
        raise GuardError(f"--rate is {rate:g}; expected more than 0 control steps a second.")
    if wide:
        return Guard(labels, -10, 10, speed / rate, 20)
    open_ = 1.0 if gripper == "scale" else GRIPPER
    return Guard(
        labels,
        np.tile([*LOWER, 0.0], 2),
        np.tile([*UPPER, open_], 2),
        np.tile([*[speed / rate] * 6, open_ * speed / rate], 2),
        np.tile([*[JUMP] * 6, open_ * 2], 2),  # a gripper may be anywhere
    )


def from_driver(left: Sequence[float], right: Sequence[float], gripper: str) -> np.ndarray:
    """Positions of both drivers, six radians and metres each -> the policy's state, float32 [14].

    Raises ValueError for a driver that sends fewer.
    """
    for side, positions in (("left", left), ("right", right)):
        if len(positions) < 7:
            raise ValueError(f"the {side} driver sends {len(positions)} numbers; expected six joints and the gripper.")
    scale = GRIPPER if gripper == "scale" else 1.0
    return np.float32([*left[:6], left[6] / scale, *right[:6], right[6] / scale])


def to_driver(command: np.ndarray, gripper: str) -> tuple[list[float], list[float]]:
    """A command -> positions for the left and the right driver."""
    scale = GRIPPER if gripper == "scale" else 1.0
    left, right = ([*map(float, part[:6]), float(part[6]) * scale] for part in (command[:7], command[7:]))
    return left, right


class DryRun:
    """A robot that is read and never written to: what it would be told is printed once a second."""

    def __init__(self, robot: Robot, rate: float) -> None:
        self._robot, self._every, self.withheld = robot, max(round(rate), 1), 0

    def read(self) -> Observation | None:
        return self._robot.read()

    def write(self, positions: np.ndarray) -> None:
        if self.withheld % self._every == 0:
            parts = [" ".join(f"{x:6.3f}" for x in part) for part in (positions[:7], positions[7:])]
            print(f"would send  left {parts[0]}  right {parts[1]}", flush=True)
        self.withheld += 1


class Recorded:
    """A robot whose commands are kept, with what was seen when they were given."""

    def __init__(self, robot: Robot, recorder: Any) -> None:
        self._robot, self._recorder, self._seen = robot, recorder, None

    def read(self) -> Observation | None:
        self._seen = self._robot.read()
        return self._seen

    def write(self, positions: np.ndarray) -> None:
        self._robot.write(positions)
        self._recorder.add(self._seen.images, self._seen.state, positions)


@contextlib.contextmanager
def recorder_of(options: argparse.Namespace, says: Mapping[str, Any]) -> Iterator[Any]:
    """A recorder, None without --record. Raises ValueError where there can be none."""
    if options.record is None:
        yield None
        return
    if not options.instruction:
        raise ValueError("--record needs --instruction, which the episode is kept under.")
    try:
        from ahawam_client.recorder import Recorder
    except ModuleNotFoundError as error:
        raise ValueError(f"--record needs {error.name}; pip install 'ahawam-client[record]' brings it.") from error
    with Recorder(options.record, options.rate, says["state"], says["actions"], "piper") as recorder:
        yield recorder


def run(
    make_robot: Callable[[Sequence[str]], Robot], options: argparse.Namespace, dry_run: bool,
    over: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """One episode; the exit status. make_robot: is told the policy's cameras."""
    try:
        token = options.token_file.read_text().partition("\n")[0].strip() if options.token_file else None
        if dry_run and options.record:
            raise ValueError("--record keeps what was driven, and a dry run drives nothing.")
        with PolicyClient(options.server, token) as policy, recorder_of(options, policy.metadata) as recorder:
            says = policy.metadata
            limits = guard(says["actions"], options.rate, options.speed, options.gripper, options.wide_limits)
            bridge = Bridge(says, limits, wait=not options.overlap, state_of_commands=options.state_of_commands)
            for label, name, low, high in zip(says["actions"], NAMES, limits.lower, limits.upper, strict=True):
                print(f"{label} of the policy is the {name}, {low:g} to {high:g}")
            if options.overlap:
                print(f"hand-over in motion: {says['hand_over']}, up to {says['max_delay']} control steps")
            robot = make_robot(says["cameras"])
            if recorder is not None:
                robot = Recorded(robot, recorder)
            if dry_run:
                robot = DryRun(robot, options.rate)
                print("dry run: nothing is sent to the arms", flush=True)
            try:
                drive(robot, policy, bridge, options.rate, options.instruction, options.seconds, over)
            except KeyboardInterrupt:
                print("stopped: the arms stay where they were told to be last")
            for line in bridge.report():
                print(line)
            if dry_run:
                print(f"{robot.withheld} commands were withheld")
            if recorder is not None and not bridge.stopped:
                recorder.end_episode(options.instruction)
                print(f"kept as episode {recorder.episodes - 1} of {options.record}")
    except (ServerError, GuardError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if bridge.stopped:
        print(f"error: {bridge.stopped}", file=sys.stderr)
    return 1 if bridge.stopped else 0
