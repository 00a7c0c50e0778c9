"""numba's functions are ready before an episode."""

import subprocess
import sys

import pytest

CODE = """
import numpy as np
from rsd.sim.libero import LiberoEnv
from robosuite.utils import control_utils, transform_utils

def compiled():
    functions = [*vars(control_utils).items(), *vars(transform_utils).items()]
    return {name: len(f.signatures) for name, f in functions if getattr(f, "signatures", None)}

env = LiberoEnv("libero_spatial", 0, cameras=False)
before = compiled()
env.reset(options={"init_state": 0})
env.step_chunk(np.full((2, 7), 0.5))
print(before == compiled(), sorted(before))
"""


@pytest.mark.simulator
def test_nothing_is_left_to_be_compiled_when_an_episode_begins() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.startswith("True "), done.stderr
    functions = ["mat2quat", "nullspace_torques", "opspace_matrices", "orientation_error", "quat2mat"]
    assert done.stdout.endswith(f"{functions}\n")
