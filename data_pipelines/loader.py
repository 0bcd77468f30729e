"""Batches for training and evaluation, out of one dataset or a weighted mixture of several.

What lies at a place of the global stream - the dataset, the window, its offset - is computed from the seed, the
step and the place in the batch. So batch k is the same array on 1 host and on 64, a run resumes anywhere on any
number of hosts, and 10^8 windows need no list of indices: grain shuffles by a permutation that it evaluates at one
index at a time. All windows have the same static shapes, so batches need no sorting by history length as in the
release: absent frames are masked.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import grain
import numpy as np
from absl import flags

from data_pipelines.caches.frame_cache import Frames
from data_pipelines.caches.latent_cache import CachedLatents
from data_pipelines.episodes import Episodes
from data_pipelines.processes import WorkerError, ending, follow_parent, out_of_reach_of_ctrl_c
from data_pipelines.statistics import Statistics
from data_pipelines.windows import WindowConfig, Windows

Batch = dict[str, np.ndarray]

# Of each process. Copying out of a memory map and decoding both run outside the interpreter lock: 2 processes decoded
# no faster than 2 threads. As many batches are kept waiting as there are threads, so full-size batches (100 MB and
# more) stay within memory.
THREADS = min(16, max(2, os.cpu_count() or 1))
_AUGMENTED = 4  # last word of a sample's seed, so that it is no other's


@dataclass(frozen=True)
class Source:
    """A dataset of a mixture.

    frames: its canvases uint8 [total rows, H, W, 3], None where all latents are cached.  statistics: normalise its
    states and actions; None leaves them in the units of the recording.  weight: its share of the samples, relative to
    the other sources' weights.  episodes: indices of the episodes to use, all by default.  latents: in place of
    pictures.
    """

    dataset: Episodes
    frames: Frames | None
    statistics: Statistics | None
    weight: float = 1.0
    episodes: Sequence[int] | None = None
    latents: CachedLatents | None = None

    @property
    def rows(self) -> int:
        """Rows of its episodes, each of which begins a window."""
        return int(self.dataset.lengths[slice(None) if self.episodes is None else list(self.episodes)].sum())

    @property
    def pictures(self) -> list[tuple[int, ...]]:
        """Shapes of what it shows of a row."""
        stores = (self.frames, self.latents and self.latents.frames, self.latents and self.latents.clips)
        return [store.shape[1:] for store in stores if store is not None]


def instructions(sources: Sequence[Source]) -> list[str]:
    """What `instruction` of a batch counts: the instructions of all sources, one source after the other."""
    return [text for source in sources for text in source.dataset.instructions]


def make_loader(
    sources: Sequence[Source],
    windows: WindowConfig,
    batch_size: int,
    seed: int,
    places: Sequence[int] | None = None,
    start_step: int = 0,
    workers: int = 0,
    augment: Callable[[Batch, list[tuple[int, ...]]], None] | None = None,
) -> Iterator[Batch]:
    """Endless iterator of training batches, keys and shapes as `Windows.gather`.

    Each source passes every one of its windows once per epoch of its own, in an order shuffled anew each epoch; in
    any stretch of the stream its number of samples differs from its share by a few samples at most. `instruction`
    counts in `instructions(sources)`.

    batch_size: samples of all hosts together. places: which of a batch, 0 to batch_size - 1, this host gets; nothing
    else is read; all by default. start_step: number of batches already consumed; the stream continues exactly
    there. workers: processes that make the batches, for hosts with more cores than one interpreter keeps busy; 0 makes
    them in threads of this one. They take batches in turn, never touch an accelerator and end with this process; a
    script that asks for them needs its `if __name__ == "__main__"` guard. augment: changes a batch in place, by a seed
    for each of its samples, see `Augmentation.apply`. Raises ValueError for sources that do not fit into one batch and
    for impossible places.
    """
    chosen = _places(batch_size, places)
    if start_step < 0:
        raise ValueError(f"start_step {start_step} must not be negative.")
    mixture = _Mixture(sources, windows)
    stream = _stream(sources, mixture, windows, batch_size, seed)

    def batch(step: int) -> Batch:
        made = mixture.gather(*stream(step, chosen))
        if augment:
            augment(made, [(seed, step, int(place), _AUGMENTED) for place in chosen])
        return made

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch)
    if not workers:
        return iter(steps.to_iter_dataset(grain.ReadOptions(THREADS, THREADS)))
    threads = max(1, THREADS // workers)
    batches = steps.to_iter_dataset(grain.ReadOptions(threads, threads))
    if not flags.FLAGS.is_parsed():  # grain's workers read flags of their own
        flags.FLAGS.mark_as_parsed()
    return _OfWorkers(batches.mp_prefetch(grain.MultiprocessingOptions(workers), _begin_worker))


def windows_of_batch(
    sources: Sequence[Source], windows: WindowConfig, batch_size: int, seed: int, step: int
) -> list[tuple[int, int, int, int]]:
    """What `make_loader` put into batch number `step`: source, episode, first row in it and offset of each sample."""
    mixture = _Mixture(sources, windows)
    found = zip(*_stream(sources, mixture, windows, batch_size, seed)(step, np.arange(batch_size)), strict=True)
    return [(int(s), *mixture.locate(s, index), int(delta)) for s, index, delta in found]


def _stream(
    sources: Sequence[Source], mixture: "_Mixture", windows: WindowConfig, batch_size: int, seed: int
) -> Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Function of a step and of places in its batch, int [b]: the source, window and offset at each, int [b]."""
    place = _interleave([source.weight for source in sources])
    orders = [
        # A seed of its own, or sources of one size would be shuffled alike.
        grain.MapDataset.range(len(part)).shuffle(seed=_seed(seed, number)).repeat()
        for number, part in enumerate(mixture.parts)
    ]

    def at(step: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        delta = np.random.default_rng([seed, step]).integers(windows.max_offset + 1, size=batch_size)[chosen]
        source, count = zip(*(place(step * batch_size + int(k)) for k in chosen), strict=True)
        index = [orders[s][n] for s, n in zip(source, count, strict=True)]
        return np.array(source), np.array(index), delta

    return at


def _begin_worker(worker: int, workers: int) -> None:
    """Runs first in a worker: it finds no accelerator to take, and ends when the job does."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    follow_parent()


class _OfWorkers(Iterator[Batch]):
    """Batches of worker processes, which end with this iterator. Raises WorkerError where one of them is gone."""

    def __init__(self, batches: grain.IterDataset) -> None:
        self._dataset, self._batches = batches, None

    def __next__(self) -> Batch:
        try:
            if self._batches is not None:
                return next(self._batches)
            with out_of_reach_of_ctrl_c():  # the first batch starts the processes, in threads of its own
                self._batches = iter(self._dataset)
                return next(self._batches)
        except RuntimeError as error:
            found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if found is None:
                raise
            raise WorkerError(
                f"A worker process that makes batches {ending(int(found[1]))}. The last checkpoint is kept; the same "
                "command goes on from there."
            ) from error


def evaluation_batches(
    sources: Sequence[Source],
    windows: WindowConfig,
    batch_size: int,
    batches: int,
    places: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """`batches` full batches of fixed windows, spread evenly over all rows of the sources' episodes; no weights.

    The same windows, offsets (0, 1, .., max_offset, 0, ..) and order on every call; places as in `make_loader`.
    """
    chosen = _places(batch_size, places)
    mixture = _Mixture(sources, windows)
    sizes = [len(part) for part in mixture.parts]
    total, count = sum(sizes), batches * batch_size
    if not 0 < count <= total:
        raise ValueError(
            f"{batches} evaluation batches of {batch_size} need {count} distinct windows, the held-out episodes have "
            f"{total}; use fewer batches or more episodes."
        )
    index = np.arange(count) * total // count
    source = np.searchsorted(np.cumsum(sizes), index, side="right")
    index -= (np.cumsum(sizes) - sizes)[source]
    delta = np.arange(count) % (windows.max_offset + 1)
    order = np.arange(count).reshape(batches, batch_size)[:, chosen]
    return (mixture.gather(source[k], index[k], delta[k]) for k in order)


class _Mixture:
    """The windows of all sources; one batch may hold windows of several."""

    def __init__(self, sources: Sequence[Source], windows: WindowConfig) -> None:
        check_alike(sources)
        self.parts = [Windows(s.dataset, s.frames, windows, s.statistics, s.episodes, s.latents) for s in sources]
        counts = [len(source.dataset.instructions) for source in sources]
        self._first_instruction = np.cumsum(counts) - counts

    def locate(self, source: int, index: int) -> tuple[int, int]:
        """Of one window: its episode's number in the dataset and its first row in it."""
        place, row = self.parts[source].locate(np.array([index]))
        return int(self.parts[source].chosen[place[0]]), int(row[0])

    def gather(self, source: np.ndarray, index: np.ndarray, delta: np.ndarray) -> Batch:
        """`Windows.gather` for windows number `index` of the sources `source`, all int [B]."""
        batch: Batch = {}
        for number in np.unique(source):
            here = source == number
            part = self.parts[number].gather(index[here], delta[here])
            part["instruction"] += np.int32(self._first_instruction[number])
            if here.all():
                return part
            for key, value in part.items():
                batch.setdefault(key, np.empty((len(source), *value.shape[1:]), value.dtype))[here] = value
        return batch


def check_alike(sources: Sequence[Source]) -> None:
    """Refuses sources whose samples do not fit into one array, and weights without a meaning."""
    if not sources:
        raise ValueError("A loader needs at least one source.")
    first = sources[0]
    for source in sources:
        root = source.dataset.root
        if not 0 < source.weight < math.inf:
            raise ValueError(f"{root} has weight {source.weight}; a weight must be positive and finite.")
        for what, here, there in (
            ("states of width", source.dataset.state_dim, first.dataset.state_dim),
            ("actions of width", source.dataset.action_dim, first.dataset.action_dim),
            ("pictures of shape", source.pictures, first.pictures),
        ):
            if here != there:
                raise ValueError(
                    f"{root} has {what} {here}, {first.dataset.root} of {there}: one batch cannot hold both. Map them "
                    "to one layout, or train on them apart."
                )


def _interleave(weights: Sequence[float]) -> Callable[[int], tuple[int, int]]:
    """Function of a place in the stream: which source is there, and how many of its samples come before.

    Of the first k samples of this and all later sources, floor(k * later weights / weights) belong to the later
    ones. The weights are taken exactly, so no source drifts from its share however long the stream.
    """
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    tails = [sum(shares[source:]) for source in range(len(shares) + 1)]

    def later(source: int, count: int) -> int:
        return count * tails[source + 1] // tails[source]

    def place(position: int) -> tuple[int, int]:
        source, before = 0, position
        while (past := later(source, before)) != later(source, before + 1):
            source, before = source + 1, past
        return source, before - past

    return place


def _seed(*words: int) -> int:
    """32 bits that differ for any two lists of numbers, as far as 32 bits can."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _places(batch_size: int, places: Sequence[int] | None) -> np.ndarray:
    """int [b] of the places in a batch that are wanted."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1.")
    chosen = np.arange(batch_size) if places is None else np.asarray(places)
    if not chosen.size or not 0 <= chosen.min() <= chosen.max() < batch_size:
        raise ValueError(f"places {chosen.tolist()} in a batch of {batch_size}: give some of 0 to {batch_size - 1}.")
    return chosen
