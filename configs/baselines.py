"""The paper's baselines and ablations (Table 2), each trained and run as its own variant:

    ahawam train --config=configs/baselines.py:demo.naive_async --workdir=runs/naive_async

The name is BASE.VARIANT. BASE is the experiment that a variant is one of: demo, robotwin and robotwin_offset are the
configs of these names, velocity is demo_velocity. far is the demo with windows of 64 rows, so that a plan may be in
use for up to six calls, a video tower that tells where in the picture something is, without which the router cannot,
and gates of the router that begin half open, because in so few steps they hardly move; far_aligned is the same without
offsets between planner and chunk (Eq. 12): all 64 rows are chunks. augmented is the demo whose training pictures are
cropped, tinted and partly painted over.
"""

from ml_collections import ConfigDict

from configs import demo, demo_velocity, robotwin, robotwin_offset


def far() -> ConfigDict:
    config = demo.get_config()
    config.model.horizon = 48
    config.model.initial_gate = 0.0
    config.towers.video = "placed_block_transform"
    return config


def far_aligned() -> ConfigDict:
    config = far()
    config.model.horizon = 64
    config.data.max_offset = 0
    return config


def augmented() -> ConfigDict:
    config = demo.get_config()
    config.data.augmentation.update(crop=0.1, colour=0.3, erased=2)
    return config


BASES = {
    "demo": demo.get_config, "velocity": demo_velocity.get_config, "far": far, "far_aligned": far_aligned,
    "augmented": augmented, "robotwin": robotwin.get_config, "robotwin_offset": robotwin_offset.get_config,
}  # fmt: skip
# memory: of earlier frames (Eq. 13); routing: of the context to the newest frame (Eq. 8-10); synchronous: the planner
# is refreshed before every chunk.
VARIANTS = {
    "fast_wam": dict(memory=False, routing=False, synchronous=True),
    "naive_async": dict(memory=False, routing=False, synchronous=False),
    "memory": dict(memory=True, routing=False, synchronous=False),
    "ovcr": dict(memory=False, routing=True, synchronous=False),
    "full": dict(memory=True, routing=True, synchronous=False),
}


def get_config(name: str = "demo.full") -> ConfigDict:
    """name: BASE.VARIANT."""
    base, _, variant = name.partition(".")
    if base not in BASES or variant not in VARIANTS:
        raise ValueError(
            f"configs/baselines.py:{name} is no baseline; expected BASE.VARIANT, BASE one of {', '.join(BASES)} and "
            f"VARIANT one of {', '.join(VARIANTS)}, as in demo.naive_async."
        )
    config, parts = BASES[base](), dict(VARIANTS[variant])
    if parts.pop("synchronous"):
        config.policy.refresh_every = 1
    for section in (config.objective, config.policy):
        section.update(parts)
    return config
