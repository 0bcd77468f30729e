"""Readers for RoboTwin recordings, one HDF5 file per episode with JPEG pictures, in its two forms.

A dataset is the folder that RoboTwin writes for one task and configuration, or its folder data/:

- classic: data/episode0.hdf5 with observation/{head,left,right}_camera/rgb and joint_action/vector, and
  instructions/episode0.json beside data/;
- XPolicyLab: data/episode_0000000.hdf5 with vision/{cam_head,cam_left_wrist,cam_right_wrist}/colors,
  {state,action}/{left,right}_{arm,ee}_joint_states and instructions.

Both write pictures from RGB arrays with an encoder that expects BGR, so that red and blue are swapped in the JPEG;
they are swapped back here. Joint angles are in rad, grippers 0 (closed) to 1 (open). The joints are the targets of
the drives, and a row is taken every 15 steps of the 250 Hz simulation; XPolicyLab files hold that 15 under the name
of a frequency.
"""

import io
import json
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipelines.episodes import DatasetError
from data_pipelines.files import absent, disguised, read_json
from data_pipelines.readers.base import Reader, Rows

HDF5 = b"\x89HDF\r\n\x1a\n"  # how a file begins
SIMULATION_HZ, STEPS_PER_ROW = 250, 15
# The words of RoboCOIN, so that one table of names serves both.
ARMS_OF_SIX = tuple(
    f"{side}_{what}"
    for side in ("left", "right")
    for what in (*(f"arm_joint_{n}_rad" for n in range(1, 7)), "gripper_open_scale")
)


class Robotwin(Reader):
    """A folder of RoboTwin episodes; its forms differ in how the datasets inside a file are called."""

    _known: dict[str, str]  # camera -> dataset of JPEGs
    _state: tuple[str, ...]  # datasets that make up the state, side by side
    _action: tuple[str, ...]  # likewise; () where the action is the next row's state

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root, self.robot, self.fps = root, "", SIMULATION_HZ / STEPS_PER_ROW
        self._files = files
        with _opened(files[0]) as file:
            self._pictures = {camera: name for camera, name in self._known.items() if name in file}
            self.state_dim = _matrix(file, self._state).shape[1]
            self.action_dim = _matrix(file, self._action).shape[1] if self._action else self.state_dim
        self.state_names = ARMS_OF_SIX if self.state_dim == len(ARMS_OF_SIX) else ()
        self.action_names = ARMS_OF_SIX if self.action_dim == len(ARMS_OF_SIX) else ()
        lengths, texts = [], []
        for path in files:
            with _opened(path) as file:
                lengths.append(self._length(file))
                texts.append(self._instruction(file))
        self.instructions = list(dict.fromkeys(texts))
        places = {text: place for place, text in enumerate(self.instructions)}
        self._tasks = [places[text] for text in texts]
        self._set_lengths(lengths)
        self.cameras, self.unusable = {}, {}
        for camera in self._pictures:
            try:
                with _opened(files[0]) as file:
                    self.cameras[camera] = self._picture(file, camera, 0).shape[:2]
            except DatasetError as error:
                self.unusable[camera] = str(error)

    def picture_file(self, episode: int, camera: str) -> tuple[Path, str]:
        return self._files[episode], self._pictures[camera]

    @abstractmethod
    def _instruction(self, file: h5py.File) -> str:
        """The instruction of the episode in a file."""

    def _length(self, file: h5py.File) -> int:
        """Rows of the episode in a file, of which every vector has the same number."""
        lengths = {name: len(_dataset(file, name, (1, 2))) for name in (*self._state, *self._action)}
        if len(set(lengths.values())) != 1:
            rows = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DatasetError(f"{file.filename} holds different numbers of rows ({rows}); record the episode again.")
        return next(iter(lengths.values()))

    def _read_rows(self, episode: int) -> Rows:
        path, length = self._files[episode], int(self.lengths[episode])
        with _opened(path) as file:
            state = _matrix(file, self._state)
            action = _matrix(file, self._action) if self._action else np.concatenate([state[1:], state[-1:]])
        for what, values, width in (("state", state, self.state_dim), ("action", action, self.action_dim)):
            if values.shape != (length, width):
                raise DatasetError(
                    f"{path}: the {what} is {values.shape[1]} wide, in {self._files[0].name} it is {width}; put "
                    "episodes of different robots into different folders."
                )
        timestamp = (np.arange(length) / self.fps).astype(np.float32)
        return Rows(path, state, action, timestamp, self._tasks[episode])

    def _decode(self, episode: int, camera: str, rows: np.ndarray, out: np.ndarray) -> None:
        with _opened(self._files[episode]) as file:
            pictures = len(_dataset(file, self._pictures[camera], (1,)))
            if pictures != self.lengths[episode]:
                raise DatasetError(
                    f"{file.filename} holds {pictures} pictures of {self._pictures[camera]} for "
                    f"{self.lengths[episode]} rows; record the episode again."
                )
            for place, row in enumerate(rows):
                image = self._picture(file, camera, row)
                if image.shape != out.shape[1:]:
                    raise DatasetError(
                        f"{file.filename}: row {row} of {self._pictures[camera]} is {image.shape[:2]}, expected "
                        f"{out.shape[1:3]} (height, width) as in {self._files[0].name}; put recordings of different "
                        "sizes into different folders."
                    )
                out[place] = image

    def _picture(self, file: h5py.File, camera: str, row: int) -> np.ndarray:
        """RGB uint8 [h, w, 3]."""
        jpeg = np.asarray(_dataset(file, self._pictures[camera], (1,))[row]).tobytes()
        try:
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                return np.asarray(image.convert("RGB"))[..., ::-1]
        except (OSError, Image.DecompressionBombError) as error:
            # Pillow's own words for this one hold an address in memory.
            reason = "no JPEG header" if isinstance(error, UnidentifiedImageError) else error
            raise DatasetError(
                f"{file.filename}: row {row} of {self._pictures[camera]} is not a whole JPEG ({reason}); copy or "
                "record the episode again."
            ) from error


