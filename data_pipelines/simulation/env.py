"""Two ViperX arms in MuJoCo: the bimanual ALOHA tasks, 25 actions a second, three camera views.

Uses the scene files that ship with `gym-aloha` without importing its environment, which renders three 640x480
views at every step and is therefore hundreds of times slower than the physics.
"""

import copy
import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from data_pipelines.simulation.looks import add_things, dress
from data_pipelines.simulation.rendering import POINTS, FilmRenderer, PointRenderer, Renderer, check_rendering
from data_pipelines.simulation.tasks import TASKS, Scene

FPS = 25
EPISODE_STEPS = 155  # 6.2 s

CAMERAS = {"cam_high": "top", "cam_left_wrist": "left_wrist", "cam_right_wrist": "right_wrist"}
IMAGE_SIZES = {"cam_high": (64, 128), "cam_left_wrist": (64, 64), "cam_right_wrist": (64, 64)}
ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
STATE_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in (*ARM_JOINTS, "gripper"))
_START_POSE = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239] * 2)
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.058  # metres, finger slide at gripper 0 and at gripper 1
_LARGEST_IMAGE = (480, 640)  # height, width in pixels of the drawing buffer
FILM_SIZE = (240, 480)  # height, width in pixels of a film's frames
# Vertical fields of view in degrees. The scene's 78 of the top camera are half floor, its 20 of the wrists show
# little more than the fingertips.
_FOVY = {"top": 44.0, "left_wrist": 60.0, "right_wrist": 60.0, "angle": 26.5}
# A camera of the scene that no policy sees films from where both arms are whole: in front of the table, above it.
_FILM_CAMERA, _FILM_PLACE, _FILM_TARGET = "angle", (0.0, -1.15, 1.02), "midair"
_PAINT = {"vx300s_left": (0.33, 0.47, 0.66), "vx300s_right": (0.80, 0.52, 0.24), "table": (0.30, 0.31, 0.33)}

# Which state numbers are arm angles and grippers, and where their joints lie in MuJoCo's qpos and ctrl.
_ARM_STATE = np.array([*range(6), *range(7, 13)])
_ARM_QPOS = np.array([*range(6), *range(8, 14)])
_GRIPPER_STATE = np.array([6, 13])
_FINGER_QPOS = np.array([6, 14])


def scene_file(task: str) -> Path:
    """The MuJoCo scene of `task` in gym-aloha's files. Raises ValueError, and RuntimeError where they are missing."""
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: expected one of {', '.join(TASKS)}.")
    spec = importlib.util.find_spec("gym_aloha")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "The simulation uses the scene files of gym-aloha 0.1.5, which is not installed: run "
            "`pip install --no-deps gym-aloha==0.1.5`. What it depends on is not needed."
        )
    return Path(spec.submodule_search_locations[0]) / "assets" / TASKS[task].file


@functools.cache
def load_model(task: str, randomise: bool = False) -> mujoco.MjModel:
    """The compiled scene of `task`, shared by every environment of a process (compiling takes a second).

    randomise: with things that lie about, see `looks`; its environments have a copy each.
    """
    spec = mujoco.MjSpec.from_file(str(scene_file(task)))
    TASKS[task].build(spec)
    if randomise:
        add_things(spec)
    model = spec.compile()
    for camera, degrees in _FOVY.items():
        model.cam_fovy[model.camera(camera).id] = degrees
    film = model.camera(_FILM_CAMERA)
    film.pos[:], film.targetbodyid[:] = _FILM_PLACE, model.body(_FILM_TARGET).id
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    return model


@functools.cache
def _renderer(task: str, randomise: bool) -> Renderer | PointRenderer:
    """One off-screen buffer for all environments of a process that draw the same scene."""
    if os.environ.get("MUJOCO_GL") == POINTS:
        if randomise:
            raise RuntimeError(f"MUJOCO_GL={POINTS} has no light to draw randomised scenes in: use egl or osmesa.")
        return PointRenderer(load_model(task))
    try:
        return Renderer(load_model(task, randomise), *_LARGEST_IMAGE)
    except Exception as error:  # whatever a missing or broken driver raises
        raise RuntimeError(check_rendering() or f"MuJoCo cannot draw: {error}") from error


@functools.cache
def _film_renderer(task: str, randomise: bool) -> Renderer | PointRenderer:
    if isinstance(_renderer(task, randomise), PointRenderer):
        return _renderer(task, randomise)
    return FilmRenderer(load_model(task, randomise), *FILM_SIZE, _PAINT)


