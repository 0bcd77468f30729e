"""By what does a chunk go that continues committed actions: by what it sees, or by them?

    ahawam record --task=transfer_cube --episodes=12 --seed0=500 --out=runs/unseen
    python -m benchmarks.committed runs/demo_delay runs/unseen

At rows of unseen demonstrations the policy is given four of their actions as committed, those of now and then those of
a few rows earlier or later. A chunk that goes by its observation stays where it is; one that goes by the committed
actions moves with them. Printed is the error of the rows behind them, rad, mean over both arms' joints, against the
recording as much earlier or later. The policy begins anew at every row, without memory.
"""

import argparse
from collections import defaultdict

import numpy as np

from ahawam_jax.evaluation.markdown import grid
from ahawam_jax.experiments.latency_study import ARMS
from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.policy import Policy
from data_pipelines.paths import local_path
from data_pipelines.readers.opening import open_episodes

DELAY, AFTER = 4, 8  # rows committed, and compared behind them
SHIFTS = (-4, -2, 0, 2, 4)
ROWS = range(20, 120, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="trained with config.objective.max_delay")
    parser.add_argument("dataset", type=local_path, help="demonstrations that it has not seen")
    options = parser.parse_args()
    policy, data = Policy.load(options.run), open_episodes(options.dataset)
    episodes = range(len(data.lengths))
    states, actions = (np.stack([read(i) for i in episodes]) for read in (data.states, data.actions))
    errors = defaultdict(list)
    for row in ROWS:
        cameras = policy.canvas.cameras
        views = {name: np.concatenate([data.frames(i, name, [row]) for i in episodes]) for name in cameras}
        seen = policy.encode(views, states[:, row], len(episodes))
        state = policy.refresh(seen, policy.start([data.instruction(i) for i in episodes]))
        for given in (None, *SHIFTS):
            begin = row + (given or 0)
            continued = None if given is None else Continued(actions[:, begin : begin + DELAY], DELAY)
            chunk, _ = policy.act(seen, state, continued)
            for shift in SHIFTS:
                begin = row + shift + DELAY
                error = chunk[:, DELAY : DELAY + AFTER] - actions[:, begin : begin + AFTER]
                errors[given, shift].append(np.abs(error[..., ARMS]).mean())
    rows = [("committed actions", *(f"against {shift:+d} rows" for shift in SHIFTS))]
    for given in (None, *SHIFTS):
        name = "none" if given is None else f"of {given:+d} rows"
        rows.append((name, *(f"{np.mean(errors[given, shift]):.4f}" for shift in SHIFTS)))
    print("\n".join(grid(rows)))


if __name__ == "__main__":
    main()
