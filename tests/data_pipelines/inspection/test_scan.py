"""Many datasets below a folder: what is found of each, that a broken one stops nobody, and that a scan goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ahawam_jax.commands import robocoin
from data_pipelines.episodes import DatasetError
from data_pipelines.inspection import findings as module
from data_pipelines.inspection.findings import Finding, find, power_of_ten, state_of_files
from data_pipelines.inspection.proposal import propose, to_toml
from data_pipelines.inspection.scan import folders, scan
from data_pipelines.readers.subset import load_subset, open_datasets
from tests.data_pipelines.synthetic_robocoin import UNSEEN, Synthetic, census, other_side

MILLIMETRES = {"state_gripper": (0.0, 100.0), "action_gripper": (0.0, 100.0)}


def write(root: Path, schema: str = "first_person", lengths: tuple[int, ...] = (100, 90), **more: object) -> Synthetic:
    """A dataset without pictures."""
    made = Synthetic(UNSEEN[schema], lengths, **more)
    made.write(root, pictures=None)
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write(root / "a/fold", **MILLIMETRES)
    write(root / "a/pour", **MILLIMETRES, still_tail=50, bad={1: [(0, 20, "Abnormal")]})
    write(root / "deep/er/grippers", "grippers_first")
    write(root / "deep/er/one", "one_arm", lengths=(80,))
    write(root / "still", action_is_state=True, **MILLIMETRES)
    write(root / "a/torn", **MILLIMETRES)
    file = root / "a/torn/data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    (root / ".cache/old/meta").mkdir(parents=True)
    (root / ".cache/old/meta/info.json").write_text("{}")
    return root


# ---------------------------------------------------------------- one dataset
@pytest.mark.parametrize("schema", UNSEEN)
def test_a_finding_is_what_was_written(tmp_path: Path, schema: str) -> None:
    made = write(tmp_path / "set", schema, (120, 100), state_gripper=(2.0, 90.0), action_gripper=(100.0, 0.0))
    found = find(tmp_path / "set", "set")
    names = made.names("action")
    assert found.robot == schema and found.rate == 30 and found.lengths == (120, 100) and found.rows == 220
    assert not found.problem and not found.unmappable and not found.equal and not found.crossed
    assert found.arms == len({name[:5] for name in names if "_arm_" in name})
    assert found.joints == max(sum(name.startswith(f"{side}_arm_") for name in names) for side in ("left", "right"))
    assert {name.removesuffix("_scale") for name in found.present["state"]} == {
        name for name in names if "_arm_joint" in name or "gripper" in name
    }
    assert found.views == 3 - 2 * (schema == "single_view") - (schema == "one_arm")
    assert len(found.grippers) == 2 * sum("gripper" in name for name in names)
    for grip in found.grippers:
        rows = [made.value(f"{grip.side}_gripper_open", grip.kind, episode) for episode in range(2)]
        ends = np.quantile(np.concatenate(rows), [0, 0.01, 0.99, 1])
        np.testing.assert_allclose([grip.least, grip.q01, grip.q99, grip.greatest], ends, rtol=5e-6)  # 6 digits
    assert Finding.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_hands_and_the_recorded_opening(tmp_path: Path, shared_dir: Path) -> None:
    records = {record["schema"]: record for record in census(shared_dir)}
    Synthetic(records["12"], (100,)).write(tmp_path / "hands", pictures=None)
    hands = find(tmp_path / "hands", "hands")
    assert hands.hands == 6 and hands.arms == 2 and hands.joints == 7 and not hands.gripper and not hands.grippers
    made = Synthetic(records["4"], (100,), state_gripper=(80.0, 0.0))
    made.write(tmp_path / "scale", pictures=None)
    for grip in find(tmp_path / "scale", "scale").grippers:
        assert grip.scale == pytest.approx(-1.0 if grip.kind == "state" else 1.0, abs=1e-6)  # a straight line
    Synthetic(records["14"], (100,)).write(tmp_path / "few", pictures=None)
    assert find(tmp_path / "few", "few").unnamed == {"action": (16, 17)}


def test_every_naming_of_the_census_is_proposed_or_has_its_reason(tmp_path: Path, shared_dir: Path) -> None:
    found = []
    for record in census(shared_dir):
        Synthetic(record, (100, 90)).write(tmp_path / record["schema"], pictures=None)
        found.append(find(tmp_path / record["schema"], record["schema"]))
        assert found[-1].arms == 2 and found[-1].joints == record["arm_dof"]
        assert found[-1].gripper == ("gripper" in record["end_effector"]) != (found[-1].hands > 0)
    proposal = propose(found)
    out = tmp_path / "subset.toml"
    out.write_text(to_toml(proposal, tmp_path, out, []))
    assert {candidate.finding.robot for candidate in proposal.candidates if candidate.exclude} == {"ruantong_a2d"}
    parts = {part.name: part.dataset for part in open_datasets(out)}
    assert len(parts) == len(found) - 1 and {dataset.action_dim for dataset in parts.values()} == {16}
    one_set_of_numbers = {(dataset.robot, tuple(dataset.action_present)) for dataset in parts.values()}
    assert len(one_set_of_numbers) == len({dataset.robot for dataset in parts.values()})


def test_tails_bad_rows_and_sides(tmp_path: Path) -> None:
    write(tmp_path / "tail", lengths=(100, 90), still_tail=32, bad={0: [(5, 9, "Discard."), (20, 21, "abnormal")]})
    found = find(tmp_path / "tail", "tail")
    assert found.bad == 5 and found.rows == 185 and found.still == 2
    write(tmp_path / "short", still_tail=31, **MILLIMETRES)  # 30 rows after the one that they are as
    assert find(tmp_path / "short", "short").still == 0
    names = Synthetic(UNSEEN["first_person"]).names("action")
    write(tmp_path / "crossed", labels={"action": other_side(names)})
    assert find(tmp_path / "crossed", "crossed").crossed


def test_a_gripper_s_noise_does_not_hide_a_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 mm of 100: it stands still, as 0.003 of 1 would."""
    value = Synthetic.value

    def noisy(self: Synthetic, name: str, kind: str, episode: int) -> np.ndarray:
        rows = value(self, name, kind, episode)
        return rows + 0.3 * (np.arange(len(rows)) % 2).astype(np.float32) * ("gripper" in name)

    monkeypatch.setattr(Synthetic, "value", noisy)
    write(tmp_path / "set", still_tail=40, **MILLIMETRES)
    assert find(tmp_path / "set", "set").still == 2
    assert [power_of_ten(x) for x in (0.0, 0.02, 1.0, 1.09, 1.2, 100.0, 850.0)] == [1, 1, 1, 1, 10, 100, 1000]


