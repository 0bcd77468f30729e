"""Mesh, and the one table from logical axis names to mesh axes; and what of a tree it leaves whole."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ahawam_jax.models.partitioning import Axes, Local, constraints

MESH_AXES = ("data", "fsdp", "tensor")
SPLITTING = ("fsdp", "tensor")  # parameters are split over these; over data they are copies
LARGE = 1_000_000  # elements of a leaf that must not be left whole

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("activation_embed", None),
)


STATE_SHARE = 0.5  # of a device's memory, where -1 decides: gradients, gathered layers and activations have the rest


def make_mesh(
    sizes: Mapping[str, int], devices: list[jax.Device] | None = None, state_bytes: int = 0,
    device_bytes: int | None = None,
) -> Mesh:  # fmt: skip
    """Mesh of all devices with axes data, fsdp, tensor, of which the later ones stay inside a host as far as they fit.

    A host stands for what a fast network joins: a GPU host, a TPU slice. Inside a slice the axes follow its torus.

    sizes: by axis; one may be -1 for "the rest". Data and fsdp both -1: parameters are split over the devices of a
    host and copied between hosts, unless a host is too small for the state; then over as few hosts as hold it.
    state_bytes: of the whole state.  device_bytes: memory of a device, by default what it says of itself.
    Raises ValueError if the sizes do not multiply to the number of devices, or the hosts differ in theirs.
    """
    devices = jax.devices() if devices is None else devices
    hosts = _hosts(devices)
    if len({len(host) for host in hosts}) > 1:
        raise ValueError(
            f"The hosts have {', '.join(str(len(host)) for host in hosts)} devices; a mesh needs as many of each."
        )
    memory = _memory(devices) if device_bytes is None else device_bytes
    shape = mesh_shape(sizes, len(hosts), len(hosts[0]), state_bytes, memory)
    inside, rest = [1, 1, 1], len(hosts[0])
    for axis in (2, 1, 0):  # the fastest network for the innermost axis; gcd leaves nothing of `rest` in the end
        inside[axis] = math.gcd(shape[axis], rest)
        rest //= inside[axis]
    outside = [size // part for size, part in zip(shape, inside, strict=True)]
    laid = np.stack([mesh_utils.create_device_mesh(inside, host, allow_split_physical_axes=True) for host in hosts])
    laid = laid.reshape(*outside, *inside).transpose(0, 3, 1, 4, 2, 5).reshape(shape)
    return Mesh(laid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(
    sizes: Mapping[str, int], hosts: int, host_devices: int, state_bytes: int = 0, device_bytes: int | None = None
) -> tuple[int, int, int]:
    """Sizes of data, fsdp and tensor as `make_mesh` chooses them; an unknown device_bytes is enough for any state."""
    shape, count = [int(sizes[axis]) for axis in MESH_AXES], hosts * host_devices
    if shape[:2] == [-1, -1] and shape[2] > 0 and count % shape[2] == 0:
        split = count // shape[2]
        least = host_devices // math.gcd(host_devices, shape[2])
        fits = [
            size for size in range(least, split, least)
            if split % size == 0
            and (device_bytes is None or state_bytes <= STATE_SHARE * device_bytes * size * shape[2])
        ]  # fmt: skip
        shape[1] = min(fits, default=split)
    if shape.count(-1) == 1 and 0 not in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = count // known if count % known == 0 else 0
    if math.prod(shape) != count or min(shape) < 1:
        raise ValueError(
            f"config.mesh {dict(sizes)} does not fit {count} devices; data * fsdp * tensor must equal the "
            "number of devices; one of them may be -1, or data and fsdp both."
        )
    return tuple(shape)


def describe_mesh(mesh: Mesh) -> str:
    """Its sizes in words, and which axes leave a host: "data 8 x fsdp 8 x tensor 1, data between 8 hosts"."""
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in MESH_AXES)
    host = np.vectorize(_host, otypes=[int])(mesh.devices)
    crossing = [axis for n, axis in enumerate(MESH_AXES) if (host != host.take([0], n)).any()]
    if not crossing:
        return sizes
    return f"{sizes}, {' and '.join(crossing)} between {len(np.unique(host))} hosts"


def state_size(boxed: Any) -> int:
    """Bytes of a tree of abstract arrays, boxed or not."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nn.unbox(boxed)))


def _host(device: jax.Device) -> int:
    """What a fast network joins; jax numbers the hosts of GPUs as it does slices of TPUs."""
    return getattr(device, "slice_index", 0)


def _hosts(devices: list[jax.Device]) -> list[list[jax.Device]]:
    hosts: dict[int, list[jax.Device]] = {}
    for device in devices:
        hosts.setdefault(_host(device), []).append(device)
    return [hosts[number] for number in sorted(hosts)]


