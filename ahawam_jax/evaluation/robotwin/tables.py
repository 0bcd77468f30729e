"""The table of a run beside what others published, as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.evaluation.markdown import grid
from ahawam_jax.evaluation.robotwin.jobs import CONFIGS, TASKS
from ahawam_jax.evaluation.robotwin.manifest import differences, published, unknown

SHORT = {"demo_clean": "clean", "demo_randomized": "randomized"}
Results = Mapping[tuple[str, str, int], Mapping[str, Any]]


def render(manifest: Mapping[str, Any], results: Results) -> str:
    """results: (task, config, repeat) -> a line with successes and episodes. A dash where there is no number."""
    others = published()
    tasks, configs, repeats = manifest["tasks"], manifest["configs"], len(manifest["seeds"])
    done = len(results)
    lines = [
        "# RoboTwin 2.0",
        "",
        f"{done} of {len(tasks) * len(configs) * repeats} evaluations: {len(tasks)} tasks, {len(configs)} "
        f"configuration(s), {repeats} repeat(s) with seeds {', '.join(map(str, manifest['seeds']))}, "
        f"{manifest['episodes']} episodes each. Intervals are Wilson's, 95 %, over all episodes of a cell.",
        "",
        *verdicts(manifest, others["references"]),
        "",
        *_table(tasks, configs, results, others["tasks"]),
        "",
        *_repeats(configs, repeats, results),
        "",
        "## Published averages",
        "",
        others["about"],
        "",
        *grid([["method", "clean", "randomized", "source"], *(
            [row["name"], _percent(row["clean"]), _percent(row["randomized"]), row["source"]]
            for row in others["averages"])]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def verdicts(manifest: Mapping[str, Any], references: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether it may be compared, a line for each of those who published."""
    lines = []
    for reference in references:
        found = differences(manifest, reference)
        said = f"**Not comparable with {reference['name']}'s numbers**: {'; '.join(found)}."
        if not found:
            said = f"Comparable with {reference['name']}'s numbers as far as they say what they were made with."
        lines.append(f"- {said} Not published: {', '.join(unknown(reference))}.")
    return lines


def _table(
    tasks: Sequence[str], configs: Sequence[str], results: Results, others: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[str]:
    places = {config: CONFIGS.index(config) for config in configs if config in CONFIGS}
    head = ["task"]
    for config in configs:
        head += [SHORT.get(config, config), "interval"]
    head += [f"{name}, {SHORT[config]}" for name in others for config in places]
    rows = [head]
    for task in tasks:
        row = [task]
        for config in configs:
            row += _cell([line for (of, how, _), line in results.items() if (of, how) == (task, config)])
        for of in others.values():
            row += [_percent(of[task][place] if task in of else None) for place in places.values()]
        rows.append(row)
    row = ["all"]
    for config in configs:
        row += _cell([line for (_, how, _), line in results.items() if how == config])
    whole = {name: _averages(name) for name in others}
    for name in others:
        row += [_percent(whole[name][place]) if len(tasks) == len(TASKS) else "-" for place in places.values()]
    return grid([*rows, row])


def _averages(name: str) -> tuple[float, float]:
    row = next(row for row in published()["averages"] if row["name"] == name)
    return row["clean"], row["randomized"]


def _cell(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Success and its interval."""
    successes, episodes = (sum(line[key] for line in lines) for key in ("successes", "episodes"))
    if not episodes:
        return ["-", "-"]
    low, high = wilson(successes, episodes)
    return [f"{successes}/{episodes} = {100 * successes / episodes:.1f}", f"{100 * low:.1f} - {100 * high:.1f}"]


def _repeats(configs: Sequence[str], repeats: int, results: Results) -> list[str]:
    """How far repeats differ, each over the tasks that it has."""
    lines = []
    for config in configs:
        rates = []
        for repeat in range(repeats):
            own = [line for (_, how, which), line in results.items() if (how, which) == (config, repeat)]
            rates.append(f"{_cell(own)[0]} ({len(own)} tasks)")
        lines.append(f"- {SHORT.get(config, config)}, by repeat: {'; '.join(rates)}")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
