"""RoboTwin recordings, classic and XPolicyLab form: right rows and colours, and a sentence for every broken file."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robotwin import ARMS_OF_SIX, Robotwin, open_robotwin
from tests.data_pipelines import disguises

LENGTHS = (9, 12)
SIZES = {"cam_high": (24, 32), "cam_left_wrist": (16, 16), "cam_right_wrist": (16, 16)}
CLASSIC = {"cam_high": "head_camera", "cam_left_wrist": "left_camera", "cam_right_wrist": "right_camera"}
XPOLICYLAB = {"cam_high": "cam_head", "cam_left_wrist": "cam_left_wrist", "cam_right_wrist": "cam_right_wrist"}
PARTS = {"left_arm": slice(0, 6), "left_ee": slice(6, 7), "right_arm": slice(7, 13), "right_ee": slice(13, 14)}


def colour(camera: str, episode: int, row: int) -> tuple[int, int, int]:
    """RGB: red for the row, green for the camera, blue for the episode, all far apart."""
    return 250 - 20 * row, 60 * list(SIZES).index(camera), 40 + 100 * episode


def jpegs(camera: str, episode: int, rows: int) -> np.ndarray:
    """Files of one colour as RoboTwin writes them: red and blue swapped, padded with zeros to equal length."""
    files = []
    for row in range(rows):
        image = Image.new("RGB", SIZES[camera][::-1], colour(camera, episode, row)[::-1])
        image.save(file := io.BytesIO(), "JPEG", quality=95)
        files.append(file.getvalue())
    return np.array(files, f"S{max(map(len, files)) + 3}")


def joints(episode: int, rows: int) -> np.ndarray:
    return np.random.default_rng(episode).normal(size=(rows, 14))


def write_classic(root: Path) -> Path:
    (root / "instructions").mkdir(parents=True)
    (root / "data").mkdir()
    for episode, rows in enumerate(LENGTHS):
        with h5py.File(root / f"data/episode{episode}.hdf5", "w") as file:
            file["joint_action/vector"] = joints(episode, rows)
            for camera, name in CLASSIC.items():
                file[f"observation/{name}/rgb"] = jpegs(camera, episode, rows)
        text = {"seen": [f"stack the bowls, {episode}", "pile them up"], "unseen": ["never"]}
        (root / f"instructions/episode{episode}.json").write_text(json.dumps(text))
    return root


def write_xpolicylab(root: Path) -> Path:
    """State and action are rows t and t + 1, so that one row fewer is left."""
    (root / "data").mkdir(parents=True)
    for episode, rows in enumerate(LENGTHS):
        vectors = joints(episode, rows + 1)
        with h5py.File(root / f"data/episode_{episode:07d}.hdf5", "w") as file:
            for name, part in PARTS.items():
                file[f"state/{name}_joint_states"] = vectors[:-1, part].astype(np.float32)
                file[f"action/{name}_joint_states"] = vectors[1:, part].astype(np.float32)
            for camera, name in XPOLICYLAB.items():
                file[f"vision/{name}/colors"] = jpegs(camera, episode, rows)
            file["instructions"] = json.dumps([f"stack the bowls, {episode}", "pile them up"])
            file["additional_info/frequency"] = np.int32(15)
    return root


WRITERS = {"classic": write_classic, "xpolicylab": write_xpolicylab}


@pytest.fixture(params=WRITERS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / request.param)


def episode_path(root: Path, episode: int) -> Path:
    return sorted((root / "data").iterdir())[episode]


def picture_name(root: Path, camera: str) -> str:
    classic = root.name == "classic"
    return f"observation/{CLASSIC[camera]}/rgb" if classic else f"vision/{XPOLICYLAB[camera]}/colors"


# ---------------------------------------------------------------- what is read
def test_describes_the_dataset(root: Path) -> None:
    dataset = open_robotwin(root)
    assert dataset.root == root and dataset.fps == pytest.approx(250 / 15) and dataset.robot == ""
    assert dataset.cameras == SIZES
    assert dataset.lengths.tolist() == list(LENGTHS) and dataset.starts.tolist() == [0, 9]
    assert dataset.state_dim == dataset.action_dim == 14
    assert dataset.state_names == dataset.action_names == ARMS_OF_SIX
    assert ARMS_OF_SIX[6:8] == ("left_gripper_open_scale", "right_arm_joint_1_rad")
    assert dataset.instructions == ["stack the bowls, 0", "stack the bowls, 1"]
    assert dataset.instruction(1) == "stack the bowls, 1"
    np.testing.assert_allclose(dataset.timestamps(1), np.arange(12) * 0.06, rtol=1e-6)


def test_action_of_the_classic_form_is_the_next_state(tmp_path: Path) -> None:
    dataset = open_robotwin(write_classic(tmp_path))
    for episode, rows in enumerate(LENGTHS):
        vectors = joints(episode, rows).astype(np.float32)
        np.testing.assert_array_equal(dataset.states(episode), vectors)
        np.testing.assert_array_equal(dataset.actions(episode)[:-1], vectors[1:])
        np.testing.assert_array_equal(dataset.actions(episode)[-1], vectors[-1])


@pytest.mark.parametrize("flat", [False, True], ids=["column", "flat"])
def test_state_and_action_of_xpolicylab(tmp_path: Path, flat: bool) -> None:
    """A gripper may be stored as [T, 1] or as [T]."""
    write_xpolicylab(tmp_path)
    if flat:
        for episode in range(2):
            with h5py.File(episode_path(tmp_path, episode), "a") as file:
                values = file["state/left_ee_joint_states"][:, 0]
                del file["state/left_ee_joint_states"]
                file["state/left_ee_joint_states"] = values
    dataset = open_robotwin(tmp_path)
    for episode, rows in enumerate(LENGTHS):
        vectors = joints(episode, rows + 1).astype(np.float32)
        assert dataset.states(episode).dtype == np.float32
        np.testing.assert_array_equal(dataset.states(episode), vectors[:-1])
        np.testing.assert_array_equal(dataset.actions(episode), vectors[1:])


def test_every_frame_has_its_colour(root: Path) -> None:
    """Swapping red and blue, rows, cameras or episodes would each show."""
    dataset = open_robotwin(root)
    for episode, rows in enumerate(LENGTHS):
        for camera, size in SIZES.items():
            indices = [rows - 1, *range(rows), 0]
            frames = dataset.frames(episode, camera, indices)
            assert frames.shape == (rows + 2, *size, 3) and frames.dtype == np.uint8
            expected = np.array([colour(camera, episode, row) for row in indices])[:, None, None]
            assert np.abs(frames.astype(int) - expected).max() <= 4  # JPEG rounds


def test_pictures_of_free_length(tmp_path: Path) -> None:
    """Bytes may be stored without padding, one array of bytes per row."""
    path = episode_path(write_classic(tmp_path), 1)
    with h5py.File(path, "a") as file:
        name = picture_name(tmp_path / "classic", "cam_high")
        files = [np.frombuffer(text, np.uint8) for text in file[name][:]]
        del file[name]
        stored = file.create_dataset(name, len(files), h5py.vlen_dtype(np.uint8))
        for row, text in enumerate(files):
            stored[row] = text
    frame = open_robotwin(tmp_path).frames(1, "cam_high", [3])[0]
    assert np.abs(frame.astype(int) - colour("cam_high", 1, 3)).max() <= 4


def test_other_widths_have_no_names(tmp_path: Path) -> None:
    write_classic(tmp_path)
    for episode, rows in enumerate(LENGTHS):
        with h5py.File(episode_path(tmp_path, episode), "a") as file:
            del file["joint_action/vector"]
            file["joint_action/vector"] = np.zeros((rows, 16))
    dataset = open_robotwin(tmp_path)
    assert (dataset.state_dim, dataset.state_names, dataset.action_names) == (16, (), ())


@pytest.mark.parametrize("texts", [["lift", "raise"], "lift"])
def test_instructions_as_an_array(tmp_path: Path, texts: list[str] | str) -> None:
    write_xpolicylab(tmp_path)
    with h5py.File(episode_path(tmp_path, 1), "a") as file:
        del file["instructions"]
        file["instructions"] = texts
    if texts == "lift":  # a bare sentence is not what RoboTwin writes
        with pytest.raises(DatasetError, match="episode_0000001.hdf5: instructions must be a list of sentences"):
            open_robotwin(tmp_path)
    else:
        assert open_robotwin(tmp_path).instruction(1) == "lift"


def test_folder_of_the_files_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_robotwin(root / "data").instruction(1) == "stack the bowls, 1"
    monkeypatch.chdir(root / "data")
    assert open_robotwin(".").instruction(1) == "stack the bowls, 1"


def test_episodes_are_ordered_by_number(tmp_path: Path) -> None:
    """episode10 comes after episode2."""
    write_classic(tmp_path)
    for episode in range(2, 11):
        rows = 3 + episode
        with h5py.File(tmp_path / f"data/episode{episode}.hdf5", "w") as file:
            file["joint_action/vector"] = joints(episode, rows)
            for camera, name in CLASSIC.items():
                file[f"observation/{name}/rgb"] = jpegs(camera, 0, 1).repeat(rows)
        (tmp_path / f"instructions/episode{episode}.json").write_text('{"seen": ["lift"]}')
    dataset = open_robotwin(tmp_path)
    assert dataset.lengths[2:].tolist() == list(range(5, 14))
    assert dataset.instructions == ["stack the bowls, 0", "stack the bowls, 1", "lift"]
    assert dataset.instruction_index(10) == 2


# ---------------------------------------------------------------- what is refused
def refused(root: Path, message: str, use: Callable[[Robotwin], object] = lambda dataset: None) -> None:
    with pytest.raises(DatasetError, match=message):
        use(open_robotwin(root))


def test_missing_episode(root: Path) -> None:
    episode_path(root, 0).unlink()
    refused(root, r"holds 1 files episode\*.hdf5, expected the numbers 0..0 once each, 0 is missing; copy what")


def test_file_with_a_name_of_its_own(root: Path) -> None:
    episode_path(root, 1).rename(root / "data/episode1_bad.hdf5")
    refused(root, "data/episode1_bad.hdf5 has no number of an episode; give it one, or move it elsewhere")


def test_truncated_file(root: Path) -> None:
    path = episode_path(root, 1)
    whole = path.read_bytes()
    for kept in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(root, f"{path.name} cannot be read as HDF5 .*; copy or record the episode again")


@pytest.mark.parametrize("name", disguises.but("hdf5"))
def test_files_that_are_something_else(root: Path, name: str) -> None:
    path = episode_path(root, 1)
    says = disguises.put(path, name)
    refused(root, f"{path.name} {says}")


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # made infinite, and then refused
def test_damaged_file_gives_a_sentence_or_rows(root: Path) -> None:
    path = episode_path(root, 1)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for place in rng.integers(0, len(whole) - 16, 60):
        lost = int(rng.integers(2)) * 8  # what follows lies elsewhere then
        path.write_bytes(whole[:place] + rng.bytes(16 - lost) + whole[place + 16 :] + bytes(lost))
        try:
            dataset = open_robotwin(root)
            dataset.states(1)
            for camera in SIZES:
                dataset.frames(1, camera, range(LENGTHS[1]))
        except DatasetError:
            refusals += 1
    assert refusals > 5


def test_file_of_another_kind(root: Path) -> None:
    for episode in range(2):
        with h5py.File(episode_path(root, episode), "w") as file:
            file["observations/qpos"] = np.zeros((3, 14))
    refused(root, r"is not a RoboTwin episode: expected joint_action/vector \(classic\) or state/left_arm_joint_st")


def test_camera_missing_in_one_episode(root: Path) -> None:
    name = picture_name(root, "cam_left_wrist")
    with h5py.File(episode_path(root, 1), "a") as file:
        del file[name]
    dataset = open_robotwin(root)  # others may be all that is needed
    assert dataset.frames(1, "cam_high", [0]).shape[0] == 1 and len(dataset.states(1)) == LENGTHS[1]
    with pytest.raises(DatasetError, match=f"{episode_path(root, 1).name} lacks the dataset {name} with 1 axes"):
        dataset.frames(1, "cam_left_wrist", [0])


def test_first_picture_of_a_camera_nobody_asks_for(root: Path) -> None:
    """Its size is not known then; nothing else is lost."""
    name = picture_name(root, "cam_left_wrist")
    with h5py.File(episode_path(root, 0), "a") as file:
        whole = file[name][:]
        del file[name]
        file[name] = np.array([whole[0][:50], *whole[1:]], whole.dtype)
    dataset = open_robotwin(root)
    dataset.require_cameras(["cam_high", "cam_right_wrist"])
    with pytest.raises(DatasetError, match=f"row 0 of {name} is not a whole JPEG"):
        dataset.require_cameras(["cam_high", "cam_left_wrist"])


def test_camera_missing_in_all_episodes(root: Path) -> None:
    for episode in range(2):
        with h5py.File(episode_path(root, episode), "a") as file:
            del file[picture_name(root, "cam_left_wrist")]
    refused(
        root, "no camera cam_left_wrist; it has: cam_high, cam_right", lambda d: d.frames(0, "cam_left_wrist", [0])
    )


def test_fewer_pictures_than_rows(root: Path) -> None:
    name = picture_name(root, "cam_high")
    with h5py.File(episode_path(root, 1), "a") as file:
        fewer = file[name][:-1]
        del file[name]
        file[name] = fewer
    refused(root, f"holds 11 pictures of {name} for 12 rows; record", lambda d: d.frames(1, "cam_high", [0]))
    open_robotwin(root).frames(1, "cam_left_wrist", [0])


def test_zero_length_episode(root: Path) -> None:
    with h5py.File(episode_path(root, 1), "a") as file:
        for name in [name for name in names_in(file) if "instruction" not in name and "info" not in name]:
            empty = file[name][:0]
            del file[name]
            file[name] = empty
    refused(root, "episode 1 has 0 rows, expected at least one")


def names_in(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    return names


def enormous(jpeg: bytes) -> bytes:
    """The same JPEG, its header claiming 65535 x 65535 pixels."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + b"\xff" * 4 + jpeg[place + 4 :]


