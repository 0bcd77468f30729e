"""Files of weights: written by torch 2.13 and safetensors 0.8, read without torch; and all the ways they break."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.safetensors_file import write_safetensors
from ahawam_jax.weights.tensors import WeightsError
from ahawam_jax.weights.torch_file import read_torch, write_torch
from tests.data_pipelines import disguises
from tests.data_pipelines.disguises import DISGUISES

KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def torch_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, a scalar, an empty one, and views that share or reorder a storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = {kind: (3 * base).to(getattr(torch, kind)) for kind in KINDS}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "view": base[1:3, 2:], "turned": base.T}


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    kind = str(theirs.dtype).removeprefix("torch.")
    assert str(ours.dtype) == kind and ours.shape == tuple(theirs.shape)
    np.testing.assert_array_equal(np.asarray(ours, np.float64), theirs.double().numpy(), err_msg=kind)


# ------------------------------------------------------------------------------------------------------ reading
def test_what_torch_saved_is_read(tmp_path: Path) -> None:
    saved = {
        "mot": OrderedDict(torch_tensors()), "step": 7, "torch_dtype": "torch.bfloat16", "real": torch.bfloat16,
        "list": [torch.ones(2), {"x": torch.zeros(1)}], "parameter": torch.nn.Parameter(torch.ones(3)),
    }  # fmt: skip
    saved["mot"]._metadata = {"": {"version": 1}}  # as state_dict() leaves it
    torch.save(saved, tmp_path / "a.pt")
    weights = open_weights(tmp_path / "a.pt")
    for name, x in torch_tensors().items():
        assert_same(np.asarray(weights.tensors[f"mot/{name}"]), x)
    assert weights.tensors["list/1/x"].shape == (1,) and weights.tensors["parameter"].shape == (3,)
    assert weights.metadata == {"step": 7, "torch_dtype": "torch.bfloat16", "real": "torch.bfloat16"}


def test_a_wrapped_state_dict_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"model_state": {"a.weight": torch.ones(2)}}, tmp_path / "a.pth")
    assert list(open_weights(tmp_path / "a.pth").tensors) == ["a.weight"]


def test_what_safetensors_saved_is_read(tmp_path: Path) -> None:
    tensors = {name: x.contiguous() for name, x in torch_tensors().items() if name not in ("view", "turned")}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.metadata == {"format": "pt"} and weights.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        assert_same(np.asarray(weights.tensors[name]), x)


def test_a_tensor_is_mapped_not_copied(tmp_path: Path) -> None:
    """Reading one tensor of a file that is otherwise a hole needs neither memory nor time for the rest."""
    with (tmp_path / "a.safetensors").open("wb") as file:
        hole = {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}
        x = {"dtype": "F32", "shape": [2], "data_offsets": [2**36, 2**36 + 8]}
        header = json.dumps({"hole": hole, "x": x}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(8 + len(header) + 2**36)
        file.write(np.array([1, 2], np.float32).tobytes())
    x = np.asarray(open_weights(tmp_path / "a.safetensors").tensors["x"])
    assert x.tolist() == [1, 2] and not x.flags.owndata and not x.flags.writeable


# ------------------------------------------------------------------------------------------------------ writing
def numpy_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = {kind: ml_dtypes.bfloat16 if kind == "bfloat16" else kind for kind in KINDS}
    arrays = {kind: (3 * rng.standard_normal((2, 3, 4))).astype(dtype) for kind, dtype in kinds.items()}
    return arrays | {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 3), np.float32)}


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    arrays = numpy_tensors()
    path = tmp_path / "a.pt"
    write_torch(path, {"section": arrays, "step": 2**40, "negative": -1, "text": "torch.bfloat16"})
    read = torch.load(path, weights_only=True)
    assert (read["step"], read["negative"], read["text"]) == (2**40, -1, "torch.bfloat16")
    assert list(read["section"]) == list(arrays)
    for name, x in arrays.items():
        assert_same(x, read["section"][name])
    mapped = torch.load(path, weights_only=True, mmap=True)["section"]
    assert all(x.data_ptr() % 64 == 0 for x in mapped.values() if x.numel())
    again = read_torch(path)["section"]
    assert all(np.asarray(again[name]).tobytes() == x.tobytes() for name, x in arrays.items())


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    arrays = numpy_tensors()
    write_safetensors(tmp_path / "a.safetensors", arrays, {"step": "7"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == arrays.keys()
    for name, x in arrays.items():
        assert_same(x, read[name])


class Dies:
    """An array that cannot be read."""

    shape, dtype = (2,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        raise OSError("disk is gone")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_half_a_file_never_has_the_name_of_a_whole_one(tmp_path: Path, name: str) -> None:
    tensors = {"x": np.ones(2, np.float32), "y": Dies()}
    with pytest.raises(OSError):
        if name == "a.pt":
            write_torch(tmp_path / name, tensors)
        else:
            write_safetensors(tmp_path / name, tensors, {})
    assert not (tmp_path / name).exists()


# ------------------------------------------------------------------------------------------------------- faults
class Bomb:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickled_class_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "bomb": Bomb()}, "a.pt")
    with pytest.raises(WeightsError, match=r"a.pt holds a pickled (posix|nt).system, and reading it would run its"):
        open_weights("a.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, "b.pt")
    with pytest.raises(WeightsError, match=r"pickled torch.nn.modules.linear.Linear.*save the state_dict alone"):
        open_weights("b.pt")
    assert not Path("exploded").exists()


def test_an_old_or_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="older than torch 1.6 must be saved again"):
        open_weights(tmp_path / "old.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match="is a plain pickle, not a zip file of torch.save"):
        open_weights(tmp_path / "pickle.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="holds no single data.pkl"):
        open_weights(tmp_path / "zip.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff\xfe\xfd" * 99)
    with pytest.raises(WeightsError, match="is not a safetensors file; give a .safetensors or .pt"):
        open_weights(tmp_path / "noise.safetensors")
    (tmp_path / "noise.pt").write_bytes(b"\xff\xfe\xfd" * 99)
    with pytest.raises(WeightsError, match="is not a zip file of torch.save; give a .pt or .safetensors"):
        open_weights(tmp_path / "noise.pt")
    with pytest.raises(WeightsError, match="nowhere.pt does not exist"):
        open_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_something_else(tmp_path: Path, suffix: str) -> None:
    """What a download or a repository leaves in place of weights is named, with the way to the weights."""
    path = tmp_path / f"weights{suffix}"
    for name in disguises.but("zip") if suffix == ".pt" else DISGUISES:
        says = disguises.put(path, name)
        with pytest.raises(WeightsError, match=f"weights{suffix} {says}"):
            open_weights(path)
    says = disguises.dangle(path)
    with pytest.raises(WeightsError, match=f"weights{suffix} {says}"):
        open_weights(path)


def test_weights_under_the_other_name(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="a.pt is a safetensors file; name it so"):
        open_weights(tmp_path / "a.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="a.safetensors is a zip file; .*name it .pt"):
        open_weights(tmp_path / "a.safetensors")


def test_damaged_json_beside_the_weights(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for content, says in (
        (b'{"weight_map": {', "is not valid JSON"), (b'{"metadata": {}}', "is not an index of shards .*weight_map"),
        (disguises.LFS, "is a pointer of Git LFS"), (b'{"weight_map": [7]}', "is not an index of shards"),
    ):  # fmt: skip
        index.write_bytes(content)
        with pytest.raises(WeightsError, match=f"index.json {says}"):
            open_weights(tmp_path)
    index.unlink()
    (tmp_path / "config.json").write_text('{"dim": 24,')
    with pytest.raises(WeightsError, match="config.json is not valid JSON .*; copy it again"):
        open_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    tensors = {f"layer.{i}": torch.randn(100, 10) for i in range(10)}
    torch.save(tensors, path) if name == "a.pt" else save_file(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=f"{name} .*(cut off|is not a|is empty)"):
        open_weights(path)


def shards(folder: Path) -> list[Path]:
    """Three shards and their index."""
    names = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for i, name in enumerate(names):
        save_file({f"layer.{i}": torch.full((2,), float(i))}, folder / name)
    index = {f"layer.{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return [folder / name for name in names]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("named", ["folder", "shard", "index"])
def test_shards_are_one_checkpoint(tmp_path: Path, named: str, index: bool) -> None:
    files = shards(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
        if named == "index":
            return
    path = {"folder": tmp_path, "shard": files[1], "index": tmp_path / "model.safetensors.index.json"}[named]
    weights = open_weights(path)
    assert weights.files == tuple(files)
    assert [np.asarray(weights.tensors[f"layer.{i}"])[0] for i in range(3)] == [0, 1, 2]
    files[2].unlink()
    with pytest.raises(WeightsError, match="lacks 1 of 3 shards: model-00003-of-00003.safetensors"):
        open_weights(path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds 0 files of weights"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"holds 2 files of weights \(a.safetensors, b.safetensors\)"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["blocks.0.attn.lora_A.weight", "lora_unet_blocks_0.lora_down.weight"])
def test_a_lora_is_refused(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="is a LoRA .* Merge it"):
        open_weights(tmp_path / "a.safetensors")


def test_a_quantised_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="stores x as F8_E4M3, which is not read"):
        open_weights(tmp_path / "a.safetensors")


def test_bytes_must_agree_with_the_shape(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(WeightsError, match=r"gives x 8 bytes, \[3\] of F32 needs 12"):
        open_weights(tmp_path / "a.safetensors")
