"""Converted datasets of mapped robots: which numbers and views they lack, and what an excerpt left of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam")
tfds = pytest.importorskip("tensorflow_datasets")

from data_pipelines.canvas import CAMERAS, HEAD  # noqa: E402
from data_pipelines.episodes import DatasetError  # noqa: E402
from data_pipelines.inspection.doctor import diagnose  # noqa: E402
from data_pipelines.readers.excerpt import Excerpt  # noqa: E402
from data_pipelines.readers.naming import Gripper, Reading  # noqa: E402
from data_pipelines.readers.subset import Entry, embodiment_of, origin_of  # noqa: E402
from data_pipelines.tfds.convert import convert, plan  # noqa: E402
from data_pipelines.tfds.episodes import open_converted  # noqa: E402
from data_pipelines.tfds.layout import CONVERSION  # noqa: E402
from tests.data_pipelines import synthetic_robocoin as coin  # noqa: E402


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """One view, six joints in a layout of seven, grippers of 0..100, rows in the middle that are left out."""
    made = coin.Synthetic(
        coin.UNSEEN["single_view"],
        (60, 50),
        (0, 100),
        (0, 100),
        bad={0: [(20, 30, "Abnormal")], 1: [(0, 10, "Discard.")]},
    )
    root = made.write(tmp_path_factory.mktemp("coin") / "set")
    said = Reading(gripper=Gripper.parse({"closed": 0.0, "open": 100.0}, "test"))
    return Entry("coin", root, 1.0, "bot", "two_arms", said, rate=15.0)


@pytest.fixture(scope="module")
def root(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    conversion = plan(entry, tmp_path_factory.mktemp("out"), "png", 2)
    convert([conversion])
    return conversion.root


def test_read_as_episodes(entry: Entry, root: Path) -> None:
    source, dataset = entry.open(), open_converted(root)
    assert isinstance(source.source, Excerpt) and source.lengths.tolist() == [10, 15, 20]
    assert embodiment_of(dataset) == embodiment_of(source)
    for present in ("state_present", "action_present"):
        found = getattr(dataset, present)
        np.testing.assert_array_equal(found, getattr(source, present))
        assert found.sum() == 14 and len(found) == 16
    assert origin_of(dataset).tolist() == origin_of(source).tolist() == [0, 0, 1]
    assert dataset.cameras == source.cameras and set(dataset.cameras) == set(CAMERAS)
    for e in range(3):
        np.testing.assert_array_equal(dataset.states(e), source.states(e))
        np.testing.assert_array_equal(dataset.actions(e), source.actions(e))
        assert dataset.subtasks(e) == source.subtasks(e) and any(dataset.subtasks(e))
        for view in CAMERAS:
            frames = dataset.frames(e, view, [7, 0, 3])
            np.testing.assert_array_equal(frames, source.frames(e, view, [7, 0, 3]))
            assert (view == HEAD) is bool(frames.any())


def test_read_by_tfds(root: Path) -> None:
    """Black pictures are not stored."""
    by = tfds.builder_from_directory(str(root))
    assert set(by.info.metadata["absent_cameras"]) == {*CAMERAS} - {HEAD}
    for present in ("state_present", "action_present"):
        assert by.info.metadata[present] == [True] * 6 + [False, True] + [True] * 6 + [False, True]
    example = by.as_data_source(split="train")[1]
    assert list(example["images"]) == [HEAD] and len(example["images"][HEAD]) == 15


def test_what_was_converted_before_opens(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    content = json.loads((copy / CONVERSION).read_text())
    own = content.pop("embodiment"), content.pop("origin")
    (copy / CONVERSION).write_text(json.dumps(content))
    dataset = open_converted(copy)
    assert dataset.state_present.all() and dataset.action_present.all() and embodiment_of(dataset) is None
    assert origin_of(dataset).tolist() == [0, 1, 2]
    del own[0]["absent"]
    (copy / CONVERSION).write_text(json.dumps(content | {"embodiment": own[0]}))
    with pytest.raises(DatasetError, match="the embodiment is not whole .*; copy or convert it again"):
        open_converted(copy)
    (copy / CONVERSION).write_text(json.dumps(content | {"origin": 3}))
    with pytest.raises(DatasetError, match="origin is missing or of another kind"):
        open_converted(copy)


def test_doctor(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert diagnose(root, "three", fast=False, full=False) == 0
    page = capsys.readouterr().out
    assert "views         2 of 3 views are absent, black: cam_left_wrist, cam_right_wrist" in page
    assert "unit, of its conversion" in page and "0 to 100" not in page and page.count("the robot has none") == 4
