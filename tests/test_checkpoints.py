"""Checkpoints: whatever is damaged or cannot be written is said, with its file, its step and the way out."""

import importlib
import json
import shutil
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax import checkpoint_sums
from ahawam_jax import checkpoints as module
from ahawam_jax.checkpoint_keep import Keep
from ahawam_jax.checkpoint_sums import sums
from ahawam_jax.checkpoints import CheckpointError, Checkpoints, save_params
from ahawam_jax.commands.export_weights import export_checkpoint
from ahawam_jax.commands.import_weights import import_checkpoint
from ahawam_jax.commands.inspect import inspect_path
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.weights.tensors import WeightsError
from data_pipelines.disk import DiskError
from data_pipelines.ownership import OwnedError, owned
from tests.full_disk import files_end_at
from tests.tiny_config import get_config
from tests.tiny_model import random_params


@flax.struct.dataclass
class State:
    """What a train state has that checkpoints need; large enough that its arrays lie in files of their own."""

    step: jax.Array
    params: dict
    moments: tuple

    @property
    def deploy(self) -> dict:
        return self.params


def state(step: int) -> State:
    kernel = np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
    return State(
        jnp.asarray(step), {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.arange(4.0)}}, (jnp.asarray(-kernel),)
    )


def like(dtype: str = "float32") -> State:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.dtype == np.float32 else x.dtype, sharding=place), state(0)
    )


def save(workdir: Path, *steps: int) -> None:
    checkpoints = Checkpoints(workdir, Keep(9))
    for step in steps:
        checkpoints.save(state(step), {"config": {}, "statistics": {"a": [0.1, 1e-9]}}, final=True)
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with the steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def test_what_was_saved_comes_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several groups, and in another dtype."""
    checkpoints, wanted = Checkpoints(saved), state(2)
    assert checkpoints.steps == [1, 2] and checkpoints.latest == 2
    for group in (module.GROUP, 1):
        monkeypatch.setattr(module, "GROUP", group)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_state(2, like()), wanted)
        half_as_wide = jax.tree.map(lambda x: x.astype("bfloat16"), wanted.params)
        params = checkpoints.restore_params(2, like("bfloat16").params)
        jax.tree.map(np.testing.assert_array_equal, params, half_as_wide)
        everything = dict(checkpoints.read_all(2, "state"))
        np.testing.assert_array_equal(everything["moments/0"], wanted.moments[0])
        assert set(everything) == {"step", "params/dense/kernel", "params/dense/bias", "moments/0"}
    np.testing.assert_array_equal(checkpoints.read_param(2, "dense/kernel"), wanted.params["dense"]["kernel"])
    assert checkpoints.restore_run(2)["statistics"] == {"a": [0.1, 1e-9]}


def test_parameters_that_are_the_state_s_own_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read from there, in groups, one by one, and where they are damaged."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), {"config": {}})
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["run", "state"]
    checkpoints, wanted = Checkpoints(tmp_path), state(1).params
    for group in (module.GROUP, 1):
        monkeypatch.setattr(module, "GROUP", group)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(1, like().params), wanted)
    np.testing.assert_array_equal(checkpoints.read_param(1, "dense/kernel"), wanted["dense"]["kernel"])
    assert {name: x.size for name, x in checkpoints.arrays(1).items()} == {"dense/kernel": 4096, "dense/bias": 4}
    assert checkpoints.misfits(1, "inference", {"dense": {"bias": jnp.zeros(4)}}) != []
    for path in (folder / "state").glob("ocdbt.process_0/d/*"):
        half(path)
    with pytest.raises(CheckpointError, match="Step 1 in .* is damaged: .*/1/state/"):
        checkpoints.restore_params(1, like().params)


def test_an_average_is_written_beside_the_state(tmp_path: Path) -> None:
    @flax.struct.dataclass
    class Averaged(State):
        @property
        def deploy(self) -> dict:
            return jax.tree.map(lambda x: 2 * x, self.params)

    checkpoints, one = Checkpoints(tmp_path), state(1)
    checkpoints.save(Averaged(one.step, one.params, one.moments), {"config": {}})
    checkpoints.close()
    found = Checkpoints(tmp_path).restore_params(1, like().params)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: 2 * x, one.params))


def test_which_steps_are_kept(tmp_path: Path) -> None:
    errors = {3: 0.5, 6: None, 9: 0.2, 12: 0.7, 15: 0.4, 18: None}
    assert Keep(2).choose(errors) == {15, 18}
    assert Keep(1, every=6).choose(errors) == {6, 12, 18}
    assert Keep(1, best=2).choose(errors) == {9, 15, 18}
    assert Keep(1, best=1).choose(dict.fromkeys(errors)) == {18}
    keep = Keep(1, every=4, best=1)
    for steps in ((1, 2, 3), (4, 5), (6,)):  # as by one process after the other
        checkpoints = Checkpoints(tmp_path, keep)
        for step in steps:
            checkpoints.save(state(step), {"open_loop_error": {2: 0.1, 3: 0.3}.get(step)})
        checkpoints.close()
    assert Checkpoints(tmp_path).steps == [2, 4, 6]


@pytest.fixture(params=["at hand", "on devices"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where JAX's arrays are read: by the host, as those of its own CPU devices are, or as those of a GPU."""
    if request.param == "on devices":
        monkeypatch.setattr(checkpoint_sums, "_at_hand", lambda x: not isinstance(x, jax.Array))


