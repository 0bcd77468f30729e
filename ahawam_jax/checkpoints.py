"""Orbax checkpoints: the train state with its data position, and a separate item for inference.

WORKDIR/checkpoints/STEP holds
  state      parameters, optimizer, average, step                  what training resumes from
  inference  parameters to deploy (the average, if there is one)   what the policy loads, and all an import has
  run        JSON: config, statistics, instructions, seed and the number of batches consumed, and of every array of
             the other two items its shape, dtype and the sum of its bits

`inference` is left out where it would say what `state` says, but for a run's last step: it is then read from there.

Whatever is read is compared with these sums, so that nothing damaged is trained on, deployed or exported.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from ahawam_jax.checkpoint_files import Damage, check_item, file_of, find_undecodable, read_json
from ahawam_jax.checkpoint_keep import NEWEST_TWO, Keep
from ahawam_jax.checkpoint_sums import describe, find_not_finite, name_of, named, sums
from ahawam_jax.weights.convert import differences, summarize
from data_pipelines.disk import writing
from data_pipelines.paths import local_path

FOLDER = "checkpoints"
GROUP = 4 * 2**30  # bytes read at a time where they are looked at before the next ones come

# Orbax also logs, with its traceback, what it raises, and every file it writes.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
_unraisable = sys.unraisablehook


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, what was expected and what to do."""


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous and atomic: a killed job leaves whole steps only.

    in_flight: gigabytes that may be on their way to disk at once, at least as many as the largest shard has.
    """

    def __init__(self, workdir: str | Path, keep: Keep = NEWEST_TWO, in_flight: int = 96):
        self.folder = (local_path(workdir) / FOLDER).absolute()
        self._keep, self._in_flight = keep, in_flight
        self._manager: ocp.CheckpointManager | None = None  # made for the first save: reading leaves no traces
        self._saving: int | None = None
        self._records: dict[int, dict[str, Any]] = {}
        self._errors: dict[int, float | None] = {}  # of validation, of the steps that were saved

    # --------------------------------------------------------------------------------------------------- steps
    @property
    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return max(self.steps, default=None)

    @property
    def safe(self) -> str:
        """A sentence on what is kept when nothing more can be written."""
        if self.latest is None:
            return "No step was saved before; the same command starts anew."
        return f"Step {self.latest} is the last good one, and the same command goes on from it."

    def damaged(self, step: int, what: object) -> CheckpointError:
        """The error for a step of which `what` is damaged, with the way out."""
        before = max((s for s in self.steps if s < step and not self._files_damage(s)), default=None)
        if before is None:
            way = f"No whole step before it is left in {self.folder}: train or import again into another folder."
        else:
            way = (
                f"The step before is {self.folder / str(before)}: name it instead. To resume training from it, remove "
                f"{self.folder / str(step)} and start the same command again."
            )
        return CheckpointError(f"Step {step} in {self.folder} is damaged: {what}. {way}")

    def _files_damage(self, step: int) -> str | None:
        try:
            for item in self._read_run(step)["arrays"]:
                check_item(self.folder / str(step) / item)
        except Damage as damage:
            return str(damage)
        return None

    # ------------------------------------------------------------------------------------------------- writing
    def save(self, state: Any, run: Mapping[str, Any], final: bool = False) -> None:
        """Begins to write `state`, a pytree with a `step`, `params` and, where they are others, those to `deploy`.

        run: JSON-ready; its "open_loop_error", where it has one, is what the best steps are chosen by.  final: also
        writes the parameters to deploy where they are the state's own. All processes of a job call it together.
        Raises DiskError or CheckpointError where this save or the one before fails, naming the last good step, and
        CheckpointError for a state that is not finite.
        """
        step = int(state.step)
        if step in (self.latest, self._saving):
            return
        if name := find_not_finite(state):
            raise CheckpointError(f"Step {step} is not saved: its {name} is not finite. {self.safe}")
        deploy = state.deploy
        own = list(map(id, jax.tree.leaves(deploy))) == list(map(id, jax.tree.leaves(state.params)))
        self._save(step, {"state": state} if own and not final else {"state": state, "inference": deploy}, run)

    def _save(self, step: int, items: dict[str, Any], run: Mapping[str, Any]) -> None:
        if self._saving is not None:
            self.wait()
        arrays = {name: describe(tree) for name, tree in items.items()}
        record = json.loads(json.dumps({**run, "arrays": arrays}))
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._failing(step):
            if self._manager is None:
                self._manager = self._make_manager()
            self._saving, self._errors[step] = step, run.get("open_loop_error")
            self._manager.save(
                step, args=ocp.args.Composite(**saves, run=ocp.args.JsonSave({**record, "digest": _digest(record)}))
            )

    def _make_manager(self) -> ocp.CheckpointManager:
        # What a killed save left is as large as a checkpoint.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=True, cleanup_tmp_directories=True
        )
        handlers = {
            item: ocp.StandardCheckpointHandler(save_concurrent_gb=self._in_flight) for item in ("state", "inference")
        }
        handlers["run"] = ocp.JsonCheckpointHandler()
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Orbax asks which of its checkpoints, the one that is being written among them, are to be kept."""
        errors = {each.step: self._error(each.step) for each in checkpoints}
        kept = self._keep.choose(errors)
        return [step in kept for step in errors]

    def _error(self, step: int) -> float | None:
        if step not in self._errors:
            try:
                self._errors[step] = self._read_run(step).get("open_loop_error")
            except Damage:  # a step whose removal was cut short
                self._errors[step] = None
        return self._errors[step]

    def check(self) -> None:
        """Raises DiskError or CheckpointError if the save under way has failed; does not wait for it."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything handed to `save` is on disk. Raises like `check`."""
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._failing(step):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    @contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        path = self.folder / str(step)
        try:
            with writing(path, self.safe):
                yield
        except OSError:
            _ignore_stragglers()
            raise
        except Exception as error:
            _ignore_stragglers()
            raise CheckpointError(f"{path} could not be written ({_brief(error)}). {self.safe}") from error

    # ------------------------------------------------------------------------------------------------- reading
    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON record of a step."""
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"{self.folder} has no step {step}; it has {there}.")
        if step not in self._records:
            try:
                self._records[step] = self._read_run(step)
            except Damage as damage:
                raise self.damaged(step, damage) from None
        return self._records[step]

    def _read_run(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "run" / "metadata"
        record = read_json(path)
        digest = record.pop("digest", None)
        if digest != _digest(record):
            raise Damage(f"{path} does not hold what was written to it")
        return record

    def restore_state(self, step: int, like: Any) -> Any:
        """The train state of a step, laid out like `like` (abstract arrays with target shardings)."""
        return self._restore(step, "state", like)

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters to deploy, laid out like `like` and in its dtypes."""
        return self._restore(step, "inference", like)

    def read_param(self, step: int, path: str) -> np.ndarray:
        """One parameter to deploy, by its path joined with '/', as it is stored; nothing else is read."""
        keys = path.split("/")
        item, options = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, options = {key: item}, {key: options}
        value = self._read(step, "inference", item, options, partial_restore=True)
        for key in keys:
            value = value[key]
        self._compare(step, "inference", {path: value})
        return value

    def arrays(self, step: int, item: str = "inference") -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of an item, by path joined with '/'; nothing is read."""
        return {
            name: jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
            for name, (shape, dtype, _) in self._described(step, item).items()
        }

    def misfits(self, step: int, item: str, like: Any) -> list[str]:
        """A line for every array that an item lacks, has in excess or in another shape than in `like`."""
        there = {name: x.shape for name, x in self.arrays(step, item).items()}
        return differences(there, {name: tuple(x.shape) for name, x in named(like).items()})

    def check_fits(self, step: int, item: str, like: Any) -> None:
        """Raises CheckpointError for damaged files, and one that lists all misfits."""
        self.check_files(step, item)
        if problems := self.misfits(step, item, like):
            raise CheckpointError(
                f"{self.folder / str(step) / item} does not fit this configuration; use the config it was trained "
                "with or another checkpoint:\n  " + "\n  ".join(summarize(problems))
            )

    def check_files(self, step: int, item: str) -> None:
        """Raises CheckpointError for the first file of an item that is missing or cut off; no array is read."""
        self._described(step, item)
        try:
            check_item(self._place(step, item)[0])
        except Damage as damage:
            raise self.damaged(step, damage) from None

    def read_all(self, step: int, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Reads all of an item, some gigabytes at a time, and hands out every array by name after comparing its sum.

        Raises CheckpointError for damage.
        """
        self.check_files(step, item)
        with self._damage(step, item), ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(self.folder / str(step) / item).item_metadata.tree
        options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        for part in _groups(tree):
            found = {name: x for name, x in named(self._read(step, item, part, options)).items() if x is not ...}
            self._compare(step, item, found)
            yield from found.items()

    def _restore(self, step: int, item: str, like: Any) -> Any:
        """In groups: each is read in the stored dtype, compared, and only then cast."""
        self.check_fits(step, item, like)
        stored = self.arrays(step, item)
        options = jax.tree_util.tree_map_with_path(
            lambda path, x: ocp.ArrayRestoreArgs(
                sharding=x.sharding, global_shape=x.shape, dtype=stored[name_of(path)].dtype
            ),
            like,
        )
        leaves: dict[str, Any] = {}
        for part in _groups(like):
            found = {name: x for name, x in named(self._read(step, item, part, options)).items() if x is not ...}
            self._compare(step, item, found)
            wanted = named(part)
            leaves |= {name: x.astype(wanted[name].dtype) for name, x in found.items()}
        return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name_of(path)], like)

    def _read(self, step: int, item: str, tree: Any, options: Any, **more: Any) -> Any:
        path, within = self._place(step, item)
        if within:
            asked, how = named(tree), named(options)
            asked = {f"{within}/{name}": x for name, x in asked.items() if x is not ocp.PLACEHOLDER}
            how = {name: how[name.removeprefix(f"{within}/")] for name in asked}
            tree, options = unflatten_dict(asked, sep="/"), unflatten_dict(how, sep="/")
            more = {"partial_restore": True}
        with self._damage(step, item), ocp.PyTreeCheckpointer() as reader:
            found = reader.restore(path, args=ocp.args.PyTreeRestore(item=tree, restore_args=options, **more))
        return found[within] if within else found

    def _place(self, step: int, item: str) -> tuple[Path, str]:
        """The folder that an item lies in, and under which name in there; "" for all of it."""
        there, own = self.restore_run(step)["arrays"], item == "inference"
        if own and item not in there and "state" in there:
            return self.folder / str(step) / "state", "params"
        return self.folder / str(step) / item, ""

    def _described(self, step: int, item: str) -> dict[str, list[Any]]:
        found = self.restore_run(step).get("arrays", {})
        if item == "inference" and item not in found and "state" in found:
            start = "params/"
            return {name.removeprefix(start): x for name, x in found["state"].items() if name.startswith(start)}
        if item not in found:
            raise CheckpointError(
                f"{self.folder / str(step)} has no {item}, only {', '.join(found) or 'nothing'}. An import holds "
                f"parameters alone: start from it with --config.init={self.folder.parent} and another --workdir."
            )
        return found[item]

    def _compare(self, step: int, item: str, arrays: Mapping[str, Any]) -> None:
        described = self._described(step, item)
        found_sums = sums(list(arrays.values()))
        if other := [name for name, found in zip(arrays, found_sums, strict=True) if described[name][2] != found]:
            more = f" and {len(other) - 1} other arrays" if other[1:] else ""
            path, within = self._place(step, item)
            file = file_of(path, f"{within}/{other[0]}".lstrip("/"))
            raise self.damaged(step, f"{file} holds other values of {other[0]}{more} than were saved")

    @contextmanager
    def _damage(self, step: int, item: str) -> Iterator[None]:
        """Orbax raises what it likes, Exception itself among others."""
        try:
            yield
        except Exception as error:
            _ignore_stragglers()
            path, within = self._place(step, item)
            names = [f"{within}/{name}".lstrip("/") for name in self._described(step, item)]
            what = find_undecodable(path, names) or f"{path} cannot be read ({_brief(error)})"
            raise self.damaged(step, what) from error