def test_videos_are_asked_for_their_frames(tmp_path: Path) -> None:
    """Not that of a camera that no view needs."""
    for name, rows in (("set", 40), ("less", 30)):
        Synthetic(UNSEEN["one_arm"], (rows, rows), depth=("cam_depth",)).write(tmp_path / name)
    assert find(tmp_path / "set", "set", videos=True).videos == ()
    before = state_of_files(tmp_path / "set", True)
    videos = [tmp_path / "set/videos/chunk-000" / f"observation.images.{x}" for x in ("cam_high_rgb", "cam_depth")]
    places = [(folder / "episode_000001.mp4").relative_to(tmp_path / "set") for folder in videos]
    for place in places:
        shutil.copy(tmp_path / "less" / place, tmp_path / "set" / place)
    (said,) = find(tmp_path / "set", "set", videos=True).videos
    assert said == f"{tmp_path / 'set' / places[0]} holds 30 frames, its rows need 40; copy it again."
    assert state_of_files(tmp_path / "set", True) != before
    (tmp_path / "set" / places[0]).unlink()
    assert "does not exist, its rows need 40" in find(tmp_path / "set", "set", videos=True).videos[0]


# ---------------------------------------------------------------- many
def test_a_broken_dataset_is_named_and_the_rest_go_on(tree: Path, tmp_path: Path) -> None:
    found = {finding.path: finding for finding in scan(tree, tmp_path / "kept")}
    assert [*found] == ["a/fold", "a/pour", "a/torn", "deep/er/grippers", "deep/er/one", "still"]
    assert {path for path, finding in found.items() if finding.problem} == {"a/torn"}
    assert found["a/torn"].broken == (1,) and "episode_000001.parquet cannot be read" in found["a/torn"].problem
    assert found["a/fold"] == find(tree / "a/fold", "a/fold")
    assert found["still"].equal and found["a/pour"].bad == 20 and found["a/pour"].still == 2


@pytest.mark.parametrize("key, value, said", [("total_frames", [], "set cannot be read"), ("fps", 0, "says fps = 0")])
def test_metadata_that_is_broken_is_a_problem(tmp_path: Path, key: str, value: object, said: str) -> None:
    """One that the reader has a sentence for, and one that it has none for."""
    write(tmp_path / "set")
    info = tmp_path / "set/meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {key: value}))
    assert said in find(tmp_path / "set", "set").problem


