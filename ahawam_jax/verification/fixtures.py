"""Fixtures computed with the released code: files of tensors, what is read from them and what is compared.

The error of a tensor is its largest absolute deviation over its largest stored entry.
"""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from data_pipelines.files import disguised, read_json

TOLERANCE = 2e-5  # float32 arithmetic on both sides: about 1e2 roundings of 6e-8 per block, 3 to 30 blocks
ROLLOUT_TOLERANCE = 5e-5  # ten executor passes in a row
WEIGHTS = ("vae_weights", "umt5_weights", "d_student_weights")  # other checks use and name them


class Fixture:
    """One safetensors file: inputs are read with [], results are handed to `compare`."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, although config.json lists it; copy the whole folder again.")
        try:
            self.stored = load_file(path)
        except Exception as error:
            found = disguised(path, own=b"{") or f"is not a readable safetensors file ({error}); copy it again"
            raise ValueError(f"{path} {found}.") from error
        self.unused = set(self.stored)
        self.problems = [
            f"{name} as stored is not finite"
            for name, x in self.stored.items()
            if not np.isfinite(x.astype(np.float64)).all()
        ]
        self.worst, self.compared = (0.0, "-"), 0

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.stored:
            raise ValueError(f"{name} is not stored; the fixture is incomplete, copy it again.")
        self.unused.discard(name)
        value = self.stored[name]
        return value.astype(bool) if value.dtype == np.uint8 else value

    def ignore(self, name: str) -> None:
        """Marks a stored tensor as accounted for: it repeats what another one says."""
        self.unused.discard(name)

    def compare(self, name: str, value, tolerance: float = TOLERANCE, floor: float = 0.0) -> None:
        """Records the relative error of `value` against the stored tensor; `floor` bounds the divisor from below."""
        want, got = np.asarray(self[name], np.float64), np.asarray(jax.device_get(value), np.float64)
        self.compared += 1
        if got.shape != want.shape:
            self.problems.append(f"{name} has shape {list(got.shape)}, stored {list(want.shape)}")
            return
        if not np.isfinite(got).all():
            self.problems.append(f"{name} as computed here is not finite")
            return
        scale = max(np.abs(want).max(initial=0.0), floor, 1e-300)
        error = float(np.abs(got - want).max(initial=0.0) / scale)
        self.worst = max(self.worst, (error, name))
        if not error <= tolerance:
            self.problems.append(f"{name} deviates by {error:.1e}, tolerance {tolerance:.0e}")

    def finish(self) -> None:
        """Adds a problem for every tensor nobody looked at."""
        self.problems += [f"{name} was neither used nor compared" for name in sorted(self.unused)]


class Suite:
    """A folder of fixtures and its configuration."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give the folder that holds the fixtures' config.json.")
        self.config = read_json(path, ValueError, "copy it again")
        try:
            self.fixtures = list(self.config["fixtures"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must be JSON with a 'fixtures' object ({error!r}); copy it again.") from error

    def load(self, name: str) -> Fixture:
        return Fixture(self.folder / f"{name}.safetensors")

    def weights(self, name: str = "tiny_weights") -> dict[str, np.ndarray]:
        return dict(self.load(name).stored)
