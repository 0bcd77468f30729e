"""What a run that fails leaves behind for whoever looks into it: one file."""

import importlib.metadata
import json
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from ahawam_jax.training import hosts
from ahawam_jax.training.metrics import Log
from ahawam_jax.training.stopping import Interrupted
from data_pipelines.disk import whole_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextmanager
def leaves_behind(workdir: Path, facts: Mapping[str, Any], log: Log) -> Iterator[None]:
    """An error in the block writes workdir/crash.json and passes; of process n > 0, crash.n.json.

    facts: config, mesh, hosts, JSON-ready. The file also has the error, versions and the last metrics.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        number = jax.process_index()
        path = workdir / (f"crash.{number}.json" if number else "crash.json")
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "error": "".join(traceback.format_exception(error)),
            "last_metrics": log.last(), **facts, "versions": versions(),
        }  # fmt: skip
        with suppress(OSError), whole_file(path) as partial:  # a full disk may be the error itself
            partial.write_text(json.dumps(content, indent=1))
        raise


def versions() -> dict[str, str]:
    """Of Python, the packages that training computes with, our code."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, **hosts.environment()}
