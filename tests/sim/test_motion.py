"""Scenes that move: how far, which way, until when; and that nothing else does."""

import numpy as np
import pytest

from rsd.conventions import WAIT_ACTION
from rsd.evaluation.config import EvalConfig
from rsd.sim.libero import LiberoEnv
from rsd.sim.motion import REACH, Motion, Slide, offset
from rsd.types import RsdError


@pytest.mark.parametrize(("steps", "metres"), [(0, 0.0), (10, 0.05), (16, 0.08), (20, 0.06), (48, -0.08), (64, 0.0)])
def test_it_goes_to_one_side_and_to_the_other(steps: int, metres: float) -> None:
    assert offset(Motion("thing", 0.1), steps) == pytest.approx(metres)
    assert abs(offset(Motion("thing", 0.1), steps)) <= REACH


@pytest.fixture(scope="module")
def env() -> LiberoEnv:
    return LiberoEnv("libero_object_permuted", 0, cameras=False)


def travelled(env: LiberoEnv, motion: Motion | None, state: int, steps: int = 10) -> dict[str, np.ndarray]:
    """Metres sideways of everything that moved at all."""
    env.motion = motion
    env.reset(options={"init_state": state})
    bodies = env.simulation.obj_body_id
    before = {name: env.data.xpos[body, :2].copy() for name, body in bodies.items()}
    env.step_chunk([WAIT_ACTION] * steps)
    after = {name: env.data.xpos[body, :2] - before[name] for name, body in bodies.items()}
    return {name: way for name, way in after.items() if np.linalg.norm(way) > 1e-3}


@pytest.mark.parametrize("what", ["thing", "destination"])
def test_one_thing_slides_at_its_speed_and_repeats(env: LiberoEnv, what: str) -> None:
    moved = travelled(env, Motion(what, 0.04, seed=7), 0)
    assert list(moved) == ["basket_1" if what == "destination" else env.goal[0][1]]
    way = next(iter(moved.values()))
    assert np.linalg.norm(way) == pytest.approx(0.04 * 10 / 20, rel=0.02)
    assert np.array_equal(next(iter(travelled(env, Motion(what, 0.04, seed=7), 0).values())), way)
    for other in (travelled(env, Motion(what, 0.04, seed=8), 0), travelled(env, Motion(what, 0.04, seed=7), 2)):
        assert np.linalg.norm(next(iter(other.values())) - way) > 1e-3
    assert travelled(env, None, 0) == {}


def test_a_thing_that_was_touched_is_the_robots(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.motion = Motion("thing", 0.04)
    env.reset(options={"init_state": 0})
    with monkeypatch.context() as patch:
        patch.setattr(env.simulation, "check_contact", lambda one, other=None: True)
        env.step_chunk([WAIT_ACTION])
    before = env.sim_state()
    env.step_chunk([WAIT_ACTION] * 5)
    place = env._slide._place  # type: ignore[union-attr]
    assert env.data.qpos[place] == pytest.approx(before[1:][place], abs=1e-4)


def test_what_is_fixed_to_the_scene_is_refused(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "goal", (("open", "wooden_cabinet_1_middle_region"),))
    with pytest.raises(RsdError, match="--motion destination: expected something that can slide, found wooden_cab"):
        Slide(env, Motion("destination", 0.02), 0)


def test_a_speed_without_motion_is_refused() -> None:
    with pytest.raises(RsdError, match="expected a --motion with --motion-speed"):
        EvalConfig(decode="l1", motion_speed=0.1)
    assert EvalConfig(motion="thing").hash != EvalConfig().hash
