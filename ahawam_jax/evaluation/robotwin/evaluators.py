"""The two evaluators that RoboTwin has had, as a checkout holds one or the other: is it whole, and what to call."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ahawam_jax.evaluation.robotwin.jobs import EPISODES, Job


class CheckoutError(ValueError):
    """A checkout, or a setting, that nothing can be run with; the message says what is missing and the way out."""


@dataclass(frozen=True)
class Evaluator:
    """checkout: RoboTwin's folder.  policy: name of the policy folder in it.  simulator: environment of the simulator,
    a folder or conda's name for it.  episodes: of each evaluation."""

    checkout: Path
    policy: str
    simulator: str
    episodes: int = EPISODES

    @property
    def kind(self) -> str:
        raise NotImplementedError

    def command(self, job: Job, gpu: str, slot: int) -> list[str]:
        """slot: which of the places at which jobs run."""
        raise NotImplementedError

    def variables(self, job: Job, gpu: str, folder: Path) -> dict[str, str]:
        """Of the job's environment. folder: for files that it reads."""
        return {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}

    def settings(self) -> dict[str, object]:
        """What decides the result beside the checkout, for the manifest."""
        return {"evaluator": self.kind, "policy": self.policy, "episodes": self.episodes}

    def python(self) -> list[str]:
        """The simulator's Python."""
        if is_folder(self.simulator):
            return [str(environment_python(self.simulator))]
        return in_conda(self.simulator, "python")


@dataclass(frozen=True)
class XPolicyLab(Evaluator):
    """RoboTwin since August 2026. checkpoint, policy_environment, robot: what the policy's eval.sh is given."""

    checkpoint: str = ""
    policy_environment: str = ""
    robot: str = "arx_x5"

    kind = "XPolicyLab"

    @property
    def folder(self) -> Path:
        return self.checkout / "XPolicyLab" / "policy" / self.policy

    def command(self, job: Job, gpu: str, slot: int) -> list[str]:
        return [
            "bash", str(self.folder / "eval.sh"), "RoboTwin", job.task, self.checkpoint, self.robot, "joint",
            str(job.seed), gpu, gpu, self.policy_environment, self.simulator,
        ]  # fmt: skip

    def variables(self, job: Job, gpu: str, folder: Path) -> dict[str, str]:
        """RoboTwin's own scheduler hands what eval.sh has no place for in a file, a word a line."""
        path = folder / f"{job.name}.args"
        words = ("--task_config", job.config, "--test_num", str(self.episodes), "--instruction_type", "unseen")
        path.write_text("".join(f"{word}\n" for word in words))
        return {**super().variables(job, gpu, folder), "ROBOTWIN_EVAL_ARGS_FILE": str(path.absolute())}

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "checkpoint": self.checkpoint, "robot": self.robot}


@dataclass(frozen=True)
class Classic(Evaluator):
    """RoboTwin before. servers: of `ahawam serve`, shared out over the places.  label: names results and manifest."""

    servers: tuple[str, ...] = ()
    label: str = "aha_wam"

    kind = "script/eval_policy.py"

    @property
    def folder(self) -> Path:
        return self.checkout / "policy" / self.policy

    def command(self, job: Job, gpu: str, slot: int) -> list[str]:
        script = [
            "bash", str(self.folder / "eval.sh"), job.task, job.config, f"{self.label}_r{job.repeat}", str(job.seed),
            gpu, self.servers[slot % len(self.servers)],
        ]  # fmt: skip
        return script if is_folder(self.simulator) else in_conda(self.simulator, *script)

    def variables(self, job: Job, gpu: str, folder: Path) -> dict[str, str]:
        variables = super().variables(job, gpu, folder)
        if is_folder(self.simulator):  # activated
            path = environment_python(self.simulator).parent
            variables |= {"PATH": f"{path}{os.pathsep}{variables['PATH']}", "VIRTUAL_ENV": str(path.parent)}
        return variables

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "servers": list(self.servers), "label": self.label}


def is_folder(environment: str) -> bool:
    return os.sep in environment or Path(environment).is_dir()