@pytest.mark.parametrize(
    "damage", [lambda jpeg: jpeg[: len(jpeg) // 2], lambda jpeg: b"\xff" * 40, lambda jpeg: b"", enormous]
)
def test_corrupt_jpeg(root: Path, damage: Callable[[bytes], bytes]) -> None:
    name = picture_name(root, "cam_high")
    with h5py.File(episode_path(root, 1), "a") as file:
        file[name][4] = damage(file[name][4])
    dataset = open_robotwin(root)
    dataset.frames(1, "cam_high", [3, 5])
    with pytest.raises(DatasetError, match=f"{episode_path(root, 1).name}: row 4 of {name} is not a whole JPEG"):
        dataset.frames(1, "cam_high", [3, 4])


def test_pictures_of_another_size(root: Path) -> None:
    name = picture_name(root, "cam_high")
    with h5py.File(episode_path(root, 1), "a") as file:
        file[name][4] = file[picture_name(root, "cam_left_wrist")][4]
    refused(root, r"row 4 of .* is \(16, 16\), expected \(24, 32\)", lambda d: d.frames(1, "cam_high", [4]))


def test_nan(root: Path) -> None:
    """In the classic form the first bad number is met in the state, where it is a row later than in the action."""
    name = "joint_action/vector" if root.name == "classic" else "state/left_arm_joint_states"
    with h5py.File(episode_path(root, 1), "a") as file:
        file[name][7, 2] = np.nan
    path = episode_path(root, 1).name
    refused(root, rf"{path}: the state of episode 1 is nan in row 7, dimension 2 \(left_arm_j", lambda d: d.actions(1))
    open_robotwin(root).states(0)


def test_episodes_of_different_robots(root: Path) -> None:
    name = "joint_action/vector" if root.name == "classic" else "state/left_arm_joint_states"
    with h5py.File(episode_path(root, 1), "a") as file:
        wider = np.pad(file[name][:], [(0, 0), (0, 1)])
        del file[name]
        file[name] = wider
    refused(root, "the state is 15 wide, in episode.* it is 14; put", lambda d: d.states(1))


def test_numbers_that_are_text(root: Path) -> None:
    name = "joint_action/vector" if root.name == "classic" else "state/left_arm_joint_states"
    with h5py.File(episode_path(root, 1), "a") as file:
        del file[name]
        file[name] = np.full((LENGTHS[1], 6), b"0.1")
    refused(root, f"{name} holds .S3, expected numbers", lambda d: d.states(1))


def test_other_rate(tmp_path: Path) -> None:
    with h5py.File(episode_path(write_xpolicylab(tmp_path), 1), "a") as file:
        file["additional_info/frequency"][()] = 25
    refused(tmp_path, "episode_0000001.hdf5: additional_info/frequency is 25, RoboTwin takes a row every 15 steps")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"seen": []}', '{"seen": [""]}', '{"unseen": ["lift"]}'])
def test_broken_instruction_of_the_classic_form(tmp_path: Path, text: str | None) -> None:
    path = write_classic(tmp_path) / "instructions/episode1.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    says = r"does not exist; copy the folder|must hold .*\"seen\"|is not valid JSON .*; generate|holds .*JSON object"
    refused(tmp_path, f"instructions/episode1.json ({says})")


@pytest.mark.parametrize("text", [None, "{", "[]", '[""]', "[3]"])
def test_broken_instruction_of_xpolicylab(tmp_path: Path, text: str | None) -> None:
    with h5py.File(episode_path(write_xpolicylab(tmp_path), 1), "a") as file:
        del file["instructions"]
        if text is not None:
            file["instructions"] = text
    refused(tmp_path, "episode_0000001.hdf5(: instructions must be a list| lacks the dataset instructions)")


def test_opened_by_its_content(root: Path) -> None:
    assert type(open_episodes(root)) is type(open_robotwin(root))
