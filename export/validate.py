"""Compares every graph of a deployment, and whole chunks, with JAX in float32: the paper's Table 10 for all engines.

    ahawam validate exports/robotwin --dataset data/robotwin --samples 8

Runs the engines where there is a GPU. Elsewhere it runs their ONNX files under onnxruntime if they are float32, and
the export in PyTorch if they are bfloat16 or there are none; it says which. Prints a table, writes it as
validation.json, and exits with 1 if a gate is missed, after naming the block at which the error begins. The weights
of the reference are the export's own, in float32: with --checkpoint, those that it was made of, so that the rounding
of the weights counts, too. It takes the memory of the model in float32 beside the export.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging

from ahawam_jax.weights.release import to_release
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from export.checks import blocks
from export.checks.reference import Call, Reference
from export.checks.samples import Sample, random_samples, recorded_samples
from export.checks.subject import OnnxFile, Subject, open_subject
from export.engines.onnx_graphs import GRAPHS, make_graphs
from export.exported import latent_grid
from export.manifest import ExportError
from export.twin.model import from_release

FILE = "validation.json"
COSINE = 0.9995  # bfloat16: 1 - cos is about the square of the relative error, and an error of 3% is still a detour
RELATIVE = 1e-4  # float32: sums in another order, through all layers and steps
REFRESH, CHUNK = "refresh, own memory", "chunk, end to end"  # rows beside those of the graphs


@dataclasses.dataclass
class Row:
    """Deviation of one graph, or of graphs in a row, over all samples: one line of the table.

    A cosine and a relative deviation (largest difference over the largest entry) is taken of every output of every
    call; keys and values count as one output each.
    """

    graph: str
    cosines: list[float] = dataclasses.field(default_factory=list)
    absolute: float = 0.0
    relative: float = 0.0
    nan: int = 0
    inf: int = 0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """One output of one call."""
        got, want = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
        self.nan += int(np.isnan(got).sum())
        self.inf += int(np.isinf(got).sum())
        with np.errstate(invalid="ignore"):
            self.cosines.append(float(got @ want / (np.linalg.norm(got) * np.linalg.norm(want))))
            error = np.abs(got - want).max()
            self.absolute = float(np.fmax(self.absolute, error))
            self.relative = float(np.fmax(self.relative, error / np.abs(want).max()))

    def passed(self, dtype: str) -> bool:
        """Whether the gate of a dtype holds."""
        if self.nan or self.inf:
            return False
        return self.relative <= RELATIVE if dtype == "float32" else min(self.cosines) >= COSINE

    def record(self, dtype: str) -> dict[str, Any]:
        """The line as JSON; what is not finite is None."""
        figures = {
            "cosine_mean": np.mean(self.cosines), "cosine_min": np.min(self.cosines), "absolute": self.absolute,
            "relative": self.relative,
        }  # fmt: skip
        figures = {name: float(x) if np.isfinite(x) else None for name, x in figures.items()}
        counts = {"outputs": len(self.cosines), "nan": self.nan, "inf": self.inf}
        return {"graph": self.graph} | figures | counts | {"passed": self.passed(dtype)}


def validate(
    folder: str | Path, engines: str | Path | None = None, dataset: str | Path | None = None, samples: int = 4,
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict on an export, which is also written as validation.json beside what was run.

    samples: random ones, and as many recorded ones where a dataset is given. Raises ExportError, or another
    ValueError of what it reads, in sentences.
    """
    if samples < 1:
        raise ExportError(f"{samples} samples were asked for; expected at least one of each kind.")
    subject = open_subject(Path(folder), None if engines is None else Path(engines))
    reference = Reference(subject.export, checkpoint)
    drawn = random_samples(subject.export, samples)
    recorded = [] if dataset is None else recorded_samples(subject.export, dataset, samples)
    rows = {name: Row(name) for name in (*GRAPHS, REFRESH, CHUNK)}
    worst: dict[str, tuple[float, Call, np.ndarray]] = {}
    progress = Progress(len(drawn) + len(recorded), "samples compared with JAX")
    with torch.no_grad():
        for sample in (*drawn, *recorded):
            calls = reference(sample)
            for call, cosine in compare(subject, calls, sample, rows):
                if not cosine >= worst.get(call.graph, (np.inf,))[0]:  # NaN is worst
                    worst[call.graph] = cosine, call, sample.text
            progress.add("", 1)
        records = [row.record(subject.dtype) for row in rows.values()]
        missed = [record["graph"] for record in records if not record["passed"]]
        located = find_blocks(subject, reference, {name: worst[name][1:] for name in missed if name in worst})
    report = {
        "ran": subject.by, "reference": f"JAX, float32, weights of {checkpoint or 'the export'}",
        "dtype": subject.dtype, "steps": len(subject.export.executor.schedule),
        "gate": f"relative <= {RELATIVE:.0e}" if subject.dtype == "float32" else f"cosine >= {COSINE}",
        "samples": {"random": len(drawn), "recorded": len(recorded)}, "source": subject.export.manifest["source"],
        "rows": records, "located": located, "passed": not missed,
        "versions": {name: version(name) for name in ("jax", "torch", "onnx", "onnxruntime")},
    }  # fmt: skip
    (subject.folder / FILE).write_text(json.dumps(report, indent=1) + "\n")
    return report


