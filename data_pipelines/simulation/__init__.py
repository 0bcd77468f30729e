"""Bimanual simulation: environments, a scripted expert, and many environments in parallel."""

import os

# MuJoCo loads the drawing library named by MUJOCO_GL when it is imported, and cannot be imported where that one is
# missing. Physics needs none, so it waits here until something is drawn (`rendering.Renderer`).
_backend = os.environ.get("MUJOCO_GL")
os.environ["MUJOCO_GL"] = "disable"
try:
    import mujoco  # noqa: F401
finally:
    del os.environ["MUJOCO_GL"]
    if _backend is not None:
        os.environ["MUJOCO_GL"] = _backend
