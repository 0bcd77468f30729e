"""The film of the mechanism: pages that show what happened, and a rollout with what the router read in it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ahawam_jax.analysis.routing import look
from ahawam_jax.commands import film
from ahawam_jax.evaluation.mechanism import Call, Story, check_fits, watch
from ahawam_jax.evaluation.mechanism_film import (
    AGED,
    CAPTION,
    FAINT,
    INK,
    JOINTS,
    PANEL,
    RAMP,
    REFRESH,
    REPLACED,
    RUN,
    SIZE,
    TEETH,
    TOOTH,
    TOP,
    VEIL,
    column,
    draw,
    heat,
    most_moved,
)
from ahawam_jax.inference.policy import Policy
from ahawam_jax.towers.stand_ins import BlockTransform
from data_pipelines.embodiment import Embodiment
from data_pipelines.simulation.parallel import ParallelSims
from data_pipelines.simulation.rendering import check_rendering
from data_pipelines.simulation.tasks import TASKS

needs_drawing = pytest.mark.skipif(check_rendering() is not None, reason=str(check_rendering()))
ROWS, CHUNK, EXECUTE, EVERY = 60, 10, 5, 3  # a call every 5 steps, a plan every 15
WRIST = 11  # the joint that moves most
LEFT_PANEL, RIGHT_PANEL = 16 + 480 + 16, 16 + 480 + 16 + 240 + 16  # pixels


@pytest.fixture(scope="module")
def story() -> Story:
    """Joints follow a ramp, and plans are it; what is read of twelve tokens differs by call."""
    slopes = np.full(14, 0.001)
    slopes[[2, WRIST, 13]] = 0.02, 0.1, 0.05
    rng, calls = np.random.default_rng(0), []
    for number, row in enumerate(range(0, ROWS, EXECUTE)):
        reads = rng.uniform(0.5, 1, 12)
        reads[number] = 4
        actions = np.float32((row + 1 + np.arange(CHUNK))[:, None] * slopes)
        calls.append(Call(row, row - row % (EVERY * EXECUTE), actions, reads / reads.sum()))
    canvases = np.repeat(np.arange(ROWS + 1, dtype=np.uint8)[:, None, None, None] * 2, 96, 1).repeat(128, 2)
    scenes = {row: np.full((240, 480, 3), 99, np.uint8) for row in range(2, ROWS + 1, 2)}
    states = np.float32(np.arange(ROWS + 1)[:, None] * slopes)
    return Story(
        "transfer_cube", 3, EXECUTE, EVERY, 32, canvases.repeat(3, -1), states, np.arange(ROWS + 1) // 20, scenes,
        tuple(calls),
    )  # fmt: skip


def near(colour: np.ndarray, other: tuple[int, int, int]) -> np.ndarray:
    """Whether pixels [..., 3] have a colour, as far as shrinking leaves it."""
    return np.abs(colour.astype(int) - other).max(-1) < 24


def test_refresh_marks_stand_where_refreshes_were(story: Story) -> None:
    row = 38
    page = draw(story, {}, row)
    assert page.shape == (SIZE[1], SIZE[0], 3) and page.dtype == np.uint8
    marked = [step for step in range(ROWS) if near(page[TEETH - 4, round(column(step, ROWS))], REFRESH)]
    assert marked == [0, 15, 30]  # neither the calls between nor what lies after the cursor
    assert story.refreshes == (0, 15, 30, 45)


def test_a_plan_grows_old_until_the_next_one(story: Story) -> None:
    page = draw(story, {}, 38)
    assert [story.age(row) for row in (0, 14, 15, 38, 60)] == [0, 14, 0, 8, 15] and story.oldest == 15

    def height(step: float) -> int:
        return int(near(page[TEETH : TEETH + TOOTH, round(column(step, ROWS))], AGED).sum())

    for step in (2.5, 7.5, 12.5, 17.5, 35):  # a pixel at either end is half of the colour
        assert height(step) == pytest.approx(TOOTH * (step % 15) / 15, abs=2)
    assert height(40) == 0


def test_the_heat_map_is_hottest_where_most_is_read(story: Story) -> None:
    call = story.calls[6]
    most = max(float(call.reads.max()) for call in story.calls)
    picture = heat(np.full((96, 128, 3), 50, np.uint8), call.reads, most).reshape(3, 32, 4, 32, 3)
    assert not np.ptp(picture, (1, 3)).any()  # a token has one colour
    brightness = picture[:, 0, :, 0].sum(-1).ravel()
    assert brightness.argmax() == call.reads.argmax() == 6
    hottest = heat(np.full((96, 128, 3), 50, np.uint8), np.eye(12)[6], 1.0)[40, 70]
    np.testing.assert_allclose(hottest, VEIL * RAMP[-1] + (1 - VEIL) * 50, atol=0.6)
    page = draw(story, {}, 32)  # call 6 was at step 30
    corners = page[TOP + CAPTION + 4 : TOP + CAPTION + PANEL[1] : 60, RIGHT_PANEL + 4 : RIGHT_PANEL + PANEL[0] : 60]
    assert corners.shape == (3, 4, 3) and corners.sum(-1).argmax() == 6


def test_without_routing_the_plan_is_shown_as_it_is(story: Story) -> None:
    plain = dataclasses.replace(story, calls=tuple(dataclasses.replace(call, reads=None) for call in story.calls))
    page = draw(plain, {}, 38)
    middle = TOP + CAPTION + PANEL[1] // 2
    assert (page[middle, RIGHT_PANEL + 120] == 2 * 30).all()  # the frame of step 30
    assert (page[middle, LEFT_PANEL + 120] == 2 * 38).all()  # the frame of now


def test_planned_and_measured_joints(story: Story) -> None:
    """Up to now what was measured; ahead only what the newest call planned: its rest of 5 steps, then the other 5."""
    assert most_moved(story.states) == [2, WRIST, 13]
    page, empty = draw(story, {}, 38), near(draw(story, {}, 2), (255, 255, 255))

    def inked(colour: tuple[int, int, int]) -> np.ndarray:
        """Columns of the joints' charts with the colour."""
        return np.flatnonzero((near(page, colour) & empty)[JOINTS : JOINTS + 60].any(0))

    assert column(34, ROWS) < inked(RUN).max() <= column(40, ROWS) + 2
    assert column(43, ROWS) < inked(REPLACED).max() <= column(45, ROWS) + 2
    measured = inked(INK)
    assert abs(measured.max() - column(38, ROWS)) <= 3
    assert near(page[JOINTS + 5, round(column(38, ROWS))], FAINT)  # the cursor


