"""Several processes as one job: how they find each other, and what they agree on before the first step.

`join` comes before anything touches a device. A process alone needs nothing of this: every function here then returns
at once.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ahawam_jax.compilation_cache import own_folder
from ahawam_jax.training.clusters import Job
from data_pipelines.ownership import FILE, Owner, owned

WAIT = 300  # seconds for the last process to come
HEARTBEAT = 40  # seconds without a sign of life until a process counts as lost
VISIBLE = 60  # seconds until what one host wrote is seen by the others: clients of NFS remember what was not there
SHOWN = 12  # differences that are listed


class HostsError(ValueError):
    """The processes do not make up one job; the message says which of them differs in what."""


def join(job: Job | None, wait: float = WAIT) -> None:
    """Makes this process part of its job; nothing for None. From then on only process 0 writes to stdout.

    Raises HostsError where that cannot begin; ends this process with a sentence where others do not come.
    """
    if job is None:
        return
    late = threading.Timer(wait, _give_up, (job, wait))  # jax would end the process with a trace of its C++ stack
    late.daemon = True
    late.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `stopping`
    # On CPUs gloo matches collectives by their order, which two computations at a time do not keep.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Compiling for GPUs is the work of all processes together: one that finds its program kept would not take part.
    if jax.config.jax_compilation_cache_dir == str(own_folder()):
        jax.config.update("jax_compilation_cache_dir", None)
    try:
        jax.distributed.initialize(
            job.coordinator, job.processes, job.process, job.devices, cluster_detection_method=job.cluster,
            initialization_timeout=int(wait) + 60, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise HostsError(
            f"{job} cannot begin: {' '.join(str(error).split())}. If another program has the port, choose another in "
            "JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, the same for all processes."
        ) from error
    finally:
        late.cancel()
    counts = Counter(device.process_index for device in jax.devices())
    if len({counts[process] for process in range(jax.process_count())}) > 1:
        listed = ", ".join(f"{counts[process]} of process {process}" for process in range(jax.process_count()))
        raise HostsError(f"All processes of a job need the same number of devices; they have {listed}.")
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def _give_up(job: Job, wait: float) -> None:
    found = "not all the others came"
    if job.coordinator:
        host, _, port = job.coordinator.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), 5):
                found = f"process 0 answers there, but {found}"
        except OSError as error:
            found = f"nobody answers there ({error})"
    print(
        f"error: {job} has waited for {wait:.0f} seconds: {found}. Every process needs the same address and number of "
        "processes, and a number of its own.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def gather(text: str) -> list[str]:
    """The texts of all processes, by process. All call it together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, 1 + lengths.max() - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


@contextmanager
def together() -> Iterator[None]:
    """What one process refuses in the block with a sentence, all refuse, and none waits for it in vain.

    All enter it together. Raises the ValueError or OSError of this process, else HostsError with that of another.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    said = gather("" if own is None else f"{_name()}: {own}")
    if own is not None:
        raise own
    if found := [text for text in said if text]:
        raise HostsError("\n  ".join(found[:SHOWN]))


def agree(facts: Mapping[str, Any]) -> None:
    """Raises HostsError unless all processes hold the same facts, JSON-ready. All call it together."""
    own = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    parsed = [json.loads(text) for text in gather(json.dumps([_name(), own]))]
    first, expected = parsed[0]
    found = [
        f"{name} has {fact} {values.get(fact, 'missing')}, {first} has {expected.get(fact, 'missing')}"
        for name, values in parsed
        for fact in sorted(values.keys() | expected.keys())
        if values.get(fact) != expected.get(fact)
    ]
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise HostsError(
            "The processes of this job differ; start all of them with the same command, code and data:\n  "
            + "\n  ".join(found[:SHOWN] + more)
        )


def environment() -> dict[str, str]:
    """What has to be the same on all hosts whatever they do: our code, jax, the kind of devices."""
    code = hashlib.sha256()
    for folder in ("ahawam_jax", "data_pipelines"):
        root = Path(__file__).resolve().parents[2] / folder
        for path in sorted(root.rglob("*.py")):
            code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {
        "code (sum of its files)": code.hexdigest()[:12], "jax": jax.__version__,
        "devices": jax.local_devices()[0].device_kind,
    }  # fmt: skip


def compile_together(function: Any, *arguments: Any) -> Any:
    """A jitted function, compiled for these arguments by the time that the slowest process has it.

    Else the quickest waits inside its first collective, and Gloo gives up after half a minute.
    """
    compiled = function.lower(*arguments).compile()
    gather("")
    return compiled


def fields(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as {"a.b": leaf}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, x in tree.items() for k, v in fields(x, f"{prefix}.{key}".removeprefix(".")).items()}


@contextmanager
def owned_by_first(workdir: Path) -> Iterator[Owner | None]:
    """Process 0 owns the workdir for the length of the block, and all see that. Yields its Owner, None to the others.

    Raises OwnedError where another job has it, HostsError where a process does not see it.
    """
    with ExitStack() as stack:
        with together():
            owner = None if jax.process_index() else stack.enter_context(owned(workdir))
        with together():
            check_shared(workdir / FILE)
        yield owner


def check_shared(path: Path, wait: float = VISIBLE) -> None:
    """Raises HostsError on a process that does not see a file that process 0 has written. All call it together."""
    written = gather(path.read_text() if jax.process_index() == 0 else "")[0]
    end = time.monotonic() + wait
    while not (path.exists() and path.read_text() == written):
        if time.monotonic() > end:
            raise HostsError(
                f"{path.parent} is not the folder that process 0 writes to; --workdir must lie on a disk that all "
                "hosts share."
            )
        time.sleep(1)


def _name() -> str:
    return f"process {jax.process_index()} on {socket.gethostname()}"
