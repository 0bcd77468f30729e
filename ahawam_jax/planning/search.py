"""Which meshes, rematerialisation and microbatches a cluster can train with, the fastest first."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict

from ahawam_jax.planning.devices import Cluster
from ahawam_jax.planning.estimate import Estimate, Place, Work, assess, held
from ahawam_jax.planning.program import Program, read, resized
from ahawam_jax.planning.splicing import spliced
from ahawam_jax.planning.subject import Subject, abstract_mesh, make_subject, trace, without_collector
from data_pipelines.progress import Progress

MICROBATCHES = (1, 2, 4, 8)
# From what takes most memory to what takes most arithmetic; a component that has its own policy is named.
REMATS = ("none", "dots", "full, executor=none, router=none", "full, router=none", "full, executor=none", "full")
# Samples of a microbatch and microbatches of a step that is traced once for all numbers of them: primes of which no
# other dimension is a multiple, so that theirs can be told.
ROWS, COUNT = 1009, 1013


def search(config: ConfigDict, cluster: Cluster) -> list[Estimate]:
    """Layouts of the cluster's devices that fit its memory, by expected time.

    Of a mesh and a number of microbatches it is the remat that computes least again, and of more microbatches, which
    gather weights more often, only what computes less again than fewer can. The step is traced once for every policy
    of remat; what else changes changes sizes alone, or which of these traces the loop over a component's layers is of.
    """
    with without_collector():
        return _search(config, cluster)


def _search(config: ConfigDict, cluster: Cluster) -> list[Estimate]:
    found = []
    whole = make_subject(config, abstract_mesh((1, 1, 1)))
    size = config.data.batch_size
    meshes = [sizes for sizes in _meshes(cluster, config) if size % (sizes[0] * sizes[1]) == 0]
    if not meshes:
        raise ValueError(
            f"config.data.batch_size {size} divides among the devices of no mesh of {cluster.devices}; give a "
            f"multiple of {cluster.devices}."
        )
    places = {sizes: whole.on(abstract_mesh(sizes)) for sizes in meshes}
    places = {sizes: Place.of(subject) for sizes, subject in places.items() if held(subject) <= cluster.usable}
    if not places:
        return []
    least = dict.fromkeys(places, len(REMATS))  # place in REMATS of what fits, by mesh
    programs = Programs(whole)
    progress = Progress(len(MICROBATCHES) * len(REMATS) * len(places), "layouts")
    for accumulate, (rank, remat) in itertools.product(MICROBATCHES, enumerate(REMATS)):
        left = [
            sizes for sizes in places
            if rank < least[sizes] and size % (sizes[0] * sizes[1] * accumulate) == 0
        ]  # fmt: skip
        progress.add(f"remat {remat}, {accumulate} microbatches", len(places) - len(left))
        if not left:
            continue
        subject = varied(whole, remat, size, accumulate)
        work = Work.of(resized(programs[remat], {ROWS: size // accumulate, COUNT: accumulate}), whole)
        for sizes in left:
            place = dataclasses.replace(places[sizes], subject=places[sizes].subject.like(subject))
            one = assess(place, dataclasses.replace(cluster, sizes=sizes), work)
            progress.add("x".join(map(str, sizes)), 1)
            if one.fits:
                found.append(one)
                least[sizes] = rank
    return sorted(found, key=lambda one: (one.seconds, one.memory))


class Programs(dict[str, Program]):
    """Of a step with ROWS samples in each of COUNT microbatches, by remat.

    One with a policy of its own for a component is put together from those that have one policy for all.
    """

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject = subject

    def __missing__(self, remat: str) -> Program:
        policy, *own = remat.split(", ")
        program = self[policy] if own else None
        for component, other in (part.split("=") for part in own):
            program = program and spliced(program, self[other], component)
        self[remat] = program or read(trace(varied(self.subject, remat, ROWS * COUNT, COUNT)))
        return self[remat]


def varied(subject: Subject, remat: str, batch: int, accumulate: int) -> Subject:
    """The same step with other remat, batch and number of microbatches."""
    config = copy.deepcopy(subject.config)
    config.model.remat, config.data.batch_size, config.optimizer.accumulate = remat, batch, accumulate
    return make_subject(config, subject.mesh, subject.boxed)


def _meshes(cluster: Cluster, config: ConfigDict) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) of so many devices; tensor within a host, where it splits the heads."""
    count = cluster.devices
    for tensor in (n for n in range(1, cluster.per_host + 1) if count % n == 0):
        if config.model.num_heads % tensor == 0 and cluster.per_host % tensor == 0:
            rest = count // tensor
            yield from ((rest // fsdp, fsdp, tensor) for fsdp in range(1, rest + 1) if rest % fsdp == 0)
