"""The three-view canvas: head camera on top, the two wrists side by side below.

One function for training and deployment, so that what the policy sees is what it was trained on.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

HEAD, LEFT, RIGHT = CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


def canvas_size(head_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of the canvas around a head view of `head_size` (height, width)."""
    height, width = head_size
    if height % 2 or width % 2 or min(head_size) < 2:
        raise ValueError(f"the head view must have even height and width, twice the wrists', got {head_size}.")
    return height + height // 2, width


def compose(views: Mapping[str, np.ndarray], head_size: tuple[int, int]) -> np.ndarray:
    """Canvas uint8 [..., 1.5 h, w, 3] from RGB views uint8 [..., h', w', 3] named as CAMERAS.

    The head view is resized to head_size (h, w), the wrists to (h/2, w/2), antialiased bilinear; a view that
    already has its size is copied untouched. The release uses (256, 320), a canvas of 384x320.
    """
    missing = [name for name in CAMERAS if name not in views]
    if missing:
        raise ValueError(f"the canvas needs the cameras {', '.join(CAMERAS)}; missing: {', '.join(missing)}.")
    for name in CAMERAS:
        if views[name].dtype != np.uint8 or views[name].ndim < 3 or views[name].shape[-1] != 3:
            raise ValueError(
                f"camera {name}: expected uint8 [..., height, width, 3], got {views[name].dtype} "
                f"{list(views[name].shape)}."
            )
    height, width = head_size
    low, half = height // 2, width // 2
    out = np.empty((*views[HEAD].shape[:-3], *canvas_size(head_size), 3), np.uint8)
    out[..., :height, :, :] = _resize(views[HEAD], (height, width))
    out[..., height:, :half, :] = _resize(views[LEFT], (low, half))
    out[..., height:, half:, :] = _resize(views[RIGHT], (low, half))
    return out


def _resize(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [..., h', w', 3] -> [..., h, w, 3].

    Pillow's bilinear filter widens as the image shrinks, which is what antialiased means.
    """
    if images.shape[-3:-1] == size:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    resized = [Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR) for image in flat]
    return np.stack([np.asarray(image) for image in resized]).reshape(*images.shape[:-3], *size, 3)
