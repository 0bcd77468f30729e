"""What `ahawam plan --policy` says. The programs of the true widths need XLA's CUDA plug-in, and no GPU."""

import importlib
import re

import pytest
from absl.testing import flagsaver

from ahawam_jax import __main__ as door
from ahawam_jax.planning import compiling
from ahawam_jax.planning.devices import COPY, find_device, make_cluster
from ahawam_jax.planning.estimate import estimate
from ahawam_jax.planning.kernel_pages import WORST, layer_page, of_a_layer, policy_page, where
from ahawam_jax.planning.kernels import COLLECTIVE, CONVOLUTION, LAUNCH, OTHER, PRODUCT, Kernel
from ahawam_jax.planning.policies import Program
from tests.planning.steps import get_config


def test_the_page_adds_up() -> None:
    layer = "jit(chunk)/while/body/closed_call/AhaWam.act/executor/blocks_{}/q/dot_general"
    found = [Kernel(PRODUCT, 2_000_000_000, (5,), layer.format(i)) for i in range(2)]
    found += [Kernel(CONVOLUTION, 1_000_000_000, (), "jit(chunk)/Vae.encode/conv"), Kernel(OTHER, 8, (), "")]
    found += [Kernel(OTHER, 8, (7,), f"jit(chunk)/part{i}") for i in range(WORST)]
    programs = [Program("chunk, 5 steps", 10_500_000_000, found), Program("refresh", 1, found[:1])]
    text = policy_page(programs, find_device("h200"), 1)
    rate = COPY * 4.8e12
    milliseconds = 1e3 * (21e9 / rate + (7 * WORST + 1) * LAUNCH)
    row = re.search(r"^  chunk, 5 steps +(.*)$", text, re.M)[1].split()
    assert row == ["21.00", "10.50", "2.00", f"{12 + 7 * WORST}", f"{milliseconds:.1f}", f"{1e3 * 10.5e9 / rate:.1f}",
                   "20.00", "1.00", "0.0000"]  # fmt: skip
    _, longest, of_refresh = text.split("\n\n")
    assert longest.startswith("Longest kernels of the chunk, 5 steps") and len(longest.splitlines()) == 2 + WORST
    # Both layers in one row, the longest first; the shortest of all is left out.
    first = f"  matrix products   20.00    10  {1e3 * 20e9 / rate:.2f}  AhaWam.act/executor/blocks/q/dot_general"
    assert longest.splitlines()[2] == first and "conv" in longest.splitlines()[3]
    assert "what the compiler added" not in longest and len(of_refresh.splitlines()) == 3
    assert max(map(len, text.splitlines())) < 120


def test_a_layer_is_a_run_of_the_loops_over_layers() -> None:
    one = estimate(get_config(), make_cluster("h100", "1x1x1", 1))
    assert one.subject.model.num_layers == 2
    found = [
        Kernel(PRODUCT, 3_000_000_000, (2,), "planner/ffn_in"),
        Kernel(OTHER, 1_000_000_000, (5, 2, 3), "planner/ffn_in"),  # in microbatches, and a loop of its own
        Kernel(COLLECTIVE, 7_000_000_000, (2,), "planner/ffn_in"),
        Kernel(OTHER, 7_000_000_000, (), "optimizer"),
        Kernel(OTHER, 7_000_000_000, (4,), "microbatches"),
    ]
    assert [(kernel.bytes, kernel.loops) for kernel in of_a_layer(found, 2)] == [(3e9, ()), (1e9, (5, 3))]
    text = layer_page(found, one)
    for row in ("matrix products +3.00 +1 ", "all else +15.00 +15 ", "together +18.00 +16 "):
        assert re.search(f"^  {row}", text.partition("Longest")[0], re.M)
    assert "Longest kernels of the layer" in text and max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("jit(chunk)/while/body/closed_call/AhaWam.act/executor/blocks_17/ffn_in/dot_general",
         "AhaWam.act/executor/blocks/ffn_in/dot_general"),
        ("jit(refresh)/planner/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "planner/dynamic_slice"),
        ("memory.context.k", "memory.context.k"),
        ("jit(chunk)/while", "jit(chunk)/while"),
        ("", "what the compiler added"),
    ],
)  # fmt: skip
def test_where_a_kernel_comes_from(source: str, place: str) -> None:
    assert where(source) == place


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps=2,0"], "--steps is 2,0; expected positive numbers"),
        (["--mesh=1x2x1"], "--policy is about one GPU and inference"),
        (["--hosts=2"], "--policy is about one GPU and inference"),
        (["--network=3"], "--policy is about one GPU and inference"),
        (["--device=v5p"], "--policy is for GPUs, as h100, h200 and 5090d; --device is v5p"),
        (["--config.model.num_layer=3"], "the flags do not fit the config"),
        (["--config.towers.video=jpeg"], "config.towers.video is 'jpeg'; expected one of"),
        ([], "pip install --no-deps jax-cuda12-plugin=="),
    ],
)
def test_what_cannot_be_is_a_sentence(flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(door.COMMANDS["plan"].module)  # flags that are defined here stay
    monkeypatch.setattr(compiling, "_folder", lambda module: None)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        door.main(["plan", "--config=tests/planning/steps.py", "--policy", *flags])
    assert said in str(stop.value.code)
