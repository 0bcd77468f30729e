"""A dry run without ROS and without a robot: black pictures, arms that stay where they are, nothing sent to anybody.

    python dry_run.py ws://127.0.0.1:8000 --instruction "pick up the cube" --seconds 10

Goes the whole way from observations over the policy to commands, guard included, and says what it found.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import piper

from ahawam_client.bridge import Observation


class StandIn:
    """Two arms at rest."""

    def __init__(self, cameras: Sequence[str], start: np.ndarray) -> None:
        self._images = {camera: np.zeros((480, 640, 3), np.uint8) for camera in cameras}
        self._state = start

    def read(self) -> Observation:
        return Observation(self._images, self._state, time.monotonic())

    def write(self, positions: np.ndarray) -> None:
        raise AssertionError("a dry run sends nothing")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    piper.add_options(parser)
    parser.add_argument("--start", type=float, nargs=14, metavar="X", help="where the arms are (default: all 0)")
    options = parser.parse_args(argv)
    start = np.float32(options.start or np.zeros(14))
    return piper.run(lambda cameras: StandIn(cameras, start), options, dry_run=True)


if __name__ == "__main__":
    sys.exit(main())
