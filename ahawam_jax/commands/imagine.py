"""Looks at what the planner believes: one frame and an instruction in, the predicted video out, side by side.

    ahawam imagine RUN --dataset runs/demo/dataset --episode 195 --row 40    # and what really followed
    ahawam imagine RUN --image canvas.png --instruction "pick up the red cube"

RUN is a workdir of ahawam train or ahawam import-weights, or one of its checkpoint steps. An image is the
whole canvas, head view on top and wrists below; with --dataset it is composed as in training.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from ahawam_jax.inference.policy import load_run
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import FRAMES_PER_LATENT
from ahawam_jax.sampling import imagine
from ahawam_jax.towers.building import build_text_tower, build_video_tower
from ahawam_jax.towers.encoding import pixels
from ahawam_jax.towers.latents import make_canvas
from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.disk import writing
from data_pipelines.paths import local_path
from data_pipelines.readers.opening import open_episodes
from data_pipelines.recording.encoded_video import encode_video

CAPTION, PANEL = 16, 256  # pixels: height of the caption above a panel, least width of a panel
TOWER_FILES = ("video_weights", "text_cache")  # fields of config.towers that may lie elsewhere on this machine


def believe(
    model: AhaWam, params: Any, config: ConfigDict, canvas: np.ndarray, instruction: str, frames: int, steps: int,
    seed: int, causal: bool,
) -> np.ndarray:  # fmt: skip
    """The current frame and the planner's prediction: canvas uint8 [H, W, 3] -> uint8 [1 + n, H, W, 3].

    frames is 1 + 4k; a tower that keeps one frame per latent hands back 1 + k.
    """
    if frames < 5 or frames % FRAMES_PER_LATENT != 1:
        raise ValueError(f"--frames is {frames}; expected 5, 9, 13, ...: the first frame and groups of four.")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tower = build_video_tower(config.towers, model.config, device, decoder=True)
    text, mask = (x[None] for x in build_text_tower(config.towers, model.config).tokens(instruction))

    @jax.jit
    def sample(params, tower, canvas, text, mask, key):
        first = tower.encode(pixels(canvas[None, None]))
        shape = (1, first.shape[1], frames // FRAMES_PER_LATENT, *first.shape[3:])
        noise = jax.random.normal(key, shape)
        return tower.decode(imagine(model, params, first, noise, text, mask, steps, config.objective.shift, causal))[0]

    images = sample(params, tower, canvas, text, mask, jax.random.key(seed))
    return np.asarray(jnp.round((images + 1) * 127.5).astype(jnp.uint8))


def side_by_side(panels: dict[str, np.ndarray]) -> np.ndarray:
    """Clips uint8 [n, H, W, 3] by caption -> one clip; a shorter one stands still on its last frame."""
    length = max(len(clip) for clip in panels.values())
    columns = []
    for caption, clip in panels.items():
        clip = enlarge(clip[np.minimum(np.arange(length), len(clip) - 1)])
        label = Image.new("RGB", (clip.shape[2], CAPTION), "white")
        ImageDraw.Draw(label).text((4, 2), caption, "black")
        bar = np.broadcast_to(np.asarray(label), (length, CAPTION, clip.shape[2], 3))
        columns.append(np.concatenate([bar, clip], 1))
    return np.concatenate(columns, 2)


def enlarge(clip: np.ndarray) -> np.ndarray:
    """Small canvases, such as the demo's, by a whole factor to at least PANEL pixels in width."""
    factor = -(-PANEL // clip.shape[2])
    size = (clip.shape[2] * factor, clip.shape[1] * factor)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam imagine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=local_path, help="workdir or checkpoint step")
    p.add_argument("--image", type=local_path, help="the current canvas, any picture file; is resized to the model's")
    p.add_argument("--instruction", help="what to do; with --dataset the episode's own by default")
    p.add_argument("--dataset", type=local_path, help="dataset to take the current frame, and what followed, from")
    p.add_argument("--episode", type=int, default=0)
    p.add_argument("--row", type=int, default=0, help="control step of the current frame within the episode")
    p.add_argument("--frames", type=int, default=9, help="length of the video, 1 + 4k (default %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="Euler steps (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bidirectional", action="store_true", help="for a planner that is still plain Wan2.2")
    p.add_argument("--video-weights", type=local_path, help="VAE file or folder, if not where the run's config says")
    p.add_argument("--text-cache", type=local_path, help="folder of text tokens, if not where the run's config says")
    p.add_argument("--out", type=local_path, default="imagined.mp4", help="default %(default)s, and a .png beside it")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    if (options.image is None) == (options.dataset is None):
        p.error("give the current frame: either --image or --dataset.")
    if options.image is not None and options.instruction is None:
        p.error("--image needs an --instruction.")
    logging.set_verbosity(logging.ERROR)
    try:
        model, params, record = load_run(options.run)
        config = ConfigDict(record["config"])
        config.towers.update({name: str(getattr(options, name)) for name in TOWER_FILES if getattr(options, name)})
        panels, instruction, fps = current_frame(options, config)
        frames = believe(
            model, params, config, panels["now"][0], instruction, options.frames, options.steps, options.seed,
            not options.bidirectional,
        )  # fmt: skip
        followed = panels.pop("recorded", None)
        panels["imagined"] = frames
        if followed is not None:
            panels["recorded"] = followed[:: (len(followed) - 1) // (len(frames) - 1)]
        clip = side_by_side(panels)
        still = options.out.with_suffix(".png")
        with writing(options.out, "Nothing else was written."):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_bytes(encode_video(clip, fps).mp4)
            Image.fromarray(np.concatenate(list(clip[:: max(1, (len(clip) - 1) // 2)]), 0)).save(still)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out} and {still}: {len(frames)} frames, {instruction!r}")
    return 0


def current_frame(options: argparse.Namespace, config: ConfigDict) -> tuple[dict[str, np.ndarray], str, int]:
    """Panels "now" [1, H, W, 3] and, from a dataset, "recorded" [n, H, W, 3]; the instruction; frames per second."""
    canvas, ratio = make_canvas(config), config.model.video_ratio
    if options.image is not None:
        height, width = canvas.size
        image = Image.open(options.image).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        return {"now": np.asarray(image)[None]}, options.instruction, 6
    dataset = open_episodes(options.dataset)
    if not 0 <= options.episode < len(dataset.lengths):
        raise ValueError(f"--episode is {options.episode}; {options.dataset} has {len(dataset.lengths)} episodes.")
    length = int(dataset.lengths[options.episode])
    if not 0 <= options.row < length:
        raise ValueError(f"--row is {options.row}; episode {options.episode} has rows 0 to {length - 1}.")
    rows = np.minimum(options.row + ratio * np.arange(options.frames), length - 1)
    clip = DecodingFrames(dataset, canvas)[dataset.starts[options.episode] + rows]
    instruction = options.instruction or dataset.instruction(options.episode)
    return {"now": clip[:1], "recorded": clip}, instruction, max(1, round(dataset.fps / ratio))