class RobotwinClassic(Robotwin):
    """State of row t is joint_action/vector[t]; its action is the vector of the next row, the last one repeats.

    The instruction is the first of "seen" in instructions/episodeN.json.
    """

    _known = {
        "cam_high": "observation/head_camera/rgb",
        "cam_left_wrist": "observation/left_camera/rgb",
        "cam_right_wrist": "observation/right_camera/rgb",
    }
    _state, _action = ("joint_action/vector",), ()

    def _instruction(self, file: h5py.File) -> str:
        # Beside data/ as it was given, or as it is where data/ or the episode is a link.
        episodes = Path(file.filename).absolute(), Path(file.filename).resolve()
        paths = [episode.parents[1] / "instructions" / f"{episode.stem}.json" for episode in episodes]
        path = next((path for path in paths if path.is_file()), paths[0])
        if not path.is_file():
            raise DatasetError(f"{path} {absent(path)}; copy the folder instructions/ too, it stands beside data/.")
        content = read_json(path, DatasetError, "generate the instructions again")
        try:
            return _first(content["seen"])
        except (ValueError, KeyError) as error:
            raise DatasetError(
                f'{path} must hold {{"seen": ["an instruction", ...]}} ({error!r}); generate the instructions again.'
            ) from error


class RobotwinXPolicyLab(Robotwin):
    """State and action of row t are what the file holds in row t: left arm, left gripper, right arm, right gripper.

    The instruction is the first of the file's instructions.
    """

    _known = {
        "cam_high": "vision/cam_head/colors",
        "cam_left_wrist": "vision/cam_left_wrist/colors",
        "cam_right_wrist": "vision/cam_right_wrist/colors",
    }
    _state, _action = (
        tuple(f"{group}/{side}_{part}_joint_states" for side in ("left", "right") for part in ("arm", "ee"))
        for group in ("state", "action")
    )

    def _length(self, file: h5py.File) -> int:
        if "additional_info/frequency" in file:
            steps = _dataset(file, "additional_info/frequency", (0,))[()]
            if steps != STEPS_PER_ROW:
                raise DatasetError(
                    f"{file.filename}: additional_info/frequency is {steps}, RoboTwin takes a row every "
                    f"{STEPS_PER_ROW} steps; convert recordings of another rate to LeRobot."
                )
        return super()._length(file)

    def _instruction(self, file: h5py.File) -> str:
        value = _dataset(file, "instructions", (0, 1))[()]
        try:
            texts = json.loads(value) if isinstance(value, bytes) else [bytes(text).decode() for text in value]
            return _first(texts)
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{file.filename}: instructions must be a list of sentences ({error!r}); record the episode again."
            ) from error


