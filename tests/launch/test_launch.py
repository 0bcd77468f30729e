"""What lies in launch/, as far as it runs without a cluster: scripts with stand-ins for what a cluster has."""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ahawam_jax.training.clusters import find_job
from tests.conftest import REPOSITORY
from tests.data_pipelines import tiny_dataset

LAUNCH = REPOSITORY / "launch"
# Runs its arguments so many times, each with SLURM's variables, as srun does on one node; the largest status counts
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
arguments = [x for x in sys.argv[1:] if not x.startswith("--cpus-per-task")]
tasks = int(os.environ["SLURM_NTASKS"])
step = dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE=str(tasks), SLURM_NODEID="0")
jobs = [
    subprocess.Popen(arguments, env=os.environ | step | dict(SLURM_PROCID=str(n), SLURM_LOCALID=str(n)))
    for n in range(tasks)
]
sys.exit(max(job.wait() for job in jobs))
"""


def command(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A command that finds the programs of a folder first."""
    env = os.environ | environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(arguments, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """Folder of stand-ins: srun; scontrol and gcloud, which say what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder, "srun", SRUN)
    command(folder, "scontrol", '#!/bin/sh\necho "scontrol $@"\n')
    command(folder, "gcloud", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    return folder


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")], ids=lambda path: path.name)
def test_scripts_are_bash(path: Path, bin: Path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    used = run(bin, "bash", str(path))
    assert used.returncode == 2 and used.stderr.startswith("usage: ")


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (75, True), (137, True)])
def test_sbatch_starts_a_process_a_task(bin: Path, status: int, requeued: bool) -> None:
    ahawam = command(bin, "ahawam", f'#!/bin/sh\necho "$SLURM_PROCID: $@"\nexit $(($SLURM_PROCID * {status}))\n')
    done = run(
        bin, "bash", "launch/slurm.sbatch", "configs/robocoin.py", "/shared/a run", "--config.seed=3",
        AHAWAM=str(ahawam), SLURM_NTASKS="2", SLURM_JOB_ID="17",
    )  # fmt: skip
    lines = sorted(line for line in done.stdout.splitlines() if not line.startswith("scontrol"))
    expected = "train --config=configs/robocoin.py --workdir=/shared/a run --config.seed=3"
    assert lines == [f"0: {expected}", f"1: {expected}"] and done.returncode == status
    assert ("scontrol requeue 17" in done.stdout) == requeued


@pytest.mark.slow
def test_sbatch_trains(bin: Path, tmp_path: Path) -> None:
    """Two tasks find each other by SLURM's variables alone."""
    data = tiny_dataset.write_dataset(tmp_path / "data")
    ahawam = command(bin, "ahawam", f'#!/bin/sh\nexec {sys.executable} -m ahawam_jax "$@"\n')
    done = run(
        bin, "bash", "launch/slurm.sbatch", "tests/tiny_config.py", str(tmp_path / "run"), "--config.train.steps=2",
        "--config.data.validation_episodes=0", f"--config.data.path={data}", "--config.data.cache=",
        "--config.mesh.data=1", "--config.mesh.tensor=2", AHAWAM=str(ahawam), SLURM_NTASKS="2",
        SLURM_JOB_ID=str(os.getpid()), XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 2 processes" in done.stdout and (tmp_path / "run/checkpoints/2").is_dir()


def test_latents_are_divided(bin: Path) -> None:
    ahawam = command(bin, "ahawam", '#!/bin/sh\necho "$@"\n')
    done = run(
        bin, "bash", "launch/slurm_latents.sbatch", "64", "configs/robocoin.py", "--config.data.latents=/shared/l",
        AHAWAM=str(ahawam), SLURM_ARRAY_TASK_ID="17", SLURM_NTASKS="1",
    )  # fmt: skip
    assert done.stdout == "encode-video --config=configs/robocoin.py --shard=17/64 --config.data.latents=/shared/l\n"


def test_tpu_vm_line(bin: Path, tmp_path: Path) -> None:
    """What every worker gets is one line of bash, whatever is in the arguments; it starts again after 75."""
    done = run(bin, "bash", "launch/tpu_vm.sh", "pod", "us-east5-a", "c.py", "/shared/a run", "--config.seed=3")
    lines = done.stdout.splitlines()
    assert lines[:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-a", "--worker=all"]
    words = shlex.split(lines[7].removeprefix("--command="))
    assert words[:3] == ["nohup", "bash", "-c"]
    (tmp_path / "ahawam-jax/.venv/bin").mkdir(parents=True)
    text = '#!/bin/sh\necho "$#: $@" >> called\n[ $(wc -l < called) -gt 1 ] || exit 75\n'
    command(tmp_path / "ahawam-jax/.venv/bin", "ahawam", text)
    assert run(bin, "bash", "-c", words[3], HOME=str(tmp_path)).returncode == 0
    called = (tmp_path / "ahawam-jax/called").read_text().splitlines()
    assert called == ["4: train --config=c.py --workdir=/shared/a run --config.seed=3"] * 2


def test_jobset(tmp_path: Path) -> None:
    """The manifest is YAML, its hosts are those of its topology, and what GKE adds makes up a job."""
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["parallelism"] == job["completions"] == math.prod(map(int, topology.split("x"))) // chips
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["containers"][0]["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    added = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": ",".join(f"h{n}" for n in range(job["parallelism"]))}
    assert find_job(added, device_folder=tmp_path).cluster == "gketpu"
