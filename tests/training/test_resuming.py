"""A run goes on with the data and the config it began with: what has changed is named, and may be accepted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.commands.inspect import inspect_checkpoint
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import build_text_tower, build_video_tower
from ahawam_jax.training import loop, sharding
from ahawam_jax.training.data import Data, open_data
from ahawam_jax.training.loop import train
from ahawam_jax.training.optimizer import OptimizerConfig, learning_rate
from ahawam_jax.training.resuming import Record, check_config, check_length, read_record, steps_of
from ahawam_jax.training.step import TrainState
from tests.data_pipelines import tiny_dataset as tiny
from tests.tiny_config import get_config


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("recorded") / "set", "v2.1")


@pytest.fixture
def dataset(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "set")


@pytest.fixture
def config(dataset: Path) -> ConfigDict:
    config = get_config()
    config.data.update(path=str(dataset), cache="")
    config.mesh.update(data=1, fsdp=8)  # all of the virtual devices
    return config


def opened(config: ConfigDict, before: Record | None = None, accepted: bool = False) -> Data:
    """The data of a run, as training opens them."""
    model = ModelConfig.create(config.model)
    tower = build_video_tower(config.towers, model, sharding.replicated(sharding.make_mesh(config.mesh)))
    return open_data(config, model, build_text_tower(config.towers, model), tower, before, accepted)


def record_of(config: ConfigDict) -> Record:
    """What a checkpoint of step 5 would say, read back from JSON."""
    content = {"config": json.loads(config.to_json()), "data_position": {"batches": 5}, "steps": config.train.steps}
    return json.loads(json.dumps(content | opened(config).record))


# ---------------------------------------------------------------- changed data
def scale(key: str, factor: float, *episodes: int) -> Callable[[Path], None]:
    """Multiplies a vector of some episodes, in place."""

    def change(root: Path) -> None:
        for episode in episodes:

            def scaled(values: list) -> pa.Array:
                x = (factor * np.array(values, np.float32)).astype(np.float32)
                return pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1])

            tiny.change_column(tiny.data_path(root, episode), key, scaled)

    return change


def other_instruction(root: Path) -> None:
    path = root / "meta/tasks.jsonl"
    path.write_text(path.read_text().replace("open the drawer", "open it"))


def other_video(root: Path) -> None:
    images = [tiny.picture(7, tiny.CAMERAS["cam_high"])] * tiny.LENGTHS[1]
    tiny.write_video(tiny.video_path(root, "cam_high", 1), images)


def other_bytes(root: Path) -> None:
    """A file of the same size."""
    path = tiny.video_path(root, "cam_high", 1)
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))


def renumbered(order: tuple[int, ...]) -> Callable[[Path], None]:
    """Episode i becomes what episode order[i] was; the order may be shorter or repeat."""

    def change(root: Path) -> None:
        copy = shutil.copytree(root, root.with_name("copy"))
        lines = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
        for episode in range(len(lines)):
            for path in (tiny.data_path(root, episode), *(tiny.video_path(root, c, episode) for c in tiny.CAMERAS)):
                path.unlink()
        for new, old in enumerate(order):
            pairs = [(tiny.data_path(copy, old), tiny.data_path(root, new))]
            pairs += [(tiny.video_path(copy, c, old), tiny.video_path(root, c, new)) for c in tiny.CAMERAS]
            for source, target in pairs:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
            tiny.change_column(
                tiny.data_path(root, new), "episode_index", lambda values, new=new: pa.array([new] * len(values))
            )
        written = [lines[old] | {"episode_index": new} for new, old in enumerate(order)]
        (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        rows = sum(line["length"] for line in written)
        tiny.change_info(root, total_episodes=len(order), total_frames=rows)
        shutil.rmtree(copy)

    return change


CHANGES = {
    "actions": (scale("action", 10, 0, 1, 2), "the actions changed in 3 of its 3 episodes, first in episode 0"),
    "one action": (scale("action", 1.0001, 1), "the actions changed in 1 of its 3 episodes, first in episode 1"),
    "held-out states": (
        scale("observation.state", 2, 2), "the states changed in 1 of its 3 episodes, first in episode 2",
    ),
    "instruction": (
        other_instruction,
        "the instruction changed in 1 of its 3 episodes, first in episode 1 ('open the drawer' then, 'open it' now)",
    ),
    "order": (renumbered((0, 2, 1)), "its episodes are in another order, from episode 1 on"),
    "added": (renumbered((0, 1, 2, 0)), "it has 4 episodes, had 3; the former ones unchanged"),
    "removed": (renumbered((0, 2)), "it has 2 episodes, had 3; another one from episode 1 on"),
    "video": (other_video, "the pictures of cam_high changed in 1 of its 3 episodes, first in episode 1"),
    "same size": (other_bytes, "the pictures of cam_high changed in 1 of its 3 episodes, first in episode 1"),
    "robot": (lambda root: tiny.change_info(root, robot_type="other"), "its robot was 'tiny', is 'other'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_are_named_and_may_be_accepted(
    config: ConfigDict, dataset: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    change, sentence = CHANGES[name]
    before = record_of(config)
    change(dataset)
    with pytest.raises(ValueError, match="not those that this run was trained on") as refused:
        opened(config, before)
    assert f"{dataset}: {sentence}" in str(refused.value) and "--accept-changed-data" in str(refused.value)
    data = opened(config, before, accepted=True)
    assert sentence in capsys.readouterr().out
    assert data.record["accepted"][0]["step"] == 5 and sentence in str(data.record["accepted"][0]["changes"])
    for kind in ("state", "action"):  # what is learned so far is in their units
        for value, kept in data.record["statistics"]["tiny"][kind].items():
            assert kept == before["statistics"]["tiny"][kind][value]
    after = before | json.loads(json.dumps(data.record))
    assert opened(config, after).record["accepted"] == data.record["accepted"]  # nothing new to say


def test_what_no_window_shows_may_change(config: ConfigDict, dataset: Path, tmp_path: Path) -> None:
    """Where it lies, other metadata, links in place of files, and with the head alone the wrists."""
    config.data.single_view = True
    before = record_of(config)
    moved = dataset.rename(tmp_path / "moved")
    config.data.path = str(moved)
    info = moved / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"note": "checked"}, indent=4))
    (moved / "videos").rename(tmp_path / "videos")
    (moved / "videos").symlink_to(tmp_path / "videos")
    tiny.video_path(moved, "cam_left_wrist", 1).write_bytes(b"another")
    assert opened(config, before).record["accepted"] == []


def test_the_statistics_are_those_of_the_record(config: ConfigDict) -> None:
    """Not computed anew: whatever computes them now, the run goes on in its units."""
    before = record_of(config)
    before["statistics"]["tiny"]["action"]["std"][0] = 123.0
    assert opened(config, before).statistics["tiny"]["action"]["std"][0] == 123.0


@pytest.mark.parametrize(
    ("order", "train", "held_out"),
    [((0, 1, 2, 0), [0, 1, 3], [2]), ((2, 0, 1), [1, 2], [0]), ((2, 0), [1], [0]), ((0, 1), [0, 1], None)],
)
def test_held_out_episodes_stay_so(
    config: ConfigDict, dataset: Path, order: tuple[int, ...], train: list[int], held_out: list[int] | None
) -> None:
    """Where the held-out episode is gone, none that was trained on replaces it."""
    before = record_of(config)
    renumbered(order)(dataset)
    data = opened(config, before, accepted=True)
    assert data.train[0].episodes == train
    assert [source.episodes for source in data.validation] == ([] if held_out is None else [held_out])
    again = opened(config, before | data.record)  # as accepted, without a word
    assert again.train[0].episodes == train and again.record["data"] == data.record["data"]


def test_an_episode_in_the_place_of_a_held_out_one(config: ConfigDict, dataset: Path) -> None:
    """With other rows it is the same episode; one that was trained on is not."""
    before = record_of(config)
    before["data"][0]["held_out"] = [0]
    scale("action", 2, 0)(dataset)
    assert opened(config, before, accepted=True).validation[0].episodes == [0]
    renumbered((1, 2))(dataset)
    assert not opened(config, before, accepted=True).validation


def test_another_split(config: ConfigDict) -> None:
    before = record_of(config)
    config.data.validation_episodes = 2
    check_config(before, config, Path("run"))
    with pytest.raises(ValueError, match="1 episodes were held out of training, now 2 are to be"):
        opened(config, before)
    assert opened(config, before, accepted=True).validation[0].episodes == [1, 2]


def test_towers_that_changed(config: ConfigDict) -> None:
    before = record_of(config)
    before["towers"]["text"]["open the drawer"] += 1
    before["towers"]["video"] += "!"
    with pytest.raises(ValueError) as refused:
        opened(config, before)
    assert "the text tokens of 1 of 2 instructions are others" in str(refused.value)
    assert "the video tower has other weights" in str(refused.value)


# ---------------------------------------------------------------- instructions
@pytest.mark.parametrize("text", ["", "more words than the text tower takes " * 9])
def test_a_task_that_no_episode_has(config: ConfigDict, dataset: Path, text: str) -> None:
    """It need not even be a text that can be encoded."""
    expected = opened(config)
    path = dataset / "meta/tasks.jsonl"
    texts = [text, *(json.loads(line)["task"] for line in path.read_text().splitlines())]
    path.write_text("".join(json.dumps({"task_index": i, "task": text}) + "\n" for i, text in enumerate(texts)))
    for episode in range(3):
        tiny.change_column(
            tiny.data_path(dataset, episode), "task_index", lambda values: pa.array([1 + value for value in values])
        )
    data = opened(config)
    assert data.record["instructions"] == expected.record["instructions"] == ["close the drawer", "open the drawer"]
    for episode in range(3):
        own, other = (x.context([x.train[0].dataset.instruction_index(episode)]) for x in (data, expected))
        np.testing.assert_array_equal(own["context"], other["context"])


# ---------------------------------------------------------------- the config
def test_which_fields_may_change(config: ConfigDict) -> None:
    record = {"config": json.loads(config.to_json())}
    config.train.update(log_every=7, steps=0, epochs=3.0)
    config.data.update(path="elsewhere", cache="x", workers=2)
    config.policy.steps = 4
    config.mesh.fsdp = 1
    config.model.initial_gate = 0.0
    check_config(record, config, Path("run"))
    config.data.head_size = (32, 32)
    config.optimizer.warmup_fraction = 0.1
    config.seed = 3
    with pytest.raises(ValueError) as refused:
        check_config(record, config, Path("run"))
    lines = str(refused.value).split("\n  ")
    assert "of which only train.log_every" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["data.head_size", "optimizer.warmup_fraction", "seed"]


def test_an_import_is_no_run(tmp_path: Path) -> None:
    class Imported:
        latest, folder = 0, tmp_path / "wan/checkpoints"

        def restore_run(self, step: int) -> dict:
            return {"config": {}, "instructions": []}

    with pytest.raises(ValueError, match=f"parameters alone.*--config.init={tmp_path / 'wan'}"):
        read_record(Imported())


# ---------------------------------------------------------------- the length
@pytest.mark.parametrize(
    ("given", "steps"),
    [(dict(steps=7, epochs=0.0), 7), (dict(steps=0, epochs=2.0), 16), (dict(steps=0, epochs=0.5), 4)],
)
def test_steps_or_epochs(config: ConfigDict, capsys: pytest.CaptureFixture, given: dict, steps: int) -> None:
    """63 windows, 8 a step: two epochs are 15.75 steps."""
    config.train.update(given)
    optimizer = OptimizerConfig(warmup_steps=0, warmup_fraction=0.25)
    assert steps_of(config.train, 63, 8, optimizer) == steps
    said = f"{given['epochs']:g} epochs of 63 windows, 8 a step: {steps} steps, {steps // 4} of them warm-up"
    assert (said in capsys.readouterr().out) == bool(given["epochs"])


@pytest.mark.parametrize("given", [dict(steps=7, epochs=1.0), dict(steps=0, epochs=0.0), dict(steps=-1, epochs=0.0)])
def test_neither_or_both_of_steps_and_epochs(config: ConfigDict, given: dict) -> None:
    config.train.update(given)
    with pytest.raises(ValueError, match="give one of them, and 0 for the other"):
        steps_of(config.train, 63, 8, OptimizerConfig())


def test_warm_up_as_a_share_of_the_steps() -> None:
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, warmup_fraction=0.05), 200)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 5, 10)], [0, 0.5, 1], atol=1e-6)  # float32
    with pytest.raises(ValueError, match="warmup_steps is 3 and warmup_fraction 0.1: give one"):
        OptimizerConfig(warmup_steps=3, warmup_fraction=0.1)
    with pytest.raises(ValueError, match="warmup_fraction is 1, expected"):
        OptimizerConfig(warmup_steps=0, warmup_fraction=1.0)


def test_another_length_says_what_the_learning_rate_does(capsys: pytest.CaptureFixture) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, final_fraction=0.1, warmup_steps=0)
    record = {"steps": 10, "data_position": {"batches": 10}}
    check_length(record, 10, optimizer)
    assert capsys.readouterr().out.startswith("The run of 10 steps is finished; more in config.train.steps")
    check_length(record, 20, optimizer)
    assert "From step 10 on the learning rate is that of a run of 20 steps: 0.55, where" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has reached step 10, config.train asks for 9"):
        check_length(record, 9, optimizer)


# ---------------------------------------------------------------- a whole run
def test_a_run_on_changed_data(
    config: ConfigDict, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Refused, then accepted and made longer; the record goes on, and the same command without the flag as well."""
    workdir = tmp_path / "run"
    config.data.validation_episodes = 0

    # In place of the model, which takes long to compile.
    def initial_state(model, tx, key, ema, mesh, checkpoints, *_):
        state = TrainState(jnp.array(checkpoints.latest or 0), {"kernel": jnp.zeros(2)}, (), None)
        layout = jax.tree.map(lambda _: sharding.replicated(mesh), state)
        return jax.device_put(state, layout), layout

    def count(state, batch, tower, key):
        metrics = ("loss", "loss_video", "loss_action", "skipped")
        return state.replace(step=state.step + 1), dict.fromkeys(metrics, jnp.zeros(()))

    monkeypatch.setattr(loop, "initial_state", initial_state)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: count)
    config.train.update(steps=1, checkpoint_every=1)
    train(config, workdir)
    kept = Checkpoints(workdir).restore_run(1)
    scale("action", 10, 0, 1, 2)(dataset)
    config.train.steps = 2
    with pytest.raises(ValueError, match="the actions changed in 3 of its 3 episodes"):
        train(config, workdir)
    assert Checkpoints(workdir).latest == 1
    train(config, workdir, accept_changed_data=True)
    grown = Checkpoints(workdir).restore_run(2)
    assert grown["statistics"] == kept["statistics"] and grown["steps"] == 2 and grown["config"]["train"]["steps"] == 2
    assert [change["step"] for change in grown["accepted"]] == [1]
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    train(config, workdir)
    capsys.readouterr()
    inspect_checkpoint(workdir, None, values=False)
    page = capsys.readouterr().out
    assert f"  data: {dataset}, 3 episodes of 94 rows together, 25 a second; 0 held out\n" in page
    assert f"  data changed after step 1: {dataset}: the actions changed in 3 of its 3 episodes" in page
    config.train.steps = 1
    with pytest.raises(ValueError, match="has reached step 2, config.train asks for 1"):
        train(config, workdir)
