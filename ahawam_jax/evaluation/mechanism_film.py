"""The film of a rollout watched from inside: what planner, router and executor do, on one page per frame."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ahawam_jax.evaluation.mechanism import Call, Story
from data_pipelines.simulation.env import FPS, STATE_NAMES
from data_pipelines.simulation.tasks import TASKS

SIZE = (1024, 840)  # width, height in pixels of a page
MARGIN, GAP, CAPTION = 16, 16, 20  # pixels
SCENE = (480, 240)  # width, height of the scene's frame
PANEL = (240, 180)  # of a canvas, at most
TOP = 48  # of the captions of the first line of pictures
BELOW = TOP + CAPTION + PANEL[1] + 38  # of those of the second, under the scale of colours
LEFT, RIGHT = 120, SIZE[0] - 24  # of the charts, from the first control step to the last
TEETH, TOOTH = 520, 40  # top and height of the chart of the plan's age
JOINTS, JOINT, APART = TEETH + TOOTH + 30, 66, 10  # top of the first joint's chart, height of each, pixels between
SHOWN = 3  # joints
FINER = 2  # charts are drawn so much larger and shrunk
INK, FAINT, GRID = (33, 37, 41), (110, 117, 125), (222, 226, 230)
REFRESH, AGED = (226, 93, 0), (255, 217, 178)
RUN, REPLACED = (30, 100, 200), (170, 200, 240)  # actions that are run, and those that a newer chunk replaces
RAMP = np.array([[10, 10, 60], [120, 30, 130], [235, 85, 60], [255, 235, 90]], float)  # of the heat map, from 0
VEIL = 0.62  # strength of the heat map over the picture

Line = Callable[[Sequence[tuple[float, float]], tuple[int, int, int], float], None]  # points, colour, pixels
Guesses = Mapping[int, tuple[np.ndarray, np.ndarray]]  # of a refresh: what the planner expects, and what came


def draw(story: Story, guesses: Guesses, row: int) -> np.ndarray:
    """The page of a control step that has a scene: uint8 [840, 1024, 3].

    guesses: by the control step of a refresh, uint8 [H, W, 3] each. What lies after `row` is not drawn.
    """
    page = Image.new("RGB", SIZE, "white")
    call, pen = story.call_at(row), ImageDraw.Draw(page)
    _head(pen, story, row)
    _words(pen, (MARGIN, TOP), "the scene, from a camera that no policy sees", INK)
    page.paste(_fitted(story.scenes[row], SCENE), (MARGIN, TOP + CAPTION))
    _key(pen, story, (MARGIN, TOP + CAPTION + SCENE[1] + GAP))
    first, second = (MARGIN + SCENE[0] + GAP + i * (PANEL[0] + GAP) for i in (0, 1))
    _words(pen, (first, TOP), "now: what the executor sees", RUN)
    page.paste(_fitted(story.canvases[row], PANEL), (first, TOP + CAPTION))
    _words(pen, (second, TOP), f"the plan's frame, {story.age(row)} steps old", REFRESH)
    _read(page, pen, story, call, (second, TOP + CAPTION))
    _guess(page, pen, guesses.get(call.planned_at), story.foresight / FPS, (first, second))
    page.paste(_charts(story, row), (0, TEETH - 24))
    _labels(pen, story)
    return np.asarray(page)


def column(row: float, rows: int) -> float:
    """Pixel of a control step in the charts."""
    return LEFT + (RIGHT - LEFT) * row / rows


def most_moved(states: np.ndarray) -> list[int]:
    """The numbers of a state, [R, m], whose range is greatest, in their order."""
    return sorted(np.argsort(-np.ptp(states, 0), kind="stable")[:SHOWN].tolist())


def heat(canvas: np.ndarray, reads: np.ndarray, most: float) -> np.ndarray:
    """A canvas uint8 [H, W, 3] under the colours of what is read of its tokens, [S]: uint8 [H, W, 3].

    Tokens are squares, in rows from the top left. Colours go from 0 to `most`.
    """
    grid = _grid(canvas, reads)
    colours = _ramp(grid / most)
    for axis in (0, 1):
        colours = colours.repeat(canvas.shape[axis] // grid.shape[axis], axis)
    grey = canvas.mean(-1, keepdims=True)
    return (VEIL * colours + (1 - VEIL) * grey).round().astype(np.uint8)


def _grid(canvas: np.ndarray, reads: np.ndarray) -> np.ndarray:
    side = round((canvas.shape[0] * canvas.shape[1] / len(reads)) ** 0.5)  # pixels of a token
    return reads.reshape(canvas.shape[0] // side, canvas.shape[1] // side)


def _ramp(x: np.ndarray) -> np.ndarray:
    """Colours float [..., 3] of numbers from 0 to 1."""
    at = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(x, at, part) for part in RAMP.T], -1)


def _most(story: Story) -> float:
    """The greatest share that any token has in the whole film."""
    return max((float(call.reads.max()) for call in story.calls if call.reads is not None), default=1.0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _words(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: tuple[int, int, int], size: int = 14,
    anchor: str = "la",
) -> None:  # fmt: skip
    pen.text(at, text, colour, _font(size), anchor)


def _fitted(picture: np.ndarray, box: tuple[int, int]) -> Image.Image:
    """As large as goes into a box of this width and height."""
    height, width = picture.shape[:2]
    scale = min(box[0] / width, box[1] / height)
    return Image.fromarray(picture).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _head(pen: ImageDraw.ImageDraw, story: Story, row: int) -> None:
    task = TASKS[story.task]
    _words(pen, (MARGIN, 10), f"{story.task.replace('_', ' ')}, seed {story.seed}", INK, 22)
    told = f"{row / FPS:.1f} s, step {row} of {story.rows}, stage {story.stages[row]} of {task.greatest}"
    _words(pen, (SIZE[0] - MARGIN, 8), told, INK, 15, "ra")
    _words(pen, (SIZE[0] - MARGIN, 27), f'"{task.instruction}"', FAINT, 13, "ra")


def _key(pen: ImageDraw.ImageDraw, story: Story, at: tuple[int, int]) -> None:
    """What the colours mean."""
    every = "at every call" if story.refresh_every == 1 else f"every {story.refresh_every} calls"
    lines = (
        (REFRESH, f"Planner: looks {every}, at the orange marks below."),
        (AGED, "The teeth under the marks: how old its frame is."),
        (tuple(RAMP[2].astype(int)), "Router: fits the plan to the picture of now. The colours"),
        (None, "say where it reads the plan's frame; 1.0 is evenly."),
        (RUN, f"Executor: plans {len(story.calls[0].actions)} actions a call. {story.execute} of them are run;"),
        (REPLACED, "the rest is replaced by the next call."),
        (INK, "Measured: where the joints really were."),
    )
    for i, (colour, text) in enumerate(lines):
        top = at[1] + 24 * i
        if colour is not None:
            pen.rectangle((at[0], top, at[0] + 13, top + 13), colour)
        _words(pen, (at[0] + 22, top), text, INK)


def _read(page: Image.Image, pen: ImageDraw.ImageDraw, story: Story, call: Call, at: tuple[int, int]) -> None:
    """The plan's frame, what the router reads of it, and the scale of its colours."""
    canvas = story.canvases[call.planned_at]
    if call.reads is None:
        page.paste(_fitted(canvas, PANEL), at)
        _words(pen, (at[0], at[1] + PANEL[1] + 4), "routing is off: it is taken as it is", FAINT, 13)
        return
    most, grid = _most(story), _grid(canvas, call.reads)
    picture = _fitted(canvas, PANEL)
    height, width = picture.height // grid.shape[0], picture.width // grid.shape[1]
    veiled = np.asarray(picture.resize((width * grid.shape[1], height * grid.shape[0])))
    page.paste(Image.fromarray(heat(veiled, call.reads, most)), at)
    if min(height, width) >= 28:
        for (y, x), share in np.ndenumerate(grid):
            centre = at[0] + (x + 0.5) * width, at[1] + (y + 0.5) * height
            pen.text(centre, f"{share * grid.size:.1f}", "white", _font(14), "mm", stroke_width=2, stroke_fill="black")
    top, wide = at[1] + PANEL[1] + 4, PANEL[0]
    bar = _ramp(np.linspace(0, 1, wide))[None].repeat(8, 0).round().astype(np.uint8)
    page.paste(Image.fromarray(bar), (at[0], top))
    even = 1 / (most * grid.size)
    for share, label, anchor in ((0, "0", "la"), (even, "1", "ma"), (1, f"{1 / even:.1f} times evenly", "ra")):
        _words(pen, (at[0] + share * wide, top + 10), label, FAINT, 12, anchor)


