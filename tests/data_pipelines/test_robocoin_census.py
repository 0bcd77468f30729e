"""Every naming of the census, from the folder as published to a policy that answers in the robot's own vector."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.embodiment import Embodiment
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.subset import Entry, load_subset
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines.synthetic_robocoin import KEYS, SCHEMAS, UNSEEN, Synthetic, census

ARMS = LAYOUTS["two_arms"].names
# What a robot records of its grippers where that is not 0 closed and 1 open, and the file has to say it.
UNITS = {
    "Agilex_Cobot_Magic": {"state_gripper": (0.0, 10.0), "action_gripper": (0.0, 10.0)},
    "galaxea_r1_lite": {"state_gripper": (0.0, 100.0), "action_gripper": (0.0, 100.0)},
    "Galaxea_R1_Lite": {"state_gripper": (0.0, 100.0), "action_gripper": (0.0, 100.0)},
    "ruantong_a2d": {"state_gripper": (120.0, 35.0), "action_gripper": (1.0, 0.0)},
    "yinhe": {"state_gripper": ((0.05, 0.1), (-1.2, 1.3)), "action_gripper": ((0.05, 0.1), (-1.2, 1.3))},
}


@pytest.fixture(scope="module")
def published(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Synthetic, Path]]:
    """A dataset of every naming: schema -> (what is in it, folder)."""
    folder, made = tmp_path_factory.mktemp("robocoin"), {}
    for record in [*census(shared_dir), *UNSEEN.values()]:
        dataset = Synthetic(record, (100, 90), **UNITS.get(record["robot_type_in_info"], {}))
        made[record["schema"]] = dataset, dataset.write(folder / record["schema"])
    return made


def entry(published: Mapping[str, tuple[Synthetic, Path]], schema: str, **more: Any) -> Entry:
    """The dataset as a subset file names it, with the unit of its grippers."""
    made, root = published[schema]
    unit = {kind: dict(zip(("closed", "open"), getattr(made, f"{kind}_gripper"), strict=True)) for kind in KEYS}
    table = {"name": schema, "path": root.name, "weight": 1.0, "robot": schema, "gripper": unit} | more
    path = root.parent / f"{schema}.toml"
    path.write_text("\n".join(["[[dataset]]", *(f"{key} = {_toml(value)}" for key, value in table.items())]))
    (found,) = load_subset(path)
    return found


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(x)}' for key, x in value.items())} }}"
    return json.dumps(value)


def expected(made: Synthetic, kind: str, episode: int) -> np.ndarray:
    """State or action in the layout two_arms, from what was recorded under each name, [T, 16]."""
    names, rows = made.names(kind), np.zeros((made.lengths[episode], 16))
    for place, name in enumerate(ARMS):
        side, own = name.partition("_")[0], name.replace("_open_scale", "_open")
        if own in names:
            rows[:, place] = made.opening(side, kind, episode) if own != name else made.value(own, kind, episode)
    return rows


@pytest.mark.parametrize("schema", [*SCHEMAS, *UNSEEN])
def test_numbers_go_to_the_layout_and_back(published: dict[str, tuple[Synthetic, Path]], schema: str) -> None:
    """Joints are the recorded float32. An opening is as exact as float32 holds what was recorded, of UNITS at most
    1.5 times the way from closed to open, and then itself."""
    made, _ = published[schema]
    dataset = entry(published, schema, layout="two_arms").open()
    assert dataset.state_names == dataset.action_names == ARMS
    joints = np.array(["joint" in name for name in ARMS])
    for episode in range(2):
        for kind, read in (("state", dataset.states), ("action", dataset.actions)):
            rows, wanted = read(episode), expected(made, kind, episode)
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows[:, joints], wanted[:, joints].astype(np.float32))
            np.testing.assert_allclose(rows, wanted, rtol=0, atol=2 * np.finfo(np.float32).eps)
    _answers_as_recorded(made, dataset.embodiment, dataset.actions(1))


def _answers_as_recorded(made: Synthetic, embodiment: Embodiment, actions: np.ndarray) -> None:
    """What is driven comes out as recorded, what is held as the state of that name, what has no name as NaN."""
    own, state = made.rows("action", 1), made.rows("state", 1)
    back = embodiment.act(actions[:, None], state)[:, 0]
    names, known = made.names("action"), made.names("state")
    assert back.shape == own.shape and back.dtype == np.float32
    for place, name in enumerate(names):
        if name.replace("_open", "_open_scale") in ARMS or name in ARMS:
            # float32 twice: in the layout and in the robot's own unit
            np.testing.assert_allclose(back[:, place], own[:, place], rtol=3e-7, atol=3e-5 if "open" in name else 0)
        elif name in known and name[0] != "#":
            assert name in embodiment.held
            np.testing.assert_array_equal(back[:, place], state[:, known.index(name)])
        else:
            assert name in embodiment.held and np.isnan(back[:, place]).all()


@pytest.mark.parametrize("schema", [*SCHEMAS, *UNSEEN])
def test_views_are_the_recorded_cameras_or_black(published: dict[str, tuple[Synthetic, Path]], schema: str) -> None:
    made, _ = published[schema]
    dataset = entry(published, schema, layout="two_arms").open()
    assert [*dataset.cameras] == ["cam_high", "cam_left_wrist", "cam_right_wrist"]
    for view in dataset.cameras:
        pictures = dataset.frames(1, view, [0, 41, 89])
        if view in dataset.embodiment.absent:
            assert not pictures.any()
        else:
            assert [tiny.number_of(picture) for picture in pictures] == [0, 41, 89]
    sides = {side for side in ("left", "right") if any(side in camera for camera in made.record["cameras"])}
    assert len(dataset.embodiment.absent) == 2 - len(sides)
