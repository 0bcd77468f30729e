"""Figures show the numbers that they are given, under a sentence that says what to see."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from ahawam_jax.analysis import figures
from ahawam_jax.analysis.ageing import Ageing, ChunkAgeing
from ahawam_jax.analysis.imagining import PredictionError
from ahawam_jax.analysis.probing import PARTS
from ahawam_jax.analysis.reading_out import KINDS, ReadOut
from ahawam_jax.analysis.routing import Look, Movement

LAYERS, HEADS, QUERIES, PLANS, AGES = 7, 2, 3, 4, (0, 4, 8)
rng = np.random.default_rng(0)
CLIP = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
LOOK = Look(np.full((QUERIES, 4, 4), 1 / 16), rng.random((LAYERS, QUERIES, HEADS, 2, 2)))
MOVED = [Movement(*rng.random((3, LAYERS, 2)), np.zeros((LAYERS, 2, 2, 2))) for _ in range(PLANS)]
MOVED = [Movement(x.gate[:, 0], x.norm, x.cosine, x.where) for x in MOVED]
AGED = Ageing(np.array(AGES), *rng.random((3, PLANS, len(AGES), LAYERS, 2)), rng.random((PLANS, LAYERS, 2)))
CHUNKS = ChunkAgeing(np.array(AGES), *rng.random((3, PLANS, len(AGES))))
CHANGES = rng.random((PLANS, len(PARTS), 5))
MASS = np.full((PLANS, LAYERS, HEADS, 3), 1 / 3)
READ = ReadOut({kind: rng.random((LAYERS, len(AGES))) for kind in KINDS}, rng.random(len(AGES)))
DRAWN = {
    "look": figures.draw_look(*CLIP, LOOK),
    "movement": figures.draw_movement(MOVED),
    "ageing": figures.draw_ageing(AGED, CHUNKS, 4),
    "by layer": figures.draw_ageing_by_layer(AGED),
    "probe": figures.draw_probe(CHANGES, 8),
    "memory": figures.draw_memory(MASS, range(PLANS)),
    "predictions": figures.draw_predictions(CLIP, CLIP, PredictionError(np.ones(1), np.ones(1)), 8),
    "read-out": figures.draw_read_out(READ, AGES, range(LAYERS)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_to_see(name: str) -> None:
    said = DRAWN[name].get_suptitle()
    assert said.startswith("What to see: ") and said.endswith("."), said


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in figure.axes[panel].lines}


def test_they_show_their_numbers() -> None:
    panels = DRAWN["look"].axes
    assert [panel.get_title() for panel in panels[2:-1]] == [f"layer {i}" for i in (1, 3, 4, 5, 7)]
    np.testing.assert_allclose(panels[1].images[1].get_array(), 1)  # looking everywhere alike
    for panel, shown in zip(panels[1:3], CLIP, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), shown.mean(-1))
    np.testing.assert_allclose(panels[3].images[1].get_array(), 4 * LOOK.layers[2].mean((0, 1)))
    curves = lines(DRAWN["ageing"], 1)
    np.testing.assert_allclose(curves["routed, old to fresh"], AGED.routed[..., 1].mean((0, 2)))
    np.testing.assert_allclose(lines(DRAWN["ageing"], 2)["router sees the new one"], CHUNKS.seeing.mean(0))
    heights = [bar.get_height() for bar in DRAWN["by layer"].axes[0].patches]
    np.testing.assert_allclose(heights[2], 1 - AGED.routed[:, 2, 2, 0].mean() / AGED.stale[:, 2, 2, 0].mean())
    np.testing.assert_allclose(lines(DRAWN["probe"], 1)["state"], CHANGES[:, 3].mean(0))
    np.testing.assert_allclose(lines(DRAWN["memory"], 1)["1 back"], 1 / 3)
    np.testing.assert_allclose(lines(DRAWN["read-out"], 2)["layer 3"], READ.contexts["fresh"][2])
    np.testing.assert_allclose(lines(DRAWN["movement"], 0)["V"], np.mean([x.norm[:, 1] for x in MOVED], 0))
