"""All that one GPU can say of the project, in order of worth, each part with a time limit and a log of its own.

    python -m benchmarks.on_gpu --out DIR [--only verify latency train slow_stream] [--reference FOLDER]

A part that runs over its limit is ended and what it had printed stays in DIR/PART.log; the parts after it still run.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GIB_FOR_ALL_LAYERS = 130  # of the device, for the training step of the whole model
# JAX takes memory as it needs it, beside PyTorch's, up to nearly all there is.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.97", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def parts(out: Path, reference: Path, memory_gib: float) -> dict[str, tuple[int, list[str]]]:
    """Name -> (seconds it may take, arguments of python)."""
    layers = [] if memory_gib > GIB_FOR_ALL_LAYERS else ["--layers", "16"]
    return {
        "verify": (240, ["-m", "ahawam_jax", "verify", str(reference)]),
        "latency": (375, ["-m", "ahawam_jax", "benchmark", "--steps", "2", "10", "--repeats", "12", "--profile",
                          "--out", str(out / "latency.json")]),
        "train": (180, ["-m", "benchmarks.train_step", "--batch", "8", *layers,
                        "--out", str(out / "train.json")]),
        "slow_stream": (60, ["-m", "benchmarks.slow_stream", "--repeats", "20"]),
    }  # fmt: skip


def device_memory_gib() -> float:
    """Of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def run(name: str, limit: int, arguments: list[str], log: Path) -> str:
    """Runs a part, its output to the terminal and to `log`; how it ended."""
    began = time.monotonic()
    environment = os.environ | ENVIRONMENT
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            end = f"exit status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"ended after its limit of {limit} s"
    print(f"===== {name}: {end}, {time.monotonic() - began:.0f} s\n{log.read_text(errors='replace')}", flush=True)
    return end


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in this order")
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"), help="fixtures, for verify")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    known = parts(options.out, options.reference, device_memory_gib())
    for name in options.only or known:
        if name not in known:
            parser.error(f"no part {name!r}; there are {', '.join(known)}")
    for name in options.only or known:
        run(name, *known[name], options.out / f"{name}.log")


if __name__ == "__main__":
    main()
