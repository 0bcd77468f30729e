"""What a writer is made with, checked: a ValueError names what is wrong with it and what was expected."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import av
import numpy as np

from data_pipelines.recording.encoded_video import check_video, encode_video

CAMERA_PREFIX = "observation.images."
LONGEST_NAME = 255  # bytes, of a folder


def checked_text(text: object, name: str, blank: bool = True) -> str:
    """The text, which is not empty unless it may be `blank`."""
    encodable = isinstance(text, str) and text.encode(errors="replace") == text.encode(errors="surrogatepass")
    if not encodable or not (blank or text.strip()):
        raise ValueError(f"{name} is {text!r}: expected {'' if blank else 'words, as '}text that UTF-8 can hold.")
    return str(text)


def checked_count(value: object, name: str) -> int:
    """A whole number of any kind, at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}: expected a whole number, at least 1.")
    return int(value)


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """A name for every number, each another one."""
    if isinstance(names, str) or not hasattr(names, "__iter__") or not len(names := list(names)):
        raise ValueError(f"state_names is {names!r}: expected a list with a name for every number of a state.")
    checked = tuple(checked_text(name, f"state_names[{i}]", blank=False) for i, name in enumerate(names))
    if twice := [name for name in checked if checked.count(name) > 1]:
        raise ValueError(f"state_names has {twice[0]!r} twice: expected another name for every number.")
    return checked


def checked_cameras(cameras: Mapping[str, tuple[int, int]], rate: Fraction) -> dict[str, tuple[int, int]]:
    """The cameras with plain numbers; each size is tried out, since a codec has limits of its own."""
    checked = {}
    for key, size in cameras.items():
        name = checked_text(key, "The key of a camera")
        if not name.startswith(CAMERA_PREFIX) or name == CAMERA_PREFIX or "/" in name or not name.isprintable():
            raise ValueError(
                f"The key of a camera is {name!r}: expected {CAMERA_PREFIX}<name>, as in {CAMERA_PREFIX}cam_high, and "
                "no '/' in it."
            )
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"The key {name[:40]!r}... is {len(name.encode())} bytes long, at most {LONGEST_NAME}.")
        if not hasattr(size, "__len__") or len(size) != 2:
            raise ValueError(f"The size of {key} is {size!r}: expected (height, width) in pixels.")
        height, width = (checked_count(value, f"The size of {key}") for value in size)
        if height % 2 or width % 2:
            raise ValueError(f"The size of {key} is {height}x{width}: h264 needs an even height and width; resize.")
        checked[name] = height, width
    for size in set(checked.values()):
        keys = ", ".join(key for key, found in checked.items() if found == size)
        black = np.zeros((2, *size, 3), np.uint8)
        try:
            check_video(encode_video(black, rate), rate, keys)
        except (av.error.FFmpegError, OverflowError, ValueError) as error:
            raise ValueError(
                f"{keys}: h264 cannot hold pictures of {size[0]}x{size[1]} at {float(rate):g} per second ({error}); "
                "resize them."
            ) from error
    return checked
