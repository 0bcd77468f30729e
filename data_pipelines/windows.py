"""Training windows: what one sample holds, cut out of an episode at a start row.

A window has static shapes. Rows past the episode's end repeat its last row and are marked padded; history
frames before the episode's start are zeros and counted out by `video_history_valid_len`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.caches.frame_cache import Frames
from data_pipelines.caches.latent_cache import CachedLatents, Latents
from data_pipelines.episodes import Episodes
from data_pipelines.normalization import normalize
from data_pipelines.statistics import Statistics

FRAMES_PER_LATENT = 4  # the VAE folds four video frames into one latent, the first frame stands alone


@dataclass(frozen=True)
class WindowConfig:
    """Geometry of a window, in rows of the recording.

    horizon: actions trained on.  chunk: actions per executor call.  video_ratio: rows per video frame.
    history_frames: W, remembered frames, 0 for none.  history_stride: rows between them, by default one horizon.
    max_offset: the actions start up to this many rows after the video (delta in 0..max_offset), 0 for none.
    memory_anchor: the episode's first row is always among the history, see `anchored`.
    Released: 64, 16, 8, 6, 64, 0 (65 rows, 9 frames); with offset 80, 16, 8, 6, 80, 15 (97 rows, 13 frames). The
    paper's offset: 64, 16, 8, 6, 64, 15 (81 rows, 9 frames).
    """

    horizon: int = 64
    chunk: int = 16
    video_ratio: int = 8
    history_frames: int = 6
    history_stride: int | None = None
    max_offset: int = 0
    memory_anchor: bool = False

    def __post_init__(self) -> None:
        if self.history_stride is None:
            object.__setattr__(self, "history_stride", self.horizon)
        if min(self.horizon, self.chunk, self.video_ratio, self.history_stride) < 1 or self.history_frames < 0:
            raise ValueError(f"{self}: horizon, chunk, video_ratio and history_stride must be at least 1.")
        if self.horizon % self.chunk:
            raise ValueError(f"horizon {self.horizon} must be a multiple of chunk {self.chunk}.")
        if not 0 <= self.max_offset < self.chunk:
            raise ValueError(
                f"max_offset {self.max_offset} must lie in 0..{self.chunk - 1}: one chunk of extra "
                "rows is loaded for it, a later start would run out of rows."
            )
        if self.video_rows % self._latent_rows:
            raise ValueError(
                f"{self.rows} action rows at one video frame per {self.video_ratio} give "
                f"{self.rows / self.video_ratio + 1:g} frames; the video encoder needs 1 + 4 n. "
                f"Choose horizon {'or horizon + chunk ' if self.max_offset else ''}as a multiple of "
                f"{self._latent_rows}."
            )

    @property
    def rows(self) -> int:
        """Action rows loaded: the horizon, and one chunk more when the actions may start late."""
        return self.horizon + (self.chunk if self.max_offset else 0)

    @property
    def video_rows(self) -> int:
        """Rows that the video spans: all that are loaded, or, where these do not make whole latents, the horizon."""
        return self.rows if self.rows % self._latent_rows == 0 else self.horizon

    @property
    def _latent_rows(self) -> int:
        return self.video_ratio * FRAMES_PER_LATENT

    @property
    def video_frames(self) -> int:
        return self.video_rows // self.video_ratio + 1

    @property
    def chunks(self) -> int:
        return self.horizon // self.chunk


class Windows:
    """All windows of the chosen episodes, one per row.

    frames: canvases uint8 [total rows, H, W, 3], indexed by dataset row; None where latents and clips are cached.
    stats: normalise state and action; None leaves them in the units of the recording.
    episodes: indices of the episodes to use, all by default; `chosen` then.
    latents: what to give in place of pictures.
    """

    def __init__(
        self,
        dataset: Episodes,
        frames: Frames | None,
        config: WindowConfig,
        stats: Statistics | None = None,
        episodes: Sequence[int] | None = None,
        latents: CachedLatents | None = None,
    ) -> None:
        total = len(dataset.lengths)
        chosen = np.arange(total) if episodes is None else np.asarray(episodes, np.int64)
        if not chosen.size or len(np.unique(chosen)) != len(chosen) or chosen.min() < 0 or chosen.max() >= total:
            raise ValueError(
                f"episodes {chosen.tolist()} must be distinct indices out of the dataset's 0..{total - 1}."
            )
        clips = latents.clips if latents else None
        if frames is None and clips is None:
            raise ValueError(f"{dataset.root} needs frames, or latents of frames and clips.")
        for name, x in (("frames", frames), ("latents", latents and latents.frames), ("clips", clips)):
            if x is not None and x.shape[0] != dataset.lengths.sum():
                raise ValueError(f"{name} hold {x.shape[0]} rows, {dataset.root} has {dataset.lengths.sum()}.")
        self.config, self.frames, self.latents = config, frames, latents
        self._dataset, self._stats, self.chosen = dataset, stats, chosen
        self._starts, self._lengths = dataset.starts[chosen], dataset.lengths[chosen]
        self._ends = np.cumsum(self._lengths)

    def __len__(self) -> int:
        """Number of windows: every row of every chosen episode starts one."""
        return int(self._ends[-1])

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Window numbers int [B] -> (place among the chosen episodes, start row in it), int64 [B]."""
        episode = np.searchsorted(self._ends, index, side="right")
        return episode, index - (self._ends - self._lengths)[episode]

    def gather(self, index: np.ndarray, delta: np.ndarray) -> dict[str, np.ndarray]:
        """Batch of the windows number `index` int [B], actions `delta` int [B] rows after the video's start.

        C chunks, N loaded rows (`config.rows`), W history frames, canvases [H, W_, 3], 1 + 4 n video frames:

        video uint8 [B, 1+4n, H, W_, 3] every video_ratio rows, see `video_rows`; image_is_pad bool [B, 1+4n];
        observations uint8 [B, C, H, W_, 3] at rows delta + chunk k;
        action float32 [B, N, d], proprio float32 [B, N, p] (state of the same rows), action_is_pad bool
        [B, N]: rows 0..N-1 of the window, the trained ones are [delta, delta + horizon);
        action_present bool [B, d]: the numbers that the robot has, the others are 0;
        action_offset int32 [B] = delta;
        history uint8 [B, W, H, W_, 3] oldest first, right-aligned, zeros where there is none, absent where W is 0;
        video_history_valid_len int32 [B]; video_history_frame_indices int32 [B, W] and
        video_temporal_position_ids int32 [B, 1+n]: rotary index, row in the episode // video_ratio;
        instruction int32 [B]: place in `dataset.instructions`.

        With cached latents, float16 of c channels and h x w places: obs_latents [B, C, c, 1, h, w] in place of
        observations, history_latents [B, W, c, 1, h, w] in place of history and, where clips are cached,
        input_latents [B, c, 1+n, h, w] in place of video.
        """
        index, delta, c = np.asarray(index), np.asarray(delta), self.config
        if delta.min() < 0 or delta.max() > c.max_offset:
            raise ValueError(f"offsets {delta.min()}..{delta.max()} are outside 0..{c.max_offset} of the config.")
        if index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"windows {index.min()}..{index.max()} asked for, there are 0..{len(self) - 1}.")
        episode, start = self.locate(index)
        last = self._lengths[episode][:, None] - 1
        rows = start[:, None] + np.arange(c.rows)
        video = start[:, None] + c.video_ratio * np.arange(c.video_frames)
        chunk_starts = (start + delta)[:, None] + c.chunk * np.arange(c.chunks)
        history = start[:, None] - c.history_stride * np.arange(c.history_frames, 0, -1)
        if c.memory_anchor:
            history = anchored(history, start)

        numbers, table = self.chosen[episode], np.minimum(rows, last)
        # Rows before pictures: what is wrong with an episode is told in the same sentence every time.
        action = self._vectors("action", self._dataset.actions, numbers, table)
        state = self._vectors("state", self._dataset.states, numbers, table)
        seen = np.where(history < 0, start[:, None], history)  # a row that is read anyway, blackened below
        first = self._starts[episode][:, None]
        asked = {
            "video": video_rows(c, self._dataset, first[:, 0] + start),
            "observations": first + np.minimum(chunk_starts, last),
        }
        images = self._images(asked | ({"history": first + seen} if c.history_frames else {}))
        if c.history_frames:
            images["history_latents" if self.latents else "history"][history < 0] = 0
        latents = FRAMES_PER_LATENT * np.arange(1 + (c.video_frames - 1) // FRAMES_PER_LATENT)
        return images | {
            "image_is_pad": video > last,
            "action": action,
            "action_is_pad": rows > last,
            "action_present": np.tile(self._dataset.action_present, (len(index), 1)),
            "proprio": state,
            "action_offset": delta.astype(np.int32),
            "video_history_valid_len": (history >= 0).sum(1).astype(np.int32),
            "video_history_frame_indices": (np.maximum(history, 0) // c.video_ratio).astype(np.int32),
            "video_temporal_position_ids": (start[:, None] // c.video_ratio + latents).astype(np.int32),
            "instruction": np.array([self._dataset.instruction_index(e) for e in numbers], np.int32),
        }

    def _vectors(
        self, name: str, read: Callable[[int], np.ndarray], episodes: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Rows int [B, N] of the episodes [B], normalised, float32 [B, N, width]. What is kept in memory is up to the
        dataset: a copy here would be one more."""
        vectors = np.stack([read(episode)[own] for episode, own in zip(episodes, rows, strict=True)])
        return vectors if self._stats is None else normalize(vectors, self._stats[name])

    def _images(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of dataset rows [B, n] by name: canvases [B, n, H, W, 3], or the latents that are cached of them."""
        if self.latents is None:
            return self._pictures(groups)
        frames, clips = self.latents.frames, self.latents.clips
        singles = {"observations": "obs_latents", "history": "history_latents"}
        out = {
            latents: _gather(frames, groups[images])[:, :, :, None]
            for images, latents in singles.items() if images in groups
        }  # fmt: skip
        if clips is None:
            return out | self._pictures({"video": groups["video"]})
        start = groups["video"][:, :1]
        video = np.concatenate([_gather(frames, start), _gather(clips, start)[:, 0]], 1)
        return out | {"input_latents": video.swapaxes(1, 2)}

    def _pictures(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Canvases, read in one go: every part of the answer is contiguous, and frames that decode on the fly see
        each row once."""
        flat = self.frames[np.concatenate([rows.ravel() for rows in groups.values()])]
        parts = np.split(flat, np.cumsum([rows.size for rows in groups.values()])[:-1])
        return {
            name: part.reshape(*rows.shape, *flat.shape[1:])
            for (name, rows), part in zip(groups.items(), parts, strict=True)
        }


def anchored(history: np.ndarray, start: np.ndarray) -> np.ndarray:
    """History rows int [B, W] of windows from row `start` [B] on, with the episode's first row, 0, among them.

    Rows below 0 stand for none. Where row 0 is missing it goes in front of the others, or, where all slots are taken,
    in place of the oldest. A window that starts at row 0 has no earlier frame.
    """
    missing = (start > 0) & (history != 0).all(1)
    front = np.maximum((history < 0).sum(1) - 1, 0)
    return np.where(missing[:, None] & (np.arange(history.shape[1]) == front[:, None]), 0, history)


def _gather(latents: Latents, rows: np.ndarray) -> np.ndarray:
    """latents of rows int [B, n] -> [B, n, ...]."""
    return latents[rows.ravel()].reshape(*rows.shape, *latents.shape[1:])


def video_rows(config: WindowConfig, dataset: Episodes, rows: np.ndarray) -> np.ndarray:
    """Dataset rows of the video frames of windows that begin at dataset rows [n]: int64 [n, 1+4n], the episode's last
    row in place of any beyond it."""
    episode = np.searchsorted(dataset.starts, rows, side="right") - 1
    last = (dataset.starts + dataset.lengths - 1)[episode]
    return np.minimum(rows[:, None] + config.video_ratio * np.arange(config.video_frames), last[:, None])
