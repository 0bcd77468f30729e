"""The ablation's page: tables with intervals, differences on the same episodes, figures, and the paper's numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.evaluation.markdown import grid
from ahawam_jax.evaluation.robotwin.manifest import published
from ahawam_jax.experiments import ablation
from ahawam_jax.experiments.ablation import LOOKS, METHODS, PHASES, STEPS, VARIANTS, Cell, Size, Training

Outcomes = Mapping[str, Mapping[str, Any]]  # lines of results.jsonl by key
NAMES = {
    "fast_wam": "Fast-WAM: synchronous", "naive_async": "naive asynchrony", "memory": "+ memory", "ovcr": "+ routing",
    "full": "full: memory and routing",
}  # fmt: skip
# What each step of the paper's Table 2 adds: the first should beat the second.
CLAIMS = (("memory", "naive_async"), ("ovcr", "naive_async"), ("full", "memory"), ("full", "ovcr"))
OLD = 4  # calls per plan from which on routing has something to mend


def successes(
    outcomes: Outcomes, size: Size, task: str, variant: str, base: str = "far", method: str | None = None,
    **settings: Any,
) -> np.ndarray | None:  # fmt: skip
    """bool [trainings, episodes] of a cell, the seeds of training below each other; None where none has run."""
    keys = [Cell(Training(task, variant, seed, base, method), **settings).key() for seed in size.seeds]
    rows = [np.equal(outcomes[key]["stages"], outcomes[key]["greatest"]) for key in keys if key in outcomes]
    return np.stack(rows) if rows else None


def rate(found: np.ndarray | None) -> str:
    """Successes with a Wilson interval over all episodes of all trainings."""
    if found is None:
        return "-"
    low, high = wilson(int(found.sum()), found.size)
    return f"{found.sum()}/{found.size}, {found.mean():.0%} ({low:.0%} - {high:.0%})"


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean of first - second over the same episodes, and its 95% interval (normal, of the paired differences).

    first, second: bool [trainings, episodes]. Of trainings that both have.
    """
    count = min(len(first), len(second))
    paired = (first[:count].astype(float) - second[:count]).ravel()
    half = 1.959964 * paired.std(ddof=1) / math.sqrt(paired.size)
    return paired.mean(), paired.mean() - half, paired.mean() + half


def verdicts(outcomes: Outcomes, size: Size, task: str) -> list[str]:
    """One sentence for each claim of the paper of which both sides have run: Table 2 at the usual refresh, and with
    old plans; Table 5 on the task that is distilled."""
    pairs = []
    old = [refresh for refresh in size.refreshes if refresh >= OLD]
    for settings, where in (({}, ""), *((at(refresh), f" at R = {refresh}") for refresh in old)):
        for better, worse in CLAIMS:
            both = [successes(outcomes, size, task, variant, **settings) for variant in (better, worse)]
            pairs.append((f"`{better}`", f"`{worse}`{where}", *both))
    if task == size.plain:
        ten, two = (successes(outcomes, size, task, "full", "velocity", **euler(steps)) for steps in (10, 2))
        for method in METHODS:
            found = successes(outcomes, size, task, "full", "velocity", method)
            pairs.append((f"two steps, distilled by `{method}`,", "ten steps of its teacher", found, ten))
            pairs.append((f"two steps, distilled by `{method}`,", "two steps of its teacher", found, two))
        aside = [successes(outcomes, size, task, "full", base, randomise=True) for base in reversed(LOOKS)]
        pairs.append(("training with augmentation", "training without on scenes of other looks", *aside))
    return [verdict(*pair) for pair in pairs if pair[2] is not None and pair[3] is not None]


def verdict(name: str, other: str, first: np.ndarray, second: np.ndarray) -> str:
    """What the paired difference of two policies says."""
    mean, low, high = difference(first, second)
    word = "better than" if low > 0 else "worse than" if high < 0 else "not to be told from"
    return f"{name} is {word} {other}: {mean:+.0%} ({low:+.0%} to {high:+.0%})."


def section(
    title: str, text: str, tables: Mapping[str, list[list[str]]], figure: str = "", least: int = 1
) -> list[str]:
    """Lines of a section, of what has run: rows with fewer numbers than `least` are left out, and tables without rows.

    tables: by caption, the head first. No line where nothing has run.
    """
    lines = []
    for caption, (head, *rows) in tables.items():
        rows = [row for row in rows if len(row) - 1 - row.count("-") >= least]
        lines += [*([f"*{caption}*", ""] if caption else []), *grid([head, *rows]), ""] if rows else []
    shown = [f"![{title}]({figure})", ""] if figure else []
    return [f"## {title}", "", *([text, ""] if text else []), *lines, *shown] if lines else []


