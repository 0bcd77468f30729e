"""Whole training runs at a tiny size: resuming, interrupting, refusing what does not fit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import CheckpointError, Checkpoints
from ahawam_jax.inference.policy import Policy
from ahawam_jax.training import loop
from ahawam_jax.training.loop import train
from data_pipelines.augmentation import Augmentation
from data_pipelines.normalization import Normalization
from data_pipelines.ownership import OwnedError, owned
from data_pipelines.processes import REQUEUE
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.subset import load_subset, open_subset
from data_pipelines.statistics import compute_by_robot
from tests.conftest import ONE_DEVICE, REPOSITORY
from tests.data_pipelines import tiny_dataset
from tests.data_pipelines import tiny_robocoin as coin
from tests.tiny_config import get_config

SIX = "two_6dof_arms"
STEPS = 90
LENGTH = (f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=10")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(dataset: Path, cache: Path) -> ConfigDict:
    config = get_config()
    config.data.update(path=str(dataset), cache=str(cache / "frames"))
    config.mesh.update(data=1, fsdp=8)  # all of the virtual devices
    return config


def start(dataset: Path, cache: Path, workdir: Path, *extra: str) -> subprocess.Popen:
    """Training in a process of its own, on one device."""
    env = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    command = [
        sys.executable, "-m", "ahawam_jax", "train", "--config=tests/tiny_config.py", f"--workdir={workdir}",
        f"--config.data.path={dataset}", f"--config.data.cache={cache / 'frames'}", *extra,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def told(process: subprocess.Popen) -> str:
    """What it says to its end; killed where that does not come: compiling takes minutes on a busy machine."""
    try:
        return process.communicate(timeout=900)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def finish(process: subprocess.Popen) -> str:
    output = told(process)
    assert process.returncode == 0, output
    return output


def curve(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stop(number: signal.Signals, more: int, dataset: Path, cache: Path, workdir: Path, *extra: str) -> tuple[int, str]:
    """Starts training and sends a signal once so many steps more are written: exit status, and what was said."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None
    process, steps = start(dataset, cache, workdir, *extra), None
    while steps is None or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()[0]
        if steps is None and path.exists() and path.stat().st_ino != before:  # written anew, up to the checkpoint
            steps = path.read_text().count("\n") + more
        time.sleep(0.02)
    process.send_signal(number)
    output = told(process)
    return process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    output = finish(start(dataset, cache, workdir, *LENGTH))
    assert "samples/s" in output and "ETA" in output and "open-loop error" in output
    return workdir