def save_params(workdir: str | Path, params: Any, run: Mapping[str, Any]) -> None:
    """Writes parameters alone, to deploy or to start from, as step 0; needs little memory beside them."""
    largest = max(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    checkpoints = Checkpoints(workdir, in_flight=largest // 10**9 + 1)
    checkpoints._save(0, {"inference": params}, run)
    checkpoints.close()


def _groups(tree: Any) -> Iterator[Any]:
    """The tree, each time with other gigabytes of its leaves, and orbax's placeholder for the rest."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = np.cumsum([int(np.prod(x.shape)) * 4 for x in leaves])
    for group in np.unique(sizes // GROUP):
        yield structure.unflatten(
            [x if size // GROUP == group else ocp.PLACEHOLDER for x, size in zip(leaves, sizes, strict=True)]
        )


def _ignore_stragglers() -> None:
    """Where one array fails, orbax ends its event loop; the others fail later and find nobody to tell it to."""
    sys.unraisablehook = lambda late: str(late.exc_value) == "Event loop is closed" or _unraisable(late)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_step(path: str | Path) -> tuple[Path, int]:
    """A workdir, its checkpoints folder or one step's folder -> (workdir, step), the newest step if not named."""
    path = local_path(path)
    if path.name.isdigit() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == FOLDER else path
    step = Checkpoints(workdir).latest
    if step is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; expected a workdir of ahawam train with {FOLDER}/STEP inside."
        )
    return workdir, step