def page(outcomes: Outcomes, size: Size) -> str:
    """docs/results.md, of whatever has run."""
    every = [cell.key() for training in ablation.trainings(size) for cell in ablation.cells(training, size)]
    lines = [
        "# What the mechanisms are worth", "",
        "Made by `ahawam ablation`; every number is of a small model in simulation, trained from scratch, and none is "
        f"a RoboTwin score. {size.episodes} unseen episodes of each training, at most {len(size.seeds)} training(s) a "
        f"variant, each of {size.steps:,} steps on {size.demonstrations} demonstrations of the task. Intervals are "
        "95%, over episodes: they do not hold what another training would change. "
        f"{sum(key in outcomes for key in every)} of {len(every)} measurements have been made; what has none is left "
        "out, - is one to be made. Tasks, and what was found where the paper's order does not appear: "
        "[tasks.md](tasks.md#which-mechanism-helps).", "",
    ]  # fmt: skip
    for task in dict.fromkeys((*size.tasks, size.plain)):
        said = verdicts(outcomes, size, task) or ["nothing to compare has run yet."]
        lines += [f"**{task}**", "", *(f"- {sentence}" for sentence in said), ""]

    def by_task(head: Sequence[str], rows: Callable[[str], list[list[str]]]) -> dict[str, list[list[str]]]:
        return {task: [[*head], *rows(task)] for task in size.tasks}

    def found(task: str, *which: str, **settings: Any) -> str:
        return rate(successes(outcomes, size, task, *which, **settings))

    lines += section(
        "By variant (Table 2)", "", {"": [
            ["variant", *size.tasks], *([NAMES[v], *(found(task, v) for task in size.tasks)] for v in VARIANTS),
        ]}, "results_variants.png",
    )  # fmt: skip
    lines += section(
        "By refresh interval", "R executor calls of 8 rows between two plans; trained as R = 2.",
        by_task(["variant", *(f"R = {r}" for r in size.refreshes)], lambda task: [
            [NAMES[v], *(found(task, v, **at(r)) for r in size.refreshes)] for v in VARIANTS[1:]
        ]), "results_refresh.png", 2,
    )  # fmt: skip
    lines += section(
        "By phase", "The full variant; a plan lasts 16 rows, and chunks begin so many rows behind its frame. Trained "
        "with offsets between planner and chunk (Eq. 12) and without.",
        by_task(["trained", "at 0", "at 0 and 8", "at 0, 4, 8 and 12"], lambda task: [
            [name, *(found(task, "full", base, **phase(*p)) for p in PHASES)]
            for name, base in (("with offsets", "far"), ("without", "far_aligned"))
        ]), "results_phase.png", 2,
    )  # fmt: skip
    lines += section(
        "By Euler steps", "Beside success, what a call took for all episodes at once, on one CPU core beside other "
        "jobs: heads with as many steps run the same program, and differ there by those jobs. Heads that predict the "
        "clean chunk, and a velocity head that was distilled to two steps by both methods of `ahawam distill`.",
        {"": [["head", *(f"{steps} steps" for steps in STEPS)], *(
            [name, *(timed(outcomes, size, steps, *which) for steps in STEPS)] for name, which in heads(size).items()
        )]}, "results_steps.png", 2,
    )  # fmt: skip
    lines += section(
        "Other looks", f"*{size.plain}*, recorded in one look; `--randomise` gives each episode a light, a table, "
        "cameras and distractors of its own ([tasks.md](tasks.md#other-looks)).",
        {"": [["trained", "as recorded", "randomised"], *(
            [f"{name} augmentation", *(found(size.plain, "full", base, randomise=other) for other in (False, True))]
            for name, base in zip(("without", "with"), LOOKS, strict=True)
        )]},
    )  # fmt: skip
    return "\n".join([*lines, *others(), *commands(outcomes)]) + "\n"


def at(refresh: int) -> dict[str, int]:
    """Settings of a cell; those as trained are not given."""
    return {} if refresh == 2 else {"refresh_every": refresh}


def phase(execute: int, refresh: int) -> dict[str, int]:
    """Settings of a cell; those as trained are not given."""
    return {} if (execute, refresh) == (8, 2) else {"execute": execute, "refresh_every": refresh}


def euler(steps: int, method: str | None = None) -> dict[str, int]:
    """Settings of a cell; those as trained are not given."""
    return {} if steps == (2 if method else 10) else {"steps": steps}


def heads(size: Size) -> dict[str, tuple[str, str, str | None]]:
    """By name what is measured over Euler steps: task, base and method of a training of the full variant."""
    found = {f"{task}, clean chunk": (task, "far", None) for task in size.tasks}
    for method in (None, *METHODS):
        name = "velocity" if method is None else f"velocity, distilled by `{method}`"
        found[f"{size.plain}, {name}"] = (size.plain, "velocity", method)
    return found


def timed(outcomes: Outcomes, size: Size, steps: int, task: str, base: str, method: str | None) -> str:
    """Success, and what a call took for all episodes at once."""
    settings = euler(steps, method)
    key = Cell(Training(task, "full", size.seeds[0], base, method), **settings).key()
    took = f", {outcomes[key]['chunk_ms']:.0f} ms a call" if key in outcomes else ""
    return rate(successes(outcomes, size, task, "full", base, method, **settings)) + took


def others() -> list[str]:
    """What was published elsewhere, of other sizes on other tasks."""
    found = published()
    rows = [
        [row["name"], *(f"{row[kind]:g}" if row[kind] else "-" for kind in ("clean", "randomized")), row["source"]]
        for row in found["averages"]
    ]
    return ["## Published, on RoboTwin 2.0", "", found["about"], "",
            *grid([["policy", "clean", "randomised", "source"], *rows]), ""]  # fmt: skip


def commands(outcomes: Outcomes) -> list[str]:
    """Of each line of the results, the command that makes it again."""
    rows = [
        [f"`{key}`", f"{line['seconds']:.0f} s", str(line["commit"]), f"`{line['command']}`"]
        for key, line in sorted(outcomes.items())
    ]
    return [
        "## Each cell by itself", "", "By name; recordings and trainings come before what is measured of them.", "",
        *grid([["cell", "took", "commit", "command"], *rows]),
    ]  # fmt: skip
