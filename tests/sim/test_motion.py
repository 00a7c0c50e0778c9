"""Scenes that move: how far, which way, until when; and that nothing else does."""

import numpy as np
import pytest

from rsd.conventions import WAIT_ACTION
from rsd.evaluation.config import EvalConfig
from rsd.expert.expert import run
from rsd.expert.motion import LATE, Leading
from rsd.sim.libero import LiberoEnv
from rsd.sim.motion import ASIDE, JUMP_STEPS, REACH, Motion, boxes, mover, offset
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
    before = env._mover.thing.pose[:2].copy()  # type: ignore[union-attr]
    env.step_chunk([WAIT_ACTION] * 5)
    assert env._mover is not None
    assert env._mover.thing is not None
    assert env._mover.thing.pose[:2] == pytest.approx(before, abs=1e-4)


def apart(env: LiberoEnv, name: str) -> float:
    """Metres to the sides between a thing and the nearest other one."""
    found = boxes(env)
    own = found.pop(int(env.model.body_rootid[env.simulation.obj_body_id[name]]))
    sides = [max((low - own[1])[:2].max(), (own[0] - high)[:2].max()) for low, high in found.values()]
    return min(gap for gap in sides if gap > -1.0)  # not of the floor


def test_one_thing_jumps_once_to_a_free_place_and_repeats(env: LiberoEnv) -> None:
    names, motion = set(), Motion("jump", 0.02, seed=7)
    for state in range(4):
        ways = travelled(env, motion, state, JUMP_STEPS[1])
        (name,) = ways
        assert ASIDE[0] - 0.005 < np.linalg.norm(ways[name]) < ASIDE[1] + 0.005
        assert apart(env, name) > 0.02
        names.add("basket_1" if name == "basket_1" else "thing")
    assert np.array_equal(ways[name], travelled(env, motion, state, JUMP_STEPS[1])[name])
    assert travelled(env, motion, state, env._mover.moment) == {}  # type: ignore[union-attr]
    assert names == {"basket_1", "thing"}


def test_a_thing_in_the_hand_cannot_jump(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(options={"init_state": 0})
    monkeypatch.setattr(env.simulation, "check_contact", lambda one, other=None: True)
    for state in range(4):
        assert list(travelled(env, Motion("jump", 0.02, seed=7), state, JUMP_STEPS[1])) == ["basket_1"]


def test_what_was_lifted_is_out_of_the_gripper_once(env: LiberoEnv) -> None:
    for motion in (None, Motion("push-out", 0.02)):
        env.motion = motion
        env.reset(options={"init_state": 0})
        heights = Heights(env.goal[0][1])
        assert run(env, record=heights.record, tail_steps=0).success
        lifted = np.array(heights.seen) > heights.seen[0] + 0.03
        assert int((np.diff(lifted.astype(int)) > 0).sum()) == (1 if motion is None else 2)


@pytest.mark.parametrize("what", ["thing", "destination"])
def test_the_expert_is_not_behind_what_slides(env: LiberoEnv, what: str) -> None:
    env.motion = Motion(what, 0.1, seed=7)
    env.reset(options={"placement_seed": 2**31})
    assert run(env, tail_steps=0).success


def test_the_hand_aims_ahead_of_what_moves_unless_it_jumps_or_is_touched() -> None:
    leading, place = Leading(), np.zeros(3)
    for step, expected, touched in (
        (0.0, 0.0, False),  # nothing is known yet
        (0.005, 0.005 * LATE, False),
        (0.1, 0.0, False),
        (0.005, 0.005 * LATE, False),
        (0.005, 0.0, True),
    ):
        place += np.array([step, 0.0, 0.001])
        leading.see(place, touched)
        assert leading.way == pytest.approx([expected, 0.0, 0.0])


class Heights:
    """What becomes of a thing's height, m."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, list[float]()

    def record(self, env: LiberoEnv, executed: np.ndarray, clean: np.ndarray) -> None:
        self.seen.append(float(env.data.xpos[env.simulation.obj_body_id[self.name], 2]))


def test_what_is_fixed_to_the_scene_is_refused(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "goal", (("open", "wooden_cabinet_1_middle_region"),))
    with pytest.raises(RsdError, match="--motion destination: expected something that can slide, found wooden_cab"):
        mover(env, Motion("destination", 0.02), 0)
    with pytest.raises(RsdError, match="--motion push-out: expected something that can slide"):
        mover(env, Motion("push-out", 0.02), 0)


def test_a_speed_without_motion_is_refused() -> None:
    for motion in ("none", "jump", "push-out"):
        with pytest.raises(RsdError, match="expected a --motion of thing or destination with --motion-speed, found"):
            EvalConfig(decode="l1", motion_speed=0.1, motion=motion)  # type: ignore[arg-type]
    assert EvalConfig(motion="thing").hash != EvalConfig().hash
