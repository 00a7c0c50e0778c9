from typing import Any

import mujoco
import numpy as np
import pytest
from numpy.typing import NDArray

from rsd.sim.libero import LiberoEnv
from rsd.types import RsdError

pytestmark = pytest.mark.simulator


def hard_actions() -> NDArray[np.float64]:
    """Beyond the clip, to a stretched (singular) arm and to joint limits; the gripper opens, closes and holds."""
    wild = np.random.default_rng(0).uniform(-3, 3, (15, 7))
    stretch = np.tile([1, 0.3, 1, 0, 0, 0, 1.0], (30, 1))
    twist = np.tile([0, 0, 0, 1, -1, 1, 0.0], (20, 1))
    fold = np.tile([-1, 0, -1, 0, 0, 0, -1.0], (20, 1))
    return np.concatenate([wild, stretch, twist, fold])


def physics(env: LiberoEnv) -> NDArray[np.float64]:
    """All that MuJoCo takes from one step to the next (the solver's warm start and the controls too), and sensors."""
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return np.concatenate([state, env.data.sensordata])


@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 0), ("libero_object", 2)])
def test_control_is_bit_identical_to_robosuites_at_limits_and_singular_poses(suite: str, task: int) -> None:
    plain, fast = LiberoEnv(suite, task, cameras=False, fast=False), LiberoEnv(suite, task, cameras=False)
    fast.reset(options={"init_state": 9})
    fast.step_chunk(hard_actions()[:3])  # whatever an earlier episode leaves behind must not matter
    for env in (plain, fast):
        env.reset(options={"init_state": 3})
    np.testing.assert_array_equal(physics(fast), physics(plain))
    margins, manipulability, saturated, fingers = [], [], [], []
    limits, (low, high) = fast.model.jnt_range[:7], fast.simulation.robots[0].torque_limits
    for action in hard_actions():
        _, _, ended, _, _ = plain.step(action)
        assert fast.step(action)[2] == ended
        np.testing.assert_array_equal(physics(fast), physics(plain))
        assert fast.latest().keys() == plain.latest().keys()
        for name, value in plain.latest().items():
            np.testing.assert_array_equal(fast.latest()[name], value, err_msg=name)
        joints, torques = fast.data.qpos[:7], fast.data.ctrl[:7]
        margins.append(np.minimum(joints - limits[:, 0], limits[:, 1] - joints).min())
        manipulability.append(np.linalg.svd(plain.simulation.robots[0].controller.J_full)[1][-1])
        saturated.append(((torques == low) | (torques == high)).any())
        fingers.append(fast.data.ctrl[7])
    # the poses that the test is about were reached
    assert min(margins) < 0.0
    assert min(manipulability) < 0.01 < 0.2 < max(manipulability)
    assert any(saturated)
    assert min(fingers) == 0.0
    assert max(fingers) == pytest.approx(0.04)
    plain.close()
    fast.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "OSC_POSITION"}, "OSC_POSITION"),
        ({"impedance_mode": "variable_kp"}, "expected fixed, found variable_kp"),
        ({"uncouple_pos_ori": False}, "expected True, found False"),
        ({"interpolation": "linear", "ramp_ratio": 0.2}, "LinearInterpolator"),
    ],
)
def test_another_control_of_robosuite_is_refused(env: LiberoEnv, settings: dict[str, Any], message: str) -> None:
    robot = env.simulation.robots[0]
    before = dict(robot.controller_config)
    robot.controller_config.update(settings)
    with pytest.raises(RsdError, match=f"{message}.*fast=False"):
        env.reset(options={"init_state": 0})
    robot.controller_config = before


def test_another_gripper_is_refused(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = env.simulation.robots[0]
    kind = type("RethinkGripper", (type(robot.gripper),), {})
    monkeypatch.setattr(robot.gripper, "__class__", kind)
    with pytest.raises(RsdError, match=r"RethinkGripper.*fast=False"):
        env.reset(options={"init_state": 0})


def test_gains_are_those_of_the_controller(env: LiberoEnv) -> None:
    """A stiffer arm ends elsewhere: nothing of the control is written down as a number."""
    ends = []
    robot = env.simulation.robots[0]
    before = robot.controller_config["kp"]
    for gain in (before, 2 * before):
        robot.controller_config["kp"] = gain
        env.reset(options={"init_state": 0})
        env.step([1, 0, 0, 0, 0, 0, -1.0])
        ends.append(env.sim_state())
    robot.controller_config["kp"] = before
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


def test_a_step_needs_a_reset() -> None:
    env = LiberoEnv("libero_object", 2, cameras=False)
    with pytest.raises(RsdError, match="expected a reset"):
        env.step(np.zeros(7))
    env.close()


@pytest.fixture(scope="module")
def env() -> Any:
    made = LiberoEnv("libero_object", 2, cameras=False)
    yield made
    made.close()
