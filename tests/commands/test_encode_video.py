"""Latents encoded once are those a training step would have made, whoever encoded them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from ahawam_jax.commands.encode_video import encode_video
from ahawam_jax.commands.flags import parse_shard
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import build_text_tower
from ahawam_jax.towers.encoding import encode
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import data as training_data
from ahawam_jax.training.data import open_data
from ahawam_jax.training.loop import train
from data_pipelines.caches import latent_cache
from data_pipelines.caches.keys import NOTES
from data_pipelines.disk import DiskError
from data_pipelines.loader import make_loader
from tests.conftest import REPOSITORY
from tests.data_pipelines import tiny_dataset
from tests.tiny_config import get_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def twenty_rows_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 20)  # five files


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> ConfigDict:
    config = get_config()
    config.data.update(path=str(dataset), cache="", latents=str(tmp_path / "latents"), latent_clips=True, max_offset=3)
    config.model.horizon = 12  # with the chunk that offsets add, a multiple of four rows
    return config


def batches(config: ConfigDict, count: int) -> Iterator[dict[str, np.ndarray]]:
    model = ModelConfig.create(config.model)
    data = open_data(config, model, build_text_tower(config.towers, model), BlockTransform())
    loader = make_loader(data.train, data.windows, 8, seed=3)
    return (next(loader) for _ in range(count))


def files(config: ConfigDict) -> dict[str, bytes]:
    root = Path(config.data.latents)
    found = [path for path in root.rglob("*") if path.is_file() and path.name != NOTES]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.mark.parametrize("clips", [False, True])
def test_batches_are_those_of_pictures(config: ConfigDict, clips: bool) -> None:
    config.data.latent_clips = clips
    encode_video(config, batch=1)
    live = config.copy_and_resolve_references()
    live.data.latents = ""
    seen: set[tuple[str, int]] = set()
    for cached, pictures in zip(batches(config, 12), batches(live, 12), strict=True):
        assert ("video" in cached) != clips and "observations" not in cached and "history" not in cached
        expected, got = encode(pictures, BlockTransform()), encode(cached, BlockTransform())
        assert expected.keys() == got.keys()
        absent = np.arange(2) < 2 - cached["video_history_valid_len"][:, None]
        seen |= {("offset", delta) for delta in cached["action_offset"].tolist()}
        seen |= {("absent", bool(absent.any())), ("padding", bool(cached["image_is_pad"].any()))}
        for name, want in expected.items():
            assert got[name].shape == want.shape
            if name == "history_latents":  # black pictures there, zeros here: masked either way
                want = np.where(absent.reshape(8, 2, 1, 1, 1, 1), 0, want)
            # float16 rounds by one part in 2^11 at most. The 768 terms of a number, in sum some hundreds, cancel to
            # zero in a flat patch, up to float32 rounding, which differs by batch. What is no latent is the same.
            if "latents" in name:
                assert (np.abs(got[name] - want) <= 2.0**-11 * np.abs(want) + 1e-5).all(), name
            else:
                np.testing.assert_array_equal(got[name], want, err_msg=name)
    assert seen >= {("absent", True), ("padding", True), *(("offset", delta) for delta in range(4))}


def test_jobs_share_the_work(config: ConfigDict, tmp_path: Path) -> None:
    encode_video(config)
    whole = files(config)
    assert len(whole) == 2 * 5 + 2
    config.data.latents = str(tmp_path / "shared")
    for shard in ("2/3", "0/3"):
        encode_video(config, shard)
    assert len(files(config)) < len(whole)
    encode_video(config, "1/3")
    assert files(config) == whole


def test_a_killed_job_goes_on(config: ConfigDict, tmp_path: Path) -> None:
    encode_video(config)
    whole = files(config)
    code = (
        "from data_pipelines.caches import latent_cache; latent_cache.ROWS_PER_FILE = 20\n"
        "import time; from ahawam_jax.commands import encode_video as e; from tests.tiny_config import get_config\n"
        "write = e.Work.write; done = []\n"
        "def hang(*a):\n"
        "    write(*a); done.append(a)\n"
        "    if len(done) == 3: print('written', flush=True); time.sleep(600)\n"
        "e.Work.write = hang\n"
        f"c = get_config(); c.model.horizon = 12; c.data.update(path={config.data.path!r}, cache='', max_offset=3, "
        f"latents={str(tmp_path / 'killed')!r}, latent_clips=True)\n"
        "e.encode_video(c)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ, stdout=subprocess.PIPE, text=True
    )
    while "written" not in (line := job.stdout.readline()):
        assert line or job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    config.data.latents = str(tmp_path / "killed")
    done = {name: time.time_ns() for name in files(config) if name.endswith(".bin")}
    assert 0 < len(done) < 10
    encode_video(config)
    assert files(config) == whole


def test_training_on_latents(
    config: ConfigDict, single_device: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config.train.steps = 2
    with pytest.raises(ValueError, match="holds 0 of 5 files of latents, .* ahawam encode-video"):
        train(config, tmp_path / "run")
    encode_video(config)
    assert np.isfinite(train(config, tmp_path / "run"))
    assert "all latents cached" in capsys.readouterr().out


def test_other_pictures_towers_and_windows_do_not_meet(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_video(config)
    model = ModelConfig.create(config.model)
    for section, values in (("data", {"head_size": (96, 64)}), ("model", {"video_ratio": 2, "horizon": 28})):
        other = config.copy_and_resolve_references()
        other[section].update(values)
        with pytest.raises(ValueError, match="holds 0 of 5 files"):
            list(batches(other, 1))
    # Another distance of frames leaves single frames as they are.
    other.data.latent_clips = False
    list(batches(other, 1))
    monkeypatch.setattr("ahawam_jax.training.data.fingerprint", lambda tower: "another")
    with pytest.raises(ValueError, match="holds 0 of 5 files"):
        open_data(config, model, build_text_tower(config.towers, model), BlockTransform())


def test_the_estimate(config: ConfigDict, capsys: pytest.CaptureFixture) -> None:
    encode_video(config, estimate_only=True)
    assert not Path(config.data.latents).exists()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {" ".join(row[:-3] if row[0] == "nothing" else row[:-5]): row for row in rows[2:5]}
    assert {name.split("  ")[0] for name in table} == {"nothing", "frames", "frames and clips"}
    once, sample = float(table["frames and clips"][-4]), float(table["nothing"][-1])
    assert int(table["frames and clips"][-2]) == pytest.approx(once / sample, abs=1)
    encode_video(config)
    written = sum(len(content) for name, content in files(config).items() if name.endswith(".bin"))
    disk = 94 * (48 * 24 * 2 + 4) + 94 * (4 * 48 * 24 * 2 + 4)  # [c, 6 x 4 places], and four later latents of a video
    assert written == disk


def test_no_room_is_told_before_the_start(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="needs 1.1 MB more, 0.0 MB are free; choose another folder, cache frames"):
        encode_video(config)
    assert not list(Path(config.data.latents).glob("*/"))


def test_shards_and_folders_are_checked(config: ConfigDict) -> None:
    assert parse_shard("2/8") == (2, 8)
    for text in ("8/8", "1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="expected I/N"):
            parse_shard(text)
    config.data.latents = ""
    with pytest.raises(ValueError, match="config.data.latents is empty"):
        encode_video(config)


def test_damaged_latents_stop_training(config: ConfigDict, tmp_path: Path) -> None:
    encode_video(config)
    for path in Path(config.data.latents).glob("clips-*/*.bin"):
        content = bytearray(path.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        path.write_bytes(content)
    with pytest.raises(ValueError, match="clips-.*the latents of row .* are damaged, their checksum differs"):
        train(config, tmp_path / "run")


def test_mixed_sources_read_their_own_latents(config: ConfigDict, dataset: Path, tmp_path: Path) -> None:
    """Two datasets with other pictures, one of each in a batch at least."""
    second = tiny_dataset.write_dataset(tmp_path / "second", "v2.1")
    path = tiny_dataset.video_path(second, "cam_high", 0)
    size = tiny_dataset.CAMERAS["cam_high"]
    tiny_dataset.write_video(path, [tiny_dataset.picture(399 - n, size) for n in range(tiny_dataset.LENGTHS[0])])
    opened = {}
    for root in (dataset, second):
        config.data.path = str(root)
        encode_video(config)
        model = ModelConfig.create(config.model)
        opened[root] = open_data(config, model, build_text_tower(config.towers, model), BlockTransform())
    assert len(list(Path(config.data.latents).glob("*/"))) == 4
    sources = [replace(data.train[0], weight=1.0) for data in opened.values()]
    alone = [next(make_loader([source], training_data.make_windows(config, model), 94, 0)) for source in sources]
    assert not np.array_equal(alone[0]["obs_latents"], alone[1]["obs_latents"])
    mixed = next(make_loader(sources, training_data.make_windows(config, model), 94, 0))
    for place in range(2):
        kept = {row.tobytes() for row in alone[place]["input_latents"]}
        assert sum(row.tobytes() in kept for row in mixed["input_latents"]) >= 40
