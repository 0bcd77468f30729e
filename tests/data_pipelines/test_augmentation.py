"""What is done to the pictures of a batch: alike in a window, by the seed of a sample, within the views."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.augmentation import PICTURES, Augmentation
from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.canvas import Canvas
from data_pipelines.loader import Batch, Source, make_loader
from data_pipelines.readers.opening import open_episodes
from data_pipelines.windows import WindowConfig
from tests.data_pipelines import tiny_dataset as tiny

CANVAS = Canvas((64, 128))  # the picture is 96 x 128
FULL = Augmentation(crop=0.2, colour=0.3, erased=3)
GREY = np.array([0.299, 0.587, 0.114])


def batch_of(picture: np.ndarray, samples: int = 1, present: int = 1) -> Batch:
    """Windows whose frames are all the same picture; two history frames, so many of them present."""
    pictures = {name: np.tile(picture, (samples, n, 1, 1, 1)) for name, n in zip(PICTURES, (5, 1, 2), strict=True)}
    pictures["history"][:, : 2 - present] = 0
    return {**pictures, "video_history_valid_len": np.full(samples, present, np.int32)}


def changed(how: Augmentation, picture: np.ndarray, seed: int = 0) -> np.ndarray:
    batch = batch_of(picture)
    how.apply(batch, [(seed,)], CANVAS)
    return batch["video"][0, 0]


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*CANVAS.size, 3), np.uint8)


@pytest.mark.parametrize("present", [0, 1, 2])
def test_all_frames_of_a_window_are_changed_alike_and_absent_ones_stay_black(present: int) -> None:
    batch = batch_of(noise(), 3, present)
    FULL.apply(batch, [(7, 1), (7, 2), (7, 1)], CANVAS)
    for sample in range(3):
        first = batch["video"][sample, 0]
        frames = [*batch["video"][sample], *batch["observations"][sample], *batch["history"][sample, 2 - present :]]
        assert all(np.array_equal(frame, first) for frame in frames)
        assert not batch["history"][sample, : 2 - present].any()
    assert not np.array_equal(batch["video"][0], batch["video"][1])
    np.testing.assert_array_equal(batch["video"][0], batch["video"][2])  # of the same seed
    assert (batch["video"][0, 0] != noise()).mean() > 0.9


def test_nothing_is_nothing() -> None:
    assert not Augmentation() and all(map(bool, (Augmentation(0.1), Augmentation(colour=0.1), Augmentation(erased=1))))
    np.testing.assert_array_equal(changed(Augmentation(), noise()), noise())


def test_crops_stay_within_their_view() -> None:
    """Of a ramp remains a part of it: a line of a slope between 1 - crop and 1, never outside of where it was."""
    picture = np.zeros((*CANVAS.size, 3), np.uint8)
    picture[:64] = 100 + np.arange(128)[:, None]
    picture[64:, :64] = 10  # the wrists are even: a pixel of a neighbour would show
    picture[64:, 64:] = 20
    slopes = []
    for seed in range(20):
        out = changed(Augmentation(crop=0.2), picture, seed)
        assert (out[64:, :64] == 10).all() and (out[64:, 64:] == 20).all()
        row = out[:64, :, 0].astype(float)
        assert (row == row[0]).all() and row.min() >= 100 and row.max() <= 227
        slope, start = np.polyfit(np.arange(128), row[0], 1)
        assert np.abs(row[0] - (start + slope * np.arange(128))).max() < 1  # rounded to whole numbers
        slopes.append(slope)
    assert 0.79 < min(slopes) < 0.86 and 0.94 < max(slopes) <= 1.001


def test_each_view_is_cropped_for_itself() -> None:
    ramp = np.tile((4 * np.arange(64))[:, None], (32, 2, 3)).astype(np.uint8)
    picture = np.concatenate([np.zeros((64, 128, 3), np.uint8), ramp])
    out = changed(Augmentation(crop=0.2), picture)[64:, :, 0].astype(float)
    left, right = (np.polyfit(np.arange(64), view[0], 1) for view in (out[:, :64], out[:, 64:]))
    assert np.abs(left - right).max() > 0.05


def test_colours_follow_the_equation() -> None:
    """contrast (brightness S x - 127.5) + 127.5: what two greys and a colour say of it fits the others."""
    picture = np.full((*CANVAS.size, 3), 90, np.uint8)
    picture[0, :5] = [[70] * 3, [150] * 3, [140, 100, 90], [80, 120, 100], [100, 90, 130]]
    factors = []
    for seed in range(8):
        out = changed(Augmentation(colour=0.3), picture, seed)[0, :5].astype(float)
        assert (out[:2] == out[:2, :1]).all()  # a grey stays grey
        slope = (out[1, 0] - out[0, 0]) / 80
        base = out[0, 0] - 70 * slope
        greys = picture[0, :5] @ GREY
        pure, grey = slope * picture[0, :5] + base, slope * greys[:, None] + base
        saturation = (out[2, 0] - grey[2, 0]) / (pure[2, 0] - grey[2, 0])
        want = grey + saturation * (pure - grey)
        # Whole numbers: the slope is known to 1/80, the saturation to about 1/20.
        assert np.abs(out - want).max() < 4, seed
        contrast = 1 - base / 127.5
        factors.append((slope / contrast, contrast, saturation))
    # Each is 1 - 0.3 .. 1 + 0.3, as well as it is known.
    assert 0.6 < np.min(factors) and (np.min(factors, axis=0) < 0.9).all()
    assert np.max(factors) < 1.4 and (np.max(factors, axis=0) > 1.1).all()


def test_patches_are_few_and_of_one_colour_each() -> None:
    counts = []
    for seed in range(12):
        out, before = changed(Augmentation(erased=3), noise(), seed), noise()
        hidden = (out != before).any(-1)
        counts.append(len({tuple(colour) for colour in out[hidden]}))
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        if counts[-1] == 1:  # one patch: a whole rectangle of a size that was asked for
            tall, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert 5 <= tall <= 19 and 6 <= wide <= 26  # 5% to 20% of 96 and of 128
            patch = out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (patch == patch[0, 0]).all()
    assert {0, 1, 3} <= set(counts) <= {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [{"crop": 1.0}, {"crop": -0.1}, {"colour": 1.0}, {"erased": 1.5}, {"erased": -1}])
def test_what_is_out_of_range_is_said(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"augmentation is Augmentation\(.*erased a whole number from 0 on"):
        Augmentation(**wrong)


def test_batches_are_the_same_on_any_number_of_hosts_and_after_a_resume(tmp_path: Path) -> None:
    dataset, canvas = open_episodes(tiny.write_dataset(tmp_path)), Canvas((32, 48))
    source = Source(dataset, DecodingFrames(dataset, canvas), None)
    windows = WindowConfig(horizon=4, chunk=4, video_ratio=1, history_frames=2)
    augment = partial(FULL.apply, canvas=canvas)

    def batches(places: list[int] | None = None, start: int = 0, seed: int = 5, **options: object) -> list[Batch]:
        return [*islice(make_loader([source], windows, 4, seed, places, start, **options), 3 - start)]

    whole, plain = batches(augment=augment), batches()
    half, resumed = batches([1, 3], augment=augment), batches(start=2, augment=augment)
    for name, value in whole[0].items():
        for step in range(3):
            np.testing.assert_array_equal(half[step][name], whole[step][name][[1, 3]])
        np.testing.assert_array_equal(resumed[0][name], whole[2][name])
        assert np.array_equal(plain[0][name], value) != (name in PICTURES)  # actions and states are as they were
    seen = []
    batches(augment=lambda batch, seeds: seen.extend(seeds))
    assert len(seen) == len({*seen}) >= 12  # three batches of four, and what is made ahead
