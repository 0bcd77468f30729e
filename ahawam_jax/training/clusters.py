"""What the launcher of a job tells each of its processes: SLURM, Open MPI, GKE, TPU-VM, or plain addresses."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_PROCID",
         "SLURM_LOCALID")  # fmt: skip


class ClusterError(ValueError):
    """An environment that tells half of what a process must know; the message says what is missing."""


@dataclass(frozen=True)
class Job:
    """The job that a process belongs to, as jax.distributed.initialize takes it.

    cluster: jax's name of what tells the rest, "deactivate" where nothing is left to tell.  coordinator: host:port of
    process 0.  devices: numbers of the GPUs that are this process's among those it sees; None leaves all.
    """

    cluster: str
    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None
    devices: list[int] | None = None

    def __str__(self) -> str:
        where = f" at {self.coordinator}" if self.coordinator else ""
        if self.process is None:
            return f"the {self.cluster} job{where}"
        return f"process {self.process} of {self.processes}{where}"


def find_job(
    environment: Mapping[str, str], coordinator: str | None = None, process: int | None = None,
    processes: int | None = None, device_folder: Path = Path("/dev"),
) -> Job | None:  # fmt: skip
    """The job of this process, None where it is alone.

    coordinator, process, processes: as given on the command line; else the variables PLAIN count, then SLURM's, Open
    MPI's, GKE's (TPU_WORKER_HOSTNAMES), then what a TPU-VM is told. Under SLURM and Open MPI the processes of a host
    divide its GPUs, unless the launcher has done that. Raises ClusterError for impossible and half-set values.
    """
    address = coordinator or environment.get(PLAIN[0]) or None
    number = _number(environment, PLAIN[1]) if process is None else process
    count = _number(environment, PLAIN[2]) if processes is None else processes
    if number is not None or count is not None or coordinator:
        return _plain(address, number, count)
    gpus = _visible_gpus(environment, device_folder)
    if (tasks := _number(environment, "SLURM_NTASKS") or 1) > 1:
        return _slurm(environment, tasks, address, gpus)
    if (tasks := _number(environment, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return _open_mpi(environment, tasks, address, gpus)
    if address:
        raise ClusterError(f"{PLAIN[0]} is set, but {PLAIN[1]} and {PLAIN[2]} are not; set all three or none.")
    return _tpu(environment, device_folder)


def _plain(address: str | None, process: int | None, processes: int | None) -> Job | None:
    flags = ("--coordinator", "--process", "--processes")
    given = dict(zip(flags, (address, process, processes), strict=True))
    if missing := [
        f"{flag} (or {name})" for (flag, value), name in zip(given.items(), PLAIN, strict=True) if value is None
    ]:
        raise ClusterError(f"A process of a job needs {', '.join(flags)}; missing: {', '.join(missing)}.")
    if not 0 <= process < processes:
        raise ClusterError(f"--process is {process}; expected 0 to {processes - 1}, as --processes is {processes}.")
    if not re.fullmatch(r".+:\d+", address):
        raise ClusterError(f"--coordinator is {address!r}; expected host:port of process 0, as in node1:7777.")
    return Job("deactivate", address, process, processes) if processes > 1 else None


def _slurm(environment: Mapping[str, str], tasks: int, address: str | None, gpus: int) -> Job:
    if missing := [name for name in SLURM if name not in environment]:
        raise ClusterError(
            f"SLURM_NTASKS is {tasks}, but {', '.join(missing)} not set: this process was not started by srun. Put "
            "srun before the command; to train alone inside an allocation, unset SLURM_NTASKS."
        )
    here = _tasks_here(environment["SLURM_STEP_TASKS_PER_NODE"], _number(environment, "SLURM_NODEID"))
    index = _number(environment, "SLURM_LOCALID")
    bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    devices = _divide(gpus, here, index, bound)
    return Job("slurm", address, _number(environment, "SLURM_PROCID"), tasks, devices)


def _tasks_here(text: str, node: int) -> int:
    """How many tasks a node has, of SLURM's list: "8(x2),4" is 8, 8, 4."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ClusterError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected numbers, as in 8(x2),4.")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ClusterError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE {text!r} has {len(counts)} nodes.")
    return counts[node]


def _open_mpi(environment: Mapping[str, str], tasks: int, address: str | None, gpus: int) -> Job:
    rank, here, index = (
        _number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "LOCAL_SIZE", "LOCAL_RANK")
    )
    if None in (rank, here, index):
        raise ClusterError(
            f"OMPI_COMM_WORLD_SIZE is {tasks}, but OMPI_COMM_WORLD_RANK, _LOCAL_SIZE and _LOCAL_RANK are not all set: "
            "start the processes with mpirun."
        )
    if address is None and "OMPI_MCA_orte_hnp_uri" not in environment:  # Open MPI 5 no longer tells where it began
        raise ClusterError(
            f"mpirun started {tasks} processes, but does not tell them where process 0 is; add "
            f"-x {PLAIN[0]}=HOST:PORT with a free port of that host."
        )
    return Job("ompi" if address is None else "deactivate", address, rank, tasks, _divide(gpus, here, index, False))


def _divide(gpus: int, tasks: int, index: int, bound: bool) -> list[int] | None:
    """A process's GPUs among those it sees, where `tasks` processes of a host see the same ones unless `bound`."""
    if not gpus:
        return None
    if bound or gpus < tasks:
        return list(range(gpus))
    if gpus % tasks:
        raise ClusterError(
            f"{tasks} processes of this host see {gpus} GPUs, which cannot be divided among them; start one process a "
            "host, or one a GPU."
        )
    each = gpus // tasks
    return list(range(index * each, (index + 1) * each))


def _visible_gpus(environment: Mapping[str, str], device_folder: Path) -> int:
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len(listed.split(",")) if listed else 0
    return len(list(device_folder.glob("nvidia[0-9]*")))


def _tpu(environment: Mapping[str, str], device_folder: Path) -> Job | None:
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    if names:
        if len(names.split(",")) * slices == 1:
            return None
        if missing := [
            name
            for name in ("TPU_WORKER_ID", *(("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_SLICE_ID") * (slices > 1)))
            if not environment.get(name)
        ]:
            raise ClusterError(f"TPU_WORKER_HOSTNAMES is {names!r}, but {', '.join(missing)} not set: half a TPU job.")
        return Job("gketpu")
    chips = any((device_folder / name).exists() for name in ("accel0", "vfio/0"))
    if chips and importlib.util.find_spec("libtpu") and not environment.get("TPU_SKIP_MDS_QUERY"):
        return Job("gcetpu")
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise ClusterError(f"{name} is {value!r}; expected a number.")
    return int(value)
