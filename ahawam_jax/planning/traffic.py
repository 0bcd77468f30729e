"""What devices send each other in a step, over which network, and how long that takes."""

import dataclasses
from collections.abc import Sequence

from ahawam_jax.planning.devices import LINK, Cluster
from ahawam_jax.planning.layout import REDUCE, Collective
from ahawam_jax.training.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes, in one step.

    bytes: of the whole arrays, on one device.  inside, across: bytes that a device sends within its host and to other
    hosts, groups being rings that pass every host once.
    """

    kind: str
    axes: tuple[str, ...]
    number: int
    bytes: int
    devices: int
    hosts: int
    inside: float
    across: float

    def seconds(self, cluster: Cluster) -> float:
        """At the rates that large collectives reach; both networks are busy at a time."""
        return max(self.inside / cluster.device.inside, self.across / cluster.device.across) / LINK


def traffic(found: Sequence[Collective], cluster: Cluster) -> list[Traffic]:
    """By kind and axes, the largest first."""
    total: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
    for one in found:
        number, size = total.get((one.kind, one.axes), (0, 0))
        total[one.kind, one.axes] = number + one.times, size + one.bytes * one.times
    rows = []
    for (kind, axes), (number, size) in total.items():
        devices, hosts = cluster.spans(axes, MESH_AXES)
        ways, here = 2 if kind == REDUCE else 1, devices // hosts
        # Of what a host lacks, every one of its devices in the group fetches a part, and passes it on to the others.
        across = ways * size * (hosts - 1) / hosts / here
        inside = ways * size * (here - 1) / here
        if cluster.device.platform == "tpu":
            across, inside, hosts = 0.0, ways * size * (devices - 1) / devices, 1
        rows.append(Traffic(kind, axes, number, size, devices, hosts, inside, across))
    return sorted(rows, key=lambda row: -row.bytes)