def compare(
    subject: Subject, calls: list[Call], sample: Sample, rows: dict[str, Row]
) -> Iterator[tuple[Call, float]]:
    """Adds a sample to the rows; yields the smallest cosine of every call on the reference's own inputs."""
    for call in calls:
        made = subject.call(call.graph, call.inputs, subject.words(call.graph, sample.text))
        row = rows[call.graph]
        for name, want in call.outputs.items():
            row.add(made[name].float().cpu().numpy(), want)
        yield call, min(row.cosines[-len(call.outputs) :], key=lambda x: -np.inf if np.isnan(x) else x)
    for call, made in zip(calls, subject.episode(calls, sample.text), strict=True):
        row = rows.get({"planner": REFRESH, "executor": CHUNK}.get(call.graph))
        for name, want in call.outputs.items() if row else ():
            row.add(made[name].float().numpy(), want)


def find_blocks(
    subject: Subject, reference: Reference, failed: dict[str, tuple[Call, np.ndarray]]
) -> dict[str, str]:
    """For every graph that missed its gate, where its error begins: its blocks against those of a float32 twin.

    Engines have no states to look into; of theirs, the export's blocks in PyTorch are compared.
    """
    if not failed:
        return {}
    export = subject.export
    twin = from_release(
        to_release(reference.params), reference.config, latent_grid(export.config), len(export.executor.schedule),
        export.config.objective.shift, present=export.embodiment.action.present, committed=export.max_delay > 0,
    )  # fmt: skip
    exact = dataclasses.replace(
        export, model=reference.config, planner=twin.planner, router=twin.router, executor=twin.executor,
    )
    graphs, located = make_graphs(exact), {}
    for name, (call, text) in failed.items():
        own = dataclasses.replace(subject, runs=dict.fromkeys(GRAPHS, lambda **inputs: inputs))
        inputs = own.call(name, call.inputs, own.words(name, text))
        run = subject.runs[name]
        states = blocks.onnx_states(subject.graphs[name], run.path, inputs) if isinstance(run, OnnxFile) else (
            blocks.torch_states(subject.graphs[name], inputs))
        right = dataclasses.replace(own, export=exact, graphs=graphs)
        want = blocks.torch_states(graphs[name], right.call(name, call.inputs, right.words(name, text)))
        located[name] = str(blocks.locate(subject.graphs[name], states, want, subject.dtype))
    return located


def markdown(report: dict[str, Any]) -> str:
    """The report as a table with what was run above it."""
    counts = report["samples"]
    recorded = f"{counts['recorded']} recorded" if counts["recorded"] else "none recorded (no --dataset)"
    lines = [
        f"{report['ran']}; {report['steps']} steps", f"against {report['reference']}; {counts['random']} random "
        f"samples, {recorded}; gate: {report['gate']}", "",
        "| graph | cosine, mean | cosine, min | max abs | relative | NaN | Inf | |", "|---" * 8 + "|",
    ]  # fmt: skip
    for row in report["rows"]:
        figures = [f"{row[name]:.7f}" if row[name] is not None else "nan" for name in ("cosine_mean", "cosine_min")]
        figures += [f"{row[name]:.2e}" if row[name] is not None else "nan" for name in ("absolute", "relative")]
        verdict = "passed" if row["passed"] else "**missed**"
        lines.append(f"| {row['graph']} | {' | '.join(figures)} | {row['nan']} | {row['inf']} | {verdict} |")
    return "\n".join([*lines, *(f"\n{text}" for text in report["located"].values())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam validate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    logging.set_verbosity(logging.ERROR)
    parser.add_argument("folder", type=local_path, help="what ahawam to-torch wrote")
    parser.add_argument("--engines", type=local_path, help="what ahawam to-tensorrt wrote (default: FOLDER/engines-*)")
    parser.add_argument("--dataset", type=local_path, help="or subset file; recorded samples come from it")
    parser.add_argument("--samples", type=int, default=4, help="of each kind (default 4)")
    parser.add_argument("--checkpoint", type=local_path, help="weights of the reference (default: the export's)")
    options = parser.parse_args(argv)
    try:
        report = validate(options.folder, options.engines, options.dataset, options.samples, options.checkpoint)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    return 0 if report["passed"] else 1