@pytest.mark.usefixtures("place")
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoints, broken = Checkpoints(tmp_path), state(2)
    broken = broken.replace(moments=(broken.moments[0].at[3, 3].set(jnp.inf),))
    with pytest.raises(CheckpointError, match=r"Step 2 is not saved: its moments/0 is not finite\. Step 1 is "):
        checkpoints.save(broken, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps == [1]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_sums_are_the_same_wherever_they_are_computed(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 40)) * 100, dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a", "b")))
    whole = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
    found = sums([np.asarray(x)])
    words = np.asarray(x).tobytes()
    size = x.dtype.itemsize
    expected = sum(int.from_bytes(words[at : at + size], "little") for at in range(0, len(words), size)) % 2**32
    assert found == [expected] and sums([spread, whole]) == [expected, expected]


def test_reading_leaves_no_traces(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.latest is None
    with pytest.raises(CheckpointError, match="has no step 3; it has none"):
        checkpoints.restore_run(3)
    checkpoints.close()
    assert not list(tmp_path.iterdir())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {"half": half, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink, "flipped": flip}


def files(item: Path) -> list[Path]:
    """All files of an item whose content matters."""
    spare = {"commit_success.txt", "_sharding", "process_0"}
    inner = item / "ocdbt.process_0" / "manifest.ocdbt"  # that of the writing process, merged into the other
    return [path for path in item.rglob("*") if path.is_file() and path.name not in spare and path != inner]


def read_everything(workdir: Path, item: str) -> None:
    checkpoints = Checkpoints(workdir)
    if item == "state":
        checkpoints.restore_state(2, like())
    else:
        checkpoints.restore_params(2, like().params)


@pytest.mark.parametrize("item", ["state", "inference", "run"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_file_step_and_way_out(copy: Path, item: str, damage: str) -> None:
    """Of every single file of an item: never a misfit of the configuration, never something else to read instead."""
    folder = copy / "checkpoints" / "2" / item
    found = set()
    for path in files(folder):
        content = path.read_bytes()
        DAMAGES[damage](path)
        try:
            read_everything(copy, "state" if item == "state" else "inference")
            continue  # an older version of a node, say, that nothing refers to
        except CheckpointError as error:
            message = str(error)
        finally:
            path.write_bytes(content)
        found.add(path)
        name = str(folder if path.name == "_METADATA" and damage == "flipped" else path)
        assert message.startswith(f"Step 2 in {copy / 'checkpoints'} is damaged: {name}"), message
        way = f"The step before is {copy / 'checkpoints' / '1'}: name it instead. To resume training from it, remove"
        assert way in message and "\n" not in message and "does not fit" not in message
    named = {path.name for path in found}
    assert named == {"metadata"} if item == "run" else {"manifest.ocdbt"} < named
    if item != "run" and damage == "flipped":  # what is not noticed by those who read it
        assert max(folder.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size) in found
    if item != "run" and damage != "flipped":
        assert {"_METADATA", "manifest.ocdbt"} < named and len(found) >= 4  # and a node, and a file of values
    read_everything(copy, "state")  # all is put back


def test_a_whole_item_is_missing(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "2" / "state")
    with pytest.raises(CheckpointError, match=r"Step 2 in .* is damaged: .*/2/state is missing\. The step before"):
        read_everything(copy, "state")


def test_the_way_out_is_a_whole_step(copy: Path) -> None:
    save(copy, 3)
    checkpoints = Checkpoints(copy)
    (copy / "checkpoints" / "2" / "inference" / "manifest.ocdbt").unlink()
    assert f"The step before is {copy / 'checkpoints' / '1'}: name it instead" in str(checkpoints.damaged(3, "it"))
    assert "No whole step before it is left" in str(checkpoints.damaged(1, "it"))


def test_a_misfit_is_no_damage(saved: Path, tmp_path: Path) -> None:
    other = like().replace(moments=(jax.ShapeDtypeStruct((3,), "float32"),))
    with pytest.raises(CheckpointError, match=r"does not fit this config(.|\n)*misshapen: moments/0 is \[64, 64\]"):
        Checkpoints(saved).restore_state(2, other)
    save_params(tmp_path, state(1).params, {"config": {}})
    with pytest.raises(CheckpointError, match="has no state, only inference. An import .*--config.init="):
        Checkpoints(tmp_path).restore_state(0, like())


@pytest.mark.parametrize("notice", ["check", "wait", "save", "close"])
def test_a_failed_save_names_the_last_good_step(copy: Path, notice: str) -> None:
    checkpoints = Checkpoints(copy)
    said = r"/3 cannot be written: .*Step 2 is the last good one, and the same command"
    with files_end_at(4096), pytest.raises(DiskError, match=said):
        checkpoints.save(state(3), {"config": {}})
        for _ in range(3000 if notice == "check" else 0):  # half a minute: it does not wait
            checkpoints.check()
            time.sleep(0.01)
        checkpoints.save(state(4), {"config": {}}) if notice == "save" else getattr(checkpoints, notice)()
    assert checkpoints.steps == [1, 2]
    checkpoints.close()  # said once


def test_after_a_failed_save(copy: Path) -> None:
    (copy / "checkpoints" / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # what it leaves
    save(copy, 3)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_export_on_a_full_disk(model: Path, tmp_path: Path, suffix: str) -> None:
    said = rf"b.{suffix} cannot be written: .* Nothing of it is kept"
    with files_end_at(4096), pytest.raises(DiskError, match=said):
        export_checkpoint(model, tmp_path / f"b.{suffix}")
    assert not list(tmp_path.iterdir())


def test_an_import_into_a_workdir_in_use(tmp_path: Path) -> None:
    with owned(tmp_path), pytest.raises(OwnedError, match="is being written by process"):
        import_checkpoint(get_config(), "x.pt", str(tmp_path))
    with pytest.raises(WeightsError, match="x.pt does not exist"):
        import_checkpoint(get_config(), "x.pt", str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint with a NaN in it."""
    config, workdir = get_config(), tmp_path_factory.mktemp("model")
    params = jax.tree.map(jnp.asarray, random_params(ModelConfig.create(config.model)))
    params["branch_embedding"] = params["branch_embedding"].at[0, 0].set(jnp.nan)
    unit = {"mean": [0.0] * 5, "std": [1.0] * 5}
    statistics = {"": {"state": unit, "action": {name: x[:3] for name, x in unit.items()}}}
    run = {"config": json.loads(config.to_json()), "statistics": statistics, "instructions": []}
    save_params(workdir, params, run)
    return workdir


@pytest.fixture(scope="module")
def damaged_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with half a file of values."""
    workdir = shutil.copytree(model, tmp_path_factory.mktemp("damaged") / "model")
    item = workdir / "checkpoints" / "0" / "inference"
    half(max(item.rglob("d/*"), key=lambda path: path.stat().st_size))
    return workdir


@pytest.mark.parametrize(
    "command, options",
    [
        ("ahawam_jax.commands.evaluate", "RUN --out OUT"),
        ("ahawam_jax.commands.export_weights", "RUN OUT.pt"),
        ("ahawam_jax.commands.compile_policy", "RUN --out OUT"),
        ("ahawam_jax.commands.imagine", "RUN --image X.png --instruction go --out OUT.mp4"),
        ("export.to_torch", "RUN --out OUT"),
    ],
)
def test_every_command_says_so(
    damaged_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, options: str
) -> None:
    argv = options.replace("RUN", str(damaged_model)).replace("OUT", str(tmp_path / "out")).split()
    try:
        status = importlib.import_module(command).main(argv)
        said = capsys.readouterr().err
    except SystemExit as end:
        status, said = 1, str(end.code)
    assert status == 1 and said.startswith("error: Step 0 in ") and said.strip().count("\n") == 0
    assert "is cut off" in said and "No whole step before it is left" in said
    assert not list(tmp_path.iterdir())


def test_inspect_reads_what_it_vouches_for(model: Path, damaged_model: Path, capsys: pytest.CaptureFixture) -> None:
    for values in (False, True):
        with pytest.raises(CheckpointError, match="is cut off"):
            inspect_path(damaged_model, None, values)
    assert inspect_path(model, None, False) == 0 and "--values reads the arrays" in capsys.readouterr().out
    assert inspect_path(model, None, True) == 1
    assert "not finite: inference branch_embedding [2, 16]" in capsys.readouterr().out
