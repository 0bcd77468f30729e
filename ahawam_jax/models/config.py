"""Sizes of the model: one frozen record that every module reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

PATCH = 2  # latent pixels along each side of one planner token (Wan2.2: patch size 1x2x2)
FRAMES_PER_LATENT = 4  # temporal compression of the video tower after the first frame
SPATIAL_STRIDE = 16  # image pixels along each side of one latent pixel

PREDICTIONS = ("velocity", "sample")
REMAT_POLICIES = ("none", "dots", "full")
COMPONENTS = ("planner", "executor", "router")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of planner, router and executor (Table 4). Widths are in features, lengths in tokens.

    Raises ValueError, naming the field, when sizes cannot form a model.
    """

    num_layers: int = 30  # L, the same in planner, router and executor
    num_heads: int = 24  # N
    head_dim: int = 128  # H
    planner_dim: int = 3072  # D of the planner
    planner_ffn_dim: int = 14336
    executor_dim: int = 1024  # D of the executor
    executor_ffn_dim: int = 4096
    latent_channels: int = 48
    text_dim: int = 4096  # X, width of text tokens, state tokens and routing queries
    freq_dim: int = 256  # width of the sinusoidal time embedding
    action_dim: int = 14
    state_dim: int = 14
    num_queries: int = 32  # Q
    # Of the router's gates before training, in front of the sigmoid: at -4 routing changes the context by 2%. Adam
    # moves a gate by about the learning rate a step, so that a short training leaves it where it began.
    initial_gate: float = -4.0
    chunk: int = 16  # actions the executor denoises at once
    horizon: int = 64  # actions of one training window, C = horizon / chunk chunks
    memory_frames: int = 6  # W
    memory_anchor: bool = False  # the episode's first frame stays in memory, the other W - 1 frames slide
    video_ratio: int = 8  # control steps between two video frames
    norm_eps: float = 1e-6
    prediction: str = "velocity"  # what the executor's head outputs: "velocity" or the clean "sample"
    dtype: str = "bfloat16"  # of matrix products; norms, softmax and rotary angles are float32
    remat: str = "none"  # what the backward pass recomputes: "none", "dots", "full"; or "full, executor=none"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "memory_frames" and getattr(self, field.name) < 1:
                raise ValueError(f"config.model.{field.name} is {getattr(self, field.name)}, expected at least 1.")
        if self.head_dim % 2 or (self.head_dim // 3) % 2:
            raise ValueError(
                f"head_dim {self.head_dim} cannot hold a 3-D rotary embedding: head_dim and the integer part "
                "of head_dim / 3 must both be even, as for 20, 24, 48 or 128."
            )
        if self.horizon % self.chunk:
            raise ValueError(f"horizon {self.horizon} must be a whole number of chunks of {self.chunk} actions.")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half cosines, half sines.")
        if self.memory_frames < 1:
            raise ValueError(f"memory_frames is {self.memory_frames}; the planner's memory needs at least one frame.")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
        for component in COMPONENTS:
            self.remat_of(component)

    @property
    def num_chunks(self) -> int:
        """C, chunks in one training window."""
        return self.horizon // self.chunk

    def remat_of(self, component: str) -> str:
        """The policy of planner, executor or router: the one of its own in `remat`, or else the one for all."""
        policy, *own = (part.strip() for part in self.remat.split(","))
        policies = dict.fromkeys(COMPONENTS, policy) | dict(part.split("=") for part in own if part.count("=") == 1)
        fits = len(policies) == len(COMPONENTS) and all("=" in part for part in own)
        if not fits or not set(policies.values()) <= set(REMAT_POLICIES):
            raise ValueError(
                f"remat is {self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}, and behind it, if you like, "
                f"policies of {', '.join(COMPONENTS)}, as in 'full, executor=none'."
            )
        return policies[component]

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Builds the record from `config.model`; an unknown name is a ValueError listing the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config.model has no field {', '.join(unknown)}; fields are {', '.join(sorted(known))}.")
        return cls(**dict(values))
