"""The canvas: head camera on top, the two wrists side by side below, or the head camera alone.

One function for training and deployment, so that what the policy sees is what it was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
HEAD = CAMERAS[0]


@dataclass(frozen=True)
class Canvas:
    """How camera views become one picture.

    head_size: (height, width) in pixels of the head view; even, unless it stands alone.  single_view: the head view
    is all there is. The release uses (256, 320) and three views, a picture of 384x320.
    """

    head_size: tuple[int, int]
    single_view: bool = False

    def __post_init__(self) -> None:
        height, width = self.head_size
        if not self.single_view and (height % 2 or width % 2) or min(self.head_size) < 2:
            raise ValueError(
                f"the head view must have even height and width, twice the wrists', got {self.head_size}."
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        """The views it is made of."""
        return CAMERAS[:1] if self.single_view else CAMERAS

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the picture."""
        height, width = self.head_size
        return (height if self.single_view else height + height // 2), width

    @property
    def regions(self) -> tuple[tuple[slice, slice], ...]:
        """Rows and columns of the picture where each of `cameras` lies."""
        (height, width), tall = self.head_size, self.size[0]
        wrists = (slice(height, tall), slice(0, width // 2)), (slice(height, tall), slice(width // 2, width))
        return ((slice(0, height), slice(0, width)), *(() if self.single_view else wrists))

    def compose(self, views: Mapping[str, np.ndarray]) -> np.ndarray:
        """Picture uint8 [..., *size, 3] from RGB views uint8 [..., h', w', 3] named as `cameras`; others are ignored.

        The head view is resized to head_size (h, w), the wrists to (h/2, w/2), antialiased bilinear; a view that
        already has its size is copied untouched. Raises ValueError for a missing view, and for views that do not fit
        together.
        """
        missing = [name for name in self.cameras if name not in views]
        if missing:
            raise ValueError(f"the canvas needs the cameras {', '.join(self.cameras)}; missing: {', '.join(missing)}.")
        for name in self.cameras:
            view = views[name]
            if not isinstance(view, np.ndarray):
                raise ValueError(
                    f"camera {name}: expected a numpy array [..., height, width, 3], got {type(view).__name__}."
                )
            if view.dtype != np.uint8 or view.ndim < 3 or view.shape[-1] != 3:
                raise ValueError(
                    f"camera {name}: expected uint8 [..., height, width, 3], got {view.dtype} {list(view.shape)}."
                )
            if views[name].shape[:-3] != views[HEAD].shape[:-3]:
                raise ValueError(
                    f"camera {name}: expected as many images as {HEAD} has, {list(views[HEAD].shape[:-3])}, got "
                    f"{list(views[name].shape[:-3])}."
                )
        out = np.empty((*views[HEAD].shape[:-3], *self.size, 3), np.uint8)
        for name, (rows, columns) in zip(self.cameras, self.regions, strict=True):
            _resize(views[name], out[..., rows, columns, :])
        return out


def _resize(images: np.ndarray, out: np.ndarray) -> None:
    """uint8 [..., h', w', 3] into out uint8 [..., h, w, 3].

    Pillow's bilinear filter widens as the image shrinks, which is what antialiased means.
    """
    height, width = out.shape[-3:-1]
    if images.shape[-3:-1] == (height, width):
        out[...] = images
        return
    for place in np.ndindex(images.shape[:-3]):
        out[place] = Image.fromarray(images[place]).resize((width, height), Image.Resampling.BILINEAR)
