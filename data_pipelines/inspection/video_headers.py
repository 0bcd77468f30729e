"""How many frames the video files of a dataset hold as their headers say, and how many its rows need. Decodes none."""

from pathlib import Path

import av

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers.lerobot import IMAGE_PREFIX, LeRobot
from data_pipelines.readers.subset import as_recorded


def promised_frames(dataset: Episodes) -> dict[Path, int]:
    """Number of frames that the episodes of a LeRobot dataset need in each of its video files."""
    recorded, cameras = as_recorded(dataset)
    promised: dict[Path, int] = {}
    for camera in cameras if isinstance(recorded, LeRobot) else ():
        for episode, length in enumerate(recorded.lengths):
            try:
                path, first = recorded.video(episode, IMAGE_PREFIX + camera)
            except DatasetError:  # told by check_frames
                continue
            promised[path] = max(promised.get(path, 0), first + int(length))
    return promised


def header(path: Path) -> tuple[int, str]:
    """Number of frames and codec as the file itself says, (0, "") where it cannot be opened."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.frames, stream.codec.canonical_name
    except (av.error.FFmpegError, UnicodeDecodeError, IndexError, AttributeError):
        return 0, ""


def too_short(dataset: Episodes) -> list[str]:
    """A sentence for each video that holds fewer frames than the rows need, or cannot be opened."""
    found = []
    for path, needed in promised_frames(dataset).items():
        held, _ = header(path)
        if held < needed:
            there = f"holds {held} frames" if held else "cannot be opened" if path.is_file() else "does not exist"
            found.append(f"{path} {there}, its rows need {needed}; copy it again.")
    return found
