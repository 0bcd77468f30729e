"""The ablation: its cells are commands that exist, its page says what the numbers say, and a killed study goes on."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ahawam_jax.commands import ablation as command
from ahawam_jax.commands import evaluate
from ahawam_jax.experiments.ablation import FULL, QUICK, Cell, Size, Training, cells, trainings
from ahawam_jax.experiments.figures import write
from ahawam_jax.experiments.pages import difference, page, verdicts
from ahawam_jax.experiments.running import RESULTS, Job, StudyError, run_all
from ahawam_jax.inference.policy import PolicyConfig
from ahawam_jax.models.config import ModelConfig
from configs import baselines, demo_flash
from data_pipelines import json_lines
from tests.conftest import REPOSITORY

SMALL = Size(("remember", "react"), (0, 1), demonstrations=2, steps=2, episodes=50, plain="react")


@pytest.mark.parametrize("size", [FULL, QUICK, SMALL])
def test_every_cell_is_a_command_that_a_trained_variant_can_run(size: Size, tmp_path: Path) -> None:
    jobs = command.jobs_of(tmp_path, size)
    assert len({job.key for job in jobs}) == len(jobs) and len({job.command for job in jobs}) == len(jobs)
    assert all({job.key for job in jobs}.issuperset(job.after) for job in jobs)
    for training in trainings(size):
        name = f"{training.base}.{training.variant}"
        config = baselines.get_config(name)
        if training.method:
            config, teacher = demo_flash.get_config(), dataclasses.replace(training, method=None)
            assert f"--config.init={teacher.folder(tmp_path)}" in training.command(tmp_path, size)
        else:
            assert f"--config=configs/baselines.py:{name}" in training.command(tmp_path, size)
        for cell in cells(training, size):
            options = evaluate.parser().parse_args(cell.command(tmp_path, size)[2:])
            assert (options.run, options.task) == (training.folder(tmp_path), training.task)
            asked = {name: getattr(options, name) for name in ("refresh_every", "execute", "steps")}
            settings = config.policy.to_dict() | {name: x for name, x in asked.items() if x is not None}
            PolicyConfig(**settings).check(ModelConfig.create(config.model))


def outcome(successes: np.ndarray) -> dict[str, Any]:
    """A line of results whose episodes reach the greatest stage or none."""
    stages = [3 * int(x) for x in successes]
    return dict(stages=stages, greatest=3, chunk_ms=12.0, seconds=1.0, commit="abc", command="ahawam evaluate x")


def results(rates: dict[str, float], task: str = "remember") -> dict[str, dict[str, Any]]:
    """Lines of both seeds: of each variant the first so many of 50 episodes succeed."""
    found = {}
    for variant, rate in rates.items():
        for seed in SMALL.seeds:
            found[Cell(Training(task, variant, seed)).key()] = outcome(np.arange(50) < 50 * rate)
    return found


def told_by(lines: dict[str, dict[str, Any]]) -> str:
    """The page, its tables' columns not aligned."""
    return re.sub(" +", " ", page(lines, SMALL))


def test_the_page_says_what_helps_and_what_cannot_be_told() -> None:
    lines = results(dict(naive_async=0.5, memory=0.9, ovcr=0.52, full=0.1))
    assert verdicts(lines, SMALL, "remember") == [
        "`memory` is better than `naive_async`: +40% (+30% to +50%).",
        "`ovcr` is not to be told from `naive_async`: +2% (-1% to +5%).",
        "`full` is worse than `memory`: -80% (-88% to -72%).",
        "`full` is worse than `ovcr`: -42% (-52% to -32%).",
    ]
    text = told_by(lines)
    assert "| + memory | 90/100, 90% (83% - 94%) | - |" in text and "nothing to compare has run yet" in text
    assert text.index("is better than") < text.index("## By variant")


