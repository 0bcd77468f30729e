"""Meshes on hosts, and sentences for those that cannot be."""

import re

import pytest

from ahawam_jax.planning.compiling import slice_shape
from ahawam_jax.planning.devices import make_cluster
from ahawam_jax.planning.layout import GATHER, REDUCE, Collective
from ahawam_jax.planning.program import Op, Value
from ahawam_jax.planning.traffic import traffic
from ahawam_jax.training.sharding import MESH_AXES


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("b200", "1x8x1", 1), "--device is 'b200', which is not in the table; expected one of h100, h200"),
        (("h100", "8x8", 1), "--mesh is '8x8', expected DATAxFSDPxTENSOR as in 1x64x1"),
        (("h100", "1x0x1", 1), "--mesh is '1x0x1', expected"),
        (("h100", "1x64x1", 7), "--mesh=1x64x1 has 64 devices, which 7 hosts cannot share evenly"),
        (("h100", "1x64x1", 4), "needs 16 devices a host, a host has at most 8 of h100; give --hosts=8 or more"),
        (("h100", "1x64x1", 8, -1e9), "--network is -1, expected a positive number"),
    ],
)
def test_what_cannot_be_is_a_sentence(flags: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_cluster(*flags)


def test_groups_and_their_hosts() -> None:
    """Neighbours in the last axis are neighbours in the machine."""
    cluster = make_cluster("h100", "4x8x2", None)
    assert (cluster.hosts, cluster.per_host) == (8, 8)
    assert cluster.spans(("tensor",), MESH_AXES) == (2, 1)
    assert cluster.spans(("fsdp",), MESH_AXES) == (8, 2)
    assert cluster.spans(("data",), MESH_AXES) == (4, 4)
    assert cluster.spans(("data", "fsdp"), MESH_AXES) == (32, 8)


def test_what_crosses_hosts() -> None:
    """A group of 16 on two hosts: half of a gathered array comes from the other host, an eighth of it by each card."""
    op = Op("dot_general", {}, [], [], "")
    found = [Collective(kind, ("fsdp",), 1600, 3, op, Value((), None)) for kind in (GATHER, REDUCE)]
    gathered, reduced = sorted(traffic(found, make_cluster("h100", "1x16x1", 2)), key=lambda row: row.across)
    assert (gathered.inside, gathered.across) == (4800 * 7 / 8, 4800 / 2 / 8)
    assert (reduced.inside, reduced.across) == (2 * gathered.inside, 2 * gathered.across)
    (tpu, _) = traffic(found, make_cluster("v5p", "1x16x1", 4))
    assert (tpu.inside, tpu.across) in ((4800 * 15 / 16, 0), (2 * 4800 * 15 / 16, 0))  # a slice is one network
    alone = traffic(found, make_cluster("h100", "1x8x1", 1))
    assert all(row.across == 0 for row in alone)


def test_slices_of_tpus() -> None:
    assert [slice_shape(chips, 3) for chips in (4, 8, 16, 64, 128)] == [
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 4, 4), (4, 4, 8),
    ]  # fmt: skip
    assert [slice_shape(chips, 2) for chips in (4, 8, 256)] == [(2, 2), (2, 4), (16, 16)]
    with pytest.raises(ValueError, match="slice of 12 chips does not exist"):
        slice_shape(12, 3)
