"""umT5's names, shapes and layouts against our parameter tree."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ahawam_jax.towers.text_encoder import TextEncoderConfig, abstract_text_encoder_params
from ahawam_jax.towers.text_encoder_names import (
    RENAMES_TRANSFORMERS,
    REPEATED_TRANSFORMERS,
    TABLE,
    text_encoder_tensors,
)
from ahawam_jax.weights.convert import flatten, rows
from ahawam_jax.weights.files import Weights, open_weights
from ahawam_jax.weights.tensors import WeightsError
from tests.tiny_text_encoder import CONFIG, from_original

FULL = TextEncoderConfig()
PARAMETERS = 5_680_910_336


def original_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    return {row.name: row.foreign_shape for row in rows(TABLE, abstract_text_encoder_params(config))}


def test_names_and_shapes_are_the_original_ones(shared_dir: Path) -> None:
    file = shared_dir / "reference" / "names_umt5_full_flat.txt"
    lines = (line.split("\t") for line in file.read_text().splitlines())
    published = {name: tuple(int(size) for size in shape.strip("[]").split(",")) for name, shape in lines}
    assert original_shapes(FULL) == published


def test_every_parameter_has_one_name() -> None:
    sizes = {path: math.prod(x.shape) for path, x in flatten(abstract_text_encoder_params(FULL)).items()}
    assert sorted(path for _, path, _ in TABLE) == sorted(sizes)
    assert sum(sizes.values()) == sum(map(math.prod, original_shapes(FULL).values())) == PARAMETERS


def test_layouts_compute_what_torch_computes() -> None:
    """torch multiplies by weight [out, in]: y = W x, with heads side by side on the feature axis."""
    rng = np.random.default_rng(0)
    tensors = {name: np.float32(rng.standard_normal(shape)) for name, shape in original_shapes(CONFIG).items()}
    ours = from_original(tensors, CONFIG)
    x, heads = np.float32(rng.standard_normal(CONFIG.dim)), (CONFIG.num_heads, -1)
    q = tensors["blocks.1.attn.q.weight"] @ x
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, ours["blocks"]["q"]["kernel"][1]), q.reshape(heads), 1e-5)
    mixed = np.einsum("nh,nhd->d", q.reshape(heads), ours["blocks"]["o"]["kernel"][1])
    np.testing.assert_allclose(mixed, tensors["blocks.1.attn.o.weight"] @ q, 1e-4)


def test_names_of_transformers_lead_to_every_original_name() -> None:
    """transformers 5.23.0."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=CONFIG.vocab, d_model=CONFIG.dim, d_kv=CONFIG.dim_attn // CONFIG.num_heads, d_ff=CONFIG.dim_ffn,
        num_heads=CONFIG.num_heads, num_layers=CONFIG.num_layers, relative_attention_num_buckets=CONFIG.num_buckets,
    )  # fmt: skip
    found = {}
    for name, x in transformers.UMT5EncoderModel(config).state_dict().items():
        renamed = [re.sub(old, new, name) for old, new in RENAMES_TRANSFORMERS if re.fullmatch(old, name)]
        if name in REPEATED_TRANSFORMERS:
            assert not renamed
        else:
            (original,) = renamed
            found[original] = tuple(x.shape)
    assert found == original_shapes(CONFIG)


def encoder(folder: Path, config: dict) -> Weights:
    """An encoder's file with some config.json beside it."""
    rng = np.random.default_rng(0)
    tensors = {name: np.float32(rng.standard_normal(shape)) for name, shape in original_shapes(CONFIG).items()}
    save_file(tensors, folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_weights(folder, "text encoder")


def test_sizes_are_read_off_the_tensors(tmp_path: Path) -> None:
    """Also where config.json belongs to the planner, as in Wan's own folder."""
    wan = {"_class_name": "WanModel", "dim": 3072, "num_heads": 24, "num_layers": 30}
    tensors, config = text_encoder_tensors(encoder(tmp_path, wan))
    assert config == dataclasses.replace(CONFIG, max_distance=TextEncoderConfig.max_distance)
    assert tensors.keys() == original_shapes(CONFIG).keys()
    theirs = {"d_model": CONFIG.dim, "num_heads": CONFIG.num_heads, "relative_attention_max_distance": 10}
    assert text_encoder_tensors(encoder(tmp_path, theirs))[1] == CONFIG


def test_other_heads_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="position biases of 2 heads, config.json says 64"):
        text_encoder_tensors(encoder(tmp_path, {"d_model": CONFIG.dim, "num_heads": 64}))
    save_file({"token_embedding.weight": np.ones((3, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="other.safetensors is not a umT5 encoder"):
        text_encoder_tensors(open_weights(tmp_path / "other.safetensors"))
