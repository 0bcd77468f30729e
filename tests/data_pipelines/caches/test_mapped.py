"""Caches of what was mapped or cut: keys of their own, black pictures where a robot has no camera."""

from pathlib import Path

import numpy as np

from data_pipelines.caches.frame_cache import DecodingFrames, open_frames
from data_pipelines.caches.keys import pictures_key
from data_pipelines.canvas import Canvas
from data_pipelines.readers.excerpt import Excerpt
from data_pipelines.readers.naming import Reading
from data_pipelines.readers.robocoin import Mapped, open_robocoin
from tests.data_pipelines import synthetic_robocoin as coin


def test_pieces_of_recordings_and_black_views(tmp_path: Path) -> None:
    """Two excerpts of one dataset have keys of their own; so has a view that the robot has no camera for."""
    root = coin.Synthetic(coin.UNSEEN["first_person"], (40, 40)).write(tmp_path / "set", "distinct")
    mapped = Mapped(open_robocoin(root), None, "bot")
    pieces = ([(0, 0, 20)], [(0, 1, 21)], [(1, 0, 20)], [(0, 0, 21)], [(0, 0, 10), (0, 10, 20)])
    canvas = Canvas((16, 24))
    keys = [pictures_key(Excerpt(mapped, kept), canvas, tmp_path) for kept in pieces]
    assert len({*keys, pictures_key(mapped, canvas, tmp_path)}) == len(pieces) + 1
    assert keys[0] == pictures_key(Excerpt(mapped, [(0, 0, 20)]), canvas, tmp_path)
    blind = Mapped(mapped.source, None, "bot", Reading({"cam_high": "cam_ego_rgb"}))
    assert blind.embodiment.absent and pictures_key(blind, canvas, tmp_path) != pictures_key(mapped, canvas, tmp_path)


def test_frames_of_a_black_view_are_cached(tmp_path: Path) -> None:
    root = coin.Synthetic(coin.UNSEEN["single_view"], (40, 30)).write(tmp_path / "set")
    left = Excerpt(Mapped(open_robocoin(root), None, "bot"), [(0, 5, 25), (1, 0, 30)])
    canvas = Canvas((16, 24))
    cached = open_frames(left, canvas, tmp_path / "cache")
    rows = np.arange(50)
    np.testing.assert_array_equal(cached[rows], DecodingFrames(left, canvas)[rows])
    assert not cached[rows][:, 16:].any() and cached[rows][:, :16].any((1, 2, 3)).all()
