import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsd.sim import rendering
from rsd.types import RsdError


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not chosen its GL backend; the environment is put back afterwards."""
    monkeypatch.setattr(rendering, "_chosen", None)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "placeholder")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_users_choice_is_respected_and_exported(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("MUJOCO_GL", "OSMesa")
    undecided.setattr(ctypes.util, "find_library", lambda name: "found")
    assert rendering.gl_backend() == "osmesa"
    assert os.environ["PYOPENGL_PLATFORM"] == "osmesa"


def test_an_unknown_backend_is_refused(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(RsdError, match="egl, osmesa"):
        rendering.gl_backend()


def test_a_missing_library_names_its_package(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("MUJOCO_GL", "osmesa")
    undecided.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RsdError, match="libosmesa6"):
        rendering.gl_backend()


@pytest.mark.parametrize("works", [True, False])
def test_without_a_choice_egl_is_taken_where_an_nvidia_device_draws(undecided: pytest.MonkeyPatch, works: bool) -> None:
    undecided.setattr(rendering, "_nvidia_egl_works", lambda: works)
    undecided.setattr(ctypes.util, "find_library", lambda name: "found")
    assert rendering.gl_backend() == ("egl" if works else "osmesa")


@pytest.mark.parametrize(("visible", "device"), [("", "0"), ("GPU-1b2c", "0"), ("2,3", None)])
def test_egl_gets_a_device_where_robosuite_would_crash(
    undecided: pytest.MonkeyPatch, visible: str, device: str | None
) -> None:
    undecided.setenv("CUDA_VISIBLE_DEVICES", visible)
    rendering._pin_egl_device()
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device


@pytest.mark.parametrize("number", ["", "first", "-1", "1.0", "\u0663"])
def test_an_egl_device_that_is_no_number_is_refused(undecided: pytest.MonkeyPatch, number: str) -> None:
    undecided.setenv("MUJOCO_EGL_DEVICE_ID", number)
    with pytest.raises(RsdError, match="MUJOCO_EGL_DEVICE_ID: expected a device's number such as 0, or unset, found"):
        rendering.gl_backend()


@pytest.mark.parametrize(("backend", "number"), [("egl", "99"), ("egl", None), ("glx", None)])
def test_a_backend_that_does_not_draw_is_one_line(
    undecided: pytest.MonkeyPatch, backend: str, number: str | None
) -> None:
    undecided.setenv("MUJOCO_GL", backend)
    if number is not None:
        undecided.setenv("MUJOCO_EGL_DEVICE_ID", number)
    undecided.setattr(ctypes.util, "find_library", lambda name: "found")
    rendering._drawing_error.cache_clear()
    undecided.setattr(rendering, "_PROBE", "raise RuntimeError('must be in [0, 3)')")
    asked = (f"_ID={number}" if number else f"MUJOCO_GL={backend}") + ": expected"
    for _ in range(2):  # the answer is kept: asking takes seconds
        with pytest.raises(RsdError, match=rf"{asked} .*, found: RuntimeError: must be in \[0, 3\); unset it"):
            rendering.check_gl.__wrapped__()
        undecided.setattr(rendering, "_PROBE", "")
    rendering._drawing_error.cache_clear()
    rendering.check_gl.__wrapped__()
    assert rendering.gl_backend() == backend
    rendering._drawing_error.cache_clear()


@pytest.mark.parametrize(
    ("command", "environment", "said"),
    [
        ("demos collect --out", {"MUJOCO_GL": "vulkan"}, "MUJOCO_GL: expected one of egl, osmesa"),
        ("demos collect --out", {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}, "unset MUJOCO_GL"),
        ("eval --output", {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}, "MUJOCO_EGL_DEVICE_ID"),
    ],
)
def test_an_environment_in_which_mujoco_cannot_be_imported_is_one_line(
    command: str, environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "rsd", *command.split(), str(tmp_path / "out")]
    done = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if "decodes by" not in line] == lines[-1:]
    assert not (tmp_path / "out").exists()


def test_a_disarmed_camera_repeats_its_last_image() -> None:
    class Sensor:
        __modality__ = "image"
        drawn = 0

        def __call__(self, cache: object) -> np.ndarray:
            self.drawn += 1
            return np.full((2, 2, 3), self.drawn, np.uint8)

    sensor = Sensor()
    camera = rendering.ArmedCamera(sensor, 2)
    assert not camera({}).any()
    camera.armed = True
    assert camera({})[0, 0, 0] == 1
    camera.armed = False
    assert camera({})[0, 0, 0] == 1
    camera.armed = True
    assert camera({})[0, 0, 0] == 2
    assert camera.__modality__ == "image"
