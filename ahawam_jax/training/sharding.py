"""Mesh, and the one table from logical axis names to mesh axes; and what of a tree it leaves whole."""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ahawam_jax.models.partitioning import Axes, constraints

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


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices with axes data, fsdp, tensor; one size may be -1 for "the rest".

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    shape = [int(sizes[axis]) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if int(np.prod(shape)) != len(devices) or min(shape) < 1:
        raise ValueError(
            f"config.mesh {dict(sizes)} does not fit {len(devices)} devices; data * fsdp * tensor must equal the "
            "number of devices, and one of them may be -1."
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays, sharded over data and fsdp."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def activation_rules(mesh: Mesh) -> AbstractContextManager[None]:
    """Inside, the models' activation constraints mean axes of this mesh."""

    def apply(x: jax.Array, axes: Axes) -> jax.Array:
        spec = _fit(nn.logical_to_mesh_axes(axes, RULES), x.shape, mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constraints(apply)
