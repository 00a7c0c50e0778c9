"""Another look at the same scene, as LIBERO-Plus perturbs it: its light, where the third-person camera stands, how wide
both cameras see, and pictures that are shifted or noisy. Physics and states stay as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd.sim.physics import mujoco
from rsd.types import CAMERAS, VIEWS

if TYPE_CHECKING:
    from rsd.sim.libero import LiberoEnv

BRIGHT, TINT = (0.4, 1.4), 0.15  # times the light's own strength; each colour up to so much less or more
ASIDE = 2.0  # m that a lamp is moved, each way
TURNED = (2.0, 6.0)  # degrees about an axis of any direction, through the middle of what the camera sees
WIDE = (0.9, 1.15)  # times the cameras' own angle
SHIFTED = 1 / 16  # of a picture's side, each way at most; its border is repeated
GREY = 12.0  # standard deviation of the noise, in 255ths
SCENE = ("light", "camera", "zoom")  # what is changed of the scene, before anything is drawn


@dataclass(frozen=True)
class View:
    """what: some of VIEWS; seed: of what is drawn of them, with suite, task and initial state."""

    what: tuple[str, ...]
    seed: int = 0


class Look:
    """One episode's: the model's lights and cameras are changed until `undo`, pictures by `seen`."""

    def __init__(self, env: LiberoEnv, what: Collection[str], rng: np.random.Generator) -> None:
        model, self._env = env.model, env
        headlight = model.vis.headlight
        arrays = (model.light_diffuse, model.light_pos, headlight.diffuse, headlight.ambient)
        self._before = [(array, array.copy()) for array in (*arrays, model.cam_pos, model.cam_quat, model.cam_fovy)]
        light, turn, wide, shift, noise = (np.random.default_rng(rng.integers(2**63)) for _ in VIEWS)
        if "light" in what:
            colour = light.uniform(*BRIGHT) * light.uniform(1 - TINT, 1 + TINT, 3)
            for array in (model.light_diffuse, headlight.diffuse, headlight.ambient):
                array[:] = array * colour
            model.light_pos[:] += light.uniform(-ASIDE, ASIDE, model.light_pos.shape)
        if "camera" in what:
            self._turn(env, turn)
        if "zoom" in what:
            model.cam_fovy[:] = model.cam_fovy * wide.uniform(*WIDE)
        side, most = env.image_size, round(SHIFTED * env.image_size)
        offsets = shift.integers(-most, most + 1, (len(CAMERAS), 2, 1)) if "shift" in what else 0
        places = np.clip(np.arange(side) + offsets * np.ones((len(CAMERAS), 2, 1), int), 0, side - 1)
        self._places = dict(zip(CAMERAS, places, strict=True))
        self._noise = int(noise.integers(2**63)) if "noise" in what else None
        mujoco.mj_camlight(model, env.data)

    def _turn(self, env: LiberoEnv, rng: np.random.Generator) -> None:
        """The third-person camera, about the point of its axis that is nearest to the hand."""
        camera = env.model.camera(CAMERAS[0])
        axis, about, quaternion = rng.normal(size=3), np.zeros(3), np.zeros(4)
        mujoco.mju_rotVecQuat(about, np.array([0.0, 0.0, -1.0]), camera.quat)  # it looks along its -z
        middle = camera.pos + about * float((env.latest()["robot0_eef_pos"] - camera.pos) @ about)
        mujoco.mju_axisAngle2Quat(quaternion, axis / np.linalg.norm(axis), np.radians(rng.uniform(*TURNED)))
        moved, turned = np.zeros(3), np.zeros(4)
        mujoco.mju_rotVecQuat(moved, camera.pos - middle, quaternion)
        mujoco.mju_mulQuat(turned, quaternion, camera.quat)
        camera.pos[:], camera.quat[:] = middle + moved, turned

    def undo(self) -> None:
        """The scene looks as it did."""
        for array, before in self._before:
            array[:] = before
        mujoco.mj_camlight(self._env.model, self._env.data)

    def seen(self, camera: str, image: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
        """What is seen, uint8 [S, S, 3] upright, in a control step of the simulation."""
        rows, columns = self._places[camera]
        image = image[rows][:, columns]
        if self._noise is None:
            return image
        noise = np.random.default_rng([self._noise, CAMERAS.index(camera), step]).normal(0.0, GREY, image.shape)
        return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
