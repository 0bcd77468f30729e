"""A film of the mechanism: one rollout in simulation, and on every frame what planner, router and executor do.

    ahawam film RUN --task transfer_cube --seed 0 --out film.mp4

RUN is a workdir of ahawam train or one of its checkpoints/STEP folders. The film, at half speed, shows the scene, what
the policy sees, when the planner looked and how old its plan is, what the router reads of the plan's frame, what the
planner expects to see beside what came, and the actions of each call beside the measured joints. A still lies beside
it, as .png: the oldest plan in the last third of the episode.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from ahawam_jax.commands.flags import add_robot
from ahawam_jax.evaluation.films import write_video
from ahawam_jax.evaluation.mechanism import SCENE_EVERY, watch
from ahawam_jax.evaluation.mechanism_film import draw
from ahawam_jax.inference.policy import Policy, load_run
from ahawam_jax.models.config import FRAMES_PER_LATENT
from ahawam_jax.sampling import imagine
from ahawam_jax.towers.building import VideoTower, build_text_tower, build_video_tower
from ahawam_jax.towers.encoding import pixels
from data_pipelines.disk import writing
from data_pipelines.paths import local_path
from data_pipelines.simulation.env import FPS
from data_pipelines.simulation.tasks import TASKS

PAIRS = 8  # of imagined futures, whose mean is shown
STEPS = 20  # Euler steps of each
SPEED = Fraction(1, 2)  # of the film


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam film", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=local_path, help="workdir or checkpoint step")
    p.add_argument("--task", default="transfer_cube", choices=TASKS, help="see docs/tasks.md (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the scene (default %(default)s)")
    p.add_argument("--refresh-every", type=int, help="R, executor calls per planner refresh")
    add_robot(p)
    p.add_argument("--out", type=local_path, default="film.mp4", help="default %(default)s, and a .png beside it")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    try:
        if options.out.suffix != ".mp4":
            raise ValueError(f"--out is {options.out}; expected a name that ends in .mp4.")
        if options.seed < 0:
            raise ValueError(f"--seed is {options.seed}; expected 0, 1, ...")
        asked = {} if options.refresh_every is None else {"refresh_every": options.refresh_every}
        policy = Policy.load(options.run, options.robot, options.dataset, **asked)
        story = watch(policy, options.task, options.seed)
        del policy  # its parameters make room for those that imagine
        guesses = imagined(options.run, story.canvases, story.refreshes, TASKS[options.task].instruction)
        rows = sorted(story.scenes)
        film = np.stack([draw(story, guesses, row) for row in rows])
        late = [i for i, row in enumerate(rows) if 3 * row >= 2 * story.rows]
        still = film[max(late, key=lambda i: story.age(rows[i]))]
        with writing(options.out, "Nothing else was written."):
            write_video(options.out, [film], SPEED * FPS / SCENE_EVERY)
            Image.fromarray(still).save(options.out.with_suffix(".png"), optimize=True)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{options.out} and {options.out.with_suffix('.png').name}: {len(film)} frames, {len(story.refreshes)} "
        f"refreshes, stage {story.stages[-1]} of {TASKS[options.task].greatest}"
    )


def imagined(
    run: Path, canvases: np.ndarray, refreshes: Sequence[int], instruction: str
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of each refresh what the planner expects of the four video frames after its own, and what came of them.

    canvases: uint8 [R + 1, H, W, 3]; the last one stands for what would come after it, as in training. Both uint8
    [H, W, 3], after the video tower's encoder and decoder: of the block transform the mean of the four frames, of a
    VAE the last one. Expected is the mean over PAIRS of futures that start from opposite noise: what of it a small
    planner leaves as it was cancels. The planner imagines without its memory, as in `ahawam imagine`.
    """
    model, params, record = load_run(run)
    config = ConfigDict(record["config"])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tower = build_video_tower(config.towers, model.config, device, decoder=True)
    tokens = build_text_tower(config.towers, model.config).tokens(instruction)
    text, mask = (jnp.stack([jnp.asarray(x)] * 2 * PAIRS) for x in tokens)

    @jax.jit
    def both(params: Any, tower: VideoTower, clip: jax.Array, key: jax.Array) -> list[jax.Array]:
        latents = tower.encode(pixels(clip[None]))
        first = jnp.repeat(latents[:, :, :1], 2 * PAIRS, 0)
        noise = jax.random.normal(key, (PAIRS, *first.shape[1:]))
        noise = jnp.concatenate([noise, -noise])
        futures = imagine(model, params, first, noise, text, mask, STEPS, config.objective.shift)
        pictures = [tower.decode(x)[0, -1] for x in (futures.mean(0, keepdims=True), latents)]
        return [jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8) for x in pictures]

    ahead = model.config.video_ratio * np.arange(1 + FRAMES_PER_LATENT)
    clips = {row: canvases[np.minimum(row + ahead, len(canvases) - 1)] for row in refreshes}
    keys = jax.random.split(jax.random.key(config.seed), len(clips))
    return {
        row: tuple(np.asarray(x) for x in both(params, tower, clip, key))
        for (row, clip), key in zip(clips.items(), keys, strict=True)
    }
