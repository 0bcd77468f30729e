"""What a table was made with, and whether that is what published numbers were made with.

Published RoboTwin results are often not reproduced, and the versions of simulator, physics and planner are the first
suspects. So a table says them, and does not call itself comparable where they are others.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahawam_jax.evaluation.robotwin.evaluators import CheckoutError, Evaluator
from ahawam_jax.evaluation.robotwin.jobs import EPISODES, SEEDS, TASKS

# Physics and rendering; time-optimal paths; the experts' planners; and what they compute with.
PACKAGES = ("sapien", "mplib", "toppra", "nvidia_curobo", "warp-lang", "torch", "numpy")
_PROBE = f"""
import importlib.metadata as m, json, platform
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print("VERSIONS", json.dumps(dict(python=platform.python_version(), **{{n: version(n) for n in {PACKAGES!r}}})))
"""
PUBLISHED = Path(__file__).parent / "published.json"


def published() -> dict[str, Any]:
    """The numbers of others and what they were made with, each with its source; null where that is not known."""
    return json.loads(PUBLISHED.read_text())


def describe(
    evaluator: Evaluator, gpus: Sequence[str], tasks: Sequence[str], configs: Sequence[str], repeats: int, seed: int
) -> dict[str, Any]:
    """The manifest of a table. Raises CheckoutError where the simulator's Python cannot be asked."""
    checkout, seeds = evaluator.checkout, [seed + repeat for repeat in range(repeats)]
    return {
        "simulator": {
            "checkout": str(checkout), **commit_of(checkout), "sources": sources_digest(checkout),
            "xpolicylab": commit_of(checkout / "XPolicyLab")["commit"],
        },
        "assets": assets_of(checkout / "assets"),
        "versions": versions_of(evaluator.python()),
        "devices": [devices_of(gpus)],
        "control": control_of(checkout),
        "seeds": seeds,
        "first_scenes": [SEEDS * (1 + each) for each in seeds],
        "tasks": list(tasks),
        "configs": list(configs),
        "instructions": "unseen",
        **evaluator.settings(),
    }  # fmt: skip


def _said(command: Sequence[str], folder: Path | None = None) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(folder: Path) -> dict[str, Any]:
    """{"commit", "changed"}: None where the folder is no repository of its own, as one that lies in another's."""
    top = _said(["git", "rev-parse", "--show-toplevel"], folder) if folder.is_dir() else None
    if top is None or Path(top).resolve() != folder.resolve():
        return {"commit": None, "changed": None}
    changed = _said(["git", "status", "--porcelain", "--untracked-files=no", "--ignore-submodules"], folder) or ""
    return {
        "commit": _said(["git", "rev-parse", "HEAD"], folder),
        "changed": sorted(line.split(maxsplit=1)[1] for line in changed.splitlines()),
    }


def sources_digest(checkout: Path) -> str:
    """SHA-256 of envs/**/*.py by path, without cuRobo's own, which RoboTwin's installer clones into it."""
    digest = hashlib.sha256()
    for path in sorted((checkout / "envs").rglob("*.py")):
        name = path.relative_to(checkout)
        if name.parts[1] != "curobo":
            digest.update(f"{name.as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def assets_of(folder: Path) -> dict[str, Any]:
    """Of each kind of assets how many files and bytes, and a SHA-256 of their names and sizes.

    Without .yml files: RoboTwin's installer writes this machine's paths into those.
    """
    found = {}
    for kind in ("objects", "embodiments", "background_texture"):
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted((folder / kind).rglob("*"))
            if path.is_file() and path.suffix != ".yml"
        }
        listing = "".join(f"{name}\0{size}\n" for name, size in sizes.items())
        found[kind] = {
            "files": len(sizes), "bytes": sum(sizes.values()), "listing": hashlib.sha256(listing.encode()).hexdigest()
        }  # fmt: skip
    return found


def versions_of(python: Sequence[str]) -> dict[str, str | None]:
    """Python's and of PACKAGES, as the simulator's Python has them. Raises CheckoutError."""
    said = _said([*python, "-c", _PROBE]) or ""
    line = next((line for line in said.splitlines() if line.startswith("VERSIONS ")), None)
    if line is None:
        raise CheckoutError(f"`{' '.join(python)}` does not run; --simulator names RoboTwin's environment.")
    return json.loads(line.removeprefix("VERSIONS "))


def devices_of(gpus: Sequence[str]) -> dict[str, Any]:
    """Names of the cards and their driver; None where nvidia-smi says nothing."""
    said = _said(["nvidia-smi", f"--id={','.join(gpus)}", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    rows = [tuple(map(str.strip, line.split(","))) for line in (said or "").splitlines()]
    return {"gpus": [row[0] for row in rows] or None, "driver": rows[0][1] if rows and len(rows[0]) > 1 else None}


def control_of(checkout: Path) -> str:
    """How joints reach what an action says, read off take_action's file.

    Upstream plans a time-optimal path for each action (TOPP); a fork drives them at a fixed rate where a variable
    says so, and that gives other results.
    """
    source = (checkout / "envs" / "_base_task.py").read_text(errors="replace")
    mode = os.environ.get("ROBOTWIN_QPOS_CONTROL_MODE")
    if mode and "ROBOTWIN_QPOS_CONTROL_MODE" in source:
        return f"qpos, {mode.lower().replace('topp', 'TOPP')}"
    return "qpos, TOPP" if ".TOPP(" in source else "qpos, unknown"


def differences(manifest: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing in which a table was made otherwise than published numbers; what is not known of them
    makes none."""
    pairs = [
        ("the simulator's sources (envs/*.py)", manifest["simulator"]["sources"], reference["sources"]),
        *((name, manifest["versions"].get(name), version) for name, version in reference["versions"].items()),
        ("control", manifest["control"], reference["control"]),
        ("instructions", manifest["instructions"], reference["instructions"]),
        ("episodes of a task", manifest["episodes"], EPISODES),
    ]
    found = []
    for name, ours, theirs in pairs:
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            found.append(f"{name}: {_short(ours)}, published with {' or '.join(map(_short, _listed(theirs)))}")
    missing = len(set(TASKS) - set(manifest["tasks"]))
    if missing:
        found.append(f"{missing} of the {len(TASKS)} tasks are left out")
    if manifest["simulator"]["changed"]:
        found.append(f"{len(manifest['simulator']['changed'])} file(s) of the checkout are changed: "
                     + ", ".join(manifest["simulator"]["changed"][:5]))  # fmt: skip
    return found


def unknown(reference: Mapping[str, Any]) -> list[str]:
    """What was not published of how numbers were made, and is therefore not compared."""
    return [name for name in PACKAGES if reference["versions"].get(name) is None] + ["driver", "GPU", "assets"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
