"""The one door: every command is behind it, and it starts nothing before it knows which."""

import ast
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl.testing import flagsaver

from ahawam_jax import __main__ as door
from data_pipelines.processes import REQUEUE
from data_pipelines.progress import StatusLine

REPOSITORY = Path(__file__).resolve().parents[1]


def defines_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


def test_every_entry_point_is_a_command() -> None:
    folders = (REPOSITORY / "ahawam_jax/commands", REPOSITORY / "export", REPOSITORY / "data_pipelines")
    files = [path for folder in folders for path in folder.rglob("*.py") if defines_main(path)]
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files}
    assert modules == {command.module for command in door.COMMANDS.values()}
    houses = [REPOSITORY / name for name in ("ahawam_jax", "export", "data_pipelines")]
    for path in (path for house in houses for path in house.rglob("*.py")):
        assert path.name == "__main__.py" or "\nif __name__ ==" not in path.read_text(), f"{path} is another door"


def test_it_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in door.COMMANDS.items():
        assert sum(line.split()[:1] == [name] and command.about in line for line in lines) == 1
    assert door.main([]) == 2
    assert {command.group for command in door.COMMANDS.values()} <= set(lines)


def test_an_unknown_command_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is no command; did you mean train?\n"


def test_a_missing_package_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(door.importlib, "import_module", fails)
    assert door.main(["to-torch", "x"]) == 1
    said = capsys.readouterr().err
    assert "needs the package torch, which is not installed; pip install 'ahawam-jax[export]'" in said
    assert door.main(["to-torch", "--help"]) == 0 and "where torch is installed" in capsys.readouterr().out


def test_dashes_and_underscores_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("export-weights", "export_weights"):
        with pytest.raises(SystemExit) as stop:
            door.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: ahawam export-weights" in capsys.readouterr().out.replace(name, "export-weights")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What every name of a command leads to; its `main` is the test's."""
    module = SimpleNamespace(main=lambda argv: None)
    monkeypatch.setattr(door.importlib, "import_module", lambda name: module)
    return module