def test_a_scan_goes_on_and_reads_what_has_changed_alone(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, kept = tmp_path / "tree", tmp_path / "kept"
    shutil.copytree(tree, root)
    first = scan(root, kept)
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    assert scan(root, kept) == first and kept.read_bytes() == b"".join(lines)
    assert "6 of 6 datasets are as they were" in capsys.readouterr().err
    # As a kill leaves the file: some lines, and a part of one.
    kept.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert scan(root, kept) == first
    now = kept.read_bytes().splitlines(keepends=True)
    assert now[:3] == lines[:3] and sorted(now[4:]) == sorted(lines[3:])
    # A file that was replaced, and a dataset that is new.
    shutil.copy(root / "a/fold/data/chunk-000/episode_000001.parquet", root / "a/torn/data/chunk-000")
    shutil.copytree(root / "still", root / "z")
    again = {finding.path: finding for finding in scan(root, kept)}
    assert not again["a/torn"].problem and again["z"].equal
    new = [json.loads(line)["finding"]["path"] for line in kept.read_bytes().splitlines()[7:]]
    assert sorted(new) == ["a/torn", "z"]


def test_findings_of_another_version_are_made_anew(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of_files(tree / "still")
    assert state_of_files(tree / "still") == before != state_of_files(tree / "a/fold")
    monkeypatch.setattr(module, "VERSION", -1)
    assert state_of_files(tree / "still") != before


def test_links_are_followed_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/set").symlink_to(tree / "still")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    assert folders(tmp_path) == [tmp_path / "sub/set"]
    assert folders(tree / "still") == [tree / "still"]
    with pytest.raises(DatasetError, match="holds no dataset, no folder below it has meta/info.json"):
        folders(tree / "still/data")
    with pytest.raises(DatasetError, match="is no folder"):
        folders(tree / "nowhere")


# ---------------------------------------------------------------- the command
def test_the_file_has_every_dataset_and_opens(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "subset.toml"
    assert robocoin.main([str(tree), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    entries = {entry.name: entry for entry in load_subset(out)}
    assert entries.keys() == {"fold", "pour", "torn", "grippers", "one", "still"}
    assert {name for name, entry in entries.items() if entry.exclude} == {"torn", "still"}
    assert "left out, cannot be read: 1" in said and "torn: 1 of 2 episodes cannot be read (1): " in said
    assert entries["pour"].still_tail == 1.0 and entries["fold"].still_tail is None
    parts = {part.name: part for part in open_datasets(out)}
    assert parts.keys() == {"fold", "pour", "grippers", "one"}
    # Each row is drawn as often as any other, but for those that a tail loses.
    assert parts["fold"].weight == pytest.approx(190 / 30 / 3600, abs=5e-5)  # four digits of an hour
    made = Synthetic(UNSEEN["first_person"], **MILLIMETRES)
    opened = np.array([name.endswith("open_scale") for name in parts["fold"].dataset.state_names])
    wanted = np.stack([made.opening(side, "state", 1) for side in ("left", "right")], 1)
    # float32 of 0..100 is as exact as 4e-6 of it
    np.testing.assert_allclose(parts["fold"].dataset.states(1)[:, opened], wanted, rtol=0, atol=1e-6)
    before = out.read_bytes()
    assert robocoin.main([str(tree), "--out", str(out)]) == 0 and out.read_bytes() == before


def test_select_and_hours_are_said(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, argv = tmp_path / "few.toml", [str(tree), "--out", str(tmp_path / "few.toml")]
    assert robocoin.main([*argv, "--select", "arms == 2 and robot != 'grippers_first'"]) == 0
    assert {entry.name for entry in load_subset(out)} == {"fold", "pour", "torn", "still"}
    assert "2 are not listed: --select" in capsys.readouterr().out and "# 2 are not listed" in out.read_text()
    assert robocoin.main([*argv, "--hours", "0.0017"]) == 0  # of 0.0017, 0.0015, 0.0018 and 0.0007
    assert "not listed: --hours 0.0017 --seed 0" in out.read_text()
    assert sum(not entry.exclude for entry in load_subset(out)) < 4


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--out=x.txt"], "expected a name that ends in .toml"),
        (["--out=nowhere/x.toml"], "the folder nowhere does not exist"),
        (["--out=x.toml", "--hours=-1"], "expected a positive number"),
        (["--out=x.toml", "--select=legs == 2"], "a dataset has no legs; it may compare path, robot, arms"),
    ],
)
def test_wrong_arguments_are_sentences(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        robocoin.main([str(tmp_path), *argv])
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
