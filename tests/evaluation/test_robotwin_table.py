"""`ahawam robotwin` against a stand-in evaluator: every job once, whatever happens to it and to the scheduler."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from ahawam_jax.commands import robotwin
from ahawam_jax.evaluation.robotwin import manifest, scheduler
from ahawam_jax.evaluation.robotwin.jobs import CONFIGS, TASKS, ResultError, all_jobs, read_result
from ahawam_jax.evaluation.robotwin.tables import render
from tests.conftest import REPOSITORY
from tests.evaluation.robotwin_stand_in import begun, checkout, environment, policy_environment

SOME = ["lift_pot", "turn_switch"]
PLAN = {"lift_pot": {"successes": 93}, "turn_switch": {"successes": 40}, "turn_switch.1": {"successes": 50}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL", 0.02)
    monkeypatch.delenv("ROBOTWIN_QPOS_CONTROL_MODE", raising=False)


def arguments(folder: Path, *more: str, tasks: list[str] = SOME) -> list[str]:
    return [
        f"--checkout={folder}/RoboTwin", f"--simulator={folder}/simulator", f"--out={folder}/out",
        "--tasks", *tasks, *more,
    ]  # fmt: skip


@pytest.fixture
def classic(tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a checkout with the older evaluator; the arguments that run it."""

    def make(plan: dict[str, Any], *more: str, tasks: list[str] = SOME) -> list[str]:
        checkout(tmp_path / "RoboTwin", False, tasks, plan)
        environment(tmp_path / "simulator")
        return arguments(tmp_path, "--server", "ws://127.0.0.1:8000", *more, tasks=tasks)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def test_the_tasks_are_robotwins() -> None:
    assert len(TASKS) == len(set(TASKS)) == 50 and list(TASKS) == sorted(TASKS)
    jobs = all_jobs(TASKS, CONFIGS, 3, 7)
    assert len({job.name for job in jobs}) == 300 and {job.seed for job in jobs} == {7, 8, 9}


def test_every_job_once_over_two_cards(
    classic: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert robotwin.main(classic(PLAN, "--gpus", "0", "3", "--server", "ws://a:1", "ws://b:2")) == 0
    ran = begun(tmp_path / "RoboTwin")
    wanted = [(task, config, seed) for task in SOME for config in CONFIGS for seed in range(3)]
    assert sorted((task, config, int(seed)) for task, config, _, seed, *_ in ran) == sorted(wanted)
    assert {label for _, _, label, *_ in ran} == {f"aha_wam_r{n}" for n in range(3)}
    assert {card for *_, card, _ in ran} == {"0", "3"}
    found = {(line["task"], line["config"], line["repeat"]): line for line in lines(tmp_path)}
    assert found[("turn_switch", "demo_clean", 1)]["successes"] == 50
    assert found[("lift_pot", "demo_randomized", 2)]["scenes"][:4] == [300000, 300002, 300005, 300006]
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.rstrip().endswith(table.rstrip())
    row = next(line for line in table.splitlines() if line.startswith("| turn_switch"))
    interval = binomtest(130, 300).proportion_ci(0.95, method="wilson")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:3] == ["130/300 = 43.3", f"{100 * interval.low:.1f} - {100 * interval.high:.1f}"]
    assert cells[5:7] == ["-", "-"], "rows of single tasks of AHA-WAM's table could not be had"
    assert "- clean, by repeat: 133/200 = 66.5 (2 tasks); 143/200 = 71.5 (2 tasks); 133/200" in table
    assert "**Not comparable with AHA-WAM's numbers**" in table and "48 of the 50 tasks are left out" in table
    # Again: nothing is left to do, and nothing is run.
    assert robotwin.main(arguments(tmp_path, "--server", "ws://c:1")) == 0
    assert len(begun(tmp_path / "RoboTwin")) == 12
    assert "12 of 12 evaluations are finished, 0 to go" in capsys.readouterr().out


