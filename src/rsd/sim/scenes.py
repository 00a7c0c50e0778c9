"""Compiled scenes and drawing contexts that a process keeps for its next task.

All tasks of libero_spatial, and all of libero_goal, are one scene, to the letter of its XML; only what is asked for and
where things stand differs. Compiling it takes 2.2 s of CPU, reading it as compiled 0.2 s, copying it 0.1 s, bringing
its 190 MB of textures to OSMesa 0.5 to 1.2 s. Kept is the last scene alone, and on disk the last few: 260 MB each.
Physics and images of a kept scene are those of a new one, bit for bit: tests/sim/test_scenes.py.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rsd.cache import make_room, private_folder
from rsd.devices import cpu_model
from rsd.locks import first_or_after
from rsd.manifest import file_sha256
from rsd.sim.physics import mujoco

TEXTURE = re.compile(r'<texture [^>]*/>| texture="[^"]*"')  # two thirds of compiling it again, half of its memory
FILE = re.compile(r' file\w*="([^"]*)"')
LIMIT_BYTES = 4_000_000_000  # of all compiled scenes on disk; the one used longest ago gives way
_models: dict[str, mujoco.MjModel] = {}  # scene XML -> as compiled; at most one
_contexts: dict[str, tuple[Any, mujoco.MjrContext]] = {}  # scene XML -> its GL and MuJoCo context, idle; at most one


def compiled(xml: str) -> mujoco.MjModel:
    """A model of its own, which the caller may change."""
    if xml not in _models:
        _models.clear()
        _models[xml] = read_or_compiled(xml)
        # else each substep clears a flag for every triangle of every mesh, 0.8 MB, for a drawing that nobody asks for
        _models[xml].vis.global_.bvactive = 0
    return copy.copy(_models[xml])


def read_or_compiled(xml: str) -> mujoco.MjModel:
    """As a process of this machine compiled it before, bit for bit: its folder is named by all that it depends on."""
    parts = [mujoco.mj_versionString(), cpu_model(), xml, *map(file_sha256, sorted({*map(Path, FILE.findall(xml))}))]
    file = private_folder("scenes") / hashlib.sha256("\n".join(parts).encode()).hexdigest() / "scene.mjb"
    with first_or_after(file.parent):
        if not file.exists():
            model = mujoco.MjModel.from_xml_string(xml)
            unfinished = file.with_suffix(f".{os.getpid()}")
            mujoco.mj_saveModel(model, str(unfinished), None)
            with contextlib.suppress(OSError):
                whole = unfinished.stat().st_size == mujoco.mj_sizeModel(model)  # MuJoCo says nothing of a full disk
                unfinished.replace(file) if whole else unfinished.unlink()
            make_room(file.parent, LIMIT_BYTES)
            return model
    try:
        os.utime(file.parent)  # used last now
        return mujoco.MjModel.from_binary_path(str(file))
    except (OSError, ValueError):  # another process has just made room, or it is damaged
        file.unlink(missing_ok=True)
        return read_or_compiled(xml)


def forget_contexts() -> None:
    for gl_context, context in _contexts.values():
        gl_context.make_current()
        context.free()
        gl_context.free()
    _contexts.clear()


def keep_context(xml: str, gl_context: Any, context: mujoco.MjrContext) -> None:
    """For the next environment of this scene; or freed at the process's end, before EGL ends (it registered first)."""
    forget_contexts()
    _contexts[xml] = gl_context, context
    atexit.unregister(forget_contexts)
    atexit.register(forget_contexts)


@contextlib.contextmanager
def kept_scenes(textures: bool = True) -> Iterator[None]:
    """robosuite environments built inside take a kept scene where there is one, and draw nothing; textures: for later.

    robosuite draws six frames while it sets up an environment, of states that are no episode's; here they are black
    (0.1 s each with OSMesa), until its context's `drawing` is set.
    """
    base: Any = importlib.import_module("robosuite.environments.base")
    simulation, context = _robosuite_classes()
    before = base.MjSim, base.MjRenderContextOffscreen
    base.MjSim, base.MjRenderContextOffscreen, simulation.textures = simulation, context, textures
    try:
        yield
    finally:
        base.MjSim, base.MjRenderContextOffscreen = before


@functools.cache
def _robosuite_classes() -> tuple[Any, type]:
    """(simulation, render context); made when first needed, since robosuite's import chooses the GL library."""
    binding: Any = importlib.import_module("robosuite.utils.binding_utils")

    class KeptSim(binding.MjSim):
        @classmethod
        def from_xml_string(cls, xml: str) -> KeptSim:
            made = cls(compiled(xml if cls.textures else TEXTURE.sub("", xml)))
            made.xml = xml
            return made

        def reset(self) -> None:
            """As if made anew: robosuite then runs `forward`, and once more for a render context. Neither moves
            anything, but each run of the solver warm-starts the next and so reaches an episode's last bits."""
            super().reset()
            for _ in range(1 if self._render_context_offscreen is None else 2):
                self.forward()

    class KeptContext(binding.MjRenderContext):
        """robosuite's context, but what is dear in it comes from the last environment and goes to the next one."""

        def __init__(self, sim: Any, device_id: int, max_width: int = 640, max_height: int = 480) -> None:
            self._xml, self.drawing = sim.xml, False
            self._taken = _contexts.pop(self._xml, None)
            if self._taken is None:
                forget_contexts()  # of another scene
                super().__init__(sim, True, device_id, max_width, max_height)
                return
            self.sim, self.offscreen, self.device_id = sim, True, device_id
            self.gl_ctx, self.con = self._taken
            self.gl_ctx.make_current()
            sim.forward()
            sim.add_render_context(self)
            self.model, self.data = sim.model, sim.data
            self.scn = mujoco.MjvScene(sim.model._model, maxgeom=1000)
            self.cam, self.vopt, self.pert = mujoco.MjvCamera(), mujoco.MjvOption(), mujoco.MjvPerturb()
            self.cam.type, self.cam.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
            self.pert.active, self.pert.select, self.pert.skinselect = 0, 0, -1

        def render(self, width: int, height: int, camera_id: int | None = None, segmentation: bool = False) -> None:
            if self.drawing:
                super().render(width, height, camera_id, segmentation)

        def read_pixels(self, width: int, height: int, depth: bool = False, segmentation: bool = False) -> Any:
            if self.drawing:
                return super().read_pixels(width, height, depth, segmentation)
            return np.zeros((height, width, 3), np.uint8)

        def __del__(self) -> None:
            if getattr(self, "con", None) is not None:  # else it was never finished
                keep_context(self._xml, self.gl_ctx, self.con)

    return KeptSim, KeptContext
