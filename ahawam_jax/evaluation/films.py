"""Pictures of rollouts for people: one video of several episodes, and one sheet with moments of each."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels between two frames
TILE = 320  # width in pixels of a frame on the sheet
CAPTION, MARGIN = 28, 100  # pixels above the sheet's frames and to their left
BAR = 8  # width in pixels of the outcome's bar in the margin
TEXT, SUCCESS, FAILURE = "#444444", "#2a9d4a", "#c83232"


def write_video(path: Path, episodes: Sequence[np.ndarray], rate: Fraction) -> None:
    """Episodes uint8 [frames, h, w, 3], h and w even, in a grid on white, as h264 of `rate` frames per second."""
    columns = math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    length, height, width, _ = episodes[0].shape
    down, right = height + GAP, width + GAP
    grid = np.full((length, rows * down + GAP, columns * right + GAP, 3), 255, np.uint8)
    for i, episode in enumerate(episodes):
        top, left = GAP + i // columns * down, GAP + i % columns * right
        grid[:, top : top + height, left : left + width] = episode
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = grid.shape[1], grid.shape[2], "yuv420p"
        for frame in grid:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_sheet(
    path: Path, episodes: Sequence[np.ndarray], names: Sequence[str], success: Sequence[bool], seconds: Sequence[float]
) -> None:
    """Moments [h, w, 3] of each episode from left to right, at so many `seconds`, beside its name and its outcome."""
    height, width = (round(TILE * side / episodes[0].shape[2]) for side in episodes[0].shape[1:3])
    down, right = height + GAP, width + GAP
    sheet = Image.new("RGB", (MARGIN + len(seconds) * right, CAPTION + len(episodes) * down), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, second in enumerate(seconds):
        pen.text((MARGIN + column * right + width // 2, CAPTION // 2), f"{second:.1f} s", TEXT, font, "mm")
    for row, (episode, name, solved) in enumerate(zip(episodes, names, success, strict=True)):
        top, colour = CAPTION + row * down, SUCCESS if solved else FAILURE
        pen.rectangle((MARGIN - GAP - BAR, top, MARGIN - GAP - 1, top + height - 1), colour)
        caption = f"{name}\n{'success' if solved else 'failure'}"
        pen.text((MARGIN - 2 * GAP - BAR, top + height // 2), caption, colour, font, "rm", align="right")
        for column, frame in enumerate(episode):
            tile = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + column * right, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
