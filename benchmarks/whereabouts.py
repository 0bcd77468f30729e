"""What tells where the cube of *react* lies just after it was knocked: the picture, the routing queries, the arm?

    python -m benchmarks.whereabouts runs/quick/runs/react/far.full/0 --episodes 80

Routing can restore of a stale plan only what its queries hold, and a policy need not look where the arm's own state
tells the rest. A ridge regression reads the cube's place from the latents of the picture, from the routing queries
that the run makes of them (Eq. 8) and from the state of the arms; printed is R^2 on held-out episodes, of the expert's
demonstrations so many rows after the knock.
"""

import argparse

import numpy as np

from ahawam_jax.analysis.reading_out import read_out
from ahawam_jax.analysis.routing import queries
from ahawam_jax.analysis.simulated import simulated
from ahawam_jax.evaluation.markdown import grid
from ahawam_jax.inference.policy import Policy
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.simulation.env import AlohaSim

HELD_OUT = 4  # every fourth episode
READ = ("latents of the picture", "routing queries", "state of the arms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="trained with routing")
    parser.add_argument("--episodes", type=int, default=120, help="of the expert (default %(default)s)")
    parser.add_argument("--after", type=int, nargs="+", default=[2, 5, 8], help="rows behind the knock")
    options = parser.parse_args()
    policy, env = Policy.load(options.run), AlohaSim("react")
    found: dict[tuple[str, int], list[np.ndarray]] = {(name, after): [] for name in READ for after in options.after}
    places: dict[int, list[np.ndarray]] = {after: [] for after in options.after}
    progress = Progress(options.episodes, "episodes")
    for seed in range(options.episodes):
        env.reset(seed)
        rows = {after: env.scene["knock"] + after for after in options.after}
        episode = simulated(policy, "react", seed, list(rows.values()))
        for after, row in rows.items():
            now = episode.at(row)
            for name, x in zip(READ, (now.latents, queries(policy, now), now.robot_state), strict=True):
                found[name, after].append(np.asarray(x, np.float32).ravel())
            places[after].append(episode.objects[row][0, :2])
        progress.add("simulated", 1)
    numbers = np.arange(options.episodes)
    rows = [("R^2 of the cube's place", *(f"{after} rows after" for after in options.after))]
    for name in READ:
        said = (
            read_out(np.stack(found[name, after]), np.stack(places[after]), numbers, numbers[::HELD_OUT])
            for after in options.after
        )
        rows.append((name, *(f"{x:.2f}" for x in said)))
    print("\n".join(grid(rows)))


if __name__ == "__main__":
    main()
