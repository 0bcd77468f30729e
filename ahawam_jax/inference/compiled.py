"""A policy's functions traced ahead of time: StableHLO in files, for one batch size and one kind of device.

A process that loads them neither traces the model nor sees its Python; XLA compiles what it reads.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export

from ahawam_jax.inference.programs import compiler_options
from data_pipelines.files import absent, read_json

ABOUT = "about.json"
# Of attention on GPUs. JAX does not promise that another version understands them, and so asks whether it is meant.
ATTENTION = ("LayoutConstraint", "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax")


def write(
    folder: Path, functions: Mapping[str, Callable[..., Any]], arguments: Mapping[str, tuple[Any, ...]], about: dict
) -> None:
    """Traces functions, each with its arguments as (trees of) ShapeDtypeStructs, for this process's first device.

    about: what they belong to; `read` compares it. Written last, so that an interrupted folder is never read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    files = {}
    for name, function in functions.items():
        leaves, structure = jax.tree.flatten(arguments[name])

        def flat(*leaves: jax.Array, function: Callable = function, structure: Any = structure) -> list[jax.Array]:
            return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

        meant = [export.DisabledSafetyCheck.custom_call(name) for name in ATTENTION]
        content = export.export(jax.jit(flat), disabled_checks=meant)(*leaves).serialize()
        (folder / f"{name}.jaxexport").write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()
    (folder / ABOUT).write_text(json.dumps({"about": about, "traced by": _jax(), "files": files}, indent=1))


def read(
    folder: Path, results: Mapping[str, Any], donated: Mapping[str, Any], about: dict
) -> dict[str, Callable[..., Any]]:
    """The functions that `write` left in a folder.

    results: by name, a tree of the structure that the function returns. donated: by name, one like the last argument
    of a function that writes in it. Raises ValueError for a folder that is not whole, is damaged, belongs to something
    else than `about` or was written with another JAX, which may refuse it, or read it and compute something else.
    """
    path = folder / ABOUT
    again = "write it again with ahawam compile-policy."
    if not path.is_file():
        raise ValueError(f"{folder} holds no compiled policy, {ABOUT} is missing; {again}")
    record = read_json(path, ValueError, again.removesuffix("."))
    if not all(isinstance(record.get(key), dict) for key in ("about", "files")):
        raise ValueError(f"{path} is not what ahawam compile-policy writes; {again}")
    if differing := sorted(key for key in {*record["about"], *about} if record["about"].get(key) != about.get(key)):
        found = "; ".join(f"{key}: {record['about'].get(key)} there, {about.get(key)} here" for key in differing)
        raise ValueError(f"{folder} was compiled for another policy ({found}); {again}")
    if (by := record.get("traced by", "a JAX that it does not name")) != _jax():
        raise ValueError(f"{folder} was compiled with {by}, and this is {_jax()}; {again}")
    functions = {}
    for name, result in results.items():
        file = folder / f"{name}.jaxexport"
        if not file.is_file():
            raise ValueError(f"{file} {absent(file)}; {again}")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != record["files"].get(name):
            raise ValueError(f"{file} is damaged or of another policy; {again}")
        functions[name] = _call(
            export.deserialize(bytearray(content)), jax.tree.structure(result), len(jax.tree.leaves(donated.get(name)))
        )
    return functions


def _jax() -> str:
    return f"JAX {jax.__version__}, jaxlib {jaxlib.__version__}"


def _call(exported: export.Exported, result: Any, donated: int) -> Callable[..., Any]:
    count = len(exported.in_avals)
    own = range(count - donated, count)
    run = jax.jit(exported.call, donate_argnums=own, compiler_options=compiler_options())
    return lambda *arguments: jax.tree.unflatten(result, run(*jax.tree.leaves(arguments)))