def test_few_steps_are_compared_with_their_teacher() -> None:
    teacher, distilled = (Training("react", "full", 0, "velocity", method) for method in (None, "teacher"))
    lines = {
        Cell(teacher).key(): outcome(np.arange(50) < 45), Cell(teacher, steps=2).key(): outcome(np.arange(50) < 20),
        Cell(distilled).key(): outcome(np.arange(50) < 44),
        Cell(distilled, steps=1).key(): outcome(np.arange(50) < 40),
    }  # fmt: skip
    assert [*lines] == [f"react.velocity.full{x}" for x in (".seed0", ".seed0.steps2", ".teacher.seed0",
                                                            ".teacher.seed0.steps1")]  # fmt: skip
    assert verdicts(lines, SMALL, "react") == [
        "two steps, distilled by `teacher`, is not to be told from ten steps of its teacher: -2% (-6% to +2%).",
        "two steps, distilled by `teacher`, is better than two steps of its teacher: +48% (+34% to +62%).",
    ]
    text = told_by(lines)
    told = "| react, velocity | - | 20/50, 40% (28% - 54%), 12 ms a call | 45/50, 90% (79% - 96%), 12 ms a call |"
    assert told in text and "| react, velocity, distilled by `teacher` | 40/50" in text and "4 of " in text


def test_an_old_plan_has_verdicts_of_its_own() -> None:
    lines = {
        Cell(Training("react", variant, 0), refresh_every=4).key(): outcome(np.arange(50) < count)
        for variant, count in (("memory", 10), ("full", 40))
    }
    assert verdicts(lines, SMALL, "react") == ["`full` is better than `memory` at R = 4: +60% (+46% to +74%)."]


def test_other_looks_have_a_table() -> None:
    lines = {
        Cell(Training("react", "full", 0, base), randomise=randomise).key(): outcome(np.arange(50) < count)
        for base, randomise, count in (("demo", False, 45), ("demo", True, 5), ("augmented", False, 44),
                                       ("augmented", True, 40))
    }  # fmt: skip
    assert [*lines][1] == "react.demo.full.seed0.randomised"
    assert verdicts(lines, SMALL, "react") == [
        "training with augmentation is better than training without on scenes of other looks: +70% (+57% to +83%)."
    ]
    assert "| with augmentation | 44/50, 88% (76% - 94%) | 40/50, 80% (67% - 89%) |" in told_by(lines)


def test_differences_are_paired() -> None:
    """Twenty episodes, of which one variant solves 15 and the other 12, never one that the first does not."""
    first, second = np.arange(20)[None] < 15, np.arange(20)[None] < 12
    mean, low, high = difference(first, second)
    deviation = math.sqrt((3 * (1 - 0.15) ** 2 + 17 * 0.15**2) / 19)
    np.testing.assert_allclose([mean, high - mean, mean - low], [0.15] + [1.96 * deviation / math.sqrt(20)] * 2, 1e-4)
    assert difference(first, first)[1:] == (0, 0)


def test_figures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    lines = results(dict(fast_wam=0.5))
    write(tmp_path / "few", lines, SMALL)
    assert {path.name for path in (tmp_path / "few").iterdir()} == {"results.md", "results_variants.png"}
    lines |= results(dict(naive_async=0.5, full=0.9))
    full = Training("remember", "full", 0)
    more = Cell(full, refresh_every=4), Cell(full, refresh_every=1, execute=16), Cell(full, steps=2)
    write(tmp_path, lines | {cell.key(): outcome(np.arange(50) < 20) for cell in more}, SMALL)
    for name in ("results_variants.png", "results_refresh.png", "results_phase.png", "results_steps.png"):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert picture.shape[1] > 400 and (picture != 255).any(-1).mean() > 0.01
        assert f"({name})" in (tmp_path / "results.md").read_text()


# ------------------------------------------------------------------------------------------------------------ running
def job(key: str, code: str, folder: Path, *after: str, outcome: Path | None = None) -> Job:
    """Notes that it was begun, and runs the code."""
    note = f"open({str(folder / 'begun')!r}, 'a').write({key!r} + '\\n')\n"
    return Job(key, (sys.executable, "-c", note + code), after, outcome)