def test_xpolicylab(tmp_path: Path) -> None:
    """Its eval.sh with a server of its own for each, which ends with it; what it has no place for, in a file."""
    plan = {"lift_pot": {"successes": 93, "seconds": 0.2}}
    root = checkout(tmp_path / "RoboTwin", True, ["lift_pot"], plan)
    policy = policy_environment(tmp_path / "policy")
    environment(tmp_path / "simulator")
    more = ("--checkpoint", "my/run", "--policy-env", str(policy), "--episodes", "95", "--repeats", "2")
    assert robotwin.main(arguments(tmp_path, *more, "--gpus", "0", "1", "--per-gpu", "2", tasks=["lift_pot"])) == 0
    found = sorted((line["config"], line["repeat"], line["successes"], line["episodes"]) for line in lines(tmp_path))
    assert found == [(config, repeat, 93, 95) for config in CONFIGS for repeat in range(2)]
    assert (policy / "ended").read_text().count("ended") == (policy / "begun").read_text().count("begun") == 4
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (said["evaluator"], said["checkpoint"], said["robot"]) == ("XPolicyLab", "my/run", "arx_x5")
    assert {row[4] for row in begun(root)} == {"0", "1"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die", "its process was killed by SIGKILL"),
        ("fail", "its process ended before its work was done, with exit status 1"),
        ("half", "ends with 'Instruction Type: unseen', which is no rate: it was not written to its end"),
        ("lie", "says a rate of 0.5, its output 93 of 100"),
        ("short", "10 of 100 episodes were run"),
        ("error", r"the policy's rollout ended with an error in 1 episode\(s\), counted as failures"),
        ("hang", r"no episode was over for 0.05 minutes after the first 3, so it was ended"),
    ],
)
def test_what_gives_no_number_is_said_and_tried_again(
    classic: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    """The others go on; the next call runs that one alone."""
    plan = {**PLAN, "lift_pot": {"successes": 93, "do": fault}}
    few = ("--repeats", "1", "--configs", "demo_clean", *(("--stalled", "0.05") if fault == "hang" else ()))
    call = classic(plan, *few)
    assert robotwin.main(call) == 1
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: lift_pot.demo_clean.r0: ") and error.endswith("lift_pot.demo_clean.r0.log)")
    assert re.search(said, error), error
    tries = [line for line in lines(tmp_path) if line["task"] == "lift_pot"]
    assert len(tries) == scheduler.TRIES and all("successes" not in line for line in tries)
    assert "| lift_pot    | - " in captured.out and "1 of 2 evaluations" in captured.out
    (tmp_path / "RoboTwin" / "plan.json").write_text(json.dumps(PLAN))
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "x", "--amend"],
                   cwd=tmp_path / "RoboTwin", check=True)  # fmt: skip
    before = len(begun(tmp_path / "RoboTwin"))
    assert robotwin.main(call) == 1 and "was begun with others: simulator was" in capsys.readouterr().err
    said_before = tmp_path / "out" / "manifest.json"
    said_before.unlink()
    assert robotwin.main(call) == 0
    assert [row[0] for row in begun(tmp_path / "RoboTwin")[before:]] == ["lift_pot"]