def environment_python(folder: str) -> Path:
    """Raises CheckoutError where there is none."""
    path = Path(folder).absolute() / "bin" / "python"
    if not path.is_file():
        raise CheckoutError(f"the environment {folder} has no bin/python; name its folder, or its name in conda.")
    return path


def in_conda(name: str, *command: str) -> list[str]:
    return ["conda", "run", "--no-capture-output", "-n", name, *command]


@dataclass(frozen=True)
class Choice:
    """What a user gave; some of it belongs to one evaluator alone."""

    checkout: Path
    policy: str
    simulator: str
    episodes: int = EPISODES
    checkpoint: str | None = None
    policy_environment: str | None = None
    servers: Sequence[str] = field(default_factory=tuple)
    label: str = "aha_wam"


def open_checkout(choice: Choice, tasks: Sequence[str], configs: Sequence[str]) -> Evaluator:
    """The evaluator of a checkout. Raises CheckoutError for a checkout that is not whole or settings of the other."""
    checkout = choice.checkout.absolute()
    lab = (checkout / "scripts" / "eval_policy_xpolicylab.py").is_file()
    if not lab and not (checkout / "script" / "eval_policy.py").is_file():
        raise CheckoutError(
            f"{checkout} has neither scripts/eval_policy_xpolicylab.py nor script/eval_policy.py; expected a checkout "
            "of RoboTwin 2.0."
        )
    common = (checkout, choice.policy, choice.simulator, choice.episodes)
    if lab:
        _require(choice.checkpoint, "--checkpoint, the run or export to evaluate", checkout, "XPolicyLab's evaluator")
        _require(choice.policy_environment, "--policy-env, the environment of the policy", checkout,
                 "XPolicyLab's evaluator")  # fmt: skip
        if choice.servers:
            raise CheckoutError(f"--server is for the older evaluator; {checkout} has XPolicyLab's: leave it out.")
        evaluator: Evaluator = XPolicyLab(
            *common, checkpoint=_absolute(choice.checkpoint), policy_environment=_absolute(choice.policy_environment)
        )
        source = "export/xpolicylab"
    else:
        _require(choice.servers, "--server, the address of `ahawam serve`", checkout, "the older evaluator")
        if choice.checkpoint or choice.policy_environment:
            raise CheckoutError(
                f"--checkpoint and --policy-env are for XPolicyLab's evaluator; {checkout} has the older one, whose "
                "policy runs in `ahawam serve`: give --server."
            )
        if choice.episodes != EPISODES:
            raise CheckoutError(f"--episodes is {choice.episodes}, but the older evaluator always runs {EPISODES}.")
        evaluator = Classic(*common, servers=tuple(choice.servers), label=choice.label)
        source = "ahawam_jax/evaluation/robotwin_classic"
    if not (evaluator.folder / "eval.sh").is_file():
        raise CheckoutError(f"{evaluator.folder} has no eval.sh; copy our {source} there (docs/evaluators.md).")
    settings = checkout / ("env_cfg/task_config" if lab else "task_config")
    for what, names, place in (("task", tasks, checkout / "envs/{}.py"), ("config", configs, settings / "{}.yml")):
        absent = [name for name in names if not Path(str(place).format(name)).is_file()]
        if absent:
            first = Path(str(place).format(absent[0]))
            raise CheckoutError(f"{first} does not exist: {len(absent)} of {len(names)} {what}(s) are not there.")
    if not (checkout / "assets" / "objects").is_dir():
        raise CheckoutError(
            f"{checkout}/assets/objects does not exist; RoboTwin's script{'s' * lab}/_download_assets.sh fetches it."
        )
    evaluator.python()  # is there one?
    return evaluator


def _require(value: object, what: str, checkout: Path, evaluator: str) -> None:
    if not value:
        raise CheckoutError(f"{checkout} has {evaluator}, which needs {what}.")


def _absolute(name: str | None) -> str:
    """A folder's path from anywhere; other names stay, for XPolicyLab or conda to find."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else str(name)
