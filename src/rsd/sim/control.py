"""robosuite's operational space control of one arm, with all that is constant in an episode looked up once.

Arithmetic of robosuite 1.4.0 (`controllers/osc.py`, `robots/single_arm.py`, `robots/manipulator.py`; the control law
is Khatib, 1987), in its order, data types and array layouts: torques are equal to the last bit. Its numba functions and
its `set_goal` are called, not repeated. Left out are the histories that robosuite keeps of torques, poses and forces
(`robots[0].recent_*`), which nothing in LIBERO reads.
"""

from __future__ import annotations

import importlib
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from rsd.types import RsdError

GRIPPER_SIGNS = np.array([-1.0, 1.0])  # of the two fingers, for a closing action


class ArmControl:
    """Controls of the arm and the gripper of one LIBERO simulation, for one episode: make a new one after a reset.

    Reads and writes MuJoCo's own arrays (nq, nv and nu as in the model; 7 arm joints, 2 fingers). Raises RsdError where
    robosuite would do something else than the control it repeats.
    """

    def __init__(self, simulation: Any) -> None:
        _require_supported(simulation)
        self.simulation, robot = simulation, simulation.robots[0]
        self.controller, self.gripper = robot.controller, robot.gripper
        self.maths = importlib.import_module("robosuite.utils.control_utils")
        self.model, self.data = simulation.sim.model._model, simulation.sim.data._data
        model, data, controller = self.model, self.data, self.controller

        # views of MuJoCo's arrays, which stay where they are as long as `data` lives
        self.site: int = model.site(controller.eef_name).id
        self.position = data.site_xpos[self.site]  # [3] m
        self.rotation = data.site_xmat[self.site].reshape(3, 3)
        self.velocities = data.qvel  # [nv]
        first, last = controller.qvel_index[0], controller.qvel_index[-1] + 1
        self.joint_velocities, self.bias = data.qvel[first:last], data.qfrc_bias[first:last]  # [7] rad/s, N m
        self.joint_positions = data.qpos[controller.qpos_index[0] : controller.qpos_index[-1] + 1]  # [7] rad

        # robosuite picks columns with index lists, and numpy returns those in Fortran order: BLAS takes another way
        # through such matrices, to other last bits
        self.jacobian = np.zeros((6, model.nv))
        self.arm_jacobian = np.zeros((6, last - first), order="F")
        self.arm_jacobian_position = np.zeros((3, last - first), order="F")
        self.arm_jacobian_rotation = np.zeros((3, last - first), order="F")
        self.inertia = np.zeros((model.nv, model.nv))  # kg m^2, all joints
        self.arm_inertia = np.zeros((last - first, last - first), order="F")
        self.columns = slice(first, last)

        self.arm_actuators = np.array(robot._ref_joint_actuator_indexes)
        self.low, self.high = robot.torque_limits  # [7] N m
        self.finger_actuators = np.array([model.actuator(name).id for name in self.gripper.actuators])
        span = model.actuator_ctrlrange[self.finger_actuators]
        self.finger_middle = 0.5 * (span[:, 1] + span[:, 0])  # [2] m
        self.finger_reach = 0.5 * (span[:, 1] - span[:, 0])  # [2] m

    def apply(self, action: NDArray[np.float64], first: bool) -> None:
        """Every substep, after `mj_forward`: writes the torques of the arm and the targets of the fingers.

        action [7] in [-1, 1]; `first` of a control step sets the goal from it.
        """
        controller, gripper, data = self.controller, self.gripper, self.data
        if first:
            self.finger_step = GRIPPER_SIGNS * gripper.speed * np.sign(action[6:])  # [2], share of the reach
        if not controller.new_update:
            # the first substep after a reset: robosuite's controller still acts on the pose that it saw then, although
            # the initial state has been set since, and does not run `forward`
            self.simulation._pre_action(action, first)
            return
        mujoco.mj_fwdConstraint(self.model, data)  # what its `forward` changes: one more run of the solver
        if first:
            controller.ee_pos, controller.ee_ori_mat = self.position, self.rotation
            controller.new_update = False  # the pose is the present one
            controller.set_goal(action[:6])
            controller.new_update = True
        data.ctrl[self.arm_actuators] = self.torques().clip(self.low, self.high)
        # robosuite ramps the gripper's command: 200 substeps from open to closed
        gripper.current_action = (gripper.current_action + self.finger_step).clip(-1.0, 1.0)
        data.ctrl[self.finger_actuators] = self.finger_middle + self.finger_reach * gripper.current_action

    def torques(self) -> NDArray[np.float64]:
        """[7] N m, not yet clipped: towards the goal pose, decoupled in position and rotation, with gravity taken out
        and the arm drawn to its initial pose in the null space."""
        controller, maths, columns = self.controller, self.maths, self.columns
        jacobian = self.jacobian
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.site)
        self.arm_jacobian[:] = jacobian[:, columns]
        self.arm_jacobian_position[:] = jacobian[:3, columns]
        self.arm_jacobian_rotation[:] = jacobian[3:, columns]
        mujoco.mj_fullM(self.model, self.inertia, self.data.qM)
        self.arm_inertia[:] = self.inertia[columns, columns]

        kp, kd = controller.kp, controller.kd
        # not one product with [6, nv]: BLAS would sum in another order
        velocity = np.dot(jacobian[:3], self.velocities)
        spin = np.dot(jacobian[3:], self.velocities)
        rotation_error = maths.orientation_error(controller.goal_ori, self.rotation)
        force = (controller.goal_pos - self.position) * kp[:3] - velocity * kd[:3]
        torque = rotation_error * kp[3:] - spin * kd[3:]
        _, inertia_position, inertia_rotation, null_space = maths.opspace_matrices(
            self.arm_inertia, self.arm_jacobian, self.arm_jacobian_position, self.arm_jacobian_rotation
        )
        wrench = np.concatenate([np.dot(inertia_position, force), np.dot(inertia_rotation, torque)])
        torques = np.dot(self.arm_jacobian.T, wrench) + self.bias
        torques += maths.nullspace_torques(
            self.arm_inertia, null_space, controller.initial_joint, self.joint_positions, self.joint_velocities
        )
        return torques


def _require_supported(simulation: Any) -> None:
    """Raises RsdError unless robosuite would run just the control of `ArmControl`."""
    robots = simulation.robots
    controller, gripper = robots[0].controller, getattr(robots[0], "gripper", None)
    found = {
        "robots": len(robots),
        "robot": type(robots[0]).__name__,
        "gripper": type(gripper).__name__,
        "controller": controller.name,
        "impedance": getattr(controller, "impedance_mode", None),
        "uncoupled": getattr(controller, "uncoupling", None),
        "interpolated": any(
            getattr(controller, f"interpolator_{part}", None) is not None for part in ("pos", "ori")
        ),
        "joints consecutive": all(
            (np.diff(index) == 1).all() for index in (controller.qpos_index, controller.qvel_index)
        ),
    }
    expected = {
        "robots": 1,
        "robot": "SingleArm",
        "gripper": "PandaGripper",
        "controller": "OSC_POSE",
        "impedance": "fixed",
        "uncoupled": True,
        "interpolated": False,
        "joints consecutive": True,
    }
    for name, value in expected.items():
        if found[name] != value:
            raise RsdError(
                f"control of {type(simulation).__name__}: expected {name} {value!r}, found {found[name]!r}; "
                "make the environment with fast=False"
            )
