"""Windows against a slow reimplementation, row by row, of what a sample holds."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.caches.latent_cache import CachedLatents
from data_pipelines.episodes import Episodes
from data_pipelines.readers.opening import open_episodes
from data_pipelines.statistics import compute_statistics
from data_pipelines.windows import WindowConfig, Windows
from tests.data_pipelines import tiny_dataset as tiny

PLAIN = WindowConfig(horizon=8, chunk=4, video_ratio=2, history_frames=3)
OFFSET = WindowConfig(horizon=12, chunk=4, video_ratio=2, history_frames=2, history_stride=5, max_offset=3)
RELEASED = WindowConfig()
RELEASED_OFFSET = WindowConfig(horizon=80, max_offset=15)
PAPER = WindowConfig(max_offset=15)  # 80 rows are no whole number of latents: the video spans the horizon
VIDEO_ROWS = {PLAIN: 8, OFFSET: 16, RELEASED: 64, RELEASED_OFFSET: 96, PAPER: 64}
NEAR = replace(PLAIN, history_stride=1)
ANCHORED = {
    replace(config, history_frames=w, memory_anchor=True): rows
    for w, config, rows in ((1, PLAIN, 8), (2, OFFSET, 16), (3, PLAIN, 8), (6, OFFSET, 16), (4, NEAR, 8))
}
VIDEO_ROWS |= ANCHORED


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    return open_episodes(tiny.write_dataset(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Random canvases, so that any two rows differ; never black, which stands for no history."""
    return np.random.default_rng(0).integers(1, 256, (sum(tiny.LENGTHS), 6, 4, 3), np.uint8)


def slow_window(
    dataset: Episodes, frames: np.ndarray, c: WindowConfig, episode: int, start: int, delta: int
) -> dict[str, object]:
    length = tiny.LENGTHS[episode]
    loaded = c.horizon + c.chunk if c.max_offset else c.horizon

    def row(r: int) -> int:
        return r if r < length else length - 1

    def canvas(r: int) -> np.ndarray:
        return frames[sum(tiny.LENGTHS[:episode]) + row(r)]

    w: dict[str, list] = {"video": [], "image_is_pad": [], "video_temporal_position_ids": []}
    for i, r in enumerate(range(start, start + VIDEO_ROWS[c] + 1, c.video_ratio)):
        w["video"].append(canvas(r))
        w["image_is_pad"].append(r >= length)
        if i % 4 == 0:
            w["video_temporal_position_ids"].append(start // c.video_ratio + i)
    w["observations"] = [canvas(r) for r in range(start + delta, start + delta + c.horizon, c.chunk)]
    rows = range(start, start + loaded)
    w["action"] = [dataset.actions(episode)[row(r)] for r in rows]
    w["proprio"] = [dataset.states(episode)[row(r)] for r in rows]
    w["action_is_pad"] = [r >= length for r in rows]
    w["action_present"] = [True] * dataset.action_dim
    past = [start - c.history_stride * j for j in range(c.history_frames, 0, -1)]
    past = [r for r in past if r >= 0]
    if c.memory_anchor and start > 0 and 0 not in past:
        if len(past) == c.history_frames:
            past.pop(0)
        past.insert(0, 0)
    none = c.history_frames - len(past)
    w["history"] = [np.zeros_like(frames[0])] * none + [canvas(r) for r in past]
    w["video_history_frame_indices"] = [0] * none + [r // c.video_ratio for r in past]
    w["video_history_valid_len"] = len(past)
    w["action_offset"], w["instruction"] = delta, tiny.TASKS[episode]
    return w


@pytest.mark.parametrize("config", VIDEO_ROWS, ids=["plain", "offset", "64", "80", "paper", *(
    f"anchor in {config.history_frames}" for config in ANCHORED
)])  # fmt: skip
def test_every_window(dataset: Episodes, frames: np.ndarray, config: WindowConfig) -> None:
    windows = Windows(dataset, frames, config)
    places = [(e, s) for e, length in enumerate(tiny.LENGTHS) for s in range(length)]
    assert len(windows) == len(places)
    index = np.arange(len(windows))
    delta = np.random.default_rng(1).integers(0, config.max_offset + 1, len(index))
    batch = windows.gather(index, delta)
    for i, (episode, start) in enumerate(places):
        expected = slow_window(dataset, frames, config, episode, start, int(delta[i]))
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key][i], value, err_msg=f"{key} of episode {episode}, row {start}")


def test_released_shapes_and_types(dataset: Episodes, frames: np.ndarray) -> None:
    base, late = (
        {k: (v.shape[1:], v.dtype) for k, v in Windows(dataset, frames, c).gather([0], [0]).items()}
        for c in (RELEASED, RELEASED_OFFSET)
    )
    canvas, p, d = (6, 4, 3), tiny.STATE_DIM, tiny.ACTION_DIM
    assert base == {
        "video": ((9, *canvas), np.uint8),
        "image_is_pad": ((9,), np.bool_),
        "observations": ((4, *canvas), np.uint8),
        "action": ((64, d), np.float32),
        "action_is_pad": ((64,), np.bool_),
        "action_present": ((d,), np.bool_),
        "proprio": ((64, p), np.float32),
        "action_offset": ((), np.int32),
        "history": ((6, *canvas), np.uint8),
        "video_history_valid_len": ((), np.int32),
        "video_history_frame_indices": ((6,), np.int32),
        "video_temporal_position_ids": ((3,), np.int32),
        "instruction": ((), np.int32),
    }
    assert late == base | {
        "video": ((13, *canvas), np.uint8),
        "image_is_pad": ((13,), np.bool_),
        "observations": ((5, *canvas), np.uint8),
        "action": ((96, d), np.float32),
        "action_is_pad": ((96,), np.bool_),
        "proprio": ((96, p), np.float32),
        "video_temporal_position_ids": ((4,), np.int32),
    }


