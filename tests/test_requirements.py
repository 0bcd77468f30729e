"""The pins fit the ranges of pyproject.toml, and the commands of training and the demo need nothing beyond theirs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ahawam_jax.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, Version]:
    lines = (REPOSITORY / file).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith(("#", "-")))
    return {canonicalize_name(name): Version(version) for name, version in found.items()}


def wanted(*extras: str) -> list[Requirement]:
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in (lines or PROJECT["dependencies"])]


@pytest.mark.parametrize(
    ("file", "extras"),
    [("requirements.txt", ()), ("requirements.txt", ("sim",)),
     ("requirements-dev.txt", ("export", "tfds", "parity", "dev"))],
)  # fmt: skip
def test_pins_fit_the_ranges(file: str, extras: tuple[str, ...]) -> None:
    pinned = pins("requirements.txt") | pins(file)
    for requirement in wanted(*extras):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in {file}"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} of {file} does not fit {requirement}"


def test_each_package_is_pinned_once() -> None:
    assert not pins("requirements.txt").keys() & pins("requirements-dev.txt").keys()
    assert "-r requirements.txt" in (REPOSITORY / "requirements-dev.txt").read_text().splitlines()


IMPORT_WITHOUT = """
import importlib, sys
from importlib.metadata import packages_distributions
absent, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")
owners = packages_distributions()
class Absent:
    def find_spec(self, name, path=None, target=None):
        owned = {owner.lower().replace("_", "-") for owner in owners.get(name, ())}
        if owned and owned <= absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
for module in modules:
    importlib.import_module(module)
try:
    import pytest
except ModuleNotFoundError:
    print("fine")
"""


def test_commands_start_on_the_pins_of_the_demo_alone() -> None:
    modules = [command.module for command in COMMANDS.values() if command.extra in ("", "sim")]
    absent = ",".join(pins("requirements-dev.txt"))
    started = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, absent, ",".join(modules)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert started.stdout == "fine\n", started.stderr


def test_the_scene_files_are_of_one_version() -> None:
    said = {path: set(re.findall(r"gym-aloha==(\S+?)[\s`,]", (REPOSITORY / path).read_text()))
            for path in ("Makefile", "pyproject.toml", "README.md", "data_pipelines/simulation/env.py")}  # fmt: skip
    assert all(len(versions) == 1 for versions in said.values()) and len(set.union(*said.values())) == 1, said