def _guess(
    page: Image.Image, pen: ImageDraw.ImageDraw, guess: tuple[np.ndarray, np.ndarray] | None, seconds: float,
    lefts: Sequence[int],
) -> None:  # fmt: skip
    """What the planner expected beside what came."""
    captions = (f"expected in the {seconds:.1f} s after it", f"what came in those {seconds:.1f} s")
    for left, caption, colour, picture in zip(lefts, captions, (REFRESH, INK), guess or (None, None), strict=True):
        _words(pen, (left, BELOW), caption, colour)
        if picture is not None:
            page.paste(_fitted(picture, PANEL), (left, BELOW + CAPTION))


def _charts(story: Story, row: int) -> Image.Image:
    """The plan's age and the joints, up to `row` and as far as it is planned; from 24 pixels above TEETH on."""
    top = TEETH - 24
    chart = Image.new("RGB", (SIZE[0] * FINER, (SIZE[1] - top) * FINER), "white")
    pen = ImageDraw.Draw(chart)

    def at(step: float, y: float) -> tuple[float, float]:
        return FINER * column(step, story.rows), FINER * (y - top)

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float) -> None:
        if len(points) > 1:
            pen.line([at(*point) for point in points], colour, round(FINER * width), "curve")

    base = TEETH + TOOTH
    bottom = JOINTS + SHOWN * (JOINT + APART) - APART
    for second in range(int(story.rows / FPS) + 1):
        line([(second * FPS, TEETH), (second * FPS, bottom)], GRID, 0.5)
    for call, end in story.uses:
        if call.row <= row:
            sides = call.row, min(end, row)
            upper = [(step, base - TOOTH * (step - call.planned_at) / story.oldest) for step in sides]
            pen.polygon([at(*point) for point in [(sides[0], base), *upper, (sides[1], base)]], AGED)
    line([(0, base), (story.rows, base)], FAINT, 0.5)
    for step in (step for step in story.refreshes if step <= row):
        line([(step, TEETH), (step, base)], REFRESH, 1.5)
        x, y = at(step, TEETH)
        pen.polygon([(x, y + 2 * FINER), (x - 6 * FINER, y - 9 * FINER), (x + 6 * FINER, y - 9 * FINER)], REFRESH)
    for number, joint in enumerate(most_moved(story.states)):
        _joint(line, story, row, joint, JOINTS + number * (JOINT + APART))
    line([(row, TEETH), (row, bottom)], FAINT, 1)
    return chart.reduce(FINER)


