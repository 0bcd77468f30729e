"""The tasks: what lies on the table, what the scene does by itself, and how far an episode has come.

*Transfer cube* and *insertion* are gym-aloha's. *Remember* and *react* are built from its scene of a cube, and each
needs what one picture does not give: the first a picture of long ago, the second one of this moment.
"""

from typing import Any

import mujoco
import numpy as np

Scene = dict[str, Any]  # what was drawn for an episode beside the objects' poses
Pairs = set[tuple[str, str]]  # names of the geoms that touch; a box comes before a mesh
Box = tuple[tuple[float, float, float], tuple[float, float, float]]  # low, high, half open, in metres

# Stock gym-aloha looks at the first of each hand's two fingers alone.
LEFT_FINGER = "vx300s_left/10_left_gripper_finger"
RIGHT_FINGERS = ("vx300s_right/10_right_gripper_finger", "vx300s_right/10_left_gripper_finger")
_SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")
_CUBE_QPOS, _CUBE_QVEL = slice(16, 19), slice(16, 22)


class Task:
    """One task; the default is a scene that does nothing by itself.

    file: MuJoCo scene of gym-aloha.  instruction: what a policy is told.  objects: where each may lie at the start, in
    the order of their poses; all stand upright.  greatest: the reward, from 0 on in whole stages, that is success.
    """

    file: str
    instruction: str
    objects: tuple[Box, ...]
    greatest: int

    def build(self, spec: mujoco.MjSpec) -> None:
        """Adds to the scene, before it is compiled."""

    def draw(self, rng: np.random.Generator) -> Scene:
        """What differs between episodes beside the objects' poses; `rng` has drawn those."""
        return {}

    def act(self, data: mujoco.MjData, scene: Scene, step: int) -> None:
        """What happens by itself after `step` actions, before the picture of that moment. Changes `data`."""

    def reward(self, data: mujoco.MjData, scene: Scene, pairs: Pairs) -> int:
        """The stage of now, 0 .. greatest."""
        raise NotImplementedError


# The stock reward sees a contact in one order of its two geoms only, and so do these.


class TransferCube(Task):
    file = "bimanual_viperx_transfer_cube.xml"
    instruction = "pick up the red cube with the right arm and hand it over to the left arm"
    objects = (((0.0, 0.4, 0.05), (0.2, 0.6, 0.05)),)
    greatest = 4

    def reward(self, data: mujoco.MjData, scene: Scene, pairs: Pairs) -> int:
        """1 touched by the right hand, 2 lifted by it, 3 touched by the left one, 4 lifted by that."""
        left, right = ("red_box", LEFT_FINGER) in pairs, ("red_box", RIGHT_FINGERS[0]) in pairs
        lifted = ("red_box", "table") not in pairs
        if left:
            return 4 if lifted else 3
        if right:
            return 2 if lifted else 1
        return 0


class Insertion(Task):
    file = "bimanual_viperx_insertion.xml"
    instruction = "pick up the red peg and the blue socket and insert the peg into the socket"
    objects = (((0.1, 0.4, 0.05), (0.2, 0.6, 0.05)), ((-0.2, 0.4, 0.05), (-0.1, 0.6, 0.05)))
    greatest = 4

    def reward(self, data: mujoco.MjData, scene: Scene, pairs: Pairs) -> int:
        """1 both touched, 2 both lifted, 3 the peg touches the socket, 4 it has reached its end."""
        if ("red_peg", "pin") in pairs:
            return 4
        lifted = ("red_peg", "table") not in pairs and not any((part, "table") in pairs for part in _SOCKET)
        if lifted and any(("red_peg", part) in pairs for part in _SOCKET):
            return 3
        if ("red_peg", RIGHT_FINGERS[0]) in pairs and any((part, LEFT_FINGER) in pairs for part in _SOCKET):
            return 2 if lifted else 1
        return 0


