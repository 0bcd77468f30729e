"""Signals, the clock and steps that are not finite: what the loop is told of them, and when."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from ahawam_jax.training import stopping
from ahawam_jax.training.sharding import make_mesh
from ahawam_jax.training.stopping import NOTHING, SAVE, STOP, Requests, others_may_be_lost, with_votes
from ahawam_jax.training.watch import SKIPPED, Watch, tell_skipped
from data_pipelines.loader import Source
from data_pipelines.readers.opening import open_episodes
from data_pipelines.windows import WindowConfig
from tests.data_pipelines import tiny_dataset

MESH = make_mesh(dict(data=2, fsdp=2, tensor=2))


def agreed(*wishes: int) -> int:
    """The largest of eight devices' wishes, as a step returns it."""
    step = with_votes(lambda state, batch, tower, key: (state, {}))
    votes = jax.make_array_from_callback((8,), Requests().votes(MESH).sharding, lambda at: np.array(wishes)[at])
    return int(jax.jit(step)(1, 2, 3, 4, votes)[2])


def test_one_wish_counts_for_all() -> None:
    assert agreed(*[NOTHING] * 8) == NOTHING
    assert agreed(*[NOTHING] * 7, SAVE) == SAVE
    assert agreed(NOTHING, SAVE, STOP, *[NOTHING] * 5) == STOP


def test_signals_are_taken_for_the_length_of_the_training() -> None:
    """But for one that was ignored from the start, as SIGINT is in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with Requests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert not requests.stop and not np.any(requests.votes(MESH))
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.stop
            np.testing.assert_array_equal(requests.votes(MESH), [STOP] * 8)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.SIG_IGN, before[1])
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_the_clock_asks_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    requests, never = Requests(minutes=2), Requests(minutes=0)
    for clock[0], wish in ((119.0, NOTHING), (121.0, SAVE)):
        assert (int(requests.votes(MESH)[0]), int(never.votes(MESH)[0])) == (wish, NOTHING)
    requests.saved()
    clock[0] = 240.0
    assert not np.any(requests.votes(MESH))


def test_a_step_is_read_when_the_next_one_is_under_way() -> None:
    told: list[int] = []
    watch = Watch(3, told.append)
    seen = []
    for step, (request, skipped) in enumerate([(0, 0), (SAVE, 1), (0, 1), (STOP, 0), (0, 1)], 1):
        watch.add(step, request, skipped)
        seen.append((watch.save, watch.stop, watch.skipped))
    assert seen == [(False, False, 0), (False, False, 0), (True, False, 1), (True, False, 2), (True, True, 0)]
    watch.catch_up()
    assert told == [2, 3, 5] and watch.skipped == 1


def test_a_skipped_step_names_its_batch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = open_episodes(tiny_dataset.write_dataset(tmp_path / "set"))
    windows = WindowConfig(horizon=8, chunk=4, video_ratio=1, history_frames=2)
    frames = np.zeros((sum(tiny_dataset.LENGTHS), 2, 2, 3), np.uint8)
    tell_skipped(tmp_path, 5, [Source(dataset, frames, None)], windows, 16, 3, "")
    said, line = capsys.readouterr().out, json.loads((tmp_path / SKIPPED).read_text())
    assert line["step"] == 5 and len(line["windows"]) == 16
    first = line["windows"][0]
    assert f"step 5 is skipped: its loss or gradient is not finite. Its windows, see {SKIPPED}: " in said
    assert f"episode {first['episode']} row {first['row']}; " in said and said.endswith(" and 8 more\n")


def test_so_many_skipped_steps_in_a_row_end_the_run() -> None:
    watch = Watch(2, lambda step: None)
    for step, skipped in enumerate((1, 0, 1, 1), 1):
        watch.add(step, 0, skipped)
    with pytest.raises(FloatingPointError, match="in 2 steps in a row, the last of them 4; .* those of step 2"):
        watch.catch_up()


def test_what_a_broken_connection_raises_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = signal.getsignal(signal.SIGABRT)
    try:
        with pytest.raises(stopping.LostProcess, match=r"is lost \(UNKNOWN: Gloo .* closed by peer\)"):
            with others_may_be_lost():
                raise OSError("cannot be saved") from ValueError("UNKNOWN: Gloo all-reduce failed:\n closed by peer")
        with pytest.raises(ValueError, match="^mesh does not fit$"), others_may_be_lost():
            raise ValueError("mesh does not fit")
    finally:
        signal.signal(signal.SIGABRT, before)
