"""Draws with Rerun: its viewer, or a file for it. The only module that imports the package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

STEP = "step"


class RerunSink:
    """A recording of Rerun's, a `Sink`."""

    def __init__(self, save: Path | None = None) -> None:
        """save: a file (.rrd) in place of the viewer's window. Raises OSError or RuntimeError where there is none."""
        self._recording = rr.RecordingStream("ahawam watch")
        if save is None:
            self._recording.spawn()
        else:
            self._recording.save(save)

    def begin(self, path: Sequence[str], cameras: Sequence[str], joints: Sequence[str]) -> None:
        views = [rrb.Spatial2DView(origin=_entity((*path, "cameras", camera)), name=camera) for camera in cameras]
        plots = [rrb.TimeSeriesView(origin=_entity((*path, "joints", joint)), name=joint) for joint in joints]
        rest = [
            rrb.TimeSeriesView(origin=_entity((*path, name)), name=name) for name in ("plan age", "latency", "lost")
        ]
        left = rrb.Vertical(rrb.Horizontal(*views), rrb.Horizontal(*rest), row_shares=[2, 1])
        name = " ".join(path)
        self._recording.send_blueprint(rrb.Blueprint(rrb.Horizontal(left, rrb.Grid(*plots), name=name)))

    def picture(self, path: Sequence[str], step: int, picture: np.ndarray) -> None:
        self._recording.set_time(STEP, sequence=step)
        self._recording.log(_entity(path), rr.Image(picture).compress(jpeg_quality=85))

    def numbers(self, path: Sequence[str], steps: Sequence[int], values: Sequence[float]) -> None:
        columns = rr.Scalars.columns(scalars=values)
        self._recording.send_columns(_entity(path), [rr.TimeColumn(STEP, sequence=steps)], columns)

    def text(self, path: Sequence[str], step: int, words: str) -> None:
        self._recording.set_time(STEP, sequence=step)
        self._recording.log(_entity(path), rr.TextDocument(words))

    def close(self) -> None:
        """Waits until all of it is drawn or written."""
        self._recording.flush()
        self._recording.disconnect()


def _entity(path: Sequence[str]) -> str:
    return "/".join(rr.escape_entity_path_part(part) for part in path)
