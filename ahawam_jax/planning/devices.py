"""Accelerators by their makers' datasheets, the share of it that is reached, and clusters of them."""

import dataclasses
import math
from collections.abc import Sequence

# What a step's own work takes is fitted to two steps of one H200: full size, latents cached, remat full, 8 samples
# 0.575 s and 16 samples 1.000 s, and agrees with a third, 32 with the planner frozen, 1.079 s, within 2%.
MATRIX = 0.78  # of the peak: 770 to 800 of 989 TFLOP/s, an 8192 x 8192 x 8192 product measured on an H200
PASSES = 3.77e-3  # bytes through a device's memory for each operation of a product: all that is not a product
UPDATE = 36  # bytes of the state's own device for each trained parameter: Adam's three arrays, the gradient thrice
WHOLE = 62  # bytes for each trained parameter, wherever it lies: casts, gradients of layers, products too small
COPY = 0.9  # of a memory's rate, what a large copy reaches: 4.3 of 4.8 TB/s, read and written, on an H200
LINK = 0.8  # of a link's rate, what large collectives reach
USABLE = 0.92  # of a device's memory: the runtime, its communication buffers and fragments take the rest
# Bytes that a compiler lays out for each that is alive at once. libtpu: 1.13 and 1.21, the full step on 8 and 64 v5p.
HOLES = {"cuda": 1.0, "tpu": 1.15}


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them; rates by the datasheet."""

    name: str
    platform: str  # "cuda" or "tpu"
    flops: float  # dense bfloat16 operations a second
    memory: int  # bytes
    bandwidth: float  # bytes a second of its memory
    inside: float  # bytes a second that it sends to devices of its own host; TPU: of its slice
    across: float  # bytes a second that it sends to other hosts
    per_host: int  # devices that a host has at most


# GPUs: the SXM boards on NVLink, a network card of 400 Gbit/s (A100: 200) for each; the RTX 5090 D on PCI Express 5,
# with one of 100. TPUs: a slice is one network.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", "cuda", 989e12, 84_942_979_072, 3.35e12, 450e9, 50e9, 8),
        Device("h200", "cuda", 989e12, 150_000_000_000, 4.8e12, 450e9, 50e9, 8),
        Device("a100", "cuda", 312e12, 84_942_979_072, 2.04e12, 300e9, 25e9, 8),
        Device("5090d", "cuda", 148e12, 34_190_917_632, 1.79e12, 64e9, 12.5e9, 8),
        Device("v5p", "tpu", 459e12, 95 * 2**30, 2.77e12, 600e9, 600e9, 4),
        Device("v6e", "tpu", 918e12, 32 * 2**30, 1.64e12, 448e9, 448e9, 8),
        Device("v7x", "tpu", 1154e12, 96 * 2**30, 3.69e12, 600e9, 600e9, 8),  # half a chip: JAX counts cores
    )
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts of equal devices, on which a mesh (data, fsdp, tensor) lies in order, neighbours on one host first."""

    device: Device
    sizes: tuple[int, int, int]
    hosts: int

    @property
    def devices(self) -> int:
        """Devices of all hosts."""
        return math.prod(self.sizes)

    @property
    def per_host(self) -> int:
        """Devices of one host."""
        return self.devices // self.hosts

    @property
    def usable(self) -> float:
        """Bytes of a device that a step can have."""
        return USABLE * self.device.memory

    def spans(self, axes: Sequence[str], names: Sequence[str]) -> tuple[int, int]:
        """Of a group of devices along mesh axes: how many it has, and on how many hosts. names: of all mesh axes."""
        places = [0]
        for axis, size in zip(names, self.sizes, strict=True):
            places = [place * size + i for place in places for i in range(size if axis in axes else 1)]
        return len(places), len({place // self.per_host for place in places})


def make_cluster(device: str, mesh: str, hosts: int | None, network: float | None = None) -> Cluster:
    """A cluster from flags: the name of a device, a mesh "1x64x1", hosts (None: as few as can hold the devices).

    network: bytes a second that a device sends to other hosts, where it is not the usual.
    Raises ValueError for what does not exist or does not fit.
    """
    kind, sizes = find_device(device), parse_mesh(mesh)
    count = math.prod(sizes)
    if hosts is None:
        hosts = next(n for n in range(1, count + 1) if count % n == 0 and count // n <= kind.per_host)
    if hosts < 1 or count % hosts:
        raise ValueError(
            f"--mesh={mesh} has {count} devices, which {hosts} hosts cannot share evenly; give --hosts a divisor of "
            f"{count}, or another mesh."
        )
    if count // hosts > kind.per_host:
        raise ValueError(
            f"--mesh={mesh} on {hosts} host{'s' * (hosts > 1)} needs {count // hosts} devices a host, a host has at "
            f"most {kind.per_host} of {device}; give --hosts={-(-count // kind.per_host)} or more, or a smaller mesh."
        )
    if network is not None:
        if not 0 < network < math.inf:
            raise ValueError(f"--network is {network / 1e9:g}, expected a positive number of gigabytes a second.")
        kind = dataclasses.replace(kind, across=network)
    return Cluster(kind, sizes, hosts)


def find_device(name: str) -> Device:
    """A device of the table; another name is a ValueError listing them."""
    if name not in DEVICES:
        raise ValueError(f"--device is {name!r}, which is not in the table; expected one of {', '.join(DEVICES)}.")
    return DEVICES[name]


def parse_mesh(mesh: str) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of "1x64x1"; anything else is a ValueError."""
    words = mesh.split("x")
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"--mesh is {mesh!r}, expected DATAxFSDPxTENSOR as in 1x64x1.")
    data, fsdp, tensor = map(int, words)
    return data, fsdp, tensor
