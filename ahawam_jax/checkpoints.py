"""Orbax checkpoints: the train state with its data position, and a separate item for inference.

WORKDIR/checkpoints/STEP holds
  state      parameters, optimizer, average, step                  what training resumes from
  inference  parameters to deploy (the average, if there is one)   what the policy loads, and all an import has
  run        JSON: config, statistics, instructions, seed and the number of batches consumed
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ahawam_jax.weights.convert import differences, shapes

FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, what was expected and what to do."""


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous and atomic: a killed job leaves whole steps only.

    in_flight: gigabytes that may be on their way to disk at once, at least as many as the largest shard has.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, in_flight: int = 96):
        self.folder = (Path(workdir) / FOLDER).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        state, inference = (ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight) for _ in range(2))
        handlers = {"state": state, "inference": inference, "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: Any, run: dict[str, Any]) -> None:
        """Writes `state`, a pytree with a `step`, and its parameters to `deploy`; `run` is JSON-ready."""
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                inference=ocp.args.StandardSave(state.deploy),
                run=ocp.args.JsonSave(run),
            ),
        )

    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON record of a step."""
        return self._restore(step, run=ocp.args.JsonRestore())["run"]

    def restore_state(self, step: int, like: Any) -> Any:
        """The train state of a step, laid out like `like` (abstract arrays with target shardings)."""
        check_arrays(self.folder / str(step) / "state", like)
        return self._restore(step, state=ocp.args.StandardRestore(like))["state"]

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters to deploy, laid out like `like`."""
        check_arrays(self.folder / str(step) / "inference", like)
        return self._restore(step, inference=ocp.args.StandardRestore(like))["inference"]

    def read_param(self, step: int, path: str) -> np.ndarray:
        """One parameter to deploy, by its path joined with '/', as it is stored; nothing else is read."""
        keys = path.split("/")
        item, options = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, options = {key: item}, {key: options}
        with ocp.PyTreeCheckpointer() as reader:
            value = reader.restore(
                self.folder / str(step) / "inference",
                args=ocp.args.PyTreeRestore(item=item, restore_args=options, partial_restore=True),
            )
        for key in keys:
            value = value[key]
        return value

    def wait(self) -> None:
        """Returns when everything handed to `save` is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be read ({error}); delete that step's folder to fall back on an "
                "older one."
            ) from error


def save_params(workdir: str | Path, params: Any, run: dict[str, Any]) -> None:
    """Writes parameters alone, to deploy or to start from, as step 0; needs little memory beside them."""
    largest = max(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    checkpoints = Checkpoints(workdir, in_flight=largest // 10**9 + 1)
    items = {"inference": ocp.args.StandardSave(params), "run": ocp.args.JsonSave(run)}
    checkpoints._manager.save(0, args=ocp.args.Composite(**items))
    checkpoints.close()


def check_arrays(item: Path, like: Any) -> None:
    """Raises one CheckpointError listing every array that `item` lacks, has in excess or in another shape."""
    problems = misfits(item, like)
    if problems:
        raise CheckpointError(
            f"{item} does not fit this configuration; use the config it was trained with or another checkpoint:\n  "
            + "\n  ".join(problems)
        )


def misfits(item: Path, like: Any) -> list[str]:
    """A line for every array that `item` lacks, has in excess or in another shape."""
    expected = {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(like)}
    return differences(shapes(stored_arrays(item)), expected)


def stored_arrays(item: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in a checkpoint item, by path joined with '/'; nothing is read."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(item).item_metadata
        return {
            _name(path): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
            for path, x in jax.tree_util.tree_leaves_with_path(getattr(stored, "tree", stored))
        }
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{item} is not a readable checkpoint item ({error}); use another step.") from error


def _name(path: tuple[Any, ...]) -> str:
    """Tree path as 'params/planner/...', whether its containers are structs, dicts, tuples or their JSON form."""
    parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path)
    return "/".join(str(part) for part in parts)


def find_step(path: str | Path) -> tuple[Path, int]:
    """A workdir, its checkpoints folder or one step's folder -> (workdir, step), the newest step if not named."""
    path = Path(path)
    if path.name.isdigit() and path.parent.name == FOLDER and path.is_dir():
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == FOLDER else path
    folder = workdir / FOLDER
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise CheckpointError(
            f"{path} holds no checkpoint; expected a workdir of ahawam train with {FOLDER}/STEP inside."
        )
    return workdir, int(np.max(steps))
