"""One episode as a video: all views side by side, below them the curves of states and actions.

An mp4, and beside it a png of its middle frame.
"""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.disk import whole_file, writing
from data_pipelines.episodes import Episodes
from data_pipelines.inspection.curves import Curves, panels_of
from data_pipelines.progress import Progress
from data_pipelines.readers.subset import embodiment_of
from data_pipelines.recording.encoded_video import VideoFile, encode_video

WIDTH, MARGIN, CAPTION, LABEL = 1280, 16, 64, 24  # pixels of the page, its border, its head, a name above a picture
VIEW_HEIGHT = 360  # at most
BATCH = 32  # rows decoded and encoded at a time
PAPER, INK, FAINT = (255, 255, 255), (33, 37, 41), (110, 117, 125)


class Page:
    """The picture of one row of an episode.

    size: (width, height) in pixels, both even.  views: camera -> box (left, top, right, bottom) of its picture.
    """

    def __init__(self, dataset: Episodes, episode: int) -> None:
        self.views = _view_boxes(dataset)
        below = max((box[3] for box in self.views.values()), default=CAPTION) + MARGIN
        self._rows, self._fps = int(dataset.lengths[episode]), dataset.fps
        self._curves = Curves(panels_of(dataset, episode), WIDTH - 2 * MARGIN)
        self._place = MARGIN, below
        height = below + self._curves.height + MARGIN
        self.size = WIDTH, height + height % 2
        self._blank = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(self._blank)
        title = _fitted(dataset.instruction(episode) or "no instruction", 22, WIDTH - 2 * MARGIN)
        draw.text((MARGIN, 10), title, INK, _font(22))
        name = f"{dataset.root.resolve().name}, episode {episode} of {len(dataset.lengths)}"
        draw.text((MARGIN, 40), _fitted(name, 14, WIDTH - 250), FAINT, _font(14))
        embodiment = embodiment_of(dataset)
        absent = embodiment.absent if embodiment else ()
        for camera, (left, top, right, _) in self.views.items():
            label = f"{camera}: no camera" if camera in absent else camera
            draw.text((left, top - LABEL + 4), _fitted(label, 14, right - left), FAINT, _font(14))

    def draw(self, row: int, pictures: dict[str, np.ndarray]) -> Image.Image:
        """pictures: for each camera uint8 [h, w, 3], of `row`."""
        page = self._blank.copy()
        for camera, (left, top, right, bottom) in self.views.items():
            view = Image.fromarray(pictures[camera])
            page.paste(view.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        page.paste(self._curves.draw(row), self._place)
        clock = f"row {row} of {self._rows}   {row / self._fps:.2f} s"
        ImageDraw.Draw(page).text((WIDTH - MARGIN, 40), clock, FAINT, _font(14), anchor="ra")
        return page


def write_view(dataset: Episodes, episode: int, out: Path) -> None:
    """Writes the mp4 `out` and a png of the episode's middle row under the same name.

    Every camera is read once, forward. Raises DatasetError for what the dataset does not hold, IndexError for an
    episode that there is not, DiskError where the disk takes no more.
    """
    page, fps = Page(dataset, episode), Fraction(dataset.fps).limit_denominator(1000)
    with writing(out, "Nothing of it is kept."):
        with whole_file(out) as unfinished:
            still = _write_video(dataset, episode, page, fps, unfinished)
        with whole_file(out.with_suffix(".png")) as unfinished:
            still.save(unfinished, "PNG")


def _write_video(dataset: Episodes, episode: int, page: Page, fps: Fraction, path: Path) -> Image.Image:
    """Writes the mp4 and returns the picture of the middle row."""
    length, video = int(dataset.lengths[episode]), VideoFile(path, fps)
    progress = Progress(length, "rows", stream=sys.stderr)
    try:
        for low in range(0, length, BATCH):
            rows = range(low, min(low + BATCH, length))
            pictures = {camera: dataset.frames(episode, camera, rows) for camera in page.views}
            pages = [
                page.draw(row, {camera: frames[i] for camera, frames in pictures.items()})
                for i, row in enumerate(rows)
            ]
            if length // 2 in rows:
                still = pages[length // 2 - rows[0]]
            video.append(encode_video(np.stack([np.asarray(image) for image in pages]), fps))
            progress.add("", len(rows))
    finally:
        video.close()
    return still


def _view_boxes(dataset: Episodes) -> dict[str, tuple[int, int, int, int]]:
    """Where the cameras' pictures go: in one line, of one height, in their own proportions, centred."""
    count, top = len(dataset.cameras), CAPTION + LABEL
    shapes = [width / height for height, width in dataset.cameras.values()]
    room = WIDTH - MARGIN * (count + 1)
    height = min(VIEW_HEIGHT, int(room / sum(shapes))) if count else 0
    widths = [max(1, int(height * shape)) for shape in shapes]
    left = (WIDTH - sum(widths) - MARGIN * (count - 1)) // 2
    boxes = {}
    for camera, width in zip(dataset.cameras, widths, strict=True):
        boxes[camera] = left, top, left + width, top + height
        left += width + MARGIN
    return boxes


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitted(text: str, size: int, width: int) -> str:
    """`text`, or as much of its beginning as fits."""
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
