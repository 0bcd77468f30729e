"""The canvas, and the frames made of it: cached or decoded on the fly, the same pixels."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.caches import frame_cache, keys
from data_pipelines.caches.frame_cache import DecodingFrames, open_frames
from data_pipelines.canvas import CAMERAS, Canvas
from data_pipelines.episodes import DatasetError
from data_pipelines.readers.opening import open_episodes
from tests.data_pipelines import tiny_dataset as tiny

HEAD = tiny.CAMERAS["cam_high"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(root: Path) -> np.ndarray:
    """Canvases of all rows, straight from the reader."""
    dataset = open_episodes(root)
    episodes = [
        Canvas(HEAD).compose({camera: dataset.frames(e, camera, range(length)) for camera in CAMERAS})
        for e, length in enumerate(tiny.LENGTHS)
    ]
    return np.concatenate(episodes)


# ---------------------------------------------------------------- compose
def test_views_lie_where_they_belong() -> None:
    rng = np.random.default_rng(0)
    views = {name: rng.integers(0, 256, (2, 3, *size, 3), np.uint8) for name, size in tiny.CAMERAS.items()}
    canvas = Canvas(HEAD).compose(views)
    assert canvas.shape == (2, 3, 48, 48, 3) and canvas.dtype == np.uint8
    np.testing.assert_array_equal(canvas[..., :32, :, :], views["cam_high"])  # sizes match: untouched
    np.testing.assert_array_equal(canvas[..., 32:, :24, :], views["cam_left_wrist"])
    np.testing.assert_array_equal(canvas[..., 32:, 24:, :], views["cam_right_wrist"])


def test_released_size() -> None:
    views = {name: np.full((480, 640, 3), value, np.uint8) for name, value in zip(CAMERAS, (10, 20, 30), strict=True)}
    canvas = Canvas((256, 320)).compose(views)
    assert canvas.shape == (384, 320, 3)
    assert (canvas[:256] == 10).all() and (canvas[256:, :160] == 20).all() and (canvas[256:, 160:] == 30).all()


def test_shrinking_is_antialiased_bilinear() -> None:
    """Against the triangle filter written out: weight 1 - |distance| / scale over the pixels it reaches."""
    rng = np.random.default_rng(1)
    head = rng.integers(0, 256, (40, 60, 3), np.uint8)

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        centre = (np.arange(target)[:, None] + 0.5) * scale - 0.5
        w = np.maximum(0, 1 - np.abs(np.arange(source) - centre) / scale)
        return w / w.sum(1, keepdims=True)

    black = {name: np.zeros((5, 6, 3), np.uint8) for name in CAMERAS[1:]}
    canvas = Canvas((10, 12)).compose({"cam_high": head, **black})
    filtered = np.einsum("ab,bcd,ec->aed", weights(40, 10), head.astype(float), weights(60, 12))
    np.testing.assert_allclose(canvas[:10], filtered, atol=1.1)  # rounded to grey levels twice


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2), (0,)])
@pytest.mark.parametrize("head_size", [(256, 320), (2, 2), (38, 54)])
def test_resizing_is_pillows(batch: tuple[int, ...], head_size: tuple[int, int]) -> None:
    """Byte for byte, from smaller, larger, odd and mixed sizes, out of arrays that need not be contiguous."""
    rng = np.random.default_rng(2)
    height, width = head_size
    low, half = height // 2, width // 2
    places = (np.s_[..., :height, :, :], np.s_[..., height:, :half, :], np.s_[..., height:, half:, :])
    for sizes in ([(240, 320), (1, 1), (61, 7)], [(27, 301), (low, 33), (33, half)], [head_size, (480, 640), (3, 5)]):
        views = {
            name: rng.integers(0, 256, (*batch, 3, *size[::-1]), np.uint8).swapaxes(-1, -3)
            for name, size in zip(CAMERAS, sizes, strict=True)
        }
        canvas = Canvas(head_size).compose(views)
        assert canvas.shape == (*batch, 3 * low, width, 3) and canvas.dtype == np.uint8
        for name, place, size in zip(CAMERAS, places, [head_size, (low, half), (low, half)], strict=True):
            for index in np.ndindex(batch):
                image = Image.fromarray(np.ascontiguousarray(views[name][index]))
                expected = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
                np.testing.assert_array_equal(canvas[index][place], expected)


def test_missing_camera() -> None:
    views = {name: np.zeros((4, 4, 3), np.uint8) for name in CAMERAS[:2]}
    with pytest.raises(ValueError, match="missing: cam_right_wrist"):
        Canvas((4, 4)).compose(views)


def test_wrong_kind_of_image() -> None:
    views = {name: np.zeros((4, 4, 3), np.uint8) for name in CAMERAS}
    with pytest.raises(ValueError, match="cam_left_wrist: expected uint8"):
        Canvas((4, 4)).compose(views | {"cam_left_wrist": np.zeros((4, 4, 3), np.float32)})
    with pytest.raises(ValueError, match=r"cam_left_wrist: expected as many images as cam_high has, \[\], got \[1\]"):
        Canvas((4, 4)).compose(views | {"cam_left_wrist": np.zeros((1, 4, 4, 3), np.uint8)})
    with pytest.raises(ValueError, match="even height and width"):
        Canvas((5, 4)).compose(views)


# ---------------------------------------------------------------- frames
def test_decoding_frames(root: Path, expected: np.ndarray) -> None:
    frames = DecodingFrames(open_episodes(root), Canvas(HEAD))
    assert frames.shape == expected.shape
    rows = np.array([93, 0, 62, 63, 40, 39, 40, 7])
    np.testing.assert_array_equal(frames[rows], expected[rows])


@pytest.mark.parametrize("processes", [1, 2])
def test_cache_holds_every_row(root: Path, expected: np.ndarray, tmp_path: Path, processes: int) -> None:
    frames = open_frames(open_episodes(root), Canvas(HEAD), tmp_path, processes)
    np.testing.assert_array_equal(frames[np.arange(len(expected))], expected)
    assert not frames[:].flags.writeable


def test_cache_is_built_once_per_content(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def builds(**changed: object) -> bool:
        open_frames(**{"dataset": open_episodes(copy), "canvas": Canvas(HEAD), "cache_dir": tmp_path} | changed)
        return "94 of 94 rows" in capfd.readouterr().out

    copy = shutil.copytree(root, tmp_path / "copy")
    assert builds() and not builds()
    assert builds(canvas=Canvas((16, 24)))
    tiny.change_info(copy, note="decides no picture")
    assert not builds()
    size = tiny.CAMERAS["cam_high"]
    tiny.write_video(tiny.video_path(copy, "cam_high", 2), [tiny.picture(3, size)] * tiny.LENGTHS[2])
    assert builds() and not builds()
    monkeypatch.setattr(keys, "CANVAS_VERSION", keys.CANVAS_VERSION + 1)
    assert builds()


def test_interrupted_build_is_not_trusted(
    root: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = frame_cache._write_episode

    def interrupted(*arguments: object) -> int:
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(frame_cache, "_write_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_frames(open_episodes(root), Canvas(HEAD), tmp_path)
    monkeypatch.setattr(frame_cache, "_write_episode", write)
    np.testing.assert_array_equal(open_frames(open_episodes(root), Canvas(HEAD), tmp_path)[:], expected)


def test_damaged_cache_is_refused(root: Path, tmp_path: Path) -> None:
    open_frames(open_episodes(root), Canvas(HEAD), tmp_path)
    (data,) = tmp_path.glob("*/frames.bin")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match="frames.bin has .* delete the folder"):
        open_frames(open_episodes(root), Canvas(HEAD), tmp_path)
    data.write_bytes(whole)
    note = data.with_name("key.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"key": "another"}))
    with pytest.raises(DatasetError, match="another.* delete the folder"):
        open_frames(open_episodes(root), Canvas(HEAD), tmp_path)
    note.write_text('{"key": ')
    with pytest.raises(DatasetError, match="key.json is not valid JSON .*; delete the folder"):
        open_frames(open_episodes(root), Canvas(HEAD), tmp_path)


def test_frames_need_all_three_cameras(root: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(root, tmp_path / "broken")
    info = json.loads((broken / "meta/info.json").read_text())
    del info["features"]["observation.images.cam_left_wrist"]
    tiny.change_info(broken, features=info["features"])
    for make in (DecodingFrames, lambda *arguments: open_frames(*arguments, tmp_path / "cache")):
        with pytest.raises(DatasetError, match="no camera cam_left_wrist; it has: cam_high, cam_right_wrist"):
            make(open_episodes(broken), Canvas(HEAD))


def test_a_single_view_stands_alone(root: Path, tmp_path: Path) -> None:
    """Also where it has an odd size, and whatever other views there are."""
    canvas, dataset = Canvas((45, 31), single_view=True), open_episodes(root)
    assert canvas.size == (45, 31) and canvas.cameras == ("cam_high",)
    head = dataset.frames(1, "cam_high", [3, 1])
    picture = canvas.compose({"cam_high": head, "cam_left_wrist": np.zeros((1, 1), np.float32)})
    for image, got in zip(head, picture, strict=True):
        expected = Image.fromarray(image).resize((31, 45), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(got, np.asarray(expected))
    frames = open_frames(dataset, canvas, tmp_path)
    np.testing.assert_array_equal(frames[dataset.starts[1] + [3, 1]], picture)
    np.testing.assert_array_equal(DecodingFrames(dataset, canvas)[dataset.starts[1] + [3, 1]], picture)
    with pytest.raises(ValueError, match="the canvas needs the cameras cam_high; missing: cam_high"):
        canvas.compose({"cam_left_wrist": head})


def test_views_do_not_share_a_cache(root: Path, tmp_path: Path) -> None:
    dataset = open_episodes(root)
    canvases = [Canvas(size, alone) for size in (HEAD, (16, 24)) for alone in (False, True)]
    seen = {keys.pictures_key(dataset, canvas, tmp_path) for canvas in canvases}
    assert len(seen) == 4
