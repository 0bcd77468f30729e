"""ahawam encode-text: encode instructions with umT5 once, for training and deployment to look up.

Collects the distinct instructions of datasets (or takes them from the command line), puts each into the
release's prompt and writes one file per prompt to the cache folder. What is there already is kept, so a run that
was stopped goes on where it ended, and several jobs share the work: --shard 0/8 .. --shard 7/8. Runs on all devices of
this machine; the weights are spread over them.

The weights are Wan2.2's models_t5_umt5-xxl-enc-bf16.pth or the folder of transformers' google/umt5-xxl encoder, the
tokenizer is the tokenizer.json of google/umt5-xxl.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ahawam_jax.commands.flags import parse_shard
from ahawam_jax.towers.text_cache import Tokenizer, claim, entry_path, fingerprint, prompt, write_entry
from ahawam_jax.towers.text_encoder import TextEncoder, TextEncoderConfig, abstract_text_encoder_params
from ahawam_jax.towers.text_encoder_names import TABLE, text_encoder_tensors
from ahawam_jax.training.sharding import abstract, activation_rules, batch_sharding, make_mesh, put_batch, shardings
from ahawam_jax.weights.convert import load
from ahawam_jax.weights.files import open_weights
from data_pipelines.disk import writing
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.readers.subset import open_datasets

SAFE = "The prompts before are kept; the same command goes on with those that are missing."
Loader = Callable[[Mesh], tuple[TextEncoderConfig, Any]]


def encode_prompts(
    prompts: Iterable[str], folder: str | Path, tokenizer: Tokenizer, load: Loader, mesh: Mesh, batch: int = 16,
    shard: str = "0/1",
) -> int:  # fmt: skip
    """Writes the text tokens of every prompt of this shard that the folder does not have yet; returns their number.

    Args:
      prompts: full prompts; repeated ones count once.
      load: called with the mesh if there is something to do, returns the encoder's config and parameters.
      batch: prompts encoded at once, rounded up to a multiple of the devices.
      shard: which of the prompts are this job's, "I/N".
    Raises ValueError if the folder belongs to another encoder, or the tokenizer does not fit the encoder; DiskError
    where the disk takes no more.
    """
    part, parts = parse_shard(shard)
    distinct = list(dict.fromkeys(prompts))[part::parts]
    todo = [text for text in distinct if not entry_path(folder, text, tokenizer.length).is_file()]
    print(f"{len(distinct)} distinct prompts, {len(distinct) - len(todo)} of them in {folder} already")
    if not todo:
        return 0
    long = [text for text, size in zip(todo, tokenizer.sizes(todo), strict=True) if size > tokenizer.length]
    if long:
        print(f"longer than {tokenizer.length} tokens, so their tails are lost: {len(long)}, for example {long[0]!r}")
    config, params = load(mesh)
    with writing(folder, SAFE):
        claim(folder, fingerprint(config, params, tokenizer))
    ids, mask = tokenizer(todo)
    if ids.max() >= config.vocab:
        raise ValueError(
            f"The tokenizer makes ids up to {ids.max()}, the encoder knows {config.vocab}; they do not belong "
            "together, use the tokenizer.json of the encoder's own release."
        )
    encode = _encoder(config, params, mesh)
    batch += -batch % mesh.size
    progress = Progress(len(todo), "prompts")
    for start in range(0, len(todo), batch):
        rows = slice(start, start + batch)
        padding = ((0, batch - len(todo[rows])), (0, 0))  # one size for all batches: one compilation
        tokens = encode(np.pad(ids[rows], padding), np.pad(mask[rows], padding))
        with writing(folder, SAFE):
            for i, text in enumerate(todo[rows]):
                write_entry(folder, text, tokens[i], mask[start + i])
        progress.add("", len(todo[rows]))
    print(f"wrote {len(todo)} entries of {tokenizer.length} tokens to {folder}; cut: {len(long)}")
    return len(todo)


def _encoder(config: TextEncoderConfig, params: Any, mesh: Mesh) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function (ids [B, K], mask [B, K]) -> tokens [B, K, X] float32, rows spread over the mesh's devices."""
    params = jax.device_put(params, shardings(abstract_text_encoder_params(config), mesh))
    apply = jax.jit(
        lambda params, ids, mask: TextEncoder(config).apply({"params": params}, ids, mask),
        out_shardings=batch_sharding(mesh),
    )

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with activation_rules(mesh):
            return np.asarray(apply(params, **put_batch({"ids": ids, "mask": mask}, mesh)))

    return encode


def load_text_encoder(path: Path, mesh: Mesh) -> tuple[TextEncoderConfig, Any]:
    """The encoder from Wan's or transformers' files, read straight into its shards on the mesh."""
    weights = open_weights(path, "text encoder")
    tensors, config = text_encoder_tensors(weights)
    size = sum(x.nbytes for x in weights.tensors.values())
    progress = Progress(size, "GiB", 2**30)
    return config, load(tensors, TABLE, abstract(abstract_text_encoder_params(config), mesh), progress.add)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam encode-text", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--weights", type=local_path, required=True, help="file or folder with the encoder's weights")
    parser.add_argument("--tokenizer", type=local_path, required=True, help="folder with tokenizer.json, or that file")
    parser.add_argument("--cache", type=local_path, required=True, help="folder to write to, made where there is none")
    parser.add_argument("--dataset", type=local_path, nargs="+", default=[], help="datasets or subset files to encode")
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TASK", help="single instructions, each in quotes")
    parser.add_argument("--length", type=int, default=128, help="tokens per prompt (default 128, the release's)")
    parser.add_argument("--batch", type=int, default=16, help="prompts encoded at once (default 16)")
    parser.add_argument("--shard", default="0/1", help="which part of the prompts this job encodes, I/N (default all)")
    options = parser.parse_args(argv)
    if not options.dataset and not options.prompt:
        parser.error("nothing to encode: give --dataset, --prompt or both")
    if options.length < 2 or options.batch < 1:
        parser.error("--length must be at least 2 and --batch at least 1")

    try:
        datasets = [part.dataset for path in options.dataset for part in open_datasets(path)]
        instructions = [text for dataset in datasets for text in dataset.instructions]
        prompts = [prompt(text) for text in [*instructions, *options.prompt]]
        tokenizer = Tokenizer(options.tokenizer, options.length)
        mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
        load = functools.partial(load_text_encoder, options.weights)
        encode_prompts(prompts, options.cache, tokenizer, load, mesh, options.batch, options.shard)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
