"""The ablation's figures, and its page with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.experiments.ablation import PHASES, STEPS, VARIANTS, Cell, Size, Training
from ahawam_jax.experiments.pages import NAMES, Outcomes, at, euler, heads, page, phase, successes
from data_pipelines.disk import whole_file, writing

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

CHANCE = {"remember": 0.5, "react": 0.25}  # of a policy that does everything but remember, or react
COLOURS = dict(zip(VARIANTS, ("#8c8c8c", "#d1704a", "#4a7fd1", "#8a5fc2", "#2a9d4a"), strict=True))


Curve = dict[int, np.ndarray | None]  # by x what succeeded, None where nothing has run


def _interval(found: np.ndarray) -> tuple[float, float, float]:
    """Rate, and how far below and above it the interval reaches."""
    low, high = wilson(int(found.sum()), found.size)
    return found.mean(), found.mean() - low, high - found.mean()


def write(folder: Path, outcomes: Outcomes, size: Size) -> None:
    """results.md and its figures. Raises DiskError."""
    with writing(folder, "The results themselves are kept."):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "results.md") as partial:
            partial.write_text(text := page(outcomes, size))
        for name, draw in FIGURES.items():
            if f"({name})" in text:  # of the others nothing has run
                draw(folder / name, outcomes, size)


def draw_variants(path: Path, outcomes: Outcomes, size: Size) -> None:
    """A bar for each variant with its 95% interval, a panel for each task; the dotted line is chance."""
    found = {task: {v: successes(outcomes, size, task, v) for v in VARIANTS} for task in size.tasks}
    found = {task: known for task in size.tasks if (known := _known(found[task]))}
    figure, panels = _panels(list(found))
    for panel, known in zip(panels, found.values(), strict=True):
        for variant, one in known.items():
            mean, below, above = _interval(one)
            error = [[below], [above]]
            panel.bar(VARIANTS.index(variant), mean, color=COLOURS[variant], yerr=error, capsize=4, ecolor="#444444")
        panel.set_xticks(range(len(VARIANTS)), [variant.replace("_", "\n") for variant in VARIANTS], fontsize=8)
        panel.set_xlim(-0.6, len(VARIANTS) - 0.4)
    _save(figure, path)


def draw_refreshes(path: Path, outcomes: Outcomes, size: Size) -> None:
    """Success against calls per plan, a line for each asynchronous variant, a panel for each task."""

    def of(task: str, variant: str) -> Curve:
        return {r: successes(outcomes, size, task, variant, **at(r)) for r in size.refreshes}

    curves = {task: {NAMES[v]: (COLOURS[v], of(task, v)) for v in VARIANTS[1:]} for task in size.tasks}
    limits = dict(xticks=size.refreshes, xlim=(0.5, max(size.refreshes) + 0.5))
    _draw_curves(path, curves, xlabel="R, calls per plan", **limits)


def draw_phases(path: Path, outcomes: Outcomes, size: Size) -> None:
    """Success of the full variant against the places of its chunks in a plan, trained with offsets and without."""

    def of(task: str, base: str) -> Curve:
        return {place: successes(outcomes, size, task, "full", base, **phase(*p)) for place, p in enumerate(PHASES)}

    bases = (("with", "far", "#2a9d4a"), ("without", "far_aligned", "#d1704a"))
    curves = {task: {f"trained {n} offsets": (c, of(task, base)) for n, base, c in bases} for task in size.tasks}
    ticks = dict(xticks=range(len(PHASES)), xticklabels=["0", "0, 8", "0, 4, 8, 12"], xlim=(-0.5, len(PHASES) - 0.5))
    _draw_curves(path, curves, xlabel="rows from plan to chunk", **ticks)


def draw_steps(path: Path, outcomes: Outcomes, size: Size) -> None:
    """Success against what a call took, a line for each head over its numbers of Euler steps."""
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for (name, (task, base, method)), colour in zip(heads(size).items(), plt.get_cmap("tab10").colors, strict=False):
        points = []
        for steps in STEPS:
            settings = euler(steps, method)
            found = successes(outcomes, size, task, "full", base, method, **settings)
            if found is not None:
                key = Cell(Training(task, "full", size.seeds[0], base, method), **settings).key()
                points.append((steps, outcomes[key]["chunk_ms"], *_interval(found)))
        if len(points) > 1:
            steps, took, means, *reach = zip(*points, strict=True)
            panel.errorbar(took, means, reach, color=colour, marker="o", capsize=3, label=name.replace("`", ""))
            for number, x, y in zip(steps, took, means, strict=True):
                panel.annotate(str(number), (x, y), (4, 4), textcoords="offset points", fontsize=8)
    panel.set(xlabel="ms a call, beside the point its Euler steps", ylabel="success", xlim=(0, None), ylim=(0, 1.02))
    panel.spines[["top", "right"]].set_visible(False)
    _named(figure, [panel])
    _save(figure, path)


def _known(found: dict[Any, np.ndarray | None]) -> dict[Any, np.ndarray]:
    """What has run."""
    return {key: one for key, one in found.items() if one is not None}


def _draw_curves(path: Path, curves: dict[str, dict[str, tuple[str, Curve]]], **axes: Any) -> None:
    """A panel for each task of which something has run, with intervals. curves: by task and name, with a colour."""
    curves = {task: of for task, of in curves.items() if any(_known(curve) for _, curve in of.values())}
    figure, panels = _panels(list(curves))
    for panel, of in zip(panels, curves.values(), strict=True):
        for number, (name, (colour, curve)) in enumerate(of.items()):
            if known := {x: _interval(one) for x, one in _known(curve).items()}:
                means, *reach = np.array(list(known.values())).T
                x = np.array(list(known)) + 0.06 * (number - (len(of) - 1) / 2)  # beside each other, not on each other
                panel.errorbar(x, means, reach, color=colour, marker="o", capsize=3, label=name)
        panel.set(**axes)
    _named(figure, panels)
    _save(figure, path)


def _named(figure: plt.Figure, panels: Sequence[plt.Axes]) -> None:
    """One legend for all panels."""
    named = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=3)


def _panels(tasks: Sequence[str]) -> tuple[plt.Figure, np.ndarray]:
    """A figure with a panel for each task."""
    count = len(tasks)
    figure, panels = plt.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False, sharey=True, layout="constrained")
    panels[0][0].set_ylabel("success")
    for panel, task in zip(panels[0], tasks, strict=True):
        panel.set_title(task.replace("_", " "), fontsize=10)
        panel.set_ylim(0, 1.02)
        panel.spines[["top", "right"]].set_visible(False)
        if task in CHANCE:
            panel.axhline(CHANCE[task], color="#444444", linestyle=":", linewidth=1)
    return figure, panels[0]


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


FIGURES = {
    "results_variants.png": draw_variants, "results_refresh.png": draw_refreshes, "results_phase.png": draw_phases,
    "results_steps.png": draw_steps,
}  # fmt: skip
