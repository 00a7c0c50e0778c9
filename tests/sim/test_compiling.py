"""numba's functions are ready before an episode, and compiled by one process at a time."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rsd.sim.compiling import first_or_after

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


def test_one_begins_and_those_that_come_meanwhile_go_on_together(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=10)
    inside: list[str] = []

    def enter() -> None:
        with first_or_after(tmp_path / "cache"):
            inside.append("after")
            together.wait()  # passes when both are inside

    others = [threading.Thread(target=enter) for _ in range(2)]
    with first_or_after(tmp_path / "cache"):
        for other in others:
            other.start()
        for other in others:
            other.join(0.2)
        assert inside == []
    for other in others:
        other.join()
    assert inside == ["after"] * 2
    assert not together.broken


def test_without_a_folder_to_write_to_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with first_or_after(tmp_path / "file"), first_or_after(tmp_path / "file"):
        pass
