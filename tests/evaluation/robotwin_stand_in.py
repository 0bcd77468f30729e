"""A RoboTwin checkout of either kind, whose evaluator says and writes what RoboTwin's does, and runs no simulator."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ahawam_jax.evaluation.robotwin.jobs import CONFIGS
from tests.conftest import REPOSITORY

VERSIONS = {"sapien": "3.0.0b1", "mplib": "0.2.1", "toppra": "0.6.3", "torch": "2.4.1"}
# What a task is to do beside succeeding in some episodes lies in plan.json, by task or by task and seed.
EVALUATION = '''
import fcntl, json, os, sys, time
from pathlib import Path

def evaluate(task, config, label, seed, policy, episodes):
    plan = json.loads(Path("plan.json").read_text())
    plan = plan.get(f"{task}.{seed}", plan.get(task, {}))
    with open("begun.txt", "a") as file:
        file.write(f"{task} {config} {label} {seed} {os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()}\\n")
    lock = open(f"{task}.{config}.{label}.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # RoboTwin's would write into one folder, named by the second
    stamp = f"2026-01-01 00:00:{os.getpid()}"
    folder = Path(f"eval_result/{task}/{policy}/{config}/{label}/{stamp}")
    folder.mkdir(parents=True)
    time.sleep(plan.get("seconds", 0))
    if plan.get("do") == "die":
        os.kill(os.getpid(), 9)
    if plan.get("do") == "fail":
        sys.exit("ModuleNotFoundError: No module named 'sapien'")
    succeeded, scene = 0, 100000 * (1 + seed)
    for episode in range(episodes):
        if plan.get("do") == "hang" and episode == 3:
            while True:
                print("error occurs !", flush=True)  # the expert finds no way, for ever
                time.sleep(0.05)
        if plan.get("do") == "error" and episode == 5:
            print("\\n\\033[91mPolicy rollout error:\\033[0m\\nValueError: the state is not finite")
        scene += episode % 3  # scenes that the expert does not solve are left out
        succeeded += episode < plan.get("successes", 0)
        print(f"step: \\033[92m{episode} / 400\\033[0m", end="\\r")
        print(f"\\033[93m{task}\\033[0m | \\033[94m{policy}\\033[0m | \\033[92m{config}\\033[0m | {label}\\n"
              f"Success rate: \\033[96m{succeeded}/{episode + 1}\\033[0m => \\033[95m0%\\033[0m, "
              f"current seed: \\033[90m{scene}\\033[0m\\n", flush=True)
        scene += 1
        if plan.get("do") == "short" and episode == 9:
            break
    rate = "" if plan.get("do") == "half" else 0.5 if plan.get("do") == "lie" else succeeded / episodes
    file = folder / "_result.txt"
    file.write_text(f"Timestamp: {stamp}\\n\\nInstruction Type: unseen\\n\\n{rate}")
    print(f"Data has been saved to {file}")
'''
CLASSIC = '''
import sys
sys.path.insert(0, "script")
from evaluation import evaluate
assert sys.argv[1:4] == ["--config", "policy/AHA_WAM_JAX/deploy_policy.yml", "--overrides"]
given = dict(zip(sys.argv[4::2], sys.argv[5::2]))
assert given["--server"].startswith("ws://")
evaluate(given["--task_name"], given["--task_config"], given["--ckpt_setting"], int(given["--seed"]),
         given["--policy_name"], 100)
'''
LAB = '''
import sys
sys.path.insert(0, "scripts")
from evaluation import evaluate
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["--instruction_type"] == "unseen"
evaluate(given["--task_name"], given["--task_config"], "run", int(given["--seed"]), given["--policy_name"],
         int(given["--test_num"]))
'''
LAB_SH = '''
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t more < "${ROBOTWIN_EVAL_ARGS_FILE}"
exec python scripts/eval_policy_xpolicylab.py "$@" "${more[@]}"
'''
CLIENT_SH = '''
PATH="$3/bin:$PATH" bash "${10}/scripts/eval_policy.sh" --task_name "$6" --policy_name "$8" --seed "${11}"
'''


def script(path: Path, text: str, interpreter: str = "bash") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env {interpreter}\n{text}")
    path.chmod(0o755)


def environment(folder: Path, versions: Mapping[str, str] = VERSIONS) -> Path:
    """One with these packages, as far as anybody asks."""
    for name, version in versions.items():
        info = folder / "packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    script(folder / "bin" / "python", f'PYTHONPATH={folder}/packages exec {sys.executable} -S "$@"')
    return folder


def checkout(folder: Path, lab: bool, tasks: list[str], plan: Mapping[str, Any]) -> Path:
    """A git repository with these tasks."""
    settings = folder / ("env_cfg/task_config" if lab else "task_config")
    for name in [*(f"envs/{task}.py" for task in tasks), "envs/robot/planner.py", "envs/curobo/setup.py"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# a task\n")
    (folder / "envs" / "_base_task.py").write_text("self.robot.left_mplib_planner.TOPP(left_path)\n")
    settings.mkdir(parents=True)
    for config in CONFIGS:
        (settings / f"{config}.yml").write_text("render_freq: 0\n")
    (folder / "assets" / "objects" / "001_bottle").mkdir(parents=True)
    (folder / "assets" / "objects" / "001_bottle" / "base0.glb").write_bytes(bytes(100))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / ".gitignore").write_text("assets\npolicy\nXPolicyLab/policy\neval_result\n")
    scripts = folder / ("scripts" if lab else "script")
    script(scripts / "evaluation.py", EVALUATION, "python")
    script(scripts / ("eval_policy_xpolicylab.py" if lab else "eval_policy.py"), LAB if lab else CLASSIC, "python")
    source = "export/xpolicylab" if lab else "ahawam_jax/evaluation/robotwin_classic"
    shutil.copytree(REPOSITORY / source, folder / ("XPolicyLab/policy" if lab else "policy") / "AHA_WAM_JAX")
    if lab:
        script(folder / "scripts" / "eval_policy.sh", LAB_SH)
        utils = folder / "XPolicyLab" / "utils"
        script(utils / "get_free_port.sh", "echo 4321")
        script(utils / "wait_for_policy_server.sh", "true")
        script(utils / "setup_env_client.sh", CLIENT_SH)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def policy_environment(folder: Path) -> Path:
    """Its server says nothing and runs until it is ended, then writes that down."""
    script(folder / "bin" / "activate", f"PATH={folder}/bin:$PATH")
    script(folder / "bin" / "python", f"trap 'echo ended >> {folder}/ended; exit' TERM\n"
           f"echo begun >> {folder}/begun\nwhile true; do sleep 0.02; done")  # fmt: skip
    return folder


def begun(checkout: Path) -> list[list[str]]:
    """[task, config, label, seed, card, process] of each evaluation that was begun."""
    path = checkout / "begun.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