def _joint(line: Line, story: Story, row: int, joint: int, top: float) -> None:
    """Measured up to `row`, and what each call until then planned."""
    low, high = _span(story, joint)

    def y(value: float) -> float:
        return top + JOINT * (high - float(np.clip(value, low, high))) / (high - low)

    for edge in (top, top + JOINT):
        line([(0, edge), (story.rows, edge)], GRID, 0.5)
    for own, colour in ((slice(story.execute - 1, None), REPLACED), (slice(story.execute), RUN)):
        for call in (call for call in story.calls if call.row <= row):
            points = [(call.row + 1 + i, y(value)) for i, value in enumerate(call.actions[:, joint])]
            line([point for point in points[own] if point[0] <= story.rows], colour, 3)
    line([(step, y(story.states[step, joint])) for step in range(row + 1)], INK, 1.5)


def _span(story: Story, joint: int) -> tuple[float, float]:
    """The values of a joint in the film, with some room."""
    run = [call.actions[: story.execute, joint] for call in story.calls]
    values = np.concatenate([story.states[:, joint], *run])
    room = 0.08 * max(float(np.ptp(values)), 1e-3)
    return float(values.min()) - room, float(values.max()) + room


def _labels(pen: ImageDraw.ImageDraw, story: Story) -> None:
    """Of the charts."""
    _words(pen, (MARGIN, TEETH + 2), "plan's age,\nsteps", REFRESH, 13)
    _words(pen, (LEFT - 6, TEETH - 4), str(story.oldest), FAINT, 12, "ra")
    _words(pen, (LEFT - 6, TEETH + TOOTH - 8), "0", FAINT, 12, "ra")
    for number, joint in enumerate(most_moved(story.states)):
        top, (low, high) = JOINTS + number * (JOINT + APART), _span(story, joint)
        name = STATE_NAMES[joint]
        unit = "0 shut, 1 open" if name.endswith("gripper") else "rad"
        side, part = name.split("_", 1)
        _words(pen, (MARGIN, top + 8), f"{side}\n{part.replace('_', ' ')}\n{unit}", INK, 12)
        _words(pen, (LEFT - 6, top - 4), f"{high:.1f}", FAINT, 11, "ra")
        _words(pen, (LEFT - 6, top + JOINT - 9), f"{low:.1f}", FAINT, 11, "ra")
    bottom = JOINTS + SHOWN * (JOINT + APART) - APART
    for second in range(int(story.rows / FPS) + 1):
        _words(pen, (column(second * FPS, story.rows), bottom + 4), f"{second} s", FAINT, 12, "ma")
