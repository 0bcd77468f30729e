"""Names of the Wan2.2 VAE's tensors: in Wan's own file (without its prefix "model."), in diffusers, and in our tree.

`convert.py` says how to read a row; gains are our [C] with two (trail2) or three (trail3) trailing 1-axes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ahawam_jax.towers.vae import VaeConfig
from ahawam_jax.towers.vae_layers import Stage
from ahawam_jax.weights.files import Weights
from ahawam_jax.weights.tensors import WeightsError

Rows = Iterator[tuple[str, str, str]]


def _conv(theirs: str, ours: str) -> Rows:
    yield f"{theirs}.weight", f"{ours}/kernel", "conv"
    yield f"{theirs}.bias", f"{ours}/bias", "flat"


def _norm_conv(norm: str, conv: str, ours: str) -> Rows:
    yield f"{norm}.gamma", f"{ours}/norm/scale", "trail3"
    yield from _conv(conv, f"{ours}/conv")


def _residual(theirs: str, ours: str, shortcut: bool) -> Rows:
    yield from _norm_conv(f"{theirs}.residual.0", f"{theirs}.residual.2", f"{ours}/first")
    yield from _norm_conv(f"{theirs}.residual.3", f"{theirs}.residual.6", f"{ours}/second")
    if shortcut:
        yield from _conv(f"{theirs}.shortcut", f"{ours}/shortcut")


def _half(half: str, stages: Iterator[Stage], group: str, blocks: int) -> Rows:
    """Encoder or decoder. Their stages number the resampling layer after the residual blocks."""
    yield from _conv(f"{half}.conv1", f"{half}/input")
    for i, stage in enumerate(stages):
        theirs, ours = f"{half}.{group}.{i}.{group}", f"{half}/stage{i}"
        for j in range(blocks):
            reshaped = j == 0 and stage.before != stage.features
            yield from _residual(f"{theirs}.{j}", f"{ours}/block{j}", shortcut=reshaped)
        if stage.space == 2:
            yield from _conv(f"{theirs}.{blocks}.resample.1", f"{ours}/space")
        if stage.time == 2:
            yield from _conv(f"{theirs}.{blocks}.time_conv", f"{ours}/time")
    yield from _residual(f"{half}.middle.0", f"{half}/middle/before", shortcut=False)
    yield f"{half}.middle.1.norm.gamma", f"{half}/middle/norm/scale", "trail2"
    yield from _conv(f"{half}.middle.1.to_qkv", f"{half}/middle/qkv")
    yield from _conv(f"{half}.middle.1.proj", f"{half}/middle/out")
    yield from _residual(f"{half}.middle.2", f"{half}/middle/after", shortcut=False)
    yield from _norm_conv(f"{half}.head.0", f"{half}.head.2", f"{half}/head")


def table(config: VaeConfig) -> tuple[tuple[str, str, str], ...]:
    """(Wan's name, our path joined with '/', kind) of every tensor."""
    blocks = config.num_res_blocks
    return (
        *_half("encoder", config.encoder_stages(), "downsamples", blocks),
        *_conv("conv1", "to_latent"),
        *_conv("conv2", "from_latent"),
        *_half("decoder", config.decoder_stages(), "upsamples", blocks + 1),
    )


def from_diffusers(name: str, blocks: int) -> str:
    """Name in diffusers' AutoencoderKLWan with `blocks` residual blocks a stage -> Wan's. Shapes are the same."""
    renames = (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"(resnets\.\d+)\.norm1", r"\1.residual.0"),
        (r"(resnets\.\d+)\.conv1", r"\1.residual.2"),
        (r"(resnets\.\d+)\.norm2", r"\1.residual.3"),
        (r"(resnets\.\d+)\.conv2", r"\1.residual.6"),
        (r"conv_shortcut", "shortcut"),
        (r"down_blocks\.(\d+)\.resnets", r"downsamples.\1.downsamples"),
        (r"down_blocks\.(\d+)\.downsampler", rf"downsamples.\1.downsamples.{blocks}"),
        (r"up_blocks\.(\d+)\.resnets", r"upsamples.\1.upsamples"),
        (r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{blocks + 1}"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"conv_in", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
    )
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def vae_tensors(weights: Weights, dtype: str) -> tuple[dict[str, Any], VaeConfig]:
    """A VAE's tensors under Wan's names, and its sizes, read off their shapes; dtype is that of its convolutions.

    Raises WeightsError for files of another model, such as the VAE of Wan2.1.
    """
    tensors = {name.removeprefix("model."): x for name, x in weights.tensors.items()}
    if "encoder.conv_in.weight" in tensors:
        blocks = _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
        tensors = {from_diffusers(name, blocks): x for name, x in tensors.items()}
    stage = "encoder.downsamples.{}.downsamples."
    try:
        dim = tensors["encoder.conv1.weight"].shape[0]
        stages = _count(tensors, r"encoder\.downsamples\.(\d+)\.downsamples\.0\.residual")
        blocks = _count(tensors, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual")
        mult = tuple(tensors[f"{stage.format(i)}0.residual.2.weight"].shape[0] // dim for i in range(stages))
        config = VaeConfig(
            dim=dim, dec_dim=tensors["decoder.head.2.weight"].shape[1] // mult[0],
            z_dim=tensors["conv2.weight"].shape[0], dim_mult=mult, num_res_blocks=blocks,
            temporal_downsample=tuple(f"{stage.format(i)}{blocks}.time_conv.weight" in tensors
                                      for i in range(stages - 1)),
            dtype=dtype,
        )  # fmt: skip
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{weights.path} is not the VAE of Wan2.2 ({error!r}); give Wan2.2_VAE.pth or the vae folder of "
            "Wan2.2-TI2V-5B."
        ) from error
    return tensors, config


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
