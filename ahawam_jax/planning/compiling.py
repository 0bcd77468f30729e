"""The step compiled for devices that are not here.

In a process of its own: XLA reads its flags once, when a process first asks for one, and where it finds itself in a
state that it did not expect it ends the process.
"""

import dataclasses
import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from ahawam_jax.models.attention import attention_of
from ahawam_jax.planning import mfu
from ahawam_jax.planning.devices import Cluster
from ahawam_jax.planning.kernels import Kernel, kernels
from ahawam_jax.planning.subject import make_subject
from ahawam_jax.training import sharding
from ahawam_jax.training.collectives import Collective, collectives
from data_pipelines.processes import WorkerError, worker_pool

# XLA asks of a GPU: capability, cores, threads and shared memory of a core, shared memory of a block, cache, clock,
# arithmetic units of a core.
GPUS = {
    "h100": (9, 0, 132, 2048, 233472, 232448, 52428800, 1.98, 128),
    "h200": (9, 0, 132, 2048, 233472, 232448, 52428800, 1.98, 128),
    "a100": (8, 0, 108, 2048, 167936, 166912, 41943040, 1.41, 64),
    "5090d": (12, 0, 170, 1536, 102400, 101376, 100663296, 2.41, 128),
}
TPUS = {"v5p": ("v5p", 3, 1), "v6e": ("v6e", 2, 1), "v7x": ("tpu7x", 3, 2)}  # name, dimensions, devices of a chip

INSTALL_CUDA = (
    "Compiling for CUDA needs XLA's plug-in and assembler, but no GPU: pip install --no-deps jax-cuda12-plugin=={jax} "
    "jax-cuda12-pjrt=={jax} nvidia-cuda-nvcc-cu12, or with --target FOLDER and then PYTHONPATH=FOLDER, where this "
    "environment is to stay as it is."
)
INSTALL_TPU = "Compiling for TPUs needs libtpu, but no TPU: pip install libtpu (of jax[tpu]=={jax})."


T = TypeVar("T")


class PlugInError(ValueError):
    """The compiler for a device is not installed; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step. Bytes on one device."""

    seconds: float  # that compiling took
    arguments: int
    temporaries: int
    peak: int
    collectives: list[Collective]
    kernels: list[Kernel]  # of GPUs alone

    def by_kind(self) -> Counter[str]:
        """Bytes of whole arrays in one step, without groups of one device."""
        total: Counter[str] = Counter()
        for one in self.collectives:
            if len(one.groups[0]) > 1:
                total[one.kind] += one.bytes
        return total


def compile_step(config: ConfigDict, cluster: Cluster) -> Compiled:
    """Compiles the step of a config for a cluster. Takes a minute or two at any depth, TPUs longer.

    Raises PlugInError where the compiler is missing, ValueError where it refuses the program or breaks off.
    """
    return with_compilers(cluster, _compile, config, cluster)


def with_compilers(cluster: Cluster, function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a process that has the compilers for a cluster's devices.

    Raises PlugInError where the compiler is missing, ValueError where it refuses the program or breaks off.
    """
    safe = f"That was the compiler for {cluster.device.name}; what it says stands above."
    with _environment(cluster):
        try:
            with worker_pool(1, safe) as pool:
                return pool.submit(_call, cluster.device.name, function, arguments).result()
        except WorkerError as error:
            raise ValueError(str(error)) from error


def _call(device: str, function: Callable[..., T], arguments: Sequence[Any]) -> T:
    jax.config.update("jax_platforms", "cpu")  # a GPU that happens to be here is left alone
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be loaded again
    try:
        return function(*arguments)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]  # below it stands where in the program
        raise ValueError(f"The compiler for {device} refuses the program: {reason}") from None


def _compile(config: ConfigDict, cluster: Cluster) -> Compiled:
    began = time.monotonic()
    sizes = dict(zip(sharding.MESH_AXES, cluster.sizes, strict=True))
    mesh = sharding.make_mesh(sizes, absent_devices(cluster), device_bytes=cluster.device.memory)
    subject = make_subject(config, mesh)
    results = (subject.layout, sharding.replicated(mesh))
    # cuDNN's kernel cannot be compiled without a GPU, that of TPUs can.
    backend = "tpu" if cluster.device.platform == "tpu" else "cpu"
    with sharding.activation_rules(mesh), attention_of(backend):
        step = jax.jit(subject.function, donate_argnums=0, out_shardings=results)
        compiled = step.lower(*subject.arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporary, peak = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    if backend == "tpu":  # its peak leaves out the holes between arrays, but what it refuses for is all of them
        peak = arguments + temporary
    found = kernels(text) if cluster.device.platform == "cuda" else []
    return Compiled(time.monotonic() - began, arguments, temporary, peak, collectives(text), found)


@contextmanager
def _environment(cluster: Cluster) -> Iterator[None]:
    """Inside, what the compilers read from the environment when they are loaded."""
    added = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    if cluster.device.platform == "cuda":
        nvcc = _folder("nvidia.cuda_nvcc")
        if nvcc is None or _folder("jax_cuda12_plugin") is None:
            raise PlugInError(INSTALL_CUDA.format(jax=jax.__version__))
        flags = f"--xla_gpu_cuda_data_dir={nvcc} --xla_gpu_enable_triton_gemm=false"
        added = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
                 "PATH": f"{nvcc}/bin:{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "2"}  # fmt: skip
    elif (library := _folder("libtpu")) is not None:
        added["TPU_LIBRARY_PATH"] = str(library / "libtpu.so")
    elif "TPU_LIBRARY_PATH" not in os.environ:
        raise PlugInError(INSTALL_TPU.format(jax=jax.__version__))
    before = {name: os.environ.get(name) for name in added}
    os.environ |= added
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _folder(module: str) -> Path | None:
    """Where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def absent_devices(cluster: Cluster) -> list[jax.Device]:
    """What programs for these devices are compiled for; within `with_compilers`."""
    device = cluster.device
    if device.platform == "cuda":
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=device.name, target_config=_target(cluster),
            topology=f"1x{cluster.hosts}x{cluster.per_host}",
        )  # fmt: skip
    else:
        name, rank, per_chip = TPUS[device.name]
        shape = "x".join(map(str, slice_shape(cluster.devices // per_chip, rank)))
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}")
    return list(topology.devices)


def slice_shape(chips: int, rank: int) -> tuple[int, ...]:
    """The most cubic slice of so many chips, a power of two: 64 in three dimensions are 4x4x4."""
    bits = chips.bit_length() - 1
    if chips != 1 << bits or bits < 2:
        raise ValueError(f"A TPU slice of {chips} chips does not exist; expected 4, 8, 16 and so on.")
    if rank == 3 and bits == 2:
        return (2, 2, 1)
    return tuple(sorted(2 ** (bits // rank + (i < bits % rank)) for i in range(rank)))


def _target(cluster: Cluster) -> str:
    """XLA's description of a GPU."""
    major, minor, cores, threads, shared, block, cache, clock, units = GPUS[cluster.device.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {math.floor(cluster.device.bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {cluster.device.memory}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{mfu.KINDS[cluster.device.name]}"
"""
