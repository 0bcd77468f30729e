"""Names of umT5's parameters <-> our tree, as tables; `convert.py` says how to read a row.

The original names are those of the file that Wan2.2 ships, models_t5_umt5-xxl-enc-bf16.pth.
"""

import re
from typing import Any

from ahawam_jax.towers.text_encoder import TextEncoderConfig
from ahawam_jax.weights.files import Weights
from ahawam_jax.weights.tensors import WeightsError

_BLOCK = "blocks.{i}."

TABLE = (
    ("token_embedding.weight", "token_embedding", "same"),
    (f"{_BLOCK}norm1.weight", "blocks/attn_norm", "same"),
    *((f"{_BLOCK}attn.{name}.weight", f"blocks/{name}/kernel", "linear") for name in "qkv"),
    (f"{_BLOCK}attn.o.weight", "blocks/o/kernel", "heads"),
    (f"{_BLOCK}norm2.weight", "blocks/ffn_norm", "same"),
    (f"{_BLOCK}ffn.gate.0.weight", "blocks/ffn_gate/kernel", "linear"),
    (f"{_BLOCK}ffn.fc1.weight", "blocks/ffn_in/kernel", "linear"),
    (f"{_BLOCK}ffn.fc2.weight", "blocks/ffn_out/kernel", "linear"),
    (f"{_BLOCK}pos_embedding.embedding.weight", "blocks/position_bias", "same"),
    ("norm.weight", "norm", "same"),
)

_LAYER = r"encoder\.block\.(\d+)\.layer\."

# (whole name in UMT5EncoderModel of transformers as a regular expression, original name)
RENAMES_TRANSFORMERS = (
    (r"shared\.weight", "token_embedding.weight"),
    (rf"{_LAYER}0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (rf"{_LAYER}0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    (rf"{_LAYER}0\.SelfAttention\.relative_attention_bias\.weight", r"blocks.\1.pos_embedding.embedding.weight"),
    (rf"{_LAYER}1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (rf"{_LAYER}1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
    (rf"{_LAYER}1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    (rf"{_LAYER}1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
    (r"encoder\.final_layer_norm\.weight", "norm.weight"),
)
REPEATED_TRANSFORMERS = ("encoder.embed_tokens.weight",)  # the same tensor as shared.weight


def text_encoder_tensors(weights: Weights, dtype: str = "") -> tuple[dict[str, Any], TextEncoderConfig]:
    """An encoder's tensors under their original names, and its sizes, read off their shapes.

    dtype is that of the matrices in use, by default as stored. Raises WeightsError for other files.
    """
    tensors = dict(weights.tensors)
    stated = weights.config if "d_model" in weights.config else {}  # in Wan's folder, config.json is the planner's
    if "shared.weight" in tensors:
        tensors = {_original(name): x for name, x in tensors.items() if name not in REPEATED_TRANSFORMERS}
    try:
        vocab, dim = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        config = TextEncoderConfig(
            vocab=vocab, dim=dim, dim_attn=tensors["blocks.0.attn.q.weight"].shape[0],
            dim_ffn=tensors["blocks.0.ffn.fc1.weight"].shape[0], num_heads=heads,
            num_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
            num_buckets=buckets,
            max_distance=stated.get("relative_attention_max_distance", TextEncoderConfig.max_distance),
            dtype=dtype or str(tensors["token_embedding.weight"].dtype),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{weights.path} is not a umT5 encoder ({error}); give models_t5_umt5-xxl-enc-bf16.pth of Wan2.2-TI2V-5B "
            "or the folder of google/umt5-xxl's encoder."
        ) from error
    if stated.get("num_heads", heads) != heads:
        raise WeightsError(
            f"{weights.path} has position biases of {heads} heads, config.json says {stated['num_heads']}; they do "
            "not belong together, download the folder again."
        )
    return tensors, config


def _original(name: str) -> str:
    for pattern, replacement in RENAMES_TRANSFORMERS:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name
