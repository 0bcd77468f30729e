"""A scripted expert: gripper waypoints, timed, turned into joint targets by inverse kinematics.

Given where the objects lie it always does the same, because demonstrations that solve one scene in several
ways are harder to imitate.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from data_pipelines.simulation.env import EPISODE_STEPS, AlohaSim

TOOL_OFFSET = 0.135  # metres from the gripper link to between the fingertips, along the link's x axis

_ROTATION_WEIGHT = 0.3  # metres per radian in the residual: half a degree counts like 2.6 mm
_DAMPING = 1e-2
_ITERATIONS = 20
_TOLERANCE = 1e-4
_JOINTS = {"left": slice(0, 6), "right": slice(8, 14)}  # the same in qpos, in velocities and in joint numbers
_FOREARM_ROLL = 3
_BASE = {"left": np.array([-0.469, 0.5]), "right": np.array([0.469, 0.5])}  # metres, x and y of the waist axis
LIFTED = 52  # steps of *remember* that are the same whichever plate was marked
CLOSES = 76  # steps of *react* after which the hand closes
_FASTEST = 0.016  # metres a step: 0.4 m/s
_FORWARD = {"left": 0.0, "right": np.pi}  # radians about z: each arm looks at the other


@dataclass(frozen=True)
class Waypoint:
    """Where a gripper is to be at a step.

    step: 0 .. EPISODE_STEPS. position: [3] metres, between the fingertips, in the world.
    pitch, roll: radians; at pitch pi / 2 the gripper points down, at roll pi / 2 the fingers close vertically.
    gripper: 0 closed .. 1 open.

    The heading is not free: a gripper points away from its arm's waist, so that the forearm never rolls. With a
    free heading it would flip by half a turn, to either side, whenever the wrist passes its straight pose.
    """

    step: int
    position: np.ndarray
    pitch: float
    roll: float
    gripper: float


def plan(env: AlohaSim, plate: int | None = None, delay: int | None = None) -> np.ndarray:
    """Actions that solve the task from the state just after `env.reset`: float32 [EPISODE_STEPS, 14].

    An expert that knows less shows what a task needs:
        plate: of *remember*, the number of the plate that it puts the cube on; None for the one that was marked.
        delay: of *react*, how many steps old is what it sees of the cube; None for the scene's reaction time.
    """
    solver, objects = _InverseKinematics(env), env.objects()[:, :3]
    starts = {side: solver.start(side) for side in _JOINTS}
    chase = None
    if env.task == "react":
        chase = _Chase(env, env.scene["reaction"] if delay is None else delay)

    def paths() -> dict[str, np.ndarray]:
        if env.task == "transfer_cube":
            left, right = _transfer(*objects)
        elif env.task == "insertion":
            left, right = _insertion(*objects)
        elif env.task == "remember":
            left, right = [], _remember(*objects, env.rules.plates[env.scene["marked"] if plate is None else plate])
        else:
            left, right = [], _react(chase.cube)
        return {"left": _interpolate(starts["left"], left), "right": _interpolate(starts["right"], right)}

    path = paths()
    actions = np.empty((EPISODE_STEPS, 14), np.float32)
    for step in range(EPISODE_STEPS):
        joints = solver.solve({side: rows[step, :5] for side, rows in path.items()})
        grippers = {side: rows[step, 5:] for side, rows in path.items()}
        actions[step] = np.concatenate([part[side] for side in _JOINTS for part in (joints, grippers)])
        if chase:
            chase.step(actions[step])
            path = paths()
    return actions


def _transfer(cube: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """The right arm lifts the cube by its right half to the middle, the left takes it by the other half."""
    # Fingertips reach 2 cm further than the tool point, so a lower grasp would press them on the table.
    half, down, turn = np.array([0.008, 0, 0]), 1.05, np.pi / 2
    grasp, meet = np.array([cube[0], cube[1], 0.022]) + half, np.array([0, 0.5, 0.25]) + half
    roll = _roll_along_y("right", grasp, down)
    right = [
        Waypoint(32, grasp + [0, 0, 0.08], down, roll, 1),
        Waypoint(50, grasp, down, roll, 1),
        Waypoint(60, grasp, down, roll, 0),
        Waypoint(88, meet, down, 0, 0),
        Waypoint(122, meet, down, 0, 0),
        Waypoint(130, meet, down, 0, 1),
        Waypoint(146, meet + [0.1, 0, 0.02], down, 0, 1),
    ]
    # The left fingers close above and below the cube, because the right ones hold its sides.
    take = np.array([0, 0.5, 0.24]) - half
    left = [
        Waypoint(60, take - [0.12, 0, 0], 0, turn, 1),
        Waypoint(88, take - [0.12, 0, 0], 0, turn, 1),
        Waypoint(106, take, 0, turn, 1),
        Waypoint(114, take, 0, turn, 0),
        Waypoint(132, take, 0, turn, 0),
        Waypoint(146, take - [0.08, 0, 0], 0, turn, 0),
    ]
    return left, right


def _insertion(peg: np.ndarray, socket: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """The right arm lifts the peg, the left the socket; then they are pushed together along x."""
    # Pointing almost straight down: tilted fingers would close aslant on the narrow peg and let it slip.
    meet, down = np.array([0, 0.5, 0.18]), 1.5

    def path(arm: str, grasp: np.ndarray, outwards: np.ndarray) -> list[Waypoint]:
        roll, lifted = _roll_along_y(arm, grasp, down), grasp + [0, 0, 0.08]
        return [
            Waypoint(32, lifted, down, roll, 1),
            Waypoint(50, grasp, down, roll, 1),
            Waypoint(64, grasp, down, roll, 0),
            Waypoint(74, lifted, down, roll, 0),
            Waypoint(108, meet + 0.085 * outwards, down, 0, 0),
            Waypoint(116, meet + 0.085 * outwards, down, 0, 0),
            Waypoint(142, meet + 0.045 * outwards, down, 0, 0),
        ]

    left = path("left", np.array([*socket[:2], 0.025]), np.array([-1, 0, 0]))
    # The peg is held by its top: 9 mm higher, its middle is as high as that of the socket.
    meet = meet + [0, 0, 0.009]
    return left, path("right", np.array([*peg[:2], 0.022]), np.array([1, 0, 0]))


def _remember(cube: np.ndarray, plate: np.ndarray) -> list[Waypoint]:
    """The right arm lifts the cube, and only then, at LIFTED, the way to one plate is not the way to the other."""
    down, grasp, put = 1.05, np.array([*cube[:2], 0.022]), np.array([*plate, 0.024])
    roll, turned = _roll_along_y("right", grasp, down), _roll_along_y("right", put, down)
    up = np.array([0, 0, 0.08])
    return [
        Waypoint(24, grasp + up, down, roll, 1),
        Waypoint(36, grasp, down, roll, 1),
        Waypoint(44, grasp, down, roll, 0),
        Waypoint(LIFTED, grasp + up, down, roll, 0),
        Waypoint(80, put + up, down, turned, 0),
        Waypoint(96, put, down, turned, 0),
        Waypoint(104, put, down, turned, 1),
        Waypoint(124, put + up, down, turned, 1),
    ]


def _react(cube: np.ndarray) -> list[Waypoint]:
    """The right arm waits above the cube, comes down on it and lifts it."""
    down, grasp = 1.05, np.array([*cube[:2], 0.022])
    roll, up = _roll_along_y("right", grasp, down), np.array([0, 0, 0.1])
    return [
        Waypoint(36, grasp + up, down, roll, 1),
        Waypoint(62, grasp + 0.7 * up, down, roll, 1),
        Waypoint(CLOSES, grasp, down, roll, 1),
        Waypoint(CLOSES + 10, grasp, down, roll, 0),
        Waypoint(114, np.array([0.1, 0.5, 0.25]), down, 0, 0),
    ]


class _Chase:
    """Where the cube is, to an expert that sees it `delay` steps late and leads its hand no faster than _FASTEST.

    Plays the episode that its actions make, to see what comes of them.
    """

    def __init__(self, env: AlohaSim, delay: int) -> None:
        self._twin, self._delay = env.copy(), delay
        self._seen = [env.objects()[0, :3]]
        self.cube = self._seen[0].copy()

    def step(self, action: np.ndarray) -> None:
        """After an action: looks, until the hand closes."""
        self._twin.step(action)
        self._seen.append(self._twin.objects()[0, :3])
        now = len(self._seen) - 1
        if now <= CLOSES:
            off = self._seen[max(now - self._delay, 0)] - self.cube
            self.cube = self.cube + off * min(1, _FASTEST / max(np.hypot(*off[:2]), 1e-9))


def _interpolate(start: np.ndarray, waypoints: list[Waypoint]) -> np.ndarray:
    """[EPISODE_STEPS, 6] of (x, y, z, pitch, roll, gripper), slow at both ends of every leg."""
    waypoints = waypoints or [Waypoint(EPISODE_STEPS, start[:3], *start[3:])]  # none: it stays where it is
    rows = np.stack([start] + [np.array([*w.position, w.pitch, w.roll, w.gripper]) for w in waypoints])
    steps = np.array([0] + [w.step for w in waypoints])
    now = np.arange(1, EPISODE_STEPS + 1)  # the action of step t says where to be when it ends
    leg = np.clip(np.searchsorted(steps, now, side="left") - 1, 0, len(steps) - 2)
    done = np.clip((now - steps[leg]) / (steps[leg + 1] - steps[leg]), 0, 1)[:, None]
    return rows[leg] + (3 * done**2 - 2 * done**3) * (rows[leg + 1] - rows[leg])


class _InverseKinematics:
    """Joint angles of both arms for two gripper poses, from the solution before (damped least squares)."""

    def __init__(self, env: AlohaSim) -> None:
        self._model = env.model
        self._data = mujoco.MjData(env.model)
        self._data.qpos[:] = env.data.qpos
        self._gripper = {side: env.model.body(f"vx300s_{side}/gripper_link").id for side in _JOINTS}
        self._start = env.state()
        self._update()

    def start(self, side: str) -> np.ndarray:
        """Where the gripper is now: [6] of (x, y, z, pitch, roll, gripper)."""
        position, rotation = self._tool(side)
        pitch = -np.arcsin(rotation[2, 0])
        roll = np.arctan2(rotation[2, 1], rotation[2, 2])
        return np.array([*position, pitch, roll, self._start[6 if side == "left" else 13]])

    def solve(self, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Angles [6] in rad for each side's target [5] of (x, y, z, pitch, roll)."""
        rotations = {
            side: _rotation(_FORWARD[side] + _turn(side, target), *target[3:]) for side, target in targets.items()
        }
        translation, turning = np.empty((3, self._model.nv)), np.empty((3, self._model.nv))
        for _ in range(_ITERATIONS):
            worst = 0.0
            for side, target in targets.items():
                position, rotation = self._tool(side)
                error = np.concatenate(
                    [
                        target[:3] - position,
                        # The axis of the remaining turn times the sine of its angle.
                        _ROTATION_WEIGHT * 0.5 * np.cross(rotation.T, rotations[side].T).sum(axis=0),
                    ]
                )
                worst = max(worst, np.abs(error).max())
                mujoco.mj_jac(self._model, self._data, translation, turning, position, self._gripper[side])
                joints = _JOINTS[side]
                jacobian = np.concatenate([translation[:, joints], _ROTATION_WEIGHT * turning[:, joints]])
                jacobian[:, _FOREARM_ROLL] = 0
                square = jacobian @ jacobian.T + _DAMPING**2 * np.eye(6)
                step = jacobian.T @ np.linalg.solve(square, error)
                low, high = self._model.jnt_range[joints].T
                self._data.qpos[joints] = np.clip(self._data.qpos[joints] + step, low, high)
            self._update()
            if worst < _TOLERANCE:
                break
        return {side: self._data.qpos[joints].copy() for side, joints in _JOINTS.items()}

    def _tool(self, side: str) -> tuple[np.ndarray, np.ndarray]:
        rotation = self._data.xmat[self._gripper[side]].reshape(3, 3)
        return self._data.xpos[self._gripper[side]] + TOOL_OFFSET * rotation[:, 0], rotation

    def _update(self) -> None:
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)


def _turn(side: str, position: np.ndarray) -> float:
    """Radians about z from an arm's forward direction to `position` (its first two numbers are x and y)."""
    away = position[:2] - _BASE[side]
    forward = np.cos(_FORWARD[side])  # along x
    return np.arctan2(forward * away[1], forward * away[0])


def _roll_along_y(side: str, position: np.ndarray, pitch: float) -> float:
    """The roll at which the fingers close along the world's y axis, as seen from above."""
    return np.arctan(np.tan(_turn(side, position)) / np.sin(pitch))


def _rotation(heading: float, pitch: float, roll: float) -> np.ndarray:
    """Rz(heading) Ry(pitch) Rx(roll), [3, 3]."""
    (cz, cy, cx), (sz, sy, sx) = np.cos([heading, pitch, roll]), np.sin([heading, pitch, roll])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return about_z @ about_y @ about_x
