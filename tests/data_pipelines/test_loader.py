"""The order of the batches: the same on any number of hosts, after a resume, and for every epoch complete."""

import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from data_pipelines.caches.frame_cache import DecodingFrames, open_frames
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import Episodes
from data_pipelines.loader import Batch, Source, evaluation_batches, instructions, make_loader, windows_of_batch
from data_pipelines.processes import WorkerError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.statistics import compute_statistics
from data_pipelines.windows import WindowConfig, Windows
from tests.conftest import REPOSITORY
from tests.data_pipelines import tiny_dataset as tiny

CONFIG = WindowConfig(horizon=12, chunk=4, video_ratio=2, history_frames=2, max_offset=3)
BATCH, STEPS = 8, 25  # 200 samples of 94 windows: more than two epochs
ROWS = sum(tiny.LENGTHS)
WEIGHTS = (0.5, 0.3, 0.1)  # of the sources of `mixture`; they need not sum to one


def numbered(source: int) -> np.ndarray:
    """Canvases [94, 2, 2, 3] filled with their dataset row and the number of their source."""
    frames = np.full((ROWS, 2, 2, 3), source, np.uint8)
    frames[..., 0] = np.arange(ROWS)[:, None, None]
    return frames


def mixture(root: Path) -> list[Source]:
    """Three sources, which are one dataset in its own units, z-scored, and without its second episode."""
    dataset = open_episodes(root)
    return [
        Source(dataset, numbered(0), None, WEIGHTS[0]),
        Source(dataset, numbered(1), compute_statistics(dataset), WEIGHTS[1]),
        Source(dataset, numbered(2), None, WEIGHTS[2], episodes=[0, 2]),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(root: Path) -> Episodes:
    return open_episodes(root)


@pytest.fixture(scope="module")
def source(dataset: Episodes) -> Source:
    return Source(dataset, numbered(0), None)


def take(batches: Iterator[Batch], count: int) -> Batch:
    """The next batches, stacked [count, B, ...]."""
    taken = list(islice(batches, count))
    return {key: np.stack([batch[key] for batch in taken]) for key in taken[0]}


def drawn(batches: Batch) -> np.ndarray:
    """int [steps, B, 2]: dataset row of each window's start, and its offset."""
    return np.stack([batches["video"][:, :, 0, 0, 0, 0], batches["action_offset"]], -1).astype(int)


def sources_of(batches: Batch) -> np.ndarray:
    """int [steps, B]: which source of `mixture` a sample is from."""
    return batches["video"][:, :, 0, 0, 0, 1].astype(int)


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def stream(source: Source) -> Batch:
    """The uninterrupted stream of a single host."""
    return take(make_loader([source], CONFIG, BATCH, seed=5), STEPS)


@pytest.fixture(scope="module")
def mixed(root: Path) -> Batch:
    """The uninterrupted stream of the mixture on a single host."""
    return take(make_loader(mixture(root), CONFIG, BATCH, seed=5), 4 * STEPS)


def test_windows_of_a_batch_are_named_without_reading_it(root: Path, dataset: Episodes, mixed: Batch) -> None:
    for step in (0, 7, 4 * STEPS - 1):
        found = windows_of_batch(mixture(root), CONFIG, BATCH, 5, step)
        np.testing.assert_array_equal([source for source, *_ in found], sources_of(mixed)[step])
        rows = [(dataset.starts[episode] + row, offset) for _, episode, row, offset in found]
        np.testing.assert_array_equal(rows, drawn(mixed)[step])


# ---------------------------------------------------------------- hosts
@pytest.fixture(scope="module")
def hosts() -> Iterator[list[ProcessPoolExecutor]]:
    """Four processes that live as long as the tests of this file."""
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(4)]
    yield pools
    for pool in pools:
        pool.shutdown()


