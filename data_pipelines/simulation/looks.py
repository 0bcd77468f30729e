"""Scenes that look different each time and are the same to touch: light, table, cameras, things that lie about.

Whether a policy that was trained on one look knows its task in others can so be asked, with nothing else changed.
"""

import colorsys

import mujoco
import numpy as np

_LIGHT = (0.5, 1.3)  # times as bright
_TINT = 0.15  # each colour of the light by up to so much of itself
_SLANT = 0.4  # of each number of a light's direction
_SHIFT = {"top": 0.03, "left_wrist": 0.01, "right_wrist": 0.01}  # metres along each axis
_TILT = 0.04  # radians about each axis, of the camera at the top
_SIDES = (0.01, 0.035)  # metres, half a side of a thing
# Where things lie, metres: behind and before what the tasks use of the table.
_BEHIND, _BEFORE = ((-0.35, 0.74), (0.35, 0.86)), ((-0.35, 0.26), (0.35, 0.30))
_PLACES = (_BEHIND, _BEHIND, _BEHIND, _BEFORE, _BEFORE)
THINGS = len(_PLACES)
_RED = 0.1  # of the colour circle to both sides of red, which no thing has: that is the colour of what is handled


def add_things(spec: mujoco.MjSpec) -> None:
    """Before the scene is compiled: boxes on the table that are seen and not felt."""
    for number in range(THINGS):
        spec.worldbody.add_geom(
            name=f"thing_{number}", type=mujoco.mjtGeom.mjGEOM_BOX, size=(0.01, 0.01, 0.01), contype=0, conaffinity=0
        )


def dress(model: mujoco.MjModel, plain: mujoco.MjModel, seed: int) -> None:
    """Gives `model`, a copy of `plain` with things, the look of a seed. Nothing that moves anything is changed."""
    rng = np.random.default_rng([seed, 3])  # of numbers that neither scene nor disturbance draws
    bright = rng.uniform(*_LIGHT) * (1 + rng.uniform(-_TINT, _TINT, 3))
    for light in ("ambient", "diffuse"):
        getattr(model.vis.headlight, light)[:] = bright * getattr(plain.vis.headlight, light)
    model.light_diffuse[:] = bright * plain.light_diffuse
    model.light_dir[:] = plain.light_dir + rng.uniform(-_SLANT, _SLANT, plain.light_dir.shape)
    model.light_dir[:] /= np.linalg.norm(model.light_dir, axis=1, keepdims=True)
    model.geom("table").rgba[:3] = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.15, 0.6))
    for camera, shift in _SHIFT.items():
        model.camera(camera).pos[:] = plain.camera(camera).pos + rng.uniform(-shift, shift, 3)
    # Which way is up in the picture of a camera right above its target hangs on the last digit of its place; so this
    # one no longer looks at a target, but down.
    top = model.camera("top")
    top.mode[:] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    mujoco.mju_euler2Quat(top.quat, rng.uniform(-_TILT, _TILT, 3), "xyz")
    for number in range(THINGS):
        thing, turn = model.geom(f"thing_{number}"), rng.uniform(0, np.pi) / 2
        model.geom_sameframe[thing.id] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE  # it was compiled at the world's origin
        thing.size[:] = rng.uniform(*_SIDES, 3)
        thing.pos[:] = *rng.uniform(*_PLACES[number]), thing.size[2]
        thing.quat[:] = np.cos(turn), 0, 0, np.sin(turn)
        colour = colorsys.hsv_to_rgb(rng.uniform(_RED, 1 - _RED), rng.uniform(0.3, 1), rng.uniform(0.4, 1))
        thing.rgba[:] = *colour, 1
