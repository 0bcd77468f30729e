"""Single frames out of mp4 files, by number: h264, hevc and av1, with B-frames and key frames at any distance."""

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from data_pipelines.readers.base import GRID_TOLERANCE

# A seek is worth its while if it saves decoding this many frames.
SEEK_GAP = 2
JITTER = 0.45  # of a frame, between the earliest and the latest: half a frame is as near to the next one
STEP_BACK = 16  # frames further back at a second try
# Videos kept open: opening one costs about as much as decoding two frames, and more the longer it is. Each holds a
# file descriptor, an index and a few frames, so there is a bound, for all threads together.
KEEP = 32


class VideoError(Exception):
    """What is wrong with a video file; the caller adds which camera and episode it belongs to."""


def decode_frames(path: Path, numbers: np.ndarray, fps: float, out: np.ndarray) -> None:
    """Decodes the frames `numbers` (int [n], ascending, distinct, counted in the file) into out uint8 [n, h, w, 3].

    A frame's number is its presentation time times fps, which must be whole; frames may come early or late if every
    one in the file still lies nearest to its own place. A call has its container to itself, so
    calls from several threads do not meet. Raises VideoError where the file does not hold exactly these frames in
    this size.
    """
    try:
        video = _idle.take(str(path)) or _open(str(path))
        try:
            key = np.array([_key_frame(video.stream, number, fps) for number in numbers])
            cuts = np.flatnonzero(key[1:] - numbers[:-1] > SEEK_GAP) + 1
            for run in np.split(np.arange(len(numbers)), cuts):
                _decode_run(video, numbers[run], fps, out[run[0] : run[-1] + 1])
        except BaseException:
            video.container.close()
            raise
        _idle.give(video)
    except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:  # the last for damaged metadata
        raise VideoError(str(error)) from error


@dataclass(frozen=True, eq=False)
class _Video:
    """An open file.

    state: of the file when it was opened.  steady: what `keeps` has found.
    """

    path: str
    state: tuple[int, ...]
    container: InputContainer
    stream: VideoStream
    colours: VideoReformatter

    steady: dict[float, bool] = field(default_factory=dict)

    def keeps(self, fps: float) -> bool:
        """Whether each of the file's frames lies nearest to its own place: what is off the grid then is jitter."""
        if fps not in self.steady:
            # The index counts in the order of decoding: the same times, later by the same delay.
            times = [entry.timestamp for entry in self.stream.index_entries]
            places = np.array(times, np.float64) * float(self.stream.time_base) * fps
            whole = 0 < len(places) == self.stream.frames
            self.steady[fps] = whole and np.ptp(places - np.arange(len(places))) <= JITTER
        return self.steady[fps]


def _open(path: str) -> _Video:
    state = _state(path)
    container = av.open(path)
    try:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise VideoError("it holds no video stream of a known codec")
        # Windows are decoded side by side already; a decoder's own threads would only compete.
        stream.codec_context.thread_count = 1
        # One for all frames: a frame's own would start a thread per core for every single picture.
        return _Video(path, state, container, stream, VideoReformatter())
    except BaseException:
        container.close()
        raise


def _state(path: str) -> tuple[int, ...]:
    """Differs if the file was replaced or written to."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


class _Idle:
    """Open videos that nobody reads, at most KEEP: the one idle for longest is closed first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._videos: list[_Video] = []  # in the order they came

    def take(self, path: str) -> _Video | None:
        """A video open on the file as it is now, the caller's alone until given back; None if there is none."""
        state = _state(path)
        with self._lock:
            stale = [video for video in self._videos if video.path == path and video.state != state]
            fresh = [video for video in self._videos if video.path == path and video.state == state]
            found = fresh[-1] if fresh else None
            self._videos = [video for video in self._videos if video is not found and video not in stale]
        for video in stale:
            video.container.close()
        return found

    def give(self, video: _Video) -> None:
        with self._lock:
            self._videos.append(video)
            gone = self._videos[:-KEEP]
            del self._videos[:-KEEP]
        for video in gone:
            video.container.close()


_idle = _Idle()
# A child process would share the position in the files with its parent.
os.register_at_fork(after_in_child=_idle.__init__)


def _key_frame(stream: VideoStream, number: int, fps: float) -> int:
    """About where decoding of a frame starts, from the file's index: it counts in the order of decoding."""
    return stream.index_entries.search_timestamp(_timestamp(stream, number, fps))


def _decode_run(video: _Video, numbers: np.ndarray, fps: float, out: np.ndarray) -> None:
    """Decodes neighbouring frames in one pass."""
    done = 0
    for number, frame in _frames_from(video, int(numbers[0]), fps):
        if number < numbers[done]:
            continue
        if number > numbers[done]:
            raise VideoError(f"frame {numbers[done]} is missing, frame {number} follows instead")
        if frame.is_corrupt:
            raise VideoError(f"frame {number} is damaged")
        image = video.colours.reformat(frame, format="rgb24", threads=1).to_ndarray()
        if image.shape != out.shape[1:]:
            raise VideoError(f"frames are {image.shape[:2]}, meta/info.json says {out.shape[1:3]} (height, width)")
        out[done] = image
        done += 1
        if done == len(numbers):
            return
    raise VideoError(f"the video ends before frame {numbers[done]}")


def _frames_from(video: _Video, number: int, fps: float) -> Iterator[tuple[int, av.VideoFrame]]:
    """The numbered frames in the order they are shown, starting at or before `number` where the file allows it."""
    container, stream = video.container, video.stream
    back = 0
    while True:
        start = max(0, number - back)
        container.seek(_timestamp(stream, start, fps), stream=stream, backward=True)
        frames = ((_number(frame, video, fps), frame) for frame in container.decode(stream))
        first = next(frames, None)
        if first is None:
            return iter(())
        # Frames shown before the key frame they are stored behind (an open GOP) need the key frame before that one.
        if first[0] <= number or start == 0:
            return itertools.chain([first], frames)
        back = 2 * back or STEP_BACK


def _timestamp(stream: VideoStream, number: int, fps: float) -> int:
    return round(int(number) / fps / stream.time_base)


def _number(frame: av.VideoFrame, video: _Video, fps: float) -> int:
    if frame.pts is None:
        raise VideoError("a frame carries no time stamp")
    place = frame.pts * float(video.stream.time_base) * fps
    off = abs(place - round(place))
    if off > GRID_TOLERANCE and not (off <= JITTER and video.keeps(fps)):
        raise VideoError(f"a frame lies at {place:.3f} frames, off the grid of {fps:g} frames per second")
    return round(place)