def share(size: int, host: int, count: int) -> list[int]:
    """Every host gets as many neighbouring places of a batch."""
    return list(range(host * size // count, (host + 1) * size // count))


def run_host(root: Path, host: int, count: int, start: int, stop: int) -> Batch:
    """The batches start..stop of one host; runs in its process."""
    """The batches start..stop of one host; runs in its process."""
    return take(make_loader(mixture(root), CONFIG, BATCH, 5, share(BATCH, host, count), start), stop - start)


def run_job(hosts: list[ProcessPoolExecutor], root: Path, count: int, start: int, stop: int) -> Batch:
    """The batches of `count` hosts, each a process, put together."""
    parts = [hosts[h].submit(run_host, root, h, count, start, stop) for h in range(count)]
    parts = [part.result() for part in parts]
    return {key: np.concatenate([part[key] for part in parts], 1) for key in parts[0]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_same_batches(
    hosts: list[ProcessPoolExecutor], root: Path, mixed: Batch, count: int
) -> None:
    assert_same(run_job(hosts, root, count, 0, STEPS), {key: value[:STEPS] for key, value in mixed.items()})


def test_a_job_resumes_on_other_numbers_of_hosts(hosts: list[ProcessPoolExecutor], root: Path, mixed: Batch) -> None:
    parts = [run_job(hosts, root, *job) for job in ((1, 0, 7), (4, 7, 20), (2, 20, STEPS))]
    together = {key: np.concatenate([part[key] for part in parts]) for key in mixed}
    assert_same(together, {key: value[:STEPS] for key, value in mixed.items()})


def growth(root: Path) -> int:
    """Bytes by which the peak memory of this process grows over 10,000 samples, after 2,000 to warm up."""
    dataset = open_episodes(root)
    frames = DecodingFrames(dataset, Canvas(tiny.CAMERAS["cam_high"]))
    windows = WindowConfig(horizon=4, chunk=4, video_ratio=1, history_frames=1)
    loader = make_loader([Source(dataset, frames, None)], windows, 100, seed=0)
    peaks = []
    for count in (20, 100):
        for _ in islice(loader, count):
            pass
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peaks[1] - peaks[0]) * 1024


def test_memory_stays_flat(hosts: list[ProcessPoolExecutor], root: Path) -> None:
    """A canvas has 7 KB: keeping one of every sample would be 70 MB."""
    assert hosts[3].submit(growth, root).result() < 32 * 2**20


JOB = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
from data_pipelines.readers.opening import open_episodes
from data_pipelines.canvas import Canvas
from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.loader import Source, make_loader
from data_pipelines.windows import WindowConfig

dataset = open_episodes(sys.argv[1])
for _ in make_loader([Source(dataset, DecodingFrames(dataset, Canvas((32, 48))), None)], WindowConfig(), 8, 0):
    print("batch", flush=True)
    if sys.argv[2] == "end":
        break
"""


@pytest.mark.parametrize(("way", "status"), [("end", 0), ("interrupt", -signal.SIGINT)])
def test_threads_end_with_the_job(root: Path, way: str, status: int) -> None:
    command = [sys.executable, "-c", JOB, str(root), way]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as job:
        try:
            assert job.stdout.readline() == "batch\n"
            if way == "interrupt":
                job.send_signal(signal.SIGINT)
            job.communicate(timeout=30)
            assert job.returncode == status
        finally:
            job.kill()


# ---------------------------------------------------------------- one dataset
@pytest.mark.parametrize("step", [1, 11])
def test_resume_continues_the_stream(source: Source, stream: Batch, step: int) -> None:
    resumed = make_loader([source], CONFIG, BATCH, 5, start_step=step)
    assert_same(take(resumed, STEPS - step), {key: value[step:] for key, value in stream.items()})


def test_every_epoch_passes_every_window_once(stream: Batch) -> None:
    starts = drawn(stream)[..., 0].ravel()
    first, second = starts[:94], starts[94:188]
    assert sorted(first) == sorted(second) == list(range(94))
    assert (first != second).mean() > 0.9  # shuffled anew
    assert (np.diff(first) != 1).mean() > 0.9  # shuffled at all


def test_offsets_belong_to_the_place_in_the_stream(source: Source, stream: Batch) -> None:
    samples = drawn(stream).reshape(-1, 2)
    assert set(samples[:, 1]) == {0, 1, 2, 3}
    first, second = (dict(samples[epoch : epoch + 94].tolist()) for epoch in (0, 94))
    assert 0.1 < np.mean([first[row] == second[row] for row in range(94)]) < 0.5  # one in four by chance
    assert len(np.unique(stream["action_offset"], axis=0)) > STEPS - 3  # drawn anew for each batch
    # other windows at the same places have the same offsets
    other = take(make_loader([replace(source, episodes=[1])], CONFIG, BATCH, seed=5), STEPS)
    np.testing.assert_array_equal(other["action_offset"], stream["action_offset"])


def test_seed_decides_order_and_offsets(source: Source, stream: Batch) -> None:
    def draws(seed: int) -> np.ndarray:
        return drawn(take(make_loader([source], CONFIG, BATCH, seed), STEPS))

    np.testing.assert_array_equal(draws(5), drawn(stream))
    same = draws(6) == drawn(stream)
    assert same[..., 0].mean() < 0.1 and same[..., 1].mean() < 0.4


def test_batches_hold_the_windows(source: Source, stream: Batch) -> None:
    samples = drawn(stream)
    windows = Windows(source.dataset, source.frames, CONFIG)
    for step in range(0, STEPS, 6):
        expected = windows.gather(samples[step, :, 0], samples[step, :, 1])
        assert_same({key: value[step] for key, value in stream.items()}, expected)


def test_training_stays_within_its_episodes(source: Source) -> None:
    batches = make_loader([replace(source, episodes=[0, 2])], CONFIG, BATCH, seed=5)
    starts = drawn(take(batches, 9))[..., 0].ravel()
    assert sorted(starts[:71]) == [*range(40), *range(63, 94)]


def test_a_hundred_million_windows_cost_nothing() -> None:
    lengths = np.full(250_000, 400)
    huge = SimpleNamespace(
        root=Path("huge"), lengths=lengths, starts=np.cumsum(lengths) - lengths, state_dim=1, action_dim=1,
        action_present=np.ones(1, bool), instructions=["wait"], instruction_index=lambda episode: 0,
        states=lambda episode: np.full((400, 1), episode, np.float32), actions=lambda episode: np.zeros((400, 1)),
    )  # fmt: skip

    class Blank:
        shape = (int(lengths.sum()), 1, 1, 3)

        def __getitem__(self, rows: np.ndarray) -> np.ndarray:
            return np.zeros((len(rows), 1, 1, 3), np.uint8)

    tracemalloc.start()
    taken = take(make_loader([Source(huge, Blank(), None)], CONFIG, 64, seed=0, start_step=10**6), 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    episodes = taken["proprio"][:, :, 0, 0].ravel()
    assert len(set(episodes)) > 250 and episodes.min() < 10_000 and episodes.max() > 240_000  # 256 of 250,000


# ---------------------------------------------------------------- mixtures
def test_shares_are_the_weights(mixed: Batch) -> None:
    """A stretch lies between two points of the stream, so what it misses is the difference of two deviations."""
    source = sources_of(mixed).ravel()
    for number, weight in enumerate(WEIGHTS):
        deviation = np.cumsum(source == number) - weight / sum(WEIGHTS) * np.arange(1, len(source) + 1)
        assert np.ptp(deviation) < BATCH / 2


def test_every_source_has_epochs_of_its_own(mixed: Batch) -> None:
    source, start = sources_of(mixed).ravel(), drawn(mixed)[..., 0].ravel()
    for number, windows in enumerate([range(94), range(94), [*range(40), *range(63, 94)]]):
        here = start[source == number]
        for epoch in range(len(here) // len(windows)):
            assert sorted(here[epoch * len(windows) :][: len(windows)]) == list(windows)
    first, second = (start[source == number][:94] for number in (0, 1))
    assert (first != second).mean() > 0.9  # sources of one size are shuffled apart


def test_mixed_batches_hold_the_windows_of_their_sources(root: Path, mixed: Batch) -> None:
    sources = mixture(root)
    kinds = Counter()
    for step in range(0, STEPS, 6):
        for place in range(BATCH):
            number, (row, delta) = sources_of(mixed)[step, place], drawn(mixed)[step, place]
            source = sources[number]
            expected = Windows(source.dataset, source.frames, CONFIG, source.statistics).gather([row], [delta])
            expected["instruction"] += len(tiny.INSTRUCTIONS) * number
            assert_same({key: value[step, place : place + 1] for key, value in mixed.items()}, expected)
            kinds[number] += 1
    assert set(kinds) == {0, 1, 2}
    assert {key: value.dtype for key, value in mixed.items()} == {key: value.dtype for key, value in expected.items()}


def test_instructions_of_all_sources(root: Path, mixed: Batch) -> None:
    sources = mixture(root)
    assert instructions(sources) == list(tiny.INSTRUCTIONS) * 3
    np.testing.assert_array_equal(mixed["instruction"] // 2, sources_of(mixed))


def test_sources_that_do_not_fit_together(source: Source) -> None:
    def with_dataset(**changes: object) -> Source:
        return replace(source, dataset=SimpleNamespace(**{**vars(source.dataset), **changes}))

    wide = np.zeros((ROWS, 2, 4, 3), np.uint8)
    for other, words in (
        (with_dataset(state_dim=6), "has states of width 6, .* of 5: one batch cannot hold both"),
        (with_dataset(action_dim=4), "has actions of width 4, .* of 3"),
        (replace(source, frames=wide), r"has pictures of shape \[\(2, 4, 3\)\], .* of \[\(2, 2, 3\)\]"),
        (replace(source, weight=0.0), "weight 0.0; a weight must be positive"),
        (replace(source, weight=float("nan")), "weight nan"),
    ):
        with pytest.raises(ValueError, match=words):
            make_loader([source, other], CONFIG, BATCH, 0)
    with pytest.raises(ValueError, match="at least one source"):
        make_loader([], CONFIG, BATCH, 0)


# ---------------------------------------------------------------- evaluation
def test_evaluation_is_fixed(source: Source) -> None:
    held_out = replace(source, episodes=[1])

    def evaluate(host: int = 0, hosts: int = 1) -> Batch:
        return take(evaluation_batches([held_out], CONFIG, 6, 2, share(6, host, hosts)), 3)

    whole = evaluate()
    starts = drawn(whole)[..., 0].ravel() - tiny.LENGTHS[0]
    assert starts.tolist() == [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21]  # evenly over the 23 rows of episode 1
    assert whole["action_offset"].ravel().tolist() == [0, 1, 2, 3] * 3
    assert_same(evaluate(), whole)
    for host in range(2):
        assert_same(evaluate(host, 2), {key: value[:, 3 * host : 3 * host + 3] for key, value in whole.items()})
    with pytest.raises(ValueError, match="need 24 distinct windows, the held-out episodes have 23"):
        evaluation_batches([held_out], CONFIG, 6, 4)


def test_evaluation_covers_all_sources(root: Path) -> None:
    whole = take(evaluation_batches(mixture(root)[1:], CONFIG, 15, 11), 11)
    seen = np.stack([sources_of(whole), drawn(whole)[..., 0]], -1).reshape(-1, 2).tolist()
    rows = [[1, row] for row in range(94)] + [[2, row] for row in (*range(40), *range(63, 94))]
    assert seen == rows  # 165 windows, all there are


def test_places_need_not_be_neighbours(source: Source, stream: Batch) -> None:
    """What a process loads follows from the mesh: any places, also those of another process."""
    places = [1, 2, 6]
    taken = take(make_loader([source], CONFIG, BATCH, 5, places), 3)
    assert_same(taken, {key: value[:3, places] for key, value in stream.items()})


@pytest.mark.parametrize("places", [[8], [-1, 0], []])
def test_impossible_places(source: Source, places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"in a batch of 8: give some of 0 to 7"):
        make_loader([source], CONFIG, 8, 0, places)
    with pytest.raises(ValueError, match="batch_size 0 must be"):
        make_loader([source], CONFIG, 0, 0)


def test_cached_and_decoded_frames_give_the_same_batches(dataset: Episodes, tmp_path: Path) -> None:
    canvas = Canvas(tiny.CAMERAS["cam_high"])
    cached, decoded = open_frames(dataset, canvas, tmp_path), DecodingFrames(dataset, canvas)
    a, b = (take(make_loader([Source(dataset, f, None)], CONFIG, 4, 0), 5) for f in (cached, decoded))
    assert_same(a, b)
    assert a["video"].shape == (5, 4, 9, 48, 48, 3)


# ---------------------------------------------------------------- worker processes
class Probe:
    """Frames that say who reads them: 1 where it is a worker that was prepared as one."""

    shape = (ROWS, 2, 2, 3)

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        import jax

        alone = os.getpid() != self.parent and jax.devices()[0].platform == "cpu"
        told = os.environ.get("CUDA_VISIBLE_DEVICES") == "" and signal.SIGINT in signal.pthread_sigmask(0, [])
        return np.full((len(rows), *self.shape[1:]), alone and told, np.uint8)


def test_workers_make_the_same_batches(dataset: Episodes, root: Path, tmp_path: Path, mixed: Batch) -> None:
    assert_same(take(make_loader(mixture(root), CONFIG, BATCH, 5, workers=2), 6), {k: v[:6] for k, v in mixed.items()})
    resumed = take(make_loader(mixture(root), CONFIG, BATCH, 5, start_step=3, workers=3), 3)
    assert_same(resumed, {k: v[3:6] for k, v in mixed.items()})
    canvas = Canvas(tiny.CAMERAS["cam_high"])
    cached = [Source(dataset, open_frames(dataset, canvas, tmp_path), None)]
    assert_same(take(make_loader(cached, CONFIG, 4, 0, workers=1), 3), take(make_loader(cached, CONFIG, 4, 0), 3))
    probed = take(make_loader([Source(dataset, Probe(), None)], CONFIG, 4, 0, workers=1), 1)
    assert probed["video"].all()


def test_a_killed_worker_is_an_error(root: Path) -> None:
    before = set(psutil.Process().children())
    batches = make_loader(mixture(root), CONFIG, BATCH, 5, workers=2)
    next(batches)
    workers = [p for p in set(psutil.Process().children()) - before if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(WorkerError, match="that makes batches was killed by SIGKILL.*the same command goes on from"):
        for _ in range(1000):
            next(batches)
    del batches
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_workers_end_with_the_job(root: Path) -> None:
    """Also where the job is killed and cannot say so."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tests.data_pipelines.test_loader import BATCH, CONFIG, make_loader, mixture\n"
        "if __name__ == '__main__':\n"
        "    batches = make_loader(mixture(Path(sys.argv[1])), CONFIG, BATCH, 5, workers=2)\n"
        "    next(batches); print('running', flush=True); time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "running\n"
    children = psutil.Process(job.pid).children(recursive=True)
    assert len(children) >= 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