def test_what_was_expected_stands_beside_what_came(story: Story) -> None:
    pictures = tuple(np.full((96, 128, 3), value, np.uint8) for value in (201, 101))
    page = draw(story, {15: pictures}, 28)
    row = TOP + 2 * CAPTION + PANEL[1] + 38 + 90
    assert (page[row, LEFT_PANEL + 120] == 201).all() and (page[row, RIGHT_PANEL + 120] == 101).all()
    other = draw(story, {15: pictures}, 30)
    assert (other[row, [LEFT_PANEL + 120, RIGHT_PANEL + 120]] == 255).all()  # of another plan


def test_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a robot of 5 state and 3 action numbers, but the simulated one has 14 of"):
        check_fits(SimpleNamespace(embodiment=Embodiment.as_recorded(5, 3)))
    for argv, said in (
        (["--out", "x.gif"], "--out is x.gif; expected a name that ends in .mp4"),
        (["--seed", "-1"], "--seed is -1; expected 0, 1,"),
        ([], "holds no checkpoint; expected a workdir"),
    ):
        with pytest.raises(SystemExit, match=said):
            film.main([str(tmp_path / "nothing"), *argv])


@pytest.mark.slow
@needs_drawing
def test_a_film_of_the_simulation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_device: None
) -> None:
    """Three of four actions are run a call; the rollout is the one that the policy makes alone."""
    stories = []

    def short(*args: object) -> Story:
        stories.append(watch(*args, rows=14))
        return stories[0]

    monkeypatch.setattr(film, "watch", short)
    film.main([str(run), "--task", "react", "--seed", "5", "--refresh-every", "2", "--out", str(tmp_path / "f.mp4")])
    with av.open(str(tmp_path / "f.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 7
    assert Image.open(tmp_path / "f.png").size == SIZE
    (story,) = stories
    assert [(call.row, call.planned_at) for call in story.calls] == [(0, 0), (3, 0), (6, 6), (9, 6), (12, 12)]
    assert sorted(story.scenes) == [2, 4, 6, 8, 10, 12, 14] and len(story.states) == len(story.canvases) == 15
    assert all(call.reads.sum() == pytest.approx(1, rel=1e-5) for call in story.calls)

    policy = Policy.load(run, refresh_every=2)
    state = policy.start([TASKS["react"].instruction])
    with ParallelSims("react", [5], 1) as sims:
        for call in story.calls:
            robot_state, images = sims.observe()
            np.testing.assert_array_equal(robot_state[0], story.states[call.row])
            observation = policy.encode(images, robot_state, 1)
            actions, state = policy(images, robot_state, state)
            where = look(policy, state, observation).layers  # tests of the analysis compute it by hand
            np.testing.assert_allclose(call.reads.reshape(where.shape[-2:]), where.mean((0, 1, 2)), rtol=1e-5)
            np.testing.assert_array_equal(actions[0], call.actions)
            sims.run(actions[:, :3])

    guesses = film.imagined(run, story.canvases, story.refreshes, TASKS["react"].instruction)
    assert sorted(guesses) == [0, 6, 12]
    after = jnp.float32(story.canvases[[6, 7, 8, 9, 10]])[None] / 127.5 - 1  # a video frame a step
    came = BlockTransform().decode(BlockTransform().encode(after))[0, 1]
    assert np.abs(guesses[6][1] - (np.asarray(came) + 1) * 127.5).max() < 0.51
    assert guesses[6][0].shape == story.canvases.shape[1:] and np.ptp(guesses[6][0]) > 0
