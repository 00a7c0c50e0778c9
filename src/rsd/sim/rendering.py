"""Which OpenGL library draws the cameras, and cameras that draw only when somebody will look.

A 128 px frame costs about 100 ms with OSMesa (CPU) and 2 ms with EGL (NVIDIA); a physics step costs 10 to 20 ms. A
chunked policy looks once per chunk, so drawing every step would be most of the time.
"""

from __future__ import annotations

import ctypes.util
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.types import RsdError

BACKENDS = ("egl", "osmesa", "glfw", "glx")
_PROBE = """import mujoco
context = mujoco.GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_150).free()
context.free()"""
EGL_NUMBER = "MUJOCO_EGL_DEVICE_ID"
_chosen: str | None = None


def gl_backend() -> str:
    """The GL backend in use ("egl", "osmesa", ...), chosen at the first call.

    MUJOCO_GL is respected if set; otherwise EGL where an NVIDIA device draws, else OSMesa. Software EGL (Mesa without
    a GPU) is never chosen by itself: it draws slightly different pixels. The choice is exported in MUJOCO_GL and
    PYOPENGL_PLATFORM so that worker processes make the same one. Raises RsdError if the library is missing.
    """
    global _chosen
    if _chosen is None:
        requested = os.environ.get("MUJOCO_GL", "").strip().lower()
        if requested and requested not in BACKENDS:
            raise RsdError(f"MUJOCO_GL: expected one of {', '.join(BACKENDS)} or unset, found {requested[:60]!r}")
        number = os.environ.get(EGL_NUMBER)
        if number is not None and not (number.isascii() and number.isdecimal()):
            raise RsdError(f"{EGL_NUMBER}: expected a device's number such as 0, or unset, found {number[:60]!r}")
        backend = requested or ("egl" if _nvidia_egl_works() else "osmesa")
        _require_library(backend)
        os.environ["MUJOCO_GL"] = backend
        if backend in ("egl", "osmesa"):
            os.environ["PYOPENGL_PLATFORM"] = backend
        if backend == "egl":
            _pin_egl_device()
        _chosen = backend
    return _chosen


@functools.cache
def check_gl() -> None:
    """Raises RsdError where the GL backend that the environment asks for does not draw, before a job begins whose every
    worker would fail. Costs a second where it is another than OSMesa."""
    backend = gl_backend()
    # robosuite draws with EGL where GLFW is asked for
    if backend in ("egl", "glx") and (error := _drawing_error(backend, os.environ.get(EGL_NUMBER))):
        asked = f"MUJOCO_GL={backend}: expected a backend that draws here"
        if backend == "egl" and EGL_NUMBER in os.environ:
            asked = f"{EGL_NUMBER}={os.environ[EGL_NUMBER]}: expected the number of an EGL device that draws"
        raise RsdError(f"{asked}, found: {error}; unset it, or MUJOCO_GL=osmesa draws on the CPU")


def _nvidia_egl_works() -> bool:
    nvidia = sys.platform.startswith("linux") and Path("/dev/nvidiactl").exists()
    if not nvidia or ctypes.util.find_library("EGL") is None:
        return False
    # a number that was asked for is no reason to draw elsewhere
    return EGL_NUMBER in os.environ or not _drawing_error("egl", None)


@functools.cache
def _drawing_error(backend: str, number: str | None) -> str:
    """Why a GL backend does not draw here, on the EGL device of that number, "" if it does: asked once, in seconds."""
    probe = dict(os.environ, MUJOCO_GL=backend, PYOPENGL_PLATFORM=backend)
    try:
        # a broken driver may abort the process: ask a child
        command = [sys.executable, "-c", _PROBE]
        done = subprocess.run(command, env=probe, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer within a minute"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Exception ignored")]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def _require_library(backend: str) -> None:
    library, package = {"osmesa": ("OSMesa", "libosmesa6"), "egl": ("EGL", "libegl1")}.get(backend, ("", ""))
    if library and ctypes.util.find_library(library) is None:
        raise RsdError(
            f"camera rendering: expected the {library} library for the {backend} backend, found none. "
            f"Install it (`apt-get install {package}`) or choose another backend with MUJOCO_GL."
        )


def _pin_egl_device() -> None:
    """robosuite reads the EGL device from CUDA_VISIBLE_DEVICES and crashes on '' and on UUIDs: name one for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if EGL_NUMBER not in os.environ and not all(part.strip().isdigit() for part in visible.split(",")):
        os.environ[EGL_NUMBER] = "0"


class ArmedCamera:
    """A camera sensor that draws only while armed, and otherwise repeats its last image (black before the first).

    It replaces the sensor of a robosuite observable and leaves the observable's clock alone, so an armed step returns
    the image that the plain environment would return, bit for bit. Drawing after the step instead would be one
    physics substep late (about one grey level), and disabling the observable would restart its clock.
    """

    def __init__(self, sensor: Callable[[Mapping[str, Any]], NDArray[np.uint8]], size: int) -> None:
        self.sensor = sensor
        self.__modality__ = sensor.__modality__  # type: ignore[attr-defined]  # robosuite's observables read it
        self.armed = False
        self.drawing_s = 0.0  # wall time of all its drawing
        self.image: NDArray[np.uint8] = np.zeros((size, size, 3), np.uint8)

    def __call__(self, cache: Mapping[str, Any]) -> NDArray[np.uint8]:
        if self.armed:
            self.draw(cache)
        return self.image

    def draw(self, cache: Mapping[str, Any] | None = None) -> None:
        """Draws the present state now, whatever the observable's clock says."""
        start = time.perf_counter()
        self.image = self.sensor({} if cache is None else cache)
        self.drawing_s += time.perf_counter() - start