def test_a_run_stopped_again_and_again_equals_the_uninterrupted_one_bit_for_bit(
    uninterrupted: Path, dataset: Path, cache: Path, tmp_path: Path
) -> None:
    """Killed before the first checkpoint (step 10) and after two, then interrupted, which saves one of its own."""
    run = dataset, cache, tmp_path, *LENGTH
    for more in (2, 31):
        assert stop(signal.SIGKILL, more, *run)[0] == -signal.SIGKILL
        assert len(curve(tmp_path)) < STEPS
    status, output = stop(signal.SIGINT, 3, *run, "--config.train.checkpoint_every=100000")  # the later flag counts
    assert re.search("resuming at step [2-9]0:", output)
    assert status == REQUEUE and "the same command resumes there" in output
    done = len(curve(tmp_path))
    assert f"resuming at step {done}:" in finish(start(*run))
    assert curve(tmp_path) == curve(uninterrupted)
    assert [row["step"] for row in curve(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("until", ["Ctrl-C cannot reach this job", "rows to train"])
def test_sigterm_at_the_start_asks_for_the_same_command(
    until: str, dataset: Path, cache: Path, tmp_path: Path
) -> None:
    """While JAX is imported, and when the job says that it has begun; a job in the background says so.

    From then on it may already compile or take its first steps when the signal comes, and saves what it has done.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(dataset, cache, tmp_path, *LENGTH)
    finally:
        signal.signal(signal.SIGINT, before)
    said = ""
    while until not in said:
        said += process.stdout.readline() or pytest.fail(said)
    process.send_signal(signal.SIGTERM)
    said += told(process)
    assert process.returncode == REQUEUE, said
    step = re.fullmatch(r"Stopped at step (\d+); the same command resumes there\.", said.splitlines()[-1])
    assert said.splitlines()[-1] == "stopped" or (step and until == "rows to train"), said
    assert Checkpoints(tmp_path).latest == (int(step[1]) if step else None)


def test_wrong_flags_are_sentences(dataset: Path, cache: Path, tmp_path: Path) -> None:
    for flag, expected in (
        ("--config.optimizer.learning_rat=1", 'Did you mean "learning_rate"'),
        ("--workdirr=x", "Did you mean: workdir"),
        ("--config.data.path=/nowhere", "/nowhere"),
    ):
        process = start(dataset, cache, tmp_path, flag)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and expected in output and "Traceback" not in output


def test_workdir_of_another_config(config: ConfigDict, tmp_path: Path) -> None:
    config.train.steps = 1
    error = train(config, tmp_path)
    assert np.isfinite(error)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"another config.*\n.*optimizer.learning_rate: 0.001 there, 0.5 now"):
        train(config, tmp_path)
    assert Policy.load(tmp_path).model.config.num_layers == 2  # and nothing was lost


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("model", dict(action_dim=7), "actions 3 wide, the model expects 7; set config.model.action_dim=3"),
        ("model", dict(state_dim=7), "states 5 wide, the model expects 7"),
        ("data", dict(max_offset=4), "max_offset 4 must lie in 0..3"),
        ("data", dict(batch_size=9), "must be a multiple of mesh data"),
        ("data", dict(validation_episodes=3), "has 3 episodes; hold out fewer"),
        ("data", dict(head_size=(48, 64)), "multiples of"),
        ("towers", dict(video="wan2.1_vae"), "expected one of block_transform, placed_block_transform, wan2.2_vae"),
        ("towers", dict(video="wan2.2_vae"), "video_weights is empty; give the folder"),
        ("towers", dict(text_length=2), "has 3 words"),
        ("model", dict(prediction="noise"), "expected one of velocity, sample"),
        ("objective", dict(time_law="cosine"), "expected one of shifted_uniform, logit_normal"),
        ("objective", dict(max_delay=4), "objective.max_delay is 4, but a chunk has 4 actions"),
        ("objective", dict(max_delay=-1), "objective.max_delay is -1; expected 0, for none, or a number"),
        ("mesh", dict(fsdp=3), "does not fit 8 devices"),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    config: ConfigDict, tmp_path: Path, section: str, values: dict, message: str
) -> None:
    config[section].update(values)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)


def test_dataset_without_a_camera(config: ConfigDict, tmp_path: Path) -> None:
    root = tiny_dataset.write_dataset(tmp_path / "dataset")
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["observation.images.cam_left_wrist"]
    (root / "meta/info.json").write_text(json.dumps(info))
    config.data.path = str(root)
    with pytest.raises(ValueError, match="cam_left_wrist"):
        train(config, tmp_path / "run")


def test_training_pictures_are_augmented(
    config: ConfigDict, single_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def asked(*arguments: object) -> None:
        raise Asked(arguments[-1])

    config.mesh.update(data=-1, fsdp=1)
    config.data.augmentation.erased = 2
    monkeypatch.setattr(loop, "make_loader", asked)
    monkeypatch.setattr(loop, "initial_state", lambda *_: (SimpleNamespace(step=0), None))  # not needed, and slow
    with pytest.raises(Asked) as stopped:
        loop.train(config, tmp_path / "run")
    assert stopped.value.args[0].func.__self__ == Augmentation(erased=2)


def test_a_head_camera_alone(config: ConfigDict, single_device: None, tmp_path: Path) -> None:
    """Single-view robots: the same dataset trains and deploys without its wrists. Batches come from a process."""
    root = tiny_dataset.write_dataset(tmp_path / "dataset")
    info = json.loads((root / "meta/info.json").read_text())
    for camera in ("cam_left_wrist", "cam_right_wrist"):
        del info["features"][f"observation.images.{camera}"]
    (root / "meta/info.json").write_text(json.dumps(info))
    config.data.update(path=str(root), single_view=True, workers=1)
    config.mesh.fsdp = 1
    config.train.steps = 1
    assert np.isfinite(train(config, tmp_path / "run"))
    policy = Policy.load(tmp_path / "run")
    state = policy.start(["open the drawer"])
    actions, _ = policy({"cam_high": np.zeros((1, 32, 48, 3), np.uint8)}, np.zeros((1, 5)), state)
    assert actions.shape == (1, 4, 3)


# One that lacks a number of its layout.
UNFIT = (
    'path = "set0"\nweight = 1\nrobot = "c"\nlayout = "two_6dof_arms"\n'
    'state = { left_gripper_open_scale = "" }\nif_unmappable = "skip"\n'
)


def subset(tmp_path: Path, *robots: str, **more: str) -> Path:
    """A subset file of RoboCOIN datasets, one per robot name, the last with if_unmappable = skip."""
    text = ""
    for number, robot in enumerate(robots):
        coin.write_robocoin(tmp_path / f"set{number}", coin.GRIPPERS_LAST if number % 2 else LAYOUTS[SIX].names)
        text += f'[[dataset]]\nname = "set{number}"\npath = "set{number}"\nweight = {1 + number}\n'
        text += f'robot = "{robot}"\nlayout = "{SIX}"\n'
    text += "".join(f'[[dataset]]\nname = "{name}"\n{lines}' for name, lines in more.items())
    (tmp_path / "subset.toml").write_text(text)
    return tmp_path / "subset.toml"


def test_a_mixture_of_robots(
    config: ConfigDict, single_device: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From a subset file: statistics by robot, held-out episodes of each, one that does not fit skipped."""
    config.data.path = str(subset(tmp_path, "a", "b", "b", unfit=UNFIT))
    config.model.update(action_dim=14, state_dim=14)
    config.mesh.fsdp = 1
    config.train.steps = 1
    config.data.normalization.action, config.data.clip = "left_gripper_open_scale=min-max", 1.0
    assert np.isfinite(train(config, tmp_path / "run"))
    out = capsys.readouterr().out
    assert "warning: robot 'b': Normalised, the action is cut at 1: " in out
    assert "skipping unfit: " in out and "lacks left_gripper_open_scale" in out and "9 episodes of 3 datasets" in out
    with pytest.raises(ValueError, match="statistics of the robots 'a', 'b', none was chosen; name one of them"):
        Policy.load(tmp_path / "run")
    with pytest.raises(ValueError, match="not of 'c'"):
        Policy.load(tmp_path / "run", "c")
    opened, _ = open_subset(load_subset(config.data.path))
    expected = compute_by_robot(opened.values(), Normalization(action="6=min-max", clip=1.0))
    with pytest.raises(ValueError, match="'b' differ in its own vector or units .15 numbers in set1; 14 .* set2"):
        Policy.load(tmp_path / "run", "b")
    for robot, dataset in (("a", None), ("b", "set1"), ("b", "set2")):
        policy = Policy.load(tmp_path / "run", robot, dataset)
        for kind in ("state", "action"):
            for name, values in policy.statistics[kind].items():
                np.testing.assert_array_equal(values, expected[robot][kind][name])
    # Frames cached for a mapped dataset are those of its own cameras.
    assert config.data.cache and len(list(Path(config.data.cache).glob("frames-*/frames.bin"))) >= 2


def test_a_mixture_that_skips_everything(config: ConfigDict, tmp_path: Path) -> None:
    path = subset(tmp_path, "a", unfit=UNFIT)
    path.write_text(path.read_text().split("[[dataset]]")[-1].join(["[[dataset]]", ""]))
    config.data.path = str(path)
    with pytest.raises(ValueError, match="every dataset was skipped"):
        train(config, tmp_path / "run")


def test_one_process_trains_in_a_workdir(uninterrupted: Path, config: ConfigDict) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    with owned(uninterrupted), pytest.raises(OwnedError, match=rf"is being written by process {os.getpid()} on"):
        train(config, uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    with owned(uninterrupted):  # who reads does not ask
        assert Policy.load(uninterrupted).model.config.num_layers == 2


def test_a_damaged_newest_checkpoint_is_not_passed_over(
    uninterrupted: Path, config: ConfigDict, tmp_path: Path
) -> None:
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    config.train.update(steps=STEPS, checkpoint_every=10)
    state = workdir / "checkpoints" / str(STEPS) / "state"
    max(state.rglob("d/*"), key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(CheckpointError, match=rf"Step {STEPS} in .*is missing.*To resume training from it, remove "):
        train(config, workdir)
    before = [path.name for path in (workdir / "checkpoints").iterdir()]
    (workdir / "config.json").write_text("")  # for people to read: what counts is in the checkpoint
    with pytest.raises(CheckpointError, match="To resume training from it, remove "):
        train(config, workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == before
