"""What is a path, and what is refused as one before anything is read or written."""

from pathlib import Path

import pytest

from ahawam_jax.checkpoints import Checkpoints, find_step
from ahawam_jax.weights.files import open_weights
from data_pipelines.paths import AddressError, local_path, refuse_addresses
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.subset import load_subset
from data_pipelines.recording.lerobot_writer import LeRobotWriter

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "address, way",
    [
        ("gs://bucket/run", "gcsfuse"), ("s3://bucket/run", "mount-s3"), ("S3://bucket", "mount-s3"),
        ("hf://owner/name", "hf download"), ("https://host/x.pt", "download it"), ("file:///data/x", "the path alone"),
        ("abfs+x://y", "rclone mount"), (Path("gs://bucket/run"), "gcsfuse"), ("~/run", "write .HOME"),
        ("~other/run", "write .HOME"),
    ],
)  # fmt: skip
def test_addresses_are_refused_with_a_way(address: str | Path, way: str) -> None:
    with pytest.raises(AddressError, match=way):
        local_path(address)
    with pytest.raises(AddressError, match=r"^config\.data\.path: .*" + way):
        refuse_addresses({"seed": 1, "data": {"cache": "", "path": address}}, "config.")


@pytest.mark.parametrize("path", ["runs/demo", "/data/x", "", ".", "a:b/c", "run~1", "12:30/x", "x/gs:/y", Path("a")])
def test_paths_are_paths(path: str | Path) -> None:
    assert local_path(path) == Path(path)
    refuse_addresses({"path": path, "sizes": (1, 2)}, "")


def test_what_opens_paths_refuses_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = "gs://bucket/x.toml"
    for opens in (Checkpoints, find_step, open_weights, open_episodes, load_subset):
        with pytest.raises(AddressError):
            opens(address)
    with pytest.raises(AddressError):
        LeRobotWriter(address, 25, ["a"], {}, "robot")
    assert not list(tmp_path.iterdir())


def test_commands_take_paths_through_it() -> None:
    """Path as the type of an argument would take any address for a folder."""
    files = [path for folder in ("ahawam_jax", "export") for path in (REPOSITORY / folder).rglob("*.py")]
    assert not [path for path in files if "type=Path" in path.read_text()]
