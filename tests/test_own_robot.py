"""docs/bring_your_own_robot.md, followed word for word."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ONE_DEVICE, REPOSITORY

PAGE = REPOSITORY / "docs/bring_your_own_robot.md"


def test_the_page_can_be_followed(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": ONE_DEVICE,
    }  # fmt: skip
    outputs = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if kind == "python":
            (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
            continue
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    assert len(outputs) == 4
    assert "Fit for training." in outputs[1] and (tmp_path / "runs/own/episode_0.mp4").is_file()
    assert "step 100/100" in outputs[2] and "open-loop error" in outputs[2]
    assert [line[0] for line in outputs[3].splitlines()] == ["0", "1", "2"]
