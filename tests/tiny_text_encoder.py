"""A text encoder and a tokenizer small enough for a test, with random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ahawam_jax.towers.text_encoder import TextEncoderConfig, abstract_text_encoder_params
from ahawam_jax.towers.text_encoder_names import TABLE
from ahawam_jax.weights.convert import load

CONFIG = TextEncoderConfig(
    vocab=90, dim=16, dim_attn=24, dim_ffn=20, num_heads=2, num_layers=2, num_buckets=8, max_distance=10,
    dtype="float32",
)  # fmt: skip
WORDS = ("robot", "the", "pick", "cube", "'", "’", "é")


def random_params(config: TextEncoderConfig = CONFIG, seed: int = 0) -> Any:
    """Every leaf random; scales of norms lie around 1, so that what enters a layer also leaves it."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        return (path[-1].key.endswith("norm") + 0.3 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(abstract_text_encoder_params(config)))


def from_original(tensors: Mapping[str, np.ndarray], config: TextEncoderConfig) -> Any:
    """Tensors by their original names -> our parameters."""
    return load(tensors, TABLE, nn.unbox(abstract_text_encoder_params(config)))


def write_tokenizer(folder: Path, end: str = "</s>", pad: str = "<pad>") -> Path:
    """A tokenizer.json of umT5's kind: pieces of words with a mark for spaces, the end token after every text."""
    pieces = [*WORDS, *(f"▁{word}" for word in WORDS), "▁", *map(chr, range(ord("!"), ord("~") + 1))]
    scores = [(piece, -float(len(pieces) - 2 * len(piece))) for piece in dict.fromkeys(pieces)][: CONFIG.vocab - 3]
    tokenizer = Tokenizer(models.Unigram([(pad, 0.0), (end, 0.0), ("<unk>", -99.0), *scores], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    tokenizer.add_special_tokens([pad, end, "<unk>"])
    tokenizer.enable_truncation(3)  # left in the file by its last user; must not matter
    tokenizer.enable_padding(length=4)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
