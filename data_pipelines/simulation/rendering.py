"""Off-screen drawing of MuJoCo scenes without a display, as fast as a CPU allows."""

import copy
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping

import mujoco
import numpy as np
from PIL import Image

POINTS = "points"  # value of MUJOCO_GL that chooses `PointRenderer`
_BACKENDS = ("egl", "osmesa")  # in the order tried
_PACKAGES = {
    "egl": "libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0",
    "osmesa": "libosmesa6",
}
_FINER = 2  # times as many pixels each way are drawn for a film, and averaged
_SHADOW = 1024  # side of its shadow map in pixels
_BACKDROP = (246, 214)  # grey above and below
_PROBE = """
import mujoco
from data_pipelines.simulation.rendering import Renderer
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
assert Renderer(model, 32, 32).draw(data, -1, (32, 32)).max() > 0
"""


@functools.cache
def check_rendering() -> str | None:
    """None if pictures can be drawn here, else one line that says what to install.

    Where MUJOCO_GL is unset it is set to the first backend that works. Tries in another process, because a
    broken driver may crash the one that loads it.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen == POINTS:
        return None
    for backend in (chosen,) if chosen else _BACKENDS:
        if _works(backend):
            os.environ["MUJOCO_GL"] = backend
            return None
    advice = " or ".join(
        f"`apt-get install {packages}` with MUJOCO_GL={backend}" for backend, packages in _PACKAGES.items()
    )
    return f"MuJoCo cannot draw with MUJOCO_GL={chosen or 'unset'}: {advice}."


def _works(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


class Renderer:
    """Draws the named cameras of one model, or of copies with other colours and places, into one off-screen buffer
    of `height` x `width` pixels.

    A thin layer over MuJoCo's drawing calls: `mujoco.Renderer` would need one GL context per picture size.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        if not os.environ.get("MUJOCO_GL") and (problem := check_rendering()):
            raise RuntimeError(problem)
        # Not mujoco.GLContext: that one is chosen when mujoco is imported, perhaps before MUJOCO_GL is set.
        backend = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL'].lower()}")
        self._model = model
        self._size = (height, width)
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        self._gl = backend.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "FOG", "HAZE"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self._option = mujoco.MjvOption()
        # The hulls have a tenth of the triangles of the arms' meshes.
        self._option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = True
        self._camera = mujoco.MjvCamera()

    def draw(self, data: mujoco.MjData, camera: str | int, size: tuple[int, int]) -> np.ndarray:
        """What `camera` sees, uint8 [height, width, 3] RGB; `size` is (height, width) in pixels."""
        return self._draw(data, camera, size, None)

    def _seen(self, model: mujoco.MjModel) -> mujoco.MjModel:
        """What is drawn of a scene."""
        return model

    def _draw(
        self, data: mujoco.MjData, camera: str | int, size: tuple[int, int], depth: np.ndarray | None
    ) -> np.ndarray:
        """`draw`; the depth buffer, 1 where there is nothing, goes to `depth` float32 [height, width], from below."""
        height, width = size
        if not (0 < height <= self._size[0] and 0 < width <= self._size[1]):
            raise ValueError(
                f"An image of {height}x{width} does not fit the drawing buffer: expected at most "
                f"{self._size[0]}x{self._size[1]} (height x width); ask for a smaller one."
            )
        number = camera if isinstance(camera, int) else self._model.camera(camera).id
        self._camera.fixedcamid = number
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE if number < 0 else mujoco.mjtCamera.mjCAMERA_FIXED
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._seen(data.model), data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        view = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(view, self._scene, self._context)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, depth, view, self._context)
        return image[::-1].copy()  # OpenGL counts rows from below


class FilmRenderer(Renderer):
    """Draws for people: the arms' meshes, shadows, smooth edges, a light backdrop; ten times as slow.

    paint: colours (red, green, blue, 0..1) of the geoms whose names begin so, where they have those of `model`.
    """

    def __init__(
        self, model: mujoco.MjModel, height: int, width: int, paint: Mapping[str, tuple[float, float, float]]
    ) -> None:
        names = [model.geom(geom).name for geom in range(model.ngeom)]
        self._paint = {i: c for i, name in enumerate(names) for start, c in paint.items() if name.startswith(start)}
        self._plain = model.geom_rgba.copy()
        model = copy.copy(model)
        model.vis.quality.shadowsize = _SHADOW
        super().__init__(model, _FINER * height, _FINER * width)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = True
        self._option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = False

    def _seen(self, model: mujoco.MjModel) -> mujoco.MjModel:
        painted = copy.copy(model)  # what a policy sees keeps its colours
        for geom, colour in self._paint.items():
            if np.array_equal(painted.geom_rgba[geom], self._plain[geom]):
                painted.geom_rgba[geom, :3] = colour
        return painted

    def draw(self, data: mujoco.MjData, camera: str | int, size: tuple[int, int]) -> np.ndarray:
        """As `Renderer.draw`."""
        height, width = size[0] * _FINER, size[1] * _FINER
        depth = np.empty((height, width), np.float32)
        image = self._draw(data, camera, (height, width), depth)
        backdrop = np.linspace(*_BACKDROP, height).round().astype(np.uint8)[:, None, None]
        image = np.where(depth[::-1, :, None] < 1, image, backdrop)
        return np.asarray(Image.fromarray(image).reduce(_FINER))


class PointRenderer:
    """Draws scenes without OpenGL: the vertices of every geom as dots, the nearest in front.

    A stand-in for machines without a driver, chosen with MUJOCO_GL=points: good enough to train on, not to look at.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        points, owners = [], []
        for geom in range(model.ngeom):
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                start = model.mesh_vertadr[mesh]
                local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
            elif model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX:
                grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
                local = grid[np.abs(grid).max(1) == 1] * model.geom_size[geom]
            else:
                continue
            points.append(local)
            owners.append(np.full(len(local), geom))
        self._points, self._owners = np.concatenate(points), np.concatenate(owners)
        material = model.geom_matid
        # A geom without a material has its own colour; -1 would index from the end, or nothing at all.
        table = np.concatenate([model.mat_rgba, np.zeros((1, 4))])
        colours = np.where(material[:, None] >= 0, table[material], model.geom_rgba)
        self._colours = (255 * colours[self._owners, :3]).astype(np.uint8)
        self._visible = colours[self._owners, 3] > 0

    def draw(self, data: mujoco.MjData, camera: str, size: tuple[int, int]) -> np.ndarray:
        """What `camera` sees, uint8 [height, width, 3] RGB; `size` is (height, width) in pixels."""
        height, width = size
        number = self._model.camera(camera).id
        rotations = data.geom_xmat.reshape(-1, 3, 3)[self._owners]
        world = np.einsum("pij,pj->pi", rotations, self._points) + data.geom_xpos[self._owners]
        right, up, back = ((world - data.cam_xpos[number]) @ data.cam_xmat[number].reshape(3, 3)).T
        depth = np.maximum(-back, 1e-3)
        focal = height / 2 / np.tan(np.radians(self._model.cam_fovy[number]) / 2)
        column = np.floor(width / 2 + focal * right / depth).astype(int)
        row = np.floor(height / 2 - focal * up / depth).astype(int)
        seen = self._visible & (back < -0.01) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        order = np.flatnonzero(seen)[np.argsort(back[seen])]  # the farthest first, nearer ones paint over them
        image = np.full((height, width, 3), 64, np.uint8)
        image[row[order], column[order]] = self._colours[order]
        return image