def runs(process: str) -> bool:
    """It may go between two looks at it."""
    try:
        return (Path("/proc") / process / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split()


def test_jobs_run_once_in_order_and_what_failed_is_run_again(tmp_path: Path) -> None:
    path, said = tmp_path / "one.json", []
    jobs = [
        job("record", "", tmp_path), job("train", "import time; time.sleep(0.3)", tmp_path, "record"),
        job("one", f"open({str(path)!r}, 'w').write('{{\"stages\": [1]}}')", tmp_path, "train", outcome=path),
        job("two", f"import os; print('no room'); exit(os.path.exists({str(tmp_path / 'bad')!r}))", tmp_path, "train"),
    ]  # fmt: skip
    (tmp_path / "bad").touch()
    with pytest.raises(StudyError, match=r"(?s)two ended.*exit status 1.*two.log ends:\n +no room"):
        run_all(jobs, tmp_path, said.append, lambda: None)
    (tmp_path / "bad").unlink()
    run_all(jobs, tmp_path, said.append, lambda: said.append("told"))
    assert begun(tmp_path)[:2] == ["record", "train"] and sorted(begun(tmp_path)[2:]) == ["one", "two", "two"]
    lines = {line["key"]: line for line in json_lines.read(tmp_path / RESULTS)}
    assert set(lines) == {"record", "train", "one", "two"} and lines["one"]["stages"] == [1]
    assert lines["train"]["seconds"] >= 0.3 and "3 of 4 jobs are done, 1 to go" in said and said[-1] == "told"


def test_a_killed_study_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    """The first job is done and the second one sleeps when the study is killed; a torn last line is no line."""
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(SECONDS)"
    code = (
        "import sys; from pathlib import Path; from ahawam_jax.experiments.running import *\n"
        "out = Path(sys.argv[1]); jobs = eval(sys.argv[2]); run_all(jobs, out, print, lambda: None)"
    )
    jobs = [job("a", "", tmp_path), job("b", sleeper.replace("SECONDS", "600"), tmp_path, "a")]
    study = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), repr(jobs)], cwd=REPOSITORY)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert study.poll() is None
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.wait()
    sleeping = (tmp_path / "pid").read_text()
    limit = time.monotonic() + 60
    while runs(sleeping):
        assert time.monotonic() < limit, "the job outlives its study"
        time.sleep(0.05)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "b", "sec')
    run_all([jobs[0], job("b", "", tmp_path, "a")], tmp_path, print, lambda: None)
    assert begun(tmp_path) == ["a", "b", "b"]
    assert [line["key"] for line in json_lines.read(tmp_path / RESULTS)] == ["a", "b"]


def test_a_folder_is_of_one_size_and_cells_are_named(tmp_path: Path) -> None:
    command.settle(tmp_path, SMALL)
    command.settle(tmp_path, SMALL)
    with pytest.raises(ValueError, match="was begun with .*'demonstrations': 2.*name another folder"):
        command.settle(tmp_path, QUICK)
    jobs = command.chosen(command.jobs_of(tmp_path, SMALL), ["react.far.full.seed1.R4"])
    assert [job.key for job in jobs] == ["record.react", "train.react.far.full.seed1", "react.far.full.seed1.R4"]
    with pytest.raises(ValueError, match="--only none fits no cell"):
        command.chosen(command.jobs_of(tmp_path, SMALL), ["none"])


@pytest.mark.slow
def test_one_cell_from_the_recording_to_its_line(tmp_path: Path) -> None:
    """Two demonstrations, two steps, one episode: nothing is learnt, every command runs."""
    size = Size(tasks=("react",), seeds=(0,), demonstrations=10, steps=2, episodes=1)
    jobs = command.chosen(command.jobs_of(tmp_path, size), ["react.far.naive_async.seed0"])
    run_all(jobs, tmp_path, print, lambda: None)
    line = json_lines.read(tmp_path / RESULTS)[-1]
    assert line["key"] == "react.far.naive_async.seed0" and len(line["stages"]) == 1 and line["greatest"] == 3
    config = json.loads((jobs[2].outcome).read_text())["config"]
    assert len(config) == 12 and os.path.exists(tmp_path / "films" / line["key"])