@pytest.mark.parametrize("unreachable", [False, True])
def test_who_cannot_press_ctrl_c_is_told_what_to_do(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], unreachable: bool
) -> None:
    """Shells start jobs in the background with SIGINT ignored, others block it; SIGTERM then does the same."""
    sentence = f"Ctrl-C cannot reach this job, started in the background; to stop it: kill {os.getpid()}\n"
    command.main = lambda argv: os.kill(os.getpid(), signal.SIGTERM)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        if unreachable:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert door.main(["record"]) == REQUEUE
        assert capsys.readouterr().err == sentence * unreachable + "\nstopped\n"
        signal.signal(signal.SIGINT, before[0])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT} if unreachable else ())
        assert door.main(["record"]) == REQUEUE
        assert capsys.readouterr().err == sentence * unreachable + "\nstopped\n"
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_output_goes_where_it_can(command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs without a terminal: stdout that knows ASCII alone, or that was closed."""
    command.main = lambda argv: print("put the café cup down", flush=True)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert door.main(["doctor"]) == 0 and written.getvalue() == b"put the caf\\xe9 cup down\n"
    monkeypatch.setattr(sys, "stdout", None)
    command.main = lambda argv: StatusLine().show("1 of 1", last=True)
    assert door.main(["doctor"]) == 0


def test_nobody_reads_on(command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ahawam doctor DIR | head`; a pipe to another process that breaks is an error all the same."""

    def another_pipe_breaks(argv: list[str]) -> None:
        raise BrokenPipeError

    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        command.main = another_pipe_breaks
        with pytest.raises(BrokenPipeError):
            door.main(["doctor"])
        os.close(reading)
        command.main = lambda argv: print("much", flush=True)
        assert door.main(["doctor"]) == 128 + signal.SIGPIPE


def test_ctrl_c_leaves_no_traceback(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    command.main = interrupted
    assert door.main(["record"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_light_commands_start_no_jax() -> None:
    names = ("record", "view", "robocoin", "convert", "robotwin", "watch")  # grain brings it to the doctor
    modules = [door.COMMANDS[name].module for name in names]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# Of every command the arguments that name files and folders, one of them an address.
ADDRESSED = {
    "record": ["--task=insertion", "--out=ADDRESS"],
    "doctor": ["ADDRESS"],
    "view": ["ADDRESS", "--episode=0"],
    "robocoin": ["ADDRESS", "--out=x.toml"],
    "convert": ["--dataset=x", "--out=ADDRESS"],
    "encode-text": ["--weights=x", "--tokenizer=x", "--cache=x", "--dataset", "x", "ADDRESS"],
    "encode-video": ["--config=tests/tiny_config.py", "--config.data.latents=ADDRESS"],
    "plan": ["--config=tests/tiny_config.py", "--mesh=1x1x1", "--config.data.latents=ADDRESS"],
    "train": ["--config=tests/tiny_config.py", "--workdir=ADDRESS"],
    "distill": ["--config=tests/tiny_flash_config.py", "--workdir=x", "--config.init=ADDRESS"],
    "demo": ["--config=tests/tiny_config.py", "--workdir=x", "--config.data.path=ADDRESS"],
    "import-weights": ["--config=tests/tiny_config.py", "--workdir=ADDRESS", "--source=x"],
    "export-weights": ["x", "ADDRESS"],
    "inspect": ["ADDRESS"],
    "verify": ["ADDRESS"],
    "imagine": ["x", "--image=x.png", "--instruction=x", "--text-cache=ADDRESS"],
    "to-torch": ["x", "--out=ADDRESS"],
    "to-tensorrt": ["x", "--out=ADDRESS"],
    "validate": ["x", "--checkpoint=ADDRESS"],
    "benchmark": ["--out=ADDRESS"],
    "compile-policy": ["ADDRESS", "--out=x"],
    "evaluate": ["x", "--out=ADDRESS"],
    "film": ["x", "--out=ADDRESS"],
    "evaluate-export": ["ADDRESS"],
    "latency-study": ["x", "--out=ADDRESS"],
    "robotwin": ["--checkout=ADDRESS", "--simulator=x", "--out=x"],
    "expert": ["--task=react", "--out=ADDRESS"],
    "ablation": ["--out=ADDRESS"],
    "serve": ["--checkpoint=ADDRESS"],
    "watch": ["ws://127.0.0.1:1", "--save=ADDRESS"],
}

ABSL = {
    f"ahawam_jax.commands.{name}"
    for name in ("encode_video", "plan", "train", "distill", "demo", "import_weights", "inspect")
}


@flagsaver.flagsaver
def stop_of(name: str, *argv: str) -> SystemExit:
    with pytest.raises(SystemExit) as stop:
        door.main([name, *argv])
    return stop.value


@pytest.mark.parametrize("name", door.COMMANDS)
def test_help_and_addresses(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help is no error, and an address where a path belongs ends the command before it does anything."""
    importlib.import_module(door.COMMANDS[name].module)  # flags that are defined here stay
    absl = door.COMMANDS[name].module in ABSL
    for flag in ("--help", "-h", *(("--helpfull", "-helpshort") if absl else ())):
        assert stop_of(name, flag).code == 0
        assert "--" in capsys.readouterr().out
    argv = [argument.replace("ADDRESS", "gs://bucket/x") for argument in ADDRESSED[name]]
    argv = [argument.replace("tests/", f"{REPOSITORY}/tests/") for argument in argv]
    monkeypatch.chdir(tmp_path)
    if absl:
        said = stop_of(name, "--config=nowhere.py").code
        assert said.startswith("error: --config is nowhere.py, which cannot be loaded")
    stop = stop_of(name, *argv)
    said = stop.code if isinstance(stop.code, str) else capsys.readouterr().err
    assert stop.code and "gs://bucket/x is an address, but only files and folders of this machine" in said
    assert not list(tmp_path.iterdir())
