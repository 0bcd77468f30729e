"""Writes a checkpoint as a release .pt (for the PyTorch implementation) or as safetensors, one tensor at a time.

    ahawam export-weights runs/robotwin/run robotwin.pt --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

import flax
import numpy as np
from absl import logging

from ahawam_jax.checkpoints import Checkpoints, find_step
from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.weights.convert import store
from ahawam_jax.weights.release import TABLE, payload
from ahawam_jax.weights.safetensors_file import write_safetensors
from ahawam_jax.weights.tensors import DTYPES, WeightsError
from ahawam_jax.weights.torch_file import write_torch
from data_pipelines.disk import writing
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress


def export_checkpoint(path: str | Path, out: str | Path, dtype: str | None = None) -> None:
    """Writes the parameters to deploy of a workdir or checkpoint step to `out` (.pt or .safetensors).

    dtype: "bfloat16" or "float32"; None keeps what is stored, so that an import exports bit for bit.
    """
    out = local_path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise WeightsError(f"{out} must end in .pt (release layout) or .safetensors.")
    workdir, step = find_step(path)
    checkpoints = Checkpoints(workdir)
    run = checkpoints.restore_run(step)
    like = flax.linen.unbox(abstract_params(ModelConfig.create(run["config"]["model"])))
    checkpoints.check_fits(step, "inference", like)
    arrays = checkpoints.arrays(step)
    size = sum(int(np.prod(x.shape)) for x in arrays.values())
    progress, held = Progress(size, "G parameters", 10**9), ("", np.empty(0))

    def leaf(name: str) -> np.ndarray:
        """The stacked leaf in hand; asking for another one drops it."""
        nonlocal held
        if held[0] != name:
            held = ("", np.empty(0))
            held = (name, checkpoints.read_param(step, name))
            progress.add(name, held[1].size)
        return held[1]

    tensors = store(
        flax.traverse_util.unflatten_dict(arrays, sep="/"), TABLE, leaf, DTYPES[dtype] if dtype else None
    )
    kind = str(next(iter(tensors.values())).dtype)
    with writing(out, "Nothing of it is kept; the checkpoint is as it was."):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".pt":
            write_torch(out, payload(tensors, {"step": step, "torch_dtype": f"torch.{kind}"}))
        else:
            write_safetensors(out, tensors, {"step": str(step)})
    print(f"{out}: {size:,} parameters, {out.stat().st_size / 2**30:.2f} GiB, {progress.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam export-weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    logging.set_verbosity(logging.ERROR)  # orbax reports every file it reads
    parser.add_argument("checkpoint", type=local_path, help="workdir of a run or an import, or one of its steps")
    parser.add_argument("out", type=local_path, help="file to write: .pt in the release's layout, or .safetensors")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored in the checkpoint")
    options = parser.parse_args(argv)
    try:
        export_checkpoint(options.checkpoint, options.out, options.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