def _memory(devices: list[jax.Device]) -> int | None:
    """Bytes of a device's memory, None where it does not tell."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    stats = mine[0].memory_stats() if mine else None
    return stats and stats.get("bytes_limit")


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Drops mesh axes from dimensions they do not divide: those dimensions are replicated."""
    fitted = []
    for axes, size in zip(tuple(spec) + (None,) * (len(shape) - len(spec)), shape, strict=True):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = math.prod(mesh.shape[name] for name in names)
        fitted.append(axes if size % parts == 0 else None)
    return PartitionSpec(*fitted)


def shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree of boxed abstract arrays (parameters, or a state made from them).

    An AbstractMesh((data, fsdp, tensor), MESH_AXES) does where no such devices are here.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    return jax.tree.map(
        lambda x, spec: NamedSharding(mesh, _fit(spec, x.shape, mesh)), nn.unbox(boxed), specs
    )


@dataclasses.dataclass(frozen=True)
class LeftWhole:
    """A large leaf of which the devices along a mesh axis hold copies, although the axis could split it."""

    name: str  # its path, joined with "/"
    shape: tuple[int, ...]
    axis: str  # of the mesh
    bytes: int  # on every device


def left_whole(boxed: Any, mesh: Mesh | AbstractMesh) -> list[LeftWhole]:
    """Every leaf of more than LARGE elements that fsdp or tensor leave whole and whose size they divide."""
    found = []
    placed = zip(
        jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(shardings(boxed, mesh)), strict=True
    )
    for (path, x), sharding in placed:
        part = sharding.shard_shape(x.shape)
        used = {axis for axes in sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found += [
            LeftWhole(name, x.shape, axis, math.prod(part) * x.dtype.itemsize)
            for axis in SPLITTING
            if math.prod(x.shape) > LARGE and mesh.shape[axis] > 1 and axis not in used
            and any(size % mesh.shape[axis] == 0 for size in part)
        ]  # fmt: skip
    return found


def bytes_per_device(boxed: Any, mesh: Mesh | AbstractMesh) -> tuple[int, float]:
    """Of a tree of boxed abstract arrays: bytes on one device, and what they were if fsdp and tensor split all."""
    whole, here = 0, 0
    for x, sharding in zip(jax.tree.leaves(nn.unbox(boxed)), jax.tree.leaves(shardings(boxed, mesh)), strict=True):
        whole += x.size * x.dtype.itemsize
        here += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return here, whole / math.prod(mesh.shape[axis] for axis in SPLITTING)


def abstract(boxed: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs, with their shardings, of a tree of boxed abstract arrays."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings(boxed, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(size: int, mesh: Mesh | AbstractMesh, accumulate: int) -> None:
    """Raises ValueError for a batch that is not as many rows on every device in every microbatch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if size < 1:
        raise ValueError(f"config.data.batch_size is {size}, expected at least 1.")
    if size % parts:
        raise ValueError(
            f"config.data.batch_size {size} must be a multiple of mesh data * fsdp * accumulate = {parts}."
        )


def batch_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Places [b] in a batch of `size` that the devices of this process hold, ascending.

    They follow from the mesh: processes that share rows, as along tensor, get the same places.
    """
    spans = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[span[0]] for span in spans]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of a batch at `batch_rows` -> global arrays, sharded over data and fsdp.

    On a CPU they may be the very memory of `batch`, which is not to be written to from here on.
    """
    sharding, parts = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    mine = batch_rows(mesh, parts)

    def put(name: str, rows: np.ndarray) -> jax.Array:
        size, rest = divmod(len(rows), len(mine))
        if rest:
            raise ValueError(f"{len(rows)} rows of {name} cannot be split over {len(mine)} parts of a batch.")

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = size * int(np.searchsorted(mine, (index[0].start or 0) // size))
            return rows[place : place + size]

        return jax.make_array_from_callback((parts * size, *rows.shape[1:]), sharding, part)

    return {name: put(name, rows) for name, rows in batch.items()}


def activation_rules(mesh: Mesh) -> AbstractContextManager[None]:
    """Inside, the models' activation constraints mean axes of this mesh, and kernels run on each device's part."""

    def place(axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        return _fit(nn.logical_to_mesh_axes(axes, RULES), shape, mesh)

    def apply(x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place(axes, x.shape)))

    def split(function: Local, arrays: Sequence[jax.Array], axes: Sequence[Axes]) -> jax.Array:
        specs = tuple(place(names, x.shape) for names, x in zip(axes, arrays, strict=True))
        local = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
        return local(*arrays)

    return constraints(apply, split)
