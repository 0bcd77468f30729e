"""What training does to pictures so that a policy does not hang on one light, one camera place, one background.

One place for all of it: the pictures of a batch, after they were read. So caches hold pictures as they were recorded,
and what is validated, deployed or evaluated sees them so, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines.canvas import Canvas

PICTURES = ("video", "observations", "history")  # of a batch, uint8 [B, n, H, W, 3]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
_SIDES = (0.05, 0.2)  # of an erased patch, of the canvas's


@dataclass(frozen=True)
class Augmentation:
    """How much of it; all 0 is nothing.

    crop: of each side of a view up to this part is cut away, at a random place, and the rest brought back to size.
    colour: brightness, contrast and saturation are each multiplied by 1 - colour .. 1 + colour.
    erased: up to so many patches of the canvas, 5% to 20% of its sides, are painted over in one colour each.

    Raises ValueError for what is out of range.
    """

    crop: float = 0.0
    colour: float = 0.0
    erased: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.crop < 1 and 0 <= self.colour < 1 and self.erased == int(self.erased) >= 0):
            raise ValueError(
                f"config.data.augmentation is {self}: crop and colour must be at least 0 and below 1, erased a whole "
                "number from 0 on."
            )

    def __bool__(self) -> bool:
        return max(self.crop, self.colour, self.erased) > 0

    def apply(self, batch: Mapping[str, np.ndarray], seeds: Sequence[Sequence[int]], canvas: Canvas) -> None:
        """Changes the PICTURES of a batch of canvases in place, alike in all frames of a window.

        seeds: of each sample; the same seed does the same. History frames that are absent stay black.
        """
        present = batch["video_history_valid_len"]
        for sample, seed in enumerate(seeds):
            change = self._draw(canvas, np.random.default_rng(seed))
            for name in PICTURES:
                frames = batch[name][sample]
                change(frames[len(frames) - present[sample] :] if name == "history" else frames)

    def _draw(self, canvas: Canvas, rng: np.random.Generator) -> "_Change":
        height, width = canvas.size
        boxes = []
        for rows, columns in canvas.regions:
            size = np.array([rows.stop - rows.start, columns.stop - columns.start])
            kept = size * (1 - rng.uniform(0, self.crop, 2))
            top, left = rng.uniform(0, size - kept)
            boxes.append((left, top, left + kept[1], top + kept[0]))
        brightness, contrast, saturation = rng.uniform(1 - self.colour, 1 + self.colour, 3)
        patches = []
        for _ in range(rng.integers(int(self.erased) + 1)):
            tall, wide = (rng.uniform(*_SIDES, 2) * (height, width)).round().astype(int)
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            patches.append((slice(top, top + tall), slice(left, left + wide), rng.integers(0, 256, 3, np.uint8)))
        # x -> contrast * (brightness * S x - 127.5) + 127.5, S between a pixel's grey and its colours.
        mixed = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA
        return _Change(
            canvas.regions if self.crop else (), tuple(boxes),
            np.float32(contrast * brightness) * mixed.T if self.colour else None, 127.5 * (1 - contrast),
            tuple(patches),
        )  # fmt: skip


@dataclass(frozen=True)
class _Change:
    """What is done to the frames of one window. boxes: left, top, right, bottom in pixels of each of the regions."""

    regions: tuple[tuple[slice, slice], ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    matrix: np.ndarray | None  # [3, 3], from the right
    offset: float
    patches: tuple[tuple[slice, slice, np.ndarray], ...]

    def __call__(self, frames: np.ndarray) -> None:
        """frames uint8 [n, H, W, 3], in place."""
        for frame in frames:
            for (rows, columns), box in zip(self.regions, self.boxes, strict=False):
                view = frame[rows, columns]
                size = view.shape[1], view.shape[0]
                view[...] = Image.fromarray(view).resize(size, Image.Resampling.BILINEAR, box)
            if self.matrix is not None:
                flat = frame.reshape(-1, 3) @ self.matrix + np.float32(self.offset + 0.5)
                frame[...] = np.clip(flat, 0, 255).reshape(frame.shape)
            for rows, columns, colour in self.patches:
                frame[rows, columns] = colour
