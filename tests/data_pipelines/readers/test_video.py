"""Frames by number, whatever the codec and however far apart the key frames."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import InputContainer, OutputContainer

from data_pipelines.readers import video as video_module
from data_pipelines.readers.video import SEEK_GAP, VideoError, decode_frames
from tests.data_pipelines import tiny_dataset as tiny

FRAMES, SIZE = 60, (64, 96)
X265 = "bframes=4:log-level=none:crf=10:pools=1"
ENCODINGS = {
    "h264": ("libx264", {"g": "250", "bf": "3", "crf": "10"}),
    "h264 open GOP": ("libx264", {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1"}),
    "hevc": ("libx265", {"x265-params": f"keyint=250:{X265}"}),
    "hevc open GOP": ("libx265", {"x265-params": f"keyint=12:min-keyint=12:open-gop=1:{X265}"}),
    "av1": ("libsvtav1", {"g": "250", "crf": "10", "preset": "8"}),
    "av1 as lerobot": ("libsvtav1", {"g": "2", "crf": "20", "preset": "8"}),
}


@pytest.fixture(scope="module", params=ENCODINGS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, options = ENCODINGS[request.param]
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV cannot encode with {codec}")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    tiny.write_video(path, [tiny.picture(number, SIZE) for number in range(FRAMES)], codec, options)
    return path


def numbers_of(path: Path, numbers: list[int], size: tuple[int, int] = SIZE) -> list[int]:
    out = np.empty((len(numbers), *size, 3), np.uint8)
    decode_frames(path, np.array(numbers), tiny.FPS, out)
    return [tiny.number_of(image) for image in out]


def test_every_frame_alone(video: Path) -> None:
    """Reaches frames before, at and behind key frames, and those shown before the key frame they are stored after."""
    for number in range(FRAMES):
        assert numbers_of(video, [number]) == [number]


def test_frames_near_and_far(video: Path) -> None:
    near, far = list(range(FRAMES)), [2, 3, 5, 5 + SEEK_GAP + 1, 48]
    assert numbers_of(video, near) == near
    assert numbers_of(video, far) == far


def write_uneven(path: Path, offs: list[float], rate: float = tiny.FPS) -> None:
    """Frames that come early or late, by these parts of a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5", "bf": "0", "crf": "10"})
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 25_000)
        for number, off in enumerate(offs):
            frame = av.VideoFrame.from_ndarray(tiny.picture(number, SIZE), format="rgb24")
            frame.pts, frame.time_base = round((number + off) / rate * 25_000), Fraction(1, 25_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_frames_that_jitter(tmp_path: Path) -> None:
    """As a camera with a clock of its own delivers them; the file as a whole keeps the rate."""
    path = tmp_path / "clip.mp4"
    offs = [0.0, *np.random.default_rng(0).uniform(-0.2, 0.2, 59)]
    write_uneven(path, offs)
    for number in range(60):
        assert numbers_of(path, [number]) == [number]
    for worst in (0.3, 0.7, 0.8):  # it might be the next one
        write_uneven(path, [*offs[:30], worst, *offs[31:]])
        with pytest.raises(VideoError, match="off the grid"):
            numbers_of(path, [30 + round(worst)])
    write_uneven(path, [0.0] * 60, 24.7)  # another rate is no jitter, though the first frames are nearly right
    with pytest.raises(VideoError, match="a frame lies at .* off the grid of 25 frames per second"):
        numbers_of(path, list(range(60)))


def test_frame_behind_the_end(video: Path) -> None:
    with pytest.raises(VideoError, match=f"the video ends before frame {FRAMES}"):
        numbers_of(video, [FRAMES - 1, FRAMES])


def test_size_must_be_the_promised_one(video: Path) -> None:
    with pytest.raises(VideoError, match=r"frames are \(64, 96\), meta/info.json says \(32, 96\)"):
        numbers_of(video, [0], (32, 96))


def test_damaged_metadata(tmp_path: Path) -> None:
    """The name of the encoder is no text any more: PyAV 18 refuses the file, 19 reads past what nobody asked for."""
    path = tmp_path / "clip.mp4"
    tiny.write_video(path, [tiny.picture(0, SIZE)])
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xc7avf"))
    if int(av.__version__.partition(".")[0]) >= 19:
        assert numbers_of(path, [0]) == [0]
    else:
        with pytest.raises(VideoError, match="can't decode byte"):
            numbers_of(path, [0])


def test_file_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        numbers_of(path, [0])


# ---------------------------------------------------------------- videos kept open
@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> video_module._Idle:
    """Nothing kept open by other tests."""
    idle = video_module._Idle()
    monkeypatch.setattr(video_module, "_idle", idle)
    return idle


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[InputContainer]:
    """All containers that are opened for reading, in order."""
    opened, open_container = [], av.open

    def noting(*arguments: object, **options: object) -> InputContainer | OutputContainer:
        container = open_container(*arguments, **options)
        if isinstance(container, InputContainer):
            opened.append(container)
        return container

    monkeypatch.setattr(av, "open", noting)
    return opened


def clip(path: Path, first: int = 0) -> Path:
    tiny.write_video(path, [tiny.picture(first + number, SIZE) for number in range(5)])
    return path


def is_open(container: InputContainer) -> bool:
    try:
        container.seek(0)
    except AssertionError:  # PyAV's answer for a closed one
        return False
    return True


def test_reused_video_gives_the_same_pixels(video: Path, idle: video_module._Idle, opened: list) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        numbers = np.unique(rng.integers(FRAMES, size=6))
        first, again = np.empty((2, len(numbers), *SIZE, 3), np.uint8)
        decode_frames(video, numbers, tiny.FPS, again)
        idle.__init__()  # forgets what is open
        decode_frames(video, numbers, tiny.FPS, first)
        decode_frames(video, np.array([FRAMES - 1]), tiny.FPS, np.empty((1, *SIZE, 3), np.uint8))  # runs to the end
        np.testing.assert_array_equal(again, first)
    assert len(opened) == 9


def test_replaced_file_is_noticed(tmp_path: Path, idle: video_module._Idle, opened: list) -> None:
    path = clip(tmp_path / "clip.mp4")
    assert numbers_of(path, [3]) == numbers_of(path, [3]) == [3] and len(opened) == 1
    clip(tmp_path / "other.mp4", 10).rename(path)
    assert numbers_of(path, [3]) == [13]
    path.write_bytes(clip(tmp_path / "other.mp4", 20).read_bytes())  # in place
    assert numbers_of(path, [3]) == [23]
    assert [is_open(container) for container in opened] == [False, False, True]


def test_few_videos_are_kept_open(
    tmp_path: Path, idle: video_module._Idle, opened: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "KEEP", 2)
    paths = [clip(tmp_path / f"{number}.mp4", number) for number in range(3)]
    for place in (0, 1, 0, 2, 0, 1):  # file 1 is the one idle for longest when file 2 comes
        assert numbers_of(paths[place], [1]) == [place + 1]
    assert [Path(container.name).stem for container in opened] == ["0", "1", "2", "1"]
    assert [is_open(container) for container in opened] == [True, False, False, True]


def test_faulty_video_is_closed(tmp_path: Path, idle: video_module._Idle, opened: list) -> None:
    path = clip(tmp_path / "clip.mp4")
    for _ in range(2):
        with pytest.raises(VideoError, match="ends before frame 7"):
            numbers_of(path, [7])
    assert [is_open(container) for container in opened] == [False, False]


def test_file_that_is_gone(tmp_path: Path, idle: video_module._Idle) -> None:
    path = clip(tmp_path / "clip.mp4")
    assert numbers_of(path, [0]) == [0]
    path.unlink()
    with pytest.raises(VideoError, match="No such file"):
        numbers_of(path, [0])


def test_threads_do_not_meet(tmp_path: Path, idle: video_module._Idle) -> None:
    paths = [clip(tmp_path / f"{number}.mp4", 5 * number) for number in range(2)]
    wanted = [(int(file), int(frame)) for file, frame in np.random.default_rng(0).integers((2, 5), size=(200, 2))]

    def read(place: tuple[int, int]) -> int:
        return numbers_of(paths[place[0]], [place[1]])[0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, wanted)) == [5 * file + frame for file, frame in wanted]


def test_taken_video_is_nobody_elses(tmp_path: Path, idle: video_module._Idle) -> None:
    path = clip(tmp_path / "clip.mp4")
    numbers_of(path, [0])
    assert idle.take(str(path)) is not None and idle.take(str(path)) is None


FORK = """
import os, pathlib, sys, numpy, data_pipelines.readers.video as video
video.decode_frames(pathlib.Path(sys.argv[1]), numpy.array([0]), float(sys.argv[2]), numpy.empty((1, 64, 96, 3), "u1"))
child = os.fork()
if not child:
    os._exit(len(video._idle._videos))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(video._idle._videos))
"""


def test_forked_process_opens_its_own(tmp_path: Path) -> None:
    """Both would move the one position of a file they share. In a process apart, which has no other threads."""
    command = [sys.executable, "-c", FORK, str(clip(tmp_path / "clip.mp4")), str(tiny.FPS)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "1"]