class AlohaSim:
    """One simulated pair of arms.

    Args:
        task: one of `TASKS`.
        image_sizes: (height, width) in pixels of each view that `images` returns; the keys are a subset of
            cam_high, cam_left_wrist and cam_right_wrist. Default `IMAGE_SIZES`.
        rate: actions per second; stock gym-aloha has 50.
        randomise: each seed has a look of its own, see `looks`; arms and objects move as without.

    Attributes:
        scene: what was drawn for this episode beside the objects' poses, see `Task.draw`.
        stage: the greatest reward of any step since the last reset, 0 .. `Task.greatest`.
    """

    def __init__(
        self, task: str, image_sizes: Mapping[str, tuple[int, int]] | None = None, rate: int = FPS,
        randomise: bool = False,
    ) -> None:  # fmt: skip
        self.model = load_model(task, randomise)
        self.task, self.rules, self._randomise = task, TASKS[task], randomise
        if randomise:
            self.model = copy.copy(self.model)
        self.data = mujoco.MjData(self.model)
        self.image_sizes = dict(IMAGE_SIZES if image_sizes is None else image_sizes)
        unknown = set(self.image_sizes) - set(CAMERAS)
        if unknown:
            raise ValueError(f"Unknown camera {sorted(unknown)[0]!r}: expected some of {', '.join(CAMERAS)}.")
        self._substeps = round(1 / rate / self.model.opt.timestep)
        self._geom_names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self.reset(seed=0)

    def reset(self, seed: int, **scene: Any) -> None:
        """Arms to their start pose, objects and scene to what `numpy.random.default_rng(seed)` draws.

        scene: what of `self.scene` is to be this instead, as in `reset(3, marked=1)`.
        """
        rng = np.random.default_rng(seed)
        poses = [np.append(rng.uniform(low, high), (1, 0, 0, 0)) for low, high in self.rules.objects]
        self.scene: Scene = self.rules.draw(rng)
        if unknown := set(scene) - set(self.scene):
            raise ValueError(f"{self.task} draws {sorted(self.scene)} for an episode, not {sorted(unknown)[0]!r}.")
        self.scene |= scene
        if self._randomise:
            dress(self.model, load_model(self.task, True), seed)
        self.reset_objects(np.stack(poses))

    def reset_objects(self, poses: np.ndarray) -> None:
        """Arms to their start pose, objects to `poses` [objects, 7] (metres and unit quaternion w, x, y, z)."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = _START_POSE
        self.data.ctrl[:] = _START_POSE
        self.data.qpos[16:] = np.asarray(poses).reshape(-1)
        self._taken = 0
        self.rules.act(self.data, self.scene, 0)
        # Contacts and accelerations of the first state, before any actuator has a say (as stock gym-aloha).
        flags = self.model.opt.disableflags
        self.model.opt.disableflags = flags | mujoco.mjtDisableBit.mjDSBL_ACTUATION
        mujoco.mj_forward(self.model, self.data)
        self.model.opt.disableflags = flags
        self.stage = 0

    def copy(self) -> "AlohaSim":
        """Another one in the same state, which goes its own way."""
        twin = copy.copy(self)
        twin.data, twin.scene = copy.copy(self.data), dict(self.scene)
        return twin

    def step(self, action: np.ndarray) -> None:
        """Hold one action [14] (radians; grippers 0 closed .. 1 open) for 1 / rate seconds."""
        action = np.asarray(action, np.float64)
        if action.shape != (14,) or not np.isfinite(action).all():
            raise ValueError(
                f"The action has shape {action.shape} and range {np.min(action)}..{np.max(action)}: expected 14 "
                "finite numbers, [6 joint angles in rad, gripper 0..1] for the left arm, then for the right."
            )
        fingers = _FINGER_CLOSED + action[_GRIPPER_STATE] * (_FINGER_OPEN - _FINGER_CLOSED)
        self.data.ctrl[_ARM_QPOS] = action[_ARM_STATE]
        self.data.ctrl[_FINGER_QPOS] = fingers
        self.data.ctrl[_FINGER_QPOS + 1] = -fingers
        # The first half step was computed when the last step ended, so that contacts are those of the new state.
        mujoco.mj_step2(self.model, self.data)
        mujoco.mj_step(self.model, self.data, self._substeps - 1)
        self._taken += 1
        self.rules.act(self.data, self.scene, self._taken)
        mujoco.mj_step1(self.model, self.data)
        self.stage = max(self.stage, self.reward())

    def state(self) -> np.ndarray:
        """Measured arms, float32 [14]: radians, grippers 0 closed .. 1 open; left arm first."""
        state = np.empty(14, np.float32)
        state[_ARM_STATE] = self.data.qpos[_ARM_QPOS]
        state[_GRIPPER_STATE] = (self.data.qpos[_FINGER_QPOS] - _FINGER_CLOSED) / (_FINGER_OPEN - _FINGER_CLOSED)
        return state

    def objects(self) -> np.ndarray:
        """Poses of the objects, float64 [objects, 7]: metres and unit quaternion (w, x, y, z)."""
        return self.data.qpos[16:].reshape(-1, 7).copy()

    def images(self) -> dict[str, np.ndarray]:
        """The views of now, uint8 [height, width, 3] RGB each."""
        return {camera: self.render(camera, size) for camera, size in self.image_sizes.items()}

    def render(self, camera: str, size: tuple[int, int]) -> np.ndarray:
        """One view of now at `size` (height, width), at most 480x640: uint8 [height, width, 3] RGB."""
        return _renderer(self.task, self._randomise).draw(self.data, CAMERAS[camera], size)

    def film(self) -> np.ndarray:
        """Both arms from in front, for people: uint8 [240, 480, 3] RGB."""
        return _film_renderer(self.task, self._randomise).draw(self.data, _FILM_CAMERA, FILM_SIZE)

    def reward(self) -> int:
        """The stage of now, 0 .. `Task.greatest`; of transfer cube and insertion it is stock gym-aloha's reward."""
        names = self._geom_names
        contact = self.data.contact
        pairs = {(names[a], names[b]) for a, b in zip(contact.geom1, contact.geom2, strict=True)}
        return self.rules.reward(self.data, self.scene, pairs)

    @property
    def held(self) -> bool:
        """Whether the greatest reward holds now."""
        return self.reward() == self.rules.greatest

    @property
    def success(self) -> bool:
        """Whether the greatest reward held after any step since the last reset."""
        return self.stage == self.rules.greatest
