"""What a camera saw, as h264: encoded episode by episode, and joined without encoding again."""

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path

import av
import numpy as np

# Every second frame is a key frame, so that reading one at random decodes two at most. No B frames: frames are
# then stored in the order they are shown, and files join without gaps. Quantisation is constant and scene cuts get no
# key frame of their own: either would let a frame look a little different for what was seen long before it.
_H264 = {"g": "2", "bf": "0", "qp": "20", "sc_threshold": "0", "preset": "veryfast", "threads": "1"}
_DENOMINATOR = 1001  # of 30000/1001, the largest that frame rates in use have
_SLOWEST, _FASTEST = 0.01, 10_000  # frames per second that mp4 and float32 time stamps hold


@dataclass(frozen=True)
class EncodedVideo:
    """One camera of one episode.

    mp4: a whole h264 file. frames: how many. size: (height, width). histogram: int64 [3, 256], how often each
    value occurs in each colour, from which the statistics follow exactly.
    """

    mp4: bytes
    frames: int
    size: tuple[int, int]
    histogram: np.ndarray


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as videos count them, a fraction: 25, 50/3 for 250 / 15, 2997/100 for 29.97.

    It is the nearest one with a denominator of 1001 at most. Raises ValueError for what is no rate.
    """
    if isinstance(fps, bool) or not isinstance(fps, Real) or not math.isfinite(fps):
        raise ValueError(f"fps is {fps!r}: expected a number of frames per second.")
    if not _SLOWEST <= float(fps) <= _FASTEST:
        raise ValueError(f"fps is {fps}: expected {_SLOWEST} to {_FASTEST} frames per second.")
    exact = Fraction(int(fps.numerator), int(fps.denominator)) if isinstance(fps, Rational) else Fraction(float(fps))
    return exact.limit_denominator(_DENOMINATOR)


def check_images(images: object, name: str = "The images") -> None:
    """Raises ValueError for anything but uint8 [frames, height, width, 3] with even height and width."""
    if not isinstance(images, np.ndarray):
        raise ValueError(
            f"{name}: {type(images).__name__} given, expected an array uint8 [frames, height, width, 3]; np.stack "
            "makes one of single pictures."
        )
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{name}: shape {images.shape} and dtype {images.dtype} given, expected uint8 [frames, height, width, 3], "
            "RGB from 0 to 255."
        )
    height, width = images.shape[1:3]
    if height % 2 or width % 2 or not images.size:
        raise ValueError(
            f"{name}: {len(images)} of {height}x{width} given; h264 needs at least one, and an even height and width: "
            "resize them."
        )


def encode_video(images: np.ndarray, fps: float | Fraction) -> EncodedVideo:
    """Encode `images` uint8 [frames, height, width, 3] RGB; height and width must be even."""
    check_images(images)
    frames, height, width, _ = images.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frame_rate(fps), options=_H264)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    histogram = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    return EncodedVideo(buffer.getvalue(), frames, (height, width), histogram)


def check_video(video: EncodedVideo, rate: Fraction, name: str) -> bytes:
    """Raises ValueError unless a file holds what the EncodedVideo says, at this rate; returns its decoder's settings.

    Files join only where these are the same.
    """
    try:
        with av.open(io.BytesIO(video.mp4)) as container:
            stream = container.streams.video[0]
            found = stream.codec.canonical_name, stream.height, stream.width
            packets = [packet for packet in container.demux(stream) if packet.size]
            times = [packet.pts * packet.time_base * rate for packet in packets]
            settings = bytes(stream.codec_context.extradata or b"")
    except (av.error.FFmpegError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no readable mp4 file ({error}): expected one of encode_video.") from error
    height, width = video.size
    if found != ("h264", height, width) or times != list(range(video.frames)) or not packets[0].is_keyframe:
        raise ValueError(
            f"{name} is {found[0]} of {found[1]}x{found[2]} with {len(packets)} frames, the second at "
            f"{float(times[1] / rate) if len(times) > 1 else 0:.4f} s: expected h264 of {height}x{width} with "
            f"{video.frames} frames {float(1 / rate):.4f} s apart, from 0 on; encode it with the dataset's fps."
        )
    return settings


class VideoFile:
    """An mp4 file to which encoded episodes are appended without encoding them again.

    frames: in it so far.
    """

    def __init__(self, path: Path, fps: float | Fraction) -> None:
        self._container = av.open(str(path), "w", format="mp4")
        self._stream = None
        self._rate = frame_rate(fps)
        self.frames = 0

    def append(self, video: EncodedVideo) -> None:
        """Adds the frames of a video with the file's rate and decoder settings."""
        with av.open(io.BytesIO(video.mp4)) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size == 0:  # the end
                    continue
                start = round(self.frames / self._rate / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + start, packet.dts + start, self._stream
                self._container.mux(packet)
        self.frames += video.frames

    def close(self) -> None:
        self._container.close()
