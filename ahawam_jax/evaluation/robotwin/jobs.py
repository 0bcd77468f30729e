"""What is to be run, and what an evaluator says came out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = tuple(
    """
    adjust_bottle beat_block_hammer blocks_ranking_rgb blocks_ranking_size click_alarmclock click_bell dump_bin_bigbin
    grab_roller handover_block handover_mic hanging_mug lift_pot move_can_pot move_pillbottle_pad move_playingcard_away
    move_stapler_pad open_laptop open_microwave pick_diverse_bottles pick_dual_bottles place_a2b_left place_a2b_right
    place_bread_basket place_bread_skillet place_burger_fries place_can_basket place_cans_plasticbox
    place_container_plate place_dual_shoes place_empty_cup place_fan place_mouse_pad place_object_basket
    place_object_scale place_object_stand place_phone_stand place_shoe press_stapler put_bottles_dustbin
    put_object_cabinet rotate_qrcode scan_object shake_bottle shake_bottle_horizontally stack_blocks_three
    stack_blocks_two stack_bowls_three stack_bowls_two stamp_seal turn_switch
    """.split()
)
CONFIGS = ("demo_clean", "demo_randomized")
EPISODES = 100  # of an evaluation, as published numbers have them
SEEDS = 100_000  # the evaluators' seed n begins with scene SEEDS x (n + 1)

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_COUNT = re.compile(r"(?:success rate|batch success):\s*(\d+)/(\d+)", re.IGNORECASE)
_SCENE = re.compile(r"current seed: (\d+)|\| seed=(\d+) \|")
_SAVED = re.compile(r"Data has been saved to (.*_result\w*\.txt)")
_ERROR = "Policy rollout error"  # after which XPolicyLab's evaluator goes on, and counts a failure


@dataclass(frozen=True)
class Job:
    """One evaluation: a task, a task configuration, and the repeat, which chooses the evaluator's seed."""

    task: str
    config: str
    repeat: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}.{self.config}.r{self.repeat}"


def all_jobs(tasks: Sequence[str], configs: Sequence[str], repeats: int, seed: int) -> list[Job]:
    """In the order to run them: a first repeat of everything, then the second, so that a table is soon there."""
    return [
        Job(task, config, repeat, seed + repeat) for repeat in range(repeats) for config in configs for task in tasks
    ]


class ResultError(ValueError):
    """An evaluation that gives no number; the message says why."""


def episodes_done(log: str) -> int:
    """How many episodes an evaluator's output says are over."""
    counts = _COUNT.findall(_ANSI.sub("", log))
    return int(counts[-1][1]) if counts else 0


def read_result(log: str, checkout: Path, episodes: int) -> dict[str, Any]:
    """Successes, episodes and scenes of an evaluation, from its output and the file that it names.

    RoboTwin's evaluators print a line for each episode and at last the place of _result.txt, whose last line is the
    rate; both must agree. Raises ResultError where they do not, where something is missing, or where an episode ended
    with an error of the policy's, which XPolicyLab's evaluator counts as a failure of the task.
    """
    log = _ANSI.sub("", log)
    errors = log.count(_ERROR)
    if errors:
        raise ResultError(f"the policy's rollout ended with an error in {errors} episode(s), counted as failures")
    counts, saved = _COUNT.findall(log), _SAVED.findall(log)
    if not saved or not counts:
        raise ResultError("it ended without naming a result")
    successes, done = map(int, counts[-1])
    path = checkout / saved[-1].strip()
    rate = _rate(path)
    if done != episodes:
        raise ResultError(f"{done} of {episodes} episodes were run")
    if round(rate * done, 6) != successes:
        raise ResultError(f"{path} says a rate of {rate:g}, its output {successes} of {done}")
    scenes = [int(a or b) for a, b in _SCENE.findall(log)]
    return {"successes": successes, "episodes": done, "scenes": scenes, "file": str(path)}


def _rate(path: Path) -> float:
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    try:
        rate = float(last)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ResultError(f"{path} ends with {last[:40]!r}, which is no rate: it was not written to its end")
    return rate
