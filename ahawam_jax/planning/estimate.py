"""Everything `ahawam plan` says of one configuration on one cluster, as numbers."""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core.meta import AxisMetadata
from ml_collections import ConfigDict

from ahawam_jax.planning import flops
from ahawam_jax.planning.devices import HOLES, MATRIX, PASSES, UPDATE, WHOLE, Cluster
from ahawam_jax.planning.layout import lay_out, spec_of
from ahawam_jax.planning.memory import Lives, lives, temporaries
from ahawam_jax.planning.program import Op, Program, Spec, read
from ahawam_jax.planning.subject import Subject, abstract_mesh, make_subject, trace
from ahawam_jax.planning.traffic import Traffic, traffic
from ahawam_jax.training.sharding import MESH_AXES, bytes_per_device

PARTS = ((r"\.params", "parameters"), (r"\.mu", "first moments"), (r"\.nu", "second moments"), (r"\.ema", "average"))
WAITING = 16  # batches that the loader of a large host keeps ready


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step: bytes on one device, operations of all devices together, seconds."""

    subject: Subject
    cluster: Cluster
    state: dict[str, tuple[int, float]]  # parts of the state: bytes on a device, and if nothing lay there twice
    batch_bytes: int  # the batch and the frozen tower, on a device
    temporary: int  # what is laid out for the most that is alive at once besides
    fullest: str  # where that is
    operations: Counter[tuple[str, str]]  # floating point, by component and pass
    per_device: float  # of these, what one device computes: more than its share where work is done twice
    traffic: list[Traffic]
    trained: tuple[int, int]  # parameters with moments: those that lie on a device, and those that it computes with

    @property
    def memory(self) -> int:
        """Bytes on a device at the fullest moment."""
        return sum(here for here, _ in self.state.values()) + self.batch_bytes + self.temporary

    @property
    def fits(self) -> bool:
        """Whether that is what a device can hold."""
        return self.memory <= self.cluster.usable

    @property
    def model_operations(self) -> int:
        """Forward and backward pass once, without frozen towers: what MFU counts."""
        return flops.of_model(self.operations)

    @property
    def products(self) -> float:
        """Seconds of matrix products, at the rate of large ones."""
        return self.per_device / (MATRIX * self.cluster.device.flops)

    @property
    def passes(self) -> float:
        """Seconds of what lies between them, by the bytes that it moves."""
        return PASSES * self.per_device / self.cluster.device.bandwidth

    @property
    def update(self) -> float:
        """Seconds of what does not grow with the samples of a microbatch, by the bytes of trained parameters."""
        here, used = self.trained
        moved = UPDATE * here + WHOLE * used * self.subject.config.optimizer.accumulate
        return moved / self.cluster.device.bandwidth

    @property
    def arithmetic(self) -> float:
        """Seconds of a device's own work."""
        return self.products + self.passes + self.update

    @property
    def communication(self) -> float:
        """Seconds of traffic."""
        return sum(row.seconds(self.cluster) for row in self.traffic)

    @property
    def seconds(self) -> float:
        """Expected of a step: the larger of the two, as they overlap."""
        return max(self.arithmetic, self.communication)

    @property
    def floor(self) -> float:
        """Seconds of a step that does nothing but large matrix products, or wait for its traffic."""
        return max(self.products, self.communication)

    def mfu(self, seconds: float) -> float:
        """Share of the peak that a step of so many seconds makes of the model's own operations."""
        return self.model_operations / (seconds * self.cluster.devices * self.cluster.device.flops)

    @property
    def host_bytes(self) -> int:
        """Memory of a host for batches that wait for their step."""
        batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in self.subject.batch.values())
        return WAITING * batch // self.cluster.hosts

    @property
    def checkpoint(self) -> tuple[int, int]:
        """Bytes on disk of all that a run resumes from, and of the parameters to deploy."""
        state = nn.unbox(self.subject.boxed)
        return _bytes(state), _bytes(jax.eval_shape(lambda state: state.deploy, state))


@dataclasses.dataclass(frozen=True)
class Work:
    """A program, and what of it is the same on every mesh."""

    program: Program
    lives: Lives
    products: list[tuple[Op, float]]
    operations: Counter[tuple[str, str]]

    @classmethod
    def of(cls, program: Program, subject: Subject) -> "Work":
        """subject: whose step it is; its new state is written where the old one lies."""
        held = lives(program, len(jax.tree.leaves(subject.state)))
        return cls(program, held, flops.products(program), flops.count(program))


@dataclasses.dataclass(frozen=True)
class Place:
    """A step on a mesh, and what of it is the same for every remat and number of microbatches."""

    subject: Subject
    inputs: list[Spec]  # layouts of the arguments
    state: dict[str, tuple[int, float]]
    batch_bytes: int
    trained: tuple[int, int]

    @classmethod
    def of(cls, subject: Subject) -> "Place":
        arguments, count = jax.tree.leaves(subject.arguments), len(jax.tree.leaves(subject.state))
        inputs = [spec_of(x.sharding.spec, len(x.shape)) for x in arguments]
        return cls(subject, inputs, _state(subject), sum(map(_local, arguments[count:])), _trained(subject))


def estimate(config: ConfigDict, cluster: Cluster) -> Estimate:
    """Traces the step and takes it apart. Allocates nothing; ValueError for what does not fit together."""
    subject = make_subject(config, abstract_mesh(cluster.sizes))
    return assess(Place.of(subject), cluster, Work.of(read(trace(subject)), subject))


def assess(place: Place, cluster: Cluster, work: Work) -> Estimate:
    """What a step that was read already costs on a cluster."""
    program, sizes = work.program, dict(zip(MESH_AXES, cluster.sizes, strict=True))
    count = len(jax.tree.leaves(place.subject.state))
    others = len(program.outputs) - count
    found = lay_out(
        program, place.inputs, [*place.inputs[:count], *[None] * others], sizes,
        [i < count for i in range(len(place.inputs))],
    )  # fmt: skip
    peak = temporaries(work.lives, found, sizes)
    temporary = round(HOLES[cluster.device.platform] * peak.bytes)
    return Estimate(
        place.subject, cluster, place.state, place.batch_bytes, temporary,
        f"{flops.component(peak.at)} {flops.which_pass(peak.at)}" if peak.at else "", work.operations,
        flops.on_device(work.products), traffic(found, cluster), place.trained,
    )  # fmt: skip


def held(subject: Subject) -> int:
    """Bytes of the state on a device."""
    return sum(map(_local, jax.tree.leaves(subject.state)))


def _state(subject: Subject) -> dict[str, tuple[int, float]]:
    """By part of the state."""
    parts: dict[str, list[Any]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(subject.boxed, is_leaf=lambda x: isinstance(x, AxisMetadata))
    for path, leaf in leaves:
        name = next((name for pattern, name in PARTS if re.search(pattern, jax.tree_util.keystr(path))), None)
        if name:
            parts.setdefault(name, []).append(leaf)
    return {name: bytes_per_device(leaves, subject.mesh) for name, leaves in parts.items()}


def _trained(subject: Subject) -> tuple[int, int]:
    """Parameters that have moments: on a device, and when fsdp has gathered them."""
    leaves = jax.tree_util.tree_leaves_with_path(subject.state)
    moments = [x for path, x in leaves if re.search(r"\.mu", jax.tree_util.keystr(path))]
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in moments)
    return here, sum(x.size for x in moments) // subject.mesh.shape["tensor"]


def _local(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
