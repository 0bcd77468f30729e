"""Recomputes a folder of fixtures and says how far off each is."""

from pathlib import Path

import jax

from ahawam_jax.verification import distillation_check, model_checks, tower_checks
from ahawam_jax.verification.fixtures import WEIGHTS, Suite
from data_pipelines.progress import Progress, say


def verify(folder: Path, only: list[str] | None = None) -> int:
    """Checks a folder, prints a line per fixture and returns the number of failed ones."""
    checks = model_checks.CHECKS | distillation_check.CHECKS | tower_checks.CHECKS
    suite = Suite(folder)
    unknown = sorted(set(only or ()) - set(suite.fixtures))
    if unknown:
        raise ValueError(f"No fixture named {', '.join(unknown)}; {folder} has {', '.join(suite.fixtures)}.")
    failed, checked, later = 0, 0, []
    print(f"{folder} on {jax.devices()[0].device_kind}, jax {jax.__version__}: worst relative error per fixture")
    names = only or suite.fixtures
    progress = Progress(sum(name in checks for name in names), "fixtures")
    for name in names:
        progress.add(name, 0)
        summary, damage = "", []
        try:
            fixture = suite.load(name)
            damage = fixture.problems
            if name not in checks:
                if name not in WEIGHTS:
                    later.append(name)
                continue
            with jax.default_matmul_precision("highest"):
                checks[name](suite, fixture)
            fixture.finish()
            problems = fixture.problems
            summary = f"{fixture.compared:4d} tensors, worst {fixture.worst[0]:.1e} ({fixture.worst[1]})"
            problems = problems or ([] if fixture.compared else ["nothing in it was compared"])
        except Exception as error:  # report every fixture, whatever is wrong with one of them
            problems = [*damage, str(error) if isinstance(error, (FileNotFoundError, ValueError)) else repr(error)]
        failed, checked = failed + bool(problems), checked + 1
        progress.add("", 1)
        say(f"  {'FAIL' if problems else 'ok  '}  {name:26s} {summary}")
        for problem in problems[:20]:
            print(f"          {problem}")
        if len(problems) > 20:
            print(f"          and {len(problems) - 20} more")
    if later:
        print(f"  not covered by this version: {', '.join(later)}")
    if not checked:
        raise ValueError(f"Nothing was checked: none of {folder}'s fixtures belongs to this version.")
    print("all match" if not failed else f"{failed} fixtures failed")
    return failed
