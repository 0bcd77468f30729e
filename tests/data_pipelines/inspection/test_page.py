"""The page of plots: as long as the numbers, in both formats, also where there is little to show."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.inspection.page import BLUE, HEAD, MARGIN, PALE, WIDTH, write_page
from data_pipelines.inspection.proposal import propose
from tests.data_pipelines.inspection.test_proposal import finding, grips


def longest(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Pixels of a colour in each line of the panel at the top left."""
    left = image[HEAD:, MARGIN : WIDTH // 2]
    return (left == colour).all(-1).sum(1)


def test_bars_are_as_long_as_the_hours(tmp_path: Path) -> None:
    found = [finding("a", "long", 240), finding("b", "short", 60), finding("c", "short", 60, equal=True)]
    write_page(propose(found), tmp_path / "page.png", "some of many")
    image = np.asarray(Image.open(tmp_path / "page.png"))
    assert image.shape[1:] == (WIDTH, 3)
    used, out = (np.unique(longest(image[:200], colour)).tolist() for colour in (BLUE, PALE))
    # One hour, four hours and one that is left out; an edge between two pixels has neither colour.
    assert used[-1] == pytest.approx(4 * used[1], abs=8) and out[-1] == pytest.approx(used[1], abs=2)
    assert used[-1] > 450  # of the 620 that a panel has, less the names and what is written behind


def test_grippers_lie_between_closed_and_open(tmp_path: Path) -> None:
    """One that is opened by half, of a robot whose other datasets use all of its way."""
    found = [finding(str(k), grippers=grips((0.0, 100.0 if k else 50.0))) for k in range(3)]
    write_page(propose(found), tmp_path / "all.png", "")
    write_page(propose(found[:1] * 1), tmp_path / "half.png", "")
    pages = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("all", "half")]
    assert pages[0].shape == pages[1].shape
    lines = [longest(page[200:], BLUE).max() for page in pages]
    assert lines[1] == pytest.approx(lines[0] / 2, rel=0.03)  # of some 200 pixels


@pytest.mark.parametrize("name", ["page.pdf", "page.png"])
def test_a_page_of_nothing_is_written(tmp_path: Path, name: str) -> None:
    write_page(propose([finding("a", problem="gone.", names={}, present={}, grippers=())]), tmp_path / name, "none")
    assert (tmp_path / name).read_bytes()[:4] in (b"%PDF", b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
