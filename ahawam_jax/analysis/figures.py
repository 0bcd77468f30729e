"""Figures of what the other files compute. Each says in one sentence, its title, what to see."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ahawam_jax.analysis.ageing import Ageing, ChunkAgeing
from ahawam_jax.analysis.imagining import PredictionError
from ahawam_jax.analysis.probing import PARTS
from ahawam_jax.analysis.reading_out import ReadOut
from ahawam_jax.analysis.routing import Look, Movement

COLOURS = {"stale": "#d1704a", "routed": "#2a9d4a", "fresh": "#4a7fd1", "grey": "#8c8c8c"}
KV = ("K", "V")
PANELS = 5  # of layers, at most, spread from the first to the last


def _figure(sentence: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure under its sentence, and its panels [rows, columns]; size in inches."""
    figure = Figure(size, layout="constrained")
    figure.suptitle(textwrap.fill(sentence, int(size[0] * 13)), fontsize=9, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plain(panel: Axes, title: str, x: str = "", y: str = "") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.tick_params(labelsize=7)


def _legend_beside(panel: Axes) -> None:
    panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _picture(panel: Axes, picture: np.ndarray, title: str) -> None:
    panel.imshow(picture)
    panel.set_title(title, fontsize=8)
    panel.set_axis_off()


def _spread(count: int) -> list[int]:
    """Some of so many layers."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, PANELS))})


def draw_look(now: np.ndarray, planned: np.ndarray, seen: Look) -> Figure:
    """Where the routing queries look: canvases uint8 [H, W, 3] under mean attention of all queries and heads.

    now: what is seen, of which the queries are made. planned: the plan's frame, which they read in every layer. 1 is
    what a query would give each place if it looked everywhere alike; the scale is that of all panels.
    """
    kept = _spread(len(seen.layers))
    figure, panels = _figure(
        "What to see: the brighter a place, the more the routing queries read it; 1 is looking everywhere alike, and "
        "layers that look alike everywhere tell nothing apart.", 1, 2 + len(kept), (1.5 * (2 + len(kept)), 2.0),
    )  # fmt: skip
    maps = [seen.observation.mean(0), *(seen.layers[i].mean((0, 1)) for i in kept)]
    maps = [x * x.size for x in maps]
    names = ["observation", *(f"layer {i + 1}" for i in kept)]
    _picture(panels[0, 0], now, "seen now")
    extent = (-0.5, now.shape[1] - 0.5, now.shape[0] - 0.5, -0.5)
    for panel, heat, name in zip(panels[0, 1:], maps, names, strict=True):
        panel.imshow((now if name == "observation" else planned).mean(-1), cmap="gray", vmin=0, vmax=255)
        drawn = panel.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=max(x.max() for x in maps))
        panel.set_title(name, fontsize=8)
        panel.set_axis_off()
    bar = figure.colorbar(drawn, ax=panels[0].tolist(), shrink=0.7, pad=0.01)
    bar.set_label("attention / uniform", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_movement(moved: Sequence[Movement]) -> Figure:
    """How far routing moves K and V by layer: a thin line for each plan, a thick one for their mean."""
    figure, panels = _figure(
        "What to see: how much of K and of V routing replaces in each layer (left), whether it turns them (middle), "
        "and how far the learned gate is open (right).", 1, 3, (9, 2.8),
    )  # fmt: skip
    of_layer = np.arange(len(moved[0].gate)) + 1
    for kind, colour in enumerate((COLOURS["fresh"], COLOURS["stale"])):
        for panel, values in zip(panels[0], ([m.norm for m in moved], [m.cosine for m in moved]), strict=False):
            lines = np.stack(values)[:, :, kind]
            panel.plot(of_layer, lines.T, color=colour, alpha=0.25, linewidth=0.7)
            panel.plot(of_layer, lines.mean(0), color=colour, marker="o", markersize=3, label=KV[kind])
    panels[0, 2].bar(of_layer, moved[0].gate, color=COLOURS["routed"])
    for panel, title in zip(panels[0], ("|routed - planned| / |planned|", "cosine", "gate"), strict=True):
        _plain(panel, title, "layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].set_ylim(0)
    panels[0, 2].set_ylim(0)
    panels[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _line(panel: Axes, ages: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Mean and quartiles over plans; values [P, A]."""
    panel.fill_between(ages, *np.quantile(values, (0.25, 0.75), axis=0), color=colour, alpha=0.15, linewidth=0)
    panel.plot(ages, values.mean(0), color=colour, marker="o", markersize=3, label=label)


def draw_ageing(aged: Ageing, chunks: ChunkAgeing, refresh: int) -> Figure:
    """How context ages, and what routing restores. refresh: rows between two plans, the dashed line.

    Bands are quartiles over plans; the two panels to the left are means over layers.
    """
    figure, panels = _figure(
        "What to see: routing restores what lies between the orange and the green curve, where green is below orange; "
        "in the chunk (right) it restores what lies between the chunk of a router that sees the old observation and "
        "of one that sees the new.", 1, 3, (10, 3.2),
    )  # fmt: skip
    for kind, panel in enumerate(panels[0, :2]):
        for values, colour, label in (
            (aged.stale, "stale", "planned, old to fresh"), (aged.routed, "routed", "routed, old to fresh"),
            (aged.to_planned, "grey", "routed old to planned fresh"),
        ):  # fmt: skip
            _line(panel, aged.ages, values[..., kind].mean(2), COLOURS[colour], label)
        far = aged.other[..., kind].mean()
        panel.axhline(far, color="#444444", linestyle=":", linewidth=1, label="another episode's plan")
        _plain(panel, KV[kind], "rows since the plan", "relative distance")
    for values, colour, label in (
        (chunks.blind, "stale", "router sees the old observation"),
        (chunks.seeing, "routed", "router sees the new one"), (chunks.noise, "grey", "fresh plan, other noise"),
    ):  # fmt: skip
        _line(panels[0, 2], chunks.ages, values, COLOURS[colour], label)
    _plain(panels[0, 2], "chunk, against a fresh plan's", "rows since the plan", "RMS, normalised units")
    for panel in panels[0]:
        panel.axvline(refresh, color="#444444", linestyle="--", linewidth=0.7)
        panel.set_ylim(0)
    panels[0, 0].legend(fontsize=6.5, frameon=False)
    panels[0, 2].legend(fontsize=6.5, frameon=False)
    return figure


def draw_ageing_by_layer(aged: Ageing) -> Figure:
    """The share of the distance to a fresh plan that routing takes away at the greatest age, by layer; mean of plans.

    Negative where routing leaves old and fresh further apart than they were.
    """
    figure, panels = _figure(
        f"What to see: bars above 0 are layers in which routing brings a plan {aged.ages[-1]} rows old nearer to a "
        "fresh one; below 0 it takes them apart.", 1, 1, (5, 2.8),
    )  # fmt: skip
    restored = 1 - aged.routed[:, -1].mean(0) / aged.stale[:, -1].mean(0)  # [L, 2]
    for kind, colour in enumerate((COLOURS["fresh"], COLOURS["stale"])):
        places = np.arange(len(restored)) + 1 + 0.35 * (kind - 0.5)
        panels[0, 0].bar(places, restored[:, kind], 0.33, color=colour, label=KV[kind])
    panels[0, 0].axhline(0, color="#444444", linewidth=0.7)
    _plain(panels[0, 0], "", "layer", "share restored")
    panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
    _legend_beside(panels[0, 0])
    return figure


def draw_probe(changes: np.ndarray, age: int) -> Figure:
    """How the chunk changes when a part is another episode's; changes [P, 6, T] as of `probing.probe`.

    Left a dot for each plan and a bar for their mean, right the mean by action of the chunk.
    """
    figure, panels = _figure(
        f"What to see: the higher a bar, the more a chunk {age} rows after its plan depends on that part; parts as "
        "low as the noise do not matter to it.", 1, 2, (8, 3),
    )  # fmt: skip
    palette = ("#d1704a", "#8a5fc2", "#2a9d4a", "#4a7fd1", "#444444", "#8c8c8c")
    whole = np.sqrt(np.square(changes).mean(-1))
    for place, (part, colour) in enumerate(zip(PARTS, palette, strict=True)):
        panels[0, 0].bar(place, whole[:, place].mean(), color=colour, alpha=0.5)
        spread = place + np.linspace(-0.2, 0.2, len(whole)) * (len(whole) > 1)
        panels[0, 0].plot(spread, whole[:, place], ".", color=colour, markersize=3)
        panels[0, 1].plot(np.arange(changes.shape[-1]) + 1, changes[:, place].mean(0), color=colour, label=part)
    _plain(panels[0, 0], "by part", "", "RMS change, normalised units")
    panels[0, 0].set_xticks(range(len(PARTS)), PARTS, fontsize=7, rotation=20)
    _plain(panels[0, 1], "by action of the chunk", "action")
    panels[0, 1].set_ylim(0)
    _legend_beside(panels[0, 1])
    return figure


def draw_memory(mass: np.ndarray, rows: Sequence[int]) -> Figure:
    """Which frames the planner reads: mass [P, L, N, W + 1] of `remembering.memory_mass` for plans at `rows`.

    Left the mean over the plans that remember W frames, by layer; right all layers, by plan.
    """
    figure, panels = _figure(
        "What to see: what is not in the column of the frame itself is read from memory; 1 / (W + 1) would be reading "
        "all frames alike.", 1, 2, (8, 3),
    )  # fmt: skip
    frames = mass.shape[-1]
    full = mass[(mass > 0).all((1, 2, 3))]
    names = [f"{back} back" for back in range(frames - 1, 0, -1)] + ["itself"]
    drawn = panels[0, 0].imshow(
        (full if len(full) else mass).mean((0, 2)), cmap="viridis", vmin=0, vmax=1, aspect="auto"
    )
    panels[0, 0].set_xticks(range(frames), names)
    panels[0, 0].set_yticks(_spread(mass.shape[1]), [str(i + 1) for i in _spread(mass.shape[1])])
    _plain(panels[0, 0], "by layer", "", "layer")
    figure.colorbar(drawn, ax=panels[0, 0]).ax.tick_params(labelsize=7)
    for frame, name in enumerate(names):
        colour = COLOURS["grey"] if frame == frames - 1 else colormaps["viridis"](0.9 * frame / frames)
        panels[0, 1].plot(rows, mass[..., frame].mean((1, 2)), color=colour, marker=".", label=name)
    _plain(panels[0, 1], "by plan, mean of layers", "row of the plan", "share of attention")
    panels[0, 1].set_ylim(0, 1.02)
    _legend_beside(panels[0, 1])
    return figure


def draw_predictions(predicted: np.ndarray, came: np.ndarray, error: PredictionError, rows: int) -> Figure:
    """Clips uint8 [1 + n, H, W, 3] one above the other, and the error of each frame; rows: between two frames."""
    figure, panels = _figure(
        "What to see: the planner's frames (above) beside what came (below); it predicts motion where its error is "
        "below that of a picture that stands still.", 2, len(came) + 1, (1.6 * (len(came) + 1), 3.4),
    )  # fmt: skip
    for i, (above, below) in enumerate(zip(predicted, came, strict=True)):
        _picture(panels[0, i], above, "now" if i == 0 else f"predicted, +{i * rows}")
        _picture(panels[1, i], below, "now" if i == 0 else f"came, +{i * rows}")
    ahead = rows * (np.arange(len(error.still)) + 1)
    panels[0, -1].plot(ahead, error.predicted, color=COLOURS["routed"], marker="o", markersize=3, label="predicted")
    panels[0, -1].plot(ahead, error.still, color=COLOURS["grey"], marker="o", markersize=3, label="stands still")
    panels[0, -1].set_ylim(0)
    _plain(panels[0, -1], "error, levels of 255", "rows ahead")
    panels[0, -1].legend(fontsize=6, frameon=False)
    panels[1, -1].set_axis_off()
    return figure


def draw_read_out(read: ReadOut, ages: Sequence[int], names: Sequence[int]) -> Figure:
    """R^2 of object positions against the age of the plan; a line for each layer, whose numbers are `names`."""
    figure, panels = _figure(
        "What to see: how well a straight line reads where the objects are now off the context (1: exactly; 0: no "
        "better than their mean place); what the old plan loses with age, and whether routing puts it back.",
        1, 3, (9, 3),
    )  # fmt: skip
    lowest = min(0.0, *(float(x.min()) for x in read.contexts.values()), float(read.state.min()))
    for panel, (kind, found) in zip(panels[0], read.contexts.items(), strict=True):
        for place, (layer, line) in enumerate(zip(names, found, strict=True)):
            shade, label = 0.25 + 0.75 * (place + 1) / len(names), f"layer {layer + 1}"
            panel.plot(ages, line, color=COLOURS[kind], alpha=shade, marker="o", markersize=3, label=label)
        panel.plot(ages, read.state, color="#444444", linestyle=":", label="the robot's state alone")
        _plain(panel, {"stale": "old plan", "routed": "old plan, routed", "fresh": "fresh plan"}[kind],
               "rows since the plan", "held-out R²")  # fmt: skip
        panel.set_ylim(max(lowest, -1) - 0.02, 1.02)
    panels[0, 0].legend(fontsize=6, frameon=False)
    return figure
