"""What launchers put into the environment of a process, and the job it then belongs to; nothing is started."""

from pathlib import Path

import pytest

from ahawam_jax.training.clusters import ClusterError, Job, find_job

PLAIN = dict(JAX_COORDINATOR_ADDRESS="node1:7777", JAX_PROCESS_ID="1", JAX_NUM_PROCESSES="4")
SLURM = dict(
    SLURM_JOB_ID="17", SLURM_NTASKS="12", SLURM_STEP_NODELIST="gpu[04-05]", SLURM_STEP_TASKS_PER_NODE="8,4",
    SLURM_NODEID="1", SLURM_PROCID="9", SLURM_LOCALID="1",
)  # fmt: skip
ONE_A_NODE = SLURM | dict(SLURM_NTASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_PROCID="1", SLURM_LOCALID="0")
MPI = dict(OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_RANK="5", OMPI_COMM_WORLD_LOCAL_SIZE="4",
           OMPI_COMM_WORLD_LOCAL_RANK="1")  # fmt: skip
MPI_4 = MPI | dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1:34911")
GKE = dict(TPU_WORKER_HOSTNAMES="a-0,a-1", TPU_WORKER_ID="1", TPU_SKIP_MDS_QUERY="true")
SLICES = dict(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="0", MEGASCALE_COORDINATOR_ADDRESS="a-0")


def gpus(count: int) -> dict[str, str]:
    return dict(CUDA_VISIBLE_DEVICES=",".join(map(str, range(count))))


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (PLAIN, Job("deactivate", "node1:7777", 1, 4)),
        (PLAIN | dict(JAX_PROCESS_ID="0", JAX_NUM_PROCESSES="1"), None),
        (PLAIN | SLURM, Job("deactivate", "node1:7777", 1, 4)),  # said before found
        (SLURM, Job("slurm", None, 9, 12)),
        (SLURM | gpus(4), Job("slurm", None, 9, 12, [1])),
        (SLURM | gpus(8), Job("slurm", None, 9, 12, [2, 3])),
        (SLURM | gpus(1), Job("slurm", None, 9, 12, [0])),  # SLURM has bound one to each task
        (SLURM | gpus(8) | dict(SLURM_GPUS_PER_TASK="8"), Job("slurm", None, 9, 12, list(range(8)))),
        (ONE_A_NODE | gpus(8), Job("slurm", None, 1, 2, list(range(8)))),
        (SLURM | dict(JAX_COORDINATOR_ADDRESS="x:1"), Job("slurm", "x:1", 9, 12)),
        (dict(SLURM_NTASKS="1", SLURM_JOB_ID="17"), None),  # a task of a job array
        (MPI_4 | gpus(4), Job("ompi", None, 5, 8, [1])),
        (MPI | dict(JAX_COORDINATOR_ADDRESS="x:1"), Job("deactivate", "x:1", 5, 8)),
        (GKE, Job("gketpu")),
        (GKE | SLICES, Job("gketpu")),
        (GKE | dict(TPU_WORKER_HOSTNAMES="a-0"), None),
        (GKE | SLICES | dict(TPU_WORKER_HOSTNAMES="a-0"), Job("gketpu")),
    ],
)
def test_job_of_an_environment(environment: dict[str, str], expected: Job | None, tmp_path: Path) -> None:
    assert find_job(environment, device_folder=tmp_path) == expected


def test_flags_come_before_variables(tmp_path: Path) -> None:
    assert find_job(PLAIN, "x:1", 0, 2, tmp_path) == Job("deactivate", "x:1", 0, 2)
    assert find_job(PLAIN, process=2, device_folder=tmp_path) == Job("deactivate", "node1:7777", 2, 4)


def test_devices_of_the_machine(tmp_path: Path) -> None:
    for name in (*(f"nvidia{n}" for n in range(8)), "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert find_job(ONE_A_NODE, device_folder=tmp_path).devices == list(range(8))
    assert find_job({}, device_folder=tmp_path) is None


@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(JAX_COORDINATOR_ADDRESS="node1:7777"), "JAX_PROCESS_ID and JAX_NUM_PROCESSES are not; set all three"),
        (dict(JAX_PROCESS_ID="0"), r"missing: --coordinator \(or JAX_COORDINATOR_ADDRESS\), --processes"),
        (PLAIN | dict(JAX_PROCESS_ID="4"), "--process is 4; expected 0 to 3"),
        (PLAIN | dict(JAX_PROCESS_ID="-1"), "JAX_PROCESS_ID is '-1'; expected a number"),
        (PLAIN | dict(JAX_COORDINATOR_ADDRESS="node1"), "--coordinator is 'node1'; expected host:port"),
        (dict(SLURM_NTASKS="16", SLURM_JOB_ID="1"), "SLURM_NTASKS is 16, .*SLURM_PROCID.* not started by srun"),
        (SLURM | gpus(6), "4 processes of this host see 6 GPUs"),
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="many"), "SLURM_STEP_TASKS_PER_NODE is 'many'"),
        (SLURM | dict(SLURM_NODEID="2"), "SLURM_NODEID is 2, but .* has 2 nodes"),
        (MPI, "does not tell them where process 0 is; add -x JAX_COORDINATOR_ADDRESS"),
        (dict(OMPI_COMM_WORLD_SIZE="2"), "not all set: start the processes with mpirun"),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), "TPU_WORKER_ID not set"),
        (GKE | dict(MEGASCALE_NUM_SLICES="2"), "MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID not set"),
    ],
)
def test_half_set_environments_are_sentences(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=message):
        find_job(environment, device_folder=tmp_path)
