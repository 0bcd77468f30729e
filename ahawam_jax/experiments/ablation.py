"""Which mechanism helps where: what is trained and measured for the ablation (the paper's Table 2 and its figures).

A `Training` is one run of `ahawam train`, a `Cell` one of `ahawam evaluate` on it: both are literal commands.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIANTS = ("fast_wam", "naive_async", "memory", "ovcr", "full")  # of configs/baselines.py
PHASES = ((16, 1), (8, 2), (4, 4))  # rows run of a chunk, and R: a plan lasts 16 rows, chunks begin 0, 8 ... rows in
STEPS = (1, 2, 10)  # Euler steps
METHODS = ("teacher", "self")  # of config.distillation
LOOKS = ("demo", "augmented")  # of configs/baselines.py, measured on scenes as they were recorded and of other looks


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run.  tasks: of the simulation.  seeds: of training.  demonstrations: of each task's recording.
    steps: of training.  episodes: unseen ones, of each measurement.  refreshes: R, calls per plan.
    plain: the task whose velocity head is distilled, in distil_steps, and whose scenes are given other looks.
    variants: by task, "full" among them; of other tasks all VARIANTS."""

    tasks: tuple[str, ...] = ("remember", "react", "transfer_cube")
    seeds: tuple[int, ...] = (0, 1, 2)
    demonstrations: int = 200
    steps: int = 1700
    episodes: int = 100
    refreshes: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    plain: str = "transfer_cube"
    distil_steps: int = 1000
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()


FULL = Size()
QUICK = Size(
    ("remember", "react"), (0,), demonstrations=200, steps=1000, episodes=50, refreshes=(1, 2, 5), plain="remember",
    distil_steps=150,
    variants=(("remember", ("memory", "ovcr", "full")), ("react", ("memory", "full"))),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """One variant, trained.  base: of configs/baselines.py, with offsets ("far"), without ("far_aligned"), with a
    velocity head ("velocity"), of LOOKS.  method: by which this velocity head was then distilled."""

    task: str
    variant: str
    seed: int
    base: str = "far"
    method: str | None = None

    @property
    def name(self) -> str:
        return f"{self.base}.{self.variant}" + (f".{self.method}" if self.method else "")

    @property
    def teacher(self) -> "Training | None":
        """What is distilled."""
        return dataclasses.replace(self, method=None) if self.method else None

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.task / self.name / str(self.seed)

    def command(self, out: Path, size: Size) -> tuple[str, ...]:
        if self.teacher is None:
            steps, what = size.steps, ("train", f"--config=configs/baselines.py:{self.name}")
        else:
            steps, what = size.distil_steps, (
                "distill", "--config=configs/demo_flash.py", f"--config.init={self.teacher.folder(out)}",
                f"--config.distillation.method={self.method}",
            )  # fmt: skip
        return (
            "ahawam", *what, f"--workdir={self.folder(out)}", f"--config.seed={self.seed}",
            f"--config.data.path={dataset(out, self.task)}", f"--config.data.cache={out / 'cache'}",
            f"--config.data.episodes={size.demonstrations}", f"--config.train.steps={steps}",
            f"--config.train.validate_every={steps}",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: a trained variant, run so. What is None is as the variant was trained to be run."""

    training: Training
    refresh_every: int | None = None
    execute: int | None = None
    steps: int | None = None
    randomise: bool = False  # scenes of other looks

    def key(self) -> str:
        """Names it in results.jsonl."""
        t = self.training
        settings = (("R", self.refresh_every), ("execute", self.execute), ("steps", self.steps))
        return ".".join([t.task, t.name, f"seed{t.seed}", *(f"{n}{x}" for n, x in settings if x),
                         *["randomised"] * self.randomise])  # fmt: skip

    def command(self, out: Path, size: Size) -> tuple[str, ...]:
        """Ends with where the outcome is to be written."""
        flags = (("--refresh-every", self.refresh_every), ("--execute", self.execute), ("--steps", self.steps))
        return (
            "ahawam", "evaluate", str(self.training.folder(out)), f"--task={self.training.task}",
            f"--episodes={size.episodes}", "--processes=1", *(f"{flag}={x}" for flag, x in flags if x is not None),
            *["--randomise"] * self.randomise, f"--out={out / 'films' / self.key()}",
            f"--json={out / 'cells' / self.key()}.json",
        )  # fmt: skip


def dataset(out: Path, task: str) -> Path:
    return out / "datasets" / task


def record_command(out: Path, size: Size, task: str) -> tuple[str, ...]:
    """Demonstrations of a task."""
    return (
        "ahawam", "record", f"--task={task}", f"--episodes={size.demonstrations}", f"--out={dataset(out, task)}",
        "--processes=1",
    )  # fmt: skip


def trainings(size: Size) -> Iterator[Training]:
    """First what each task's main table needs, seed by seed."""
    for seed in size.seeds:
        for task in size.tasks:
            yield from (Training(task, variant, seed) for variant in dict(size.variants).get(task, VARIANTS))
    for seed in size.seeds:
        yield from (Training(task, "full", seed, "far_aligned") for task in size.tasks)
        yield from (Training(size.plain, "full", seed, "velocity", method) for method in (None, *METHODS))
        yield from (Training(size.plain, "full", seed, base) for base in LOOKS)


def cells(training: Training, size: Size) -> Sequence[Cell]:
    """What is measured of a trained variant; none twice."""
    found, base, full = [Cell(training)], training.base, training.variant == "full"
    if training.variant != "fast_wam" and base == "far":
        found += [Cell(training, refresh_every=refresh) for refresh in size.refreshes if refresh != 2]
    if full and base in ("far", "far_aligned"):
        found += [Cell(training, refresh_every=r, execute=e) for e, r in PHASES if (e, r) != (8, 2)]
    if base in LOOKS:
        found += [Cell(training, randomise=True)]
    if full and base in ("far", "velocity"):
        usual = 2 if training.method else 10
        found += [Cell(training, steps=steps) for steps in STEPS if steps < usual]
    return found