def test_padding_and_history_at_the_ends(dataset: Episodes, frames: np.ndarray) -> None:
    """By hand: episode 1 has rows 0..22, windows of 8 actions, 5 video frames, history 8 rows apart."""
    windows = Windows(dataset, frames, PLAIN)
    first, middle, last = np.array([0, 17, 22]) + tiny.LENGTHS[0]
    batch = windows.gather([first, middle, last], [0, 0, 0])
    assert batch["action_is_pad"].sum(1).tolist() == [0, 2, 7]
    assert batch["image_is_pad"].tolist() == [[False] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4]
    assert batch["video_history_valid_len"].tolist() == [0, 2, 2]
    assert batch["video_history_frame_indices"].tolist() == [[0, 0, 0], [0, 0, 4], [0, 3, 7]]
    assert not batch["history"][0].any() and not batch["history"][1, 0].any()
    np.testing.assert_array_equal(batch["history"][1, 1:], frames[tiny.LENGTHS[0] + np.array([1, 9])])
    np.testing.assert_array_equal(batch["action"][2], np.repeat(dataset.actions(1)[-1:], 8, 0))


def test_the_first_frame_stays_in_the_history(dataset: Episodes, frames: np.ndarray) -> None:
    """By hand: three history frames 8 rows apart, episode 1 with rows 0..22 and episode 0 with 40."""
    windows = Windows(dataset, frames, replace(PLAIN, memory_anchor=True))
    batch = windows.gather([tiny.LENGTHS[0] + row for row in (0, 1, 8, 9, 16, 22)] + [24, 25, 39], [0] * 9)
    assert batch["video_history_valid_len"].tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert batch["video_history_frame_indices"][:, -2:].tolist() == [
        [0, 0], [0, 0], [0, 0], [0, 0], [0, 4], [3, 7], [4, 8], [4, 8], [11, 15]
    ]  # fmt: skip
    assert not batch["video_history_frame_indices"][:, 0].any()  # row 0, or no frame
    for place, slot in ((1, 2), (2, 2), (3, 1), (4, 1), (5, 0)):
        np.testing.assert_array_equal(batch["history"][place, slot], frames[tiny.LENGTHS[0]])
        assert not batch["history"][place, :slot].any()
    for place in (6, 7, 8):
        np.testing.assert_array_equal(batch["history"][place, 0], frames[0])


def test_history_latents_are_those_of_the_history(dataset: Episodes, frames: np.ndarray) -> None:
    """Also of the first frame: a cache holds the latent of every row alone."""
    latents = frames[:, :2, :2].astype(np.float16).transpose(0, 3, 1, 2)
    for config in (PLAIN, *ANCHORED):
        index = np.arange(len(frames))
        pictures = Windows(dataset, frames, config).gather(index, 0 * index)
        batch = Windows(dataset, frames, config, latents=CachedLatents(latents)).gather(index, 0 * index)
        want = pictures["history"][:, :, :2, :2].astype(np.float16).transpose(0, 1, 4, 2, 3)[:, :, :, None]
        np.testing.assert_array_equal(batch["history_latents"], want)
        for name in ("video_history_valid_len", "video_history_frame_indices"):
            np.testing.assert_array_equal(batch[name], pictures[name])


def test_subset_of_episodes(dataset: Episodes, frames: np.ndarray) -> None:
    everything, some = Windows(dataset, frames, PLAIN), Windows(dataset, frames, PLAIN, episodes=[2, 0])
    assert len(some) == 71
    index = np.arange(31)
    expected = everything.gather(63 + index, 0 * index)
    for key, value in some.gather(index, 0 * index).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_normalized_by_the_statistics(dataset: Episodes, frames: np.ndarray) -> None:
    stats = compute_statistics(dataset)
    raw = Windows(dataset, frames, PLAIN).gather([50], [0])
    batch = Windows(dataset, frames, PLAIN, stats).gather([50], [0])
    for key, kind in (("action", "action"), ("proprio", "state")):
        expected = (raw[key] - stats[kind]["mean"]) / stats[kind]["std"]
        np.testing.assert_allclose(batch[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 60}, "multiple of chunk"),
        ({"horizon": 48}, r"7 frames; the video encoder needs 1 \+ 4 n"),
        ({"horizon": 8, "chunk": 8, "max_offset": 7}, r"3 frames.*horizon or horizon \+ chunk as a multiple of 32"),
        ({"horizon": 80, "max_offset": 16}, "max_offset 16 must lie in 0..15"),
        ({"max_offset": -1}, "max_offset -1"),
        ({"video_ratio": 0}, "at least 1"),
    ],
)
def test_impossible_configs(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowConfig(**changes)


def test_impossible_requests(dataset: Episodes, frames: np.ndarray) -> None:
    windows = Windows(dataset, frames, OFFSET)
    for delta in (-1, 4):
        with pytest.raises(ValueError, match="outside 0..3"):
            windows.gather([0], [delta])
    with pytest.raises(IndexError, match="there are 0..93"):
        windows.gather([94], [0])
    with pytest.raises(ValueError, match="out of the dataset's 0..2"):
        Windows(dataset, frames, PLAIN, episodes=[0, 3])
    with pytest.raises(ValueError, match="frames hold 93 rows"):
        Windows(dataset, frames[1:], PLAIN)