class Remember(Task):
    """One of two plates is marked at first; when the mark has gone, the cube is to be put on that plate."""

    file = TransferCube.file
    instruction = "put the red cube on the plate that was marked green"
    objects = (((0.12, 0.45, 0.05), (0.2, 0.55, 0.05)),)
    greatest = 3
    plates = np.array([[0.02, 0.37], [0.02, 0.63]])  # metres, x and y of their middles
    plate = 0.06  # metres, half a side
    marked_rows = 28  # pictures of an episode, its first ones, that show the mark

    def build(self, spec: mujoco.MjSpec) -> None:
        for number, place in enumerate(self.plates):
            _add_slab(spec.worldbody, f"plate_{number}", (*place, 0.0005), self.plate, (0.75, 0.75, 0.78, 1))
        mark = spec.worldbody.add_body(name="mark", mocap=True)
        _add_slab(mark, "mark", (0, 0, 0), 0.8 * self.plate, (0.1, 0.85, 0.2, 1))

    def draw(self, rng: np.random.Generator) -> Scene:
        """marked: number of the marked plate."""
        return {"marked": int(rng.integers(2))}

    def act(self, data: mujoco.MjData, scene: Scene, step: int) -> None:
        # Gone is in the ground below the table, at the same place whichever plate it was on.
        gone = (0, 0, -1)
        data.mocap_pos[0] = gone if step >= self.marked_rows else (*self.plates[scene["marked"]], 0.002)

    def reward(self, data: mujoco.MjData, scene: Scene, pairs: Pairs) -> int:
        """1 lifted by the right hand, 2 put on a plate and let go, 3 on the one that was marked."""
        on_table = ("red_box", "table") in pairs
        if any(("red_box", finger) in pairs for finger in RIGHT_FINGERS):
            return int(not on_table)
        place = data.qpos[_CUBE_QPOS][:2]
        on = np.flatnonzero((np.abs(place - self.plates) < self.plate).all(axis=1))
        if not on_table or not on.size:
            return 0
        return 3 if on[0] == scene["marked"] else 2


class React(Task):
    """The cube is knocked to one side, to the other, away from the right arm or not at all while its hand comes down.

    Who shows how it is done takes a while to react, as people do: else what the arm does tells where the cube is, and
    who learns from it need not look.
    """

    file = TransferCube.file
    instruction = "pick up the red cube with the right arm even if it moves"
    objects = (((0.1, 0.46, 0.05), (0.18, 0.54, 0.05)),)
    greatest = 3
    knocks = (42, 53)  # after so many actions it is knocked, half open
    shift = (0.08, 0.10)  # metres that it then slides, on the whole
    height = 0.15  # metres, of the lifted cube's middle
    ways = np.array([[0, 0], [0, 1], [0, -1], [-1, 0]])  # x and y; the first is none
    reactions = (5, 11)  # rows until the expert sees where the cube is, half open
    _SLOWDOWN = 8.5  # m/s^2, measured: a friction of 1 in contacts that give

    def draw(self, rng: np.random.Generator) -> Scene:
        """knock: after how many actions.  length: metres.  way: one of `ways`.  reaction: the expert's, in rows."""
        return {
            "knock": int(rng.integers(*self.knocks)), "length": float(rng.uniform(*self.shift)),
            "way": int(rng.integers(len(self.ways))), "reaction": int(rng.integers(*self.reactions)),
        }  # fmt: skip

    def act(self, data: mujoco.MjData, scene: Scene, step: int) -> None:
        if step != scene["knock"] or not scene["way"]:
            return
        data.qvel[_CUBE_QVEL] = 0
        data.qvel[_CUBE_QVEL][:2] = np.sqrt(2 * self._SLOWDOWN * scene["length"]) * self.ways[scene["way"]]

    def reward(self, data: mujoco.MjData, scene: Scene, pairs: Pairs) -> int:
        """1 between the right fingers, 2 lifted by them, 3 lifted to `height`."""
        if not all(("red_box", finger) in pairs for finger in RIGHT_FINGERS):
            return 0
        if ("red_box", "table") in pairs:
            return 1
        return 3 if data.qpos[_CUBE_QPOS][2] > self.height else 2


def _add_slab(
    body: mujoco.MjsBody, name: str, place: tuple[float, ...], half: float, colour: tuple[float, ...]
) -> None:
    """A square on the table that is seen and not felt."""
    body.add_geom(
        name=name, type=mujoco.mjtGeom.mjGEOM_BOX, pos=place, size=(half, half, 0.0005), rgba=colour, contype=0,
        conaffinity=0,
    )  # fmt: skip


TASKS: dict[str, Task] = {
    "transfer_cube": TransferCube(), "insertion": Insertion(), "remember": Remember(), "react": React(),
}  # fmt: skip
