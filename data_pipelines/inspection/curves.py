"""Curves of states and actions over an episode, drawn once; per row only the cursor moves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.episodes import Episodes

COLUMNS, GAP, TITLE, LEGEND = 2, 16, 24, 38  # panels in a line; pixels between them, of their head and foot
PLOT_HEIGHT = 140
AXIS = 44  # pixels left of a plot for its numbers
MOST = 8  # curves in a panel
SCALE = 2  # everything is drawn this much larger, then shrunk to smooth it
FADED = 0.35  # strength of what the cursor has not reached
PAPER, INK, FAINT, GRID = (255, 255, 255), (33, 37, 41), (110, 117, 125), (228, 231, 234)
COLOURS = (
    (31, 119, 180), (230, 115, 0), (44, 150, 44), (200, 40, 45), (130, 90, 180), (130, 80, 70), (215, 90, 170),
    (0, 150, 165),
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    names: one per curve.  state, action: float32 [T, k], None where the panel shows only the other.
    """

    title: str
    names: tuple[str, ...]
    state: np.ndarray | None
    action: np.ndarray | None


def panels_of(dataset: Episodes, episode: int) -> list[Panel]:
    """States and actions of an episode by arm and gripper, where their names tell, else by position.

    An action is drawn over the state where both have the same names.
    """
    state, action = dataset.states(episode), dataset.actions(episode)
    names = dataset.state_names
    if names == dataset.action_names and state.shape == action.shape:
        return [_panel("", names, group, state, action) for group in _groups(names, state.shape[1])]
    return [
        *(_panel("state ", names, group, state, None) for group in _groups(names, state.shape[1])),
        *(
            _panel("action ", dataset.action_names, group, None, action)
            for group in _groups(dataset.action_names, action.shape[1])
        ),
    ]


def _panel(
    kind: str, names: Sequence[str], group: list[int], state: np.ndarray | None, action: np.ndarray | None
) -> Panel:
    side, what = _kind(names[group[0]]) if names else ("", "")
    span = f"{group[0]} to {group[-1]}" if len(group) > 1 else f"{group[0]}"
    title = kind + (f"{side} {what}".strip() if names else f"dimensions {span}")
    # The title says which side it is.
    labels = [names[d].removeprefix(f"{side}_") if names else str(d) for d in group]
    pick = [None if rows is None else rows[:, group] for rows in (state, action)]
    return Panel(title, tuple(labels), *pick)


def _groups(names: Sequence[str], width: int) -> list[list[int]]:
    """Dimensions that belong in one panel, left and right alternating as far as the names go."""
    groups: dict[tuple[str, str], list[int]] = {}
    for dimension in range(width):
        groups.setdefault(_kind(names[dimension]) if names else ("", ""), []).append(dimension)
    ordered = sorted(groups.items(), key=lambda item: item[0][1] == "gripper")
    return [group[low : low + MOST] for _, group in ordered for low in range(0, len(group), MOST)]


def _kind(name: str) -> tuple[str, str]:
    """Side and part of the robot."""
    words = name.lower().split("_")
    side = next((side for side in ("left", "right") if side in words), "")
    return side, "gripper" if "gripper" in words else "joints"


class Curves:
    """All panels of an episode. height: of the picture in pixels, its width is the one given."""

    def __init__(self, panels: Sequence[Panel], width: int) -> None:
        self._rows = len(next(rows for rows in (panels[0].state, panels[0].action) if rows is not None))
        plot = (width - GAP * (COLUMNS - 1)) // COLUMNS - AXIS
        line = TITLE + PLOT_HEIGHT + LEGEND
        self._plots = []  # (left, top, right, bottom) of every plot
        for place in range(len(panels)):
            left = (place % COLUMNS) * (plot + AXIS + GAP) + AXIS
            top = (place // COLUMNS) * line + TITLE
            self._plots.append((left, top, left + plot, top + PLOT_HEIGHT))
        self.height = -(-len(panels) // COLUMNS) * line
        large = Image.new("RGB", (width * SCALE, self.height * SCALE), PAPER)
        for panel, box in zip(panels, self._plots, strict=True):
            _draw_panel(ImageDraw.Draw(large), panel, tuple(SCALE * edge for edge in box))
        self._bright = large.reduce(SCALE)
        self._faded = Image.blend(Image.new("RGB", self._bright.size, PAPER), self._bright, FADED)

    def draw(self, row: int) -> Image.Image:
        """RGB picture with the cursor at `row`; what lies ahead is pale."""
        image = self._bright.copy()
        for left, top, right, bottom in self._plots:
            x = left + round((right - 1 - left) * row / max(self._rows - 1, 1))
            ahead = x + 1, top, right, bottom
            if x + 1 < right:
                image.paste(self._faded.crop(ahead), ahead[:2])
            ImageDraw.Draw(image).line((x, top, x, bottom - 1), INK)
        return image


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, box: tuple[int, int, int, int]) -> None:
    """Axes, curves and legend around the plot `box`, in large pixels."""
    left, top, right, bottom = box
    both = [rows for rows in (panel.state, panel.action) if rows is not None]
    low, high = min(rows.min() for rows in both), max(rows.max() for rows in both)
    middle, half = (low + high) / 2, (high - low) / 2 * 1.06 or 1.0

    def xy(values: np.ndarray) -> list[tuple[float, float]]:
        x = left + (right - 1 - left) * np.arange(len(values)) / max(len(values) - 1, 1)
        y = (top + bottom) / 2 - (values - middle) / half * (bottom - top) / 2
        return list(zip(x.tolist(), y.tolist(), strict=True))

    small, title = ImageFont.load_default(11 * SCALE), ImageFont.load_default(14 * SCALE)
    draw.text((left, top - 6 * SCALE), panel.title, INK, title, anchor="ls")
    if len(both) == 2:
        draw.text((right, top - 6 * SCALE), "state bold, action thin", FAINT, small, anchor="rs")
    for value in ticks(float(middle - half), float(middle + half)):
        y = xy(np.array([value]))[0][1]
        draw.line((left, y, right, y), GRID, SCALE)
        draw.text((left - 5 * SCALE, y), f"{value:.3g}", FAINT, small, anchor="rm")
    for rows, width in ((panel.state, 2 * SCALE), (panel.action, SCALE)):
        for curve, colour in zip([] if rows is None else rows.T, COLOURS, strict=False):
            draw.line(xy(curve), colour, width, joint="curve")
    draw.rectangle((left, top, right - 1, bottom - 1), outline=GRID, width=SCALE)
    x, y = left, bottom + 11 * SCALE
    for name, colour in zip(panel.names, COLOURS, strict=False):
        wide = small.getlength(name) + 26 * SCALE
        if x > left and x + wide > right:
            x, y = left, y + 14 * SCALE
        draw.line((x, y, x + 12 * SCALE, y), colour, 3 * SCALE)
        draw.text((x + 16 * SCALE, y), name, INK, small, anchor="lm")
        x += wide


def ticks(low: float, high: float) -> list[float]:
    """Two to five round values within the range."""
    least = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