def episode_files(root: Path) -> list[Path]:
    """The files episode*.hdf5 in root/data, or in root where there is no such folder, by their number from 0.

    Raises DatasetError where a number is missing.
    """
    folder = root / "data" if (root / "data").is_dir() else root
    files = {path: re.fullmatch(r"episode_?(\d+)\.hdf5", path.name) for path in folder.glob("episode*.hdf5")}
    if own := sorted(path.name for path, match in files.items() if not match):
        raise DatasetError(f"{folder}/{own[0]} has no number of an episode; give it one, or move it elsewhere.")
    numbers = {path: int(match[1]) for path, match in files.items()}
    ordered = sorted(numbers, key=numbers.get)
    if [numbers[path] for path in ordered] != list(range(len(ordered))):
        there = set(numbers.values())
        fault = next((f"{n} is missing" for n in range(len(ordered)) if n not in there), "one is there twice")
        raise DatasetError(
            f"{folder} holds {len(ordered)} files episode*.hdf5, expected the numbers 0..{len(ordered) - 1} once "
            f"each, {fault}; copy what is missing or number them anew, each with its instructions."
        )
    return ordered


def open_robotwin(root: str | Path) -> Robotwin:
    """The dataset in the folder `root`, in the form its first file has."""
    root = Path(root)
    files = episode_files(root)
    with _opened(files[0]) as file:
        forms = [form for form in (RobotwinClassic, RobotwinXPolicyLab) if form._state[0] in file]
    if len(forms) != 1:
        raise DatasetError(
            f"{files[0]} is not a RoboTwin episode: expected {RobotwinClassic._state[0]} (classic) or "
            f"{RobotwinXPolicyLab._state[0]} (XPolicyLab)."
        )
    return forms[0](root, files)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The open file; complaints of the HDF5 library become a DatasetError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        found = disguised(path, own=HDF5) or f"cannot be read as HDF5 ({error}); copy or record the episode again"
        raise DatasetError(f"{path} {found}.") from error


def _dataset(file: h5py.File, name: str, axes: tuple[int, ...]) -> h5py.Dataset:
    """A dataset with one of these numbers of axes."""
    found = file.get(name)
    if not isinstance(found, h5py.Dataset) or found.ndim not in axes:
        raise DatasetError(
            f"{file.filename} lacks the dataset {name} with {' or '.join(map(str, axes))} axes; record the episode "
            "again."
        )
    return found


def _matrix(file: h5py.File, names: tuple[str, ...]) -> np.ndarray:
    """Datasets [T, k] or [T] side by side, float32 [T, sum of k]."""
    parts = []
    for name in names:
        found = _dataset(file, name, (1, 2))
        if found.dtype.kind not in "fiu":
            raise DatasetError(f"{file.filename}: {name} holds {found.dtype}, expected numbers; record it again.")
        parts.append(found[()].astype(np.float32).reshape(len(found), -1))
    return np.concatenate(parts, 1)


def _first(texts: list[str]) -> str:
    """The first of a list of sentences; ValueError for anything else."""
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise ValueError(f"found {texts!r}"[:80])
    return texts[0]