def test_a_setting_that_gives_no_number_at_all_is_given_up(
    classic: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = list(TASKS[:10])
    assert robotwin.main(classic({task: {"do": "fail"} for task in tasks}, tasks=tasks)) == 1
    captured = capsys.readouterr()
    assert "error: the first 3 evaluations gave no number" in captured.err
    assert "No module named 'sapien'" in captured.out, "the log's end is shown"
    assert len(begun(tmp_path / "RoboTwin")) <= 4


def call_in_a_process(call: list[str]) -> subprocess.Popen:
    code = (
        "import sys; from ahawam_jax.evaluation.robotwin import scheduler; scheduler.POLL = 0.02; "
        "from ahawam_jax.commands.robotwin import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, *call], cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def until(true: Callable[[], Any]) -> None:
    limit = time.monotonic() + 30
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:  # gone, or going while it is read
        return False


def test_kill_9_ends_the_jobs_and_loses_those_alone(classic: Callable[..., list[str]], tmp_path: Path) -> None:
    plan = {"lift_pot": {"successes": 93}, "turn_switch": {"successes": 40, "seconds": 60}}
    call = classic(plan, "--repeats", "1", "--configs", "demo_clean")
    first = call_in_a_process(call)
    until(lambda: len(begun(tmp_path / "RoboTwin")) == 2)
    second = subprocess.run([sys.executable, "-m", "ahawam_jax", "robotwin", *call], cwd=REPOSITORY,
                            capture_output=True, text=True)  # fmt: skip
    assert second.returncode == 1 and "is being written by process" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: not alive(begun(tmp_path / "RoboTwin")[1][5]))
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"task": "turn_switch", "successes"')  # cut off in the midst of a line
    (tmp_path / "RoboTwin" / "plan.json").write_text(json.dumps({**plan, "turn_switch": {"successes": 40}}))
    subprocess.run(["git", "update-index", "--assume-unchanged", "plan.json"], cwd=tmp_path / "RoboTwin", check=True)
    assert robotwin.main(call) == 0
    assert [(line["task"], line["successes"]) for line in lines(tmp_path)] == [("lift_pot", 93), ("turn_switch", 40)]
    assert [row[0] for row in begun(tmp_path / "RoboTwin")] == ["lift_pot", "turn_switch", "turn_switch"]


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ("script/eval_policy.py", (), "neither scripts/eval_policy_xpolicylab.py nor script/eval_policy.py"),
        ("policy/AHA_WAM_JAX/eval.sh", (), "copy our ahawam_jax/evaluation/robotwin_classic there"),
        ("envs/lift_pot.py", (), r"envs/lift_pot.py does not exist: 1 of 2 task\(s\) are not there"),
        ("task_config/demo_clean.yml", (), r"1 of 2 config\(s\) are not there"),
        ("assets/objects/001_bottle/base0.glb", (), "script/_download_assets.sh fetches it"),
        ("", ("--checkpoint", "x"), "are for XPolicyLab's evaluator"),
        ("", ("--episodes", "20"), "the older evaluator always runs 100"),
        ("", ("--repeats", "0"), "--repeats is 0; expected at least 1"),
        ("", ("--gpus", "1", "1"), "--gpus names one twice"),
        ("", ("--stalled", "0"), "expected more than 0 minutes"),
        ("", ("--simulator", "/nowhere"), "/nowhere has no bin/python"),
        ("", ("--simulator", "no_such_environment"), "`conda run .*no_such_environment python` does not run"),
        ("", ("--tasks", "fly"), "fly: no task of RoboTwin 2.0; they are adjust_bottle"),
    ],
)
def test_mistakes_are_sentences(
    classic: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str,
    more: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    call = classic(PLAN)
    if change:
        (tmp_path / "RoboTwin" / change).unlink()
    if change.startswith("assets"):
        (tmp_path / "RoboTwin" / change).parent.rmdir()
        (tmp_path / "RoboTwin" / "assets" / "objects").rmdir()
    assert robotwin.main([*call, *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(said, error) and not begun(tmp_path / "RoboTwin")
    assert not (tmp_path / "out").exists()


def whole(**changes: Any) -> dict[str, Any]:
    """A manifest of what AHA-WAM's numbers were made with."""
    reference = manifest.published()["references"][0]
    return {
        "simulator": {"sources": reference["sources"][0], "commit": "bf44be5", "changed": []}, "assets": {},
        "versions": {"sapien": "3.0.0b1", "mplib": "0.2.1", "nvidia_curobo": "0.7.8", "warp-lang": "1.13.0"},
        "control": "qpos, TOPP", "instructions": "unseen", "episodes": 100, "tasks": list(TASKS),
        "configs": list(CONFIGS), "seeds": [0, 1, 2], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"sapien": "3.0.1", "mplib": "0.2.1"}}, "sapien: 3.0.1, published with 3.0.0b1"),
        ({"versions": {"sapien": "3.0.0b1", "mplib": None}}, "mplib: not there, published with 0.2.1"),
        ({"control": "qpos, fixed_rate"}, "control: qpos, fixed_rate, published with qpos, TOPP"),
        ({"episodes": 20}, "episodes of a task: 20, published with 100"),
        ({"tasks": ["lift_pot"]}, "49 of the 50 tasks are left out"),
        ({"simulator": {"sources": "0" * 64, "changed": []}},
         r"the simulator's sources \(envs/\*.py\): 000000000000, published with 047677667d39 or d0bb29888b27"),
        ({"simulator": {**whole()["simulator"], "changed": ["envs/robot/robot.py"]}},
         r"1 file\(s\) of the checkout are changed: envs/robot/robot.py"),
    ],
)  # fmt: skip
def test_it_is_not_called_comparable_when_something_differs(changes: dict[str, Any], said: str) -> None:
    same, other = render(whole(), {}), render(whole(**changes), {})
    assert "Comparable with AHA-WAM's numbers as far as they say" in same
    assert "Not published: toppra, nvidia_curobo, warp-lang, torch, numpy, driver, GPU, assets." in same
    assert "omparable with OpenWAM's" in same and "**Not" not in same
    assert re.search(rf"\*\*Not comparable with AHA-WAM's numbers\*\*: .*{said}", other)


