"""What the simulator says of a failure, and of physics that diverged."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rsd.sim.failures import WatchedLibero
from rsd.types import RsdError

STILL = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]] * 8)


@pytest.fixture(scope="module")
def env() -> Iterator[WatchedLibero]:
    env = WatchedLibero("libero_spatial", 2, cameras=False)
    yield env
    env.close()


def shift(env: WatchedLibero, name: str, offset: tuple[float, float, float]) -> None:
    joint = env.data.joint(f"{name}_joint0")
    joint.qpos[:3] += offset
    joint.qvel[:] = 0.0


@pytest.mark.simulator
def test_a_failure_says_what_became_of_the_object(env: WatchedLibero) -> None:
    def after(*shifts: tuple[str, tuple[float, float, float]]) -> str:
        env.reset(options={"init_state": 0})
        for name, offset in shifts:
            shift(env, name, offset)
            env.step_chunk(STILL)
        return env.failure_detail()

    bowl = "akita_black_bowl_1"
    env.reset(options={"init_state": 0})
    env.step_chunk(STILL)
    assert env.failure_detail() == "never moved"
    assert after((bowl, (0.04, 0.0, 0.0))) == "pushed, never lifted"
    assert after(("akita_black_bowl_2", (0.0, 0.0, 0.9))) == "another object lifted: akita_black_bowl_2"
    # 0.4 s of free fall from 2 m leave it in the air
    assert after((bowl, (0.0, 0.0, 2.0))) == "lifted, still in the air"


@pytest.mark.simulator
def test_physics_that_diverges_is_an_error_and_the_next_reset_is_sound(
    env: WatchedLibero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it is
    env.reset(options={"init_state": 0})
    env.data.qpos[10] = np.nan
    with pytest.raises(RsdError, match="diverged"):
        env.step_chunk(STILL)
    env.reset(options={"init_state": 0})
    env.step_chunk(STILL)
