"""robosuite's numba functions, compiled by one of the processes that start together instead of by each of them.

Compiling takes 11 s of CPU where numba's cache is empty, as on a new machine; reading the cache takes 0.4 s.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from rsd.locks import first_or_after


@functools.cache
def compile_maths() -> None:
    """Makes ready all that an episode calls; after `load_libero`, which chooses where numba's cache lies.

    Where another process is about to do so, this one waits for it and reads what it has compiled.
    """
    transforms: Any = importlib.import_module("robosuite.utils.transform_utils")
    control: Any = importlib.import_module("robosuite.utils.control_utils")
    # numba compiles for types and layouts, and these are those of an episode
    rotation, part = np.eye(3), np.eye(4)[:3, :3]
    inertia, jacobian = np.asfortranarray(np.eye(7)), np.asfortranarray(np.eye(6, 7))
    halves, joints = [np.asfortranarray(half) for half in (jacobian[:3], jacobian[3:])], np.zeros(7)
    with first_or_after(Path(os.environ["NUMBA_CACHE_DIR"])):
        transforms.mat2quat(rotation)
        transforms.mat2quat(part)
        transforms.quat2mat(np.array([0.0, 0.0, 0.0, 1.0]))
        control.orientation_error(rotation, rotation)
        null_space = control.opspace_matrices(inertia, jacobian, *halves)[3]
        control.nullspace_torques(inertia, null_space, joints, joints, joints)
