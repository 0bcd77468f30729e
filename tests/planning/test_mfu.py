"""What MFU is measured by."""

import pytest

from ahawam_jax.planning.mfu import KINDS, work
from tests.tiny_config import get_config


@pytest.mark.parametrize(("kind", "most"), [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5", 459e12)])
def test_work_of_a_step(kind: str, most: float) -> None:
    config = get_config()
    config.model.remat = "full"
    operations, peak = work(config, kind)
    assert peak == most
    config.model.remat = "none"
    assert work(config, kind)[0] == operations  # what is computed again is no work
    config.data.batch_size *= 2
    assert work(config, kind)[0] == 2 * operations


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v5 lite"])
def test_devices_without_a_figure(kind: str) -> None:
    """Slower boards of the same name among them."""
    assert work(get_config(), kind) is None and KINDS