def test_averages_published_are_shown_with_their_source() -> None:
    page = render(whole(), {})
    last = next(line for line in page.splitlines() if line.startswith("| all"))
    cells = [cell.strip() for cell in last.split("|")[1:-1]]
    assert cells == ["all", "-", "-", "-", "-", "93.4", "92.2", "91.9", "91.8"]
    assert "single tasks could not be had" in page and "FastWAM issue 23" in page
    known = manifest.published()
    assert set(known["tasks"]["Fast-WAM"]) <= set(TASKS) and not known["tasks"]["AHA-WAM"]
    assert all(row["source"] for row in known["averages"])


def test_the_manifest_says_what_there_is(classic: Callable[..., list[str]], tmp_path: Path) -> None:
    robotwin.main(classic(PLAN, "--repeats", "2", "--seed", "4"))
    said, root = json.loads((tmp_path / "out" / "manifest.json").read_text()), tmp_path / "RoboTwin"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    assert (said["simulator"]["commit"], said["simulator"]["changed"]) == (commit, [])
    assert said["versions"]["sapien"] == "3.0.0b1" and said["versions"]["warp-lang"] is None
    assert said["assets"]["objects"]["bytes"] == 100 and said["assets"]["embodiments"]["files"] == 0
    assert (said["seeds"], said["first_scenes"], said["control"]) == ([4, 5], [500000, 600000], "qpos, TOPP")
    digest = manifest.sources_digest(root)
    (root / "envs" / "curobo" / "setup.py").write_text("other")
    assert manifest.sources_digest(root) == digest == said["simulator"]["sources"]
    (root / "envs" / "robot" / "planner.py").write_text("other")
    assert manifest.sources_digest(root) != digest
    assert manifest.commit_of(root) == {"commit": commit, "changed": ["envs/curobo/setup.py", "envs/robot/planner.py"]}
    assert manifest.commit_of(root / "envs")["commit"] is None, "a vendored copy lies in another repository"


def test_results_of_batches_and_of_other_names(tmp_path: Path) -> None:
    """RoboTwin's batch mode prints another line; the release's evaluator calls its file _result_clean.txt."""
    (tmp_path / "_result_clean.txt").write_text("Timestamp: x\n\nBatch Workers: 2\nSkipped Seeds: 1\n0.5")
    log = "".join(
        f"\x1b[93mlift_pot\x1b[0m | episode={n} | worker=0 | seed={100000 + n} | success={n % 2} | "
        f"batch success: \x1b[96m{(n + 1) // 2}/{n + 1}\x1b[0m\n" for n in range(4)
    )  # fmt: skip
    found = read_result(f"{log}Data has been saved to _result_clean.txt\n", tmp_path, 4)
    assert (found["successes"], found["episodes"], found["scenes"]) == (2, 4, [100000, 100001, 100002, 100003])
    with pytest.raises(ResultError, match="ended without naming a result"):
        read_result(log, tmp_path, 4)
    with pytest.raises(ResultError, match="cannot be read: No such file"):
        read_result(f"{log}Data has been saved to x/_result.txt\n", tmp_path, 4)
