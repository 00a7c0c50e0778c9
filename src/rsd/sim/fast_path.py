"""What `fast=True` puts in the place of robosuite 1.4.0's own control, contacts and sampling: all that is constant is
looked up once, and its numba functions are compiled once on a machine. The answers are robosuite's to the last bit.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.locks import first_or_after
from rsd.sim.physics import mujoco
from rsd.types import RsdError

FINGER_SIGNS = np.array([-1.0, 1.0])  # of the two fingers, for a closing action


class ArmControl:
    """Operational space control of the arm and the gripper of one LIBERO simulation, for one episode: make a new one
    after a reset.

    Arithmetic of robosuite (`controllers/osc.py`, `robots/single_arm.py`, `robots/manipulator.py`; the control law is
    Khatib, 1987), in its order, data types and array layouts. Its numba functions and its `set_goal` are called, not
    repeated. Left out are its histories of torques, poses and forces (`robots[0].recent_*`), which nothing in LIBERO
    reads. Works on MuJoCo's own arrays (nq, nv and nu as in the model; 7 arm joints, 2 fingers). Raises RsdError where
    robosuite would do something else than the control it repeats.
    """

    def __init__(self, simulation: Any) -> None:
        _require_supported(simulation)
        self.maths = importlib.import_module("robosuite.utils.control_utils")
        self.simulation, robot = simulation, simulation.robots[0]
        self.controller, self.gripper = robot.controller, robot.gripper
        self.model, self.data = simulation.sim.model._model, simulation.sim.data._data
        model, data, controller = self.model, self.data, self.controller
        self.kp, self.kd, self.rest = controller.kp, controller.kd, controller.initial_joint  # [6], [6], [7] rad

        # views of MuJoCo's arrays, which stay where they are as long as `data` lives
        self.site: int = model.site(controller.eef_name).id
        self.position = data.site_xpos[self.site]  # [3] m
        self.rotation = data.site_xmat[self.site].reshape(3, 3)
        arm = _span(controller.qvel_index)
        self.sensed = (data.qpos, data.qvel, data.xpos, data.xquat, data.site_xpos, data.site_xmat)  # of observables
        self.velocities, self.joint_velocities = data.qvel, data.qvel[arm]  # [nv], [7] rad/s
        self.joint_positions = data.qpos[_span(controller.qpos_index)]  # [7] rad
        self.bias = data.qfrc_bias[arm]  # [7] N m

        # robosuite picks columns with lists of indices, and numpy returns such in Fortran order: BLAS takes another
        # way through those, to other last bits
        jacobian, joints = np.zeros((6, model.nv)), len(self.rest)
        self.jacobian_position, self.jacobian_rotation = jacobian[:3], jacobian[3:]
        self.inertia = np.zeros((model.nv, model.nv))  # kg m^2
        parts = (self.inertia[arm, arm], jacobian[:, arm], jacobian[:3, arm], jacobian[3:, arm])
        self.arm_parts = [(np.zeros((len(part), joints), order="F"), part) for part in parts]
        self.error, self.motion, self.wrench = np.zeros(6), np.zeros(6), np.zeros(6)

        self.low, self.high = robot.torque_limits  # [7] N m
        self.arm_controls = data.ctrl[_span(robot._ref_joint_actuator_indexes)]  # [7]
        fingers = _span(robot._ref_joint_gripper_actuator_indexes)
        self.finger_controls = data.ctrl[fingers]  # [2]
        low, high = model.actuator_ctrlrange[fingers].T  # m
        self.finger_middle, self.finger_reach = 0.5 * (high + low), 0.5 * (high - low)

    def step(self, action: NDArray[np.float64], observe: bool = True) -> None:
        """robosuite's `step` without its repeated work, its reward, and what it returns: see `observed`.

        Per substep robosuite runs `forward`, the controller (which runs `forward` again) and `mj_step`: three full
        evaluations of one state. The second (in `apply`) and the third need only what depends on the controls;
        the solver still runs three times, since each run warm-starts the next and so reaches the result's last bits.
        """
        simulation, model, data = self.simulation, self.model, self.data
        simulation.timestep += 1
        substeps = int(simulation.control_timestep / simulation.model_timestep)
        self._sampling = Sampling(simulation, () if observe else self.sensed)
        enabled = model.opt.disableflags
        model.opt.disableflags = enabled | mujoco.mjtDisableBit.mjDSBL_SENSOR
        for substep in range(substeps):
            if substep == substeps - 1:  # sensors do not act on the physics: the last substep's are enough
                model.opt.disableflags = enabled
            mujoco.mj_forward(model, data)
            self.apply(action, first=substep == 0)
            mujoco.mj_checkPos(model, data)
            mujoco.mj_checkVel(model, data)
            mujoco.mj_step2(model, data)
            self._sampling.substep()
        self._sampling.finish()
        simulation.cur_time += simulation.control_timestep
        simulation._post_process()

    def observed(self) -> Mapping[str, Any]:
        """The observables as of the last `step`."""
        self._sampling.sample_owed()
        return dict(self.simulation._get_observations())

    def apply(self, action: NDArray[np.float64], first: bool) -> None:
        """Every substep, after `mj_forward`: writes the torques of the arm and the targets of the fingers.

        action [7] in [-1, 1]; in the `first` substep of a control step it sets the goal.
        """
        controller, gripper = self.controller, self.gripper
        if first:
            self.finger_step = FINGER_SIGNS * gripper.speed * np.sign(action[6:])  # [2], share of the reach
        if not controller.new_update:
            # the first substep after a reset: robosuite's controller still acts on the pose that it saw then, although
            # the initial state has been set since, and does not run `forward`
            self.simulation._pre_action(action, first)
            return
        mujoco.mj_fwdConstraint(self.model, self.data)  # all that its `forward` changes: one more run of the solver
        if first:
            controller.ee_pos, controller.ee_ori_mat = self.position, self.rotation
            controller.new_update = False  # the pose is the present one
            controller.set_goal(action[:6])
            controller.new_update = True
        np.minimum(np.maximum(self.torques(), self.low), self.high, out=self.arm_controls)
        # robosuite ramps the gripper's command: 200 substeps from open to closed
        gripper.current_action = np.minimum(np.maximum(gripper.current_action + self.finger_step, -1.0), 1.0)
        self.finger_controls[:] = self.finger_middle + self.finger_reach * gripper.current_action

    def torques(self) -> NDArray[np.float64]:
        """[7] N m, not yet clipped: towards the goal pose, decoupled in position and rotation, with gravity taken out
        and the arm drawn to its initial pose in the null space."""
        maths, error, motion, wrench = self.maths, self.error, self.motion, self.wrench
        mujoco.mj_jacSite(self.model, self.data, self.jacobian_position, self.jacobian_rotation, self.site)
        mujoco.mj_fullM(self.model, self.inertia, self.data.qM)
        for copy, part in self.arm_parts:
            copy[:] = part
        inertia, jacobian, jacobian_position, jacobian_rotation = (copy for copy, _ in self.arm_parts)

        np.subtract(self.controller.goal_pos, self.position, out=error[:3])
        error[3:] = maths.orientation_error(self.controller.goal_ori, self.rotation)
        np.dot(self.jacobian_position, self.velocities, out=motion[:3])  # one product of [6, nv] has other last bits
        np.dot(self.jacobian_rotation, self.velocities, out=motion[3:])
        acceleration = error * self.kp - motion * self.kd  # [6]
        _, mass, moment, null_space = maths.opspace_matrices(inertia, jacobian, jacobian_position, jacobian_rotation)
        np.dot(mass, acceleration[:3], out=wrench[:3])
        np.dot(moment, acceleration[3:], out=wrench[3:])
        to_rest = maths.nullspace_torques(inertia, null_space, self.rest, self.joint_positions, self.joint_velocities)
        return np.dot(jacobian.T, wrench) + self.bias + to_rest


def _span(indices: Sequence[int]) -> slice:
    """Of consecutive indices: `_require_supported` has looked."""
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _require_supported(simulation: Any) -> None:
    """Raises RsdError unless robosuite would run just the control of `ArmControl`."""
    robot = simulation.robots[0]
    kinds = type(robot).__name__, type(robot.gripper).__name__, getattr(robot.controller, "name", None)
    _require(simulation, "robot, gripper, controller", ("SingleArm", "PandaGripper", "OSC_POSE"), kinds)
    controller = robot.controller
    _require(simulation, "number of robots", 1, len(simulation.robots))
    _require(simulation, "impedance mode", "fixed", controller.impedance_mode)
    _require(simulation, "position and rotation decoupled", True, bool(controller.uncoupling))
    interpolators = controller.interpolator_pos, controller.interpolator_ori
    _require(simulation, "interpolators of the goal", (None, None), interpolators)
    for what, indices in (
        ("arm's positions", controller.qpos_index),
        ("arm's velocities", controller.qvel_index),
        ("arm's actuators", robot._ref_joint_actuator_indexes),
        ("gripper's actuators", robot._ref_joint_gripper_actuator_indexes),
    ):
        found = [int(index) for index in indices]
        _require(simulation, f"indices of the {what}", list(range(found[0], found[0] + len(found))), found)


def _require(simulation: Any, what: str, expected: object, found: object) -> None:
    if found != expected:
        raise RsdError(
            f"{what} of {type(simulation).__name__}: expected {expected}, found {found}, which the fast path does not "
            "repeat; make the environment with fast=False"
        )


class Contacts:
    """`check_contact` of a robosuite environment, for one MuJoCo model and its data, by geom numbers.

    robosuite looks up the names of both geoms of every contact, 0.3 ms a question in a scene of 87 contacts, and
    LIBERO's goals ask it twice a control step.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._data = model, data
        self._members: dict[Any, NDArray[np.bool_]] = {}

    def __call__(self, geoms_1: Any, geoms_2: Any = None) -> bool:
        """Whether a geom of the first group touches one of the second; None: anything at all.

        A group is a geom's name, some names, or a robosuite model with its `contact_geoms`. Names that the model does
        not have touch nothing.
        """
        one, other = self._data.contact.geom.T  # [contacts] each
        first, second = self._group(geoms_1), self._group(geoms_2)
        return bool(((first[one] & second[other]) | (first[other] & second[one])).any())

    def _group(self, geoms: Any) -> NDArray[np.bool_]:
        """[geoms of the model]: which belong to the group; a robosuite model's are looked up once."""
        if geoms is None:
            return np.ones(self._model.ngeom, dtype=bool)
        if isinstance(geoms, str):
            return self._members_of([geoms])
        if not hasattr(geoms, "contact_geoms"):
            return self._members_of(geoms)
        if geoms not in self._members:
            self._members[geoms] = self._members_of(geoms.contact_geoms)
        return self._members[geoms]

    def _members_of(self, names: Iterable[str]) -> NDArray[np.bool_]:
        members = np.zeros(self._model.ngeom, dtype=bool)
        numbers = [mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in names]
        members[[number for number in numbers if number >= 0]] = True
        return members


class Sampling:
    """`_update_observables` of a robosuite environment after each substep of ONE control step: `substep` n times, then
    `finish`.

    robosuite asks each of the 30 or so observables in each of the 25 substeps whether it is to take a sample. They all
    follow the same clock, and in 24 of the substeps the answer is that only the clock goes on. The one sample is looked
    at in a chunk's last control step alone, or where success ends the chunk early: in others what it is of is kept.
    """

    _time: float
    _sampled: bool
    _period: float
    _last_moment: float  # to sample at

    def __init__(self, simulation: Any, kept: Sequence[NDArray[np.float64]] = ()) -> None:
        """kept: the arrays that sensors read, of which copies are kept instead of a sample taken; none: it is taken."""
        self._simulation, self._kept = simulation, kept
        self._copies: list[NDArray[np.float64]] = []
        self._observables = [each for each in simulation._observables.values() if each._enabled]
        self._timestep: float = simulation.model_timestep
        self._read()

    def substep(self) -> None:
        """Where all observables share their clock, it alone goes on; a sample that is taken is robosuite's update."""
        if self._shared:
            time = self._time + self._timestep
            over, due = time >= self._period, not self._sampled and time <= self._last_moment
            if (self._kept and not over) if due else (self._sampled or not over):
                self._time, self._sampled = (time % self._period, False) if over else (time, self._sampled or due)
                if due:
                    self._copies = [array.copy() for array in self._kept]
                return
        self.finish()
        self._simulation._update_observables()
        self._read()

    def finish(self) -> None:
        """Sets the observables' own clocks."""
        if self._shared:
            for observable in self._observables:
                observable._time_since_last_sample, observable._sampled = self._time, self._sampled

    def sample_owed(self) -> None:
        """The sample that was not taken, after `finish`: for it the arrays are once more what they were."""
        present = [array.copy() for array in self._kept]
        for content in (self._copies, present) if self._copies else ():
            for array, values in zip(self._kept, content, strict=True):
                array[:] = values
            for observable in self._observables if content is self._copies else ():
                observable.update(timestep=0.0, obs_cache=self._simulation._obs_cache, force=True)
        self._copies = []
        self.finish()

    def _read(self) -> None:
        clocks = {  # seconds since the last sample, sampled, period, delay (s)
            (each._time_since_last_sample, each._sampled, each._sampling_timestep, each._current_delay)
            for each in self._observables
        }
        self._shared = len(clocks) == 1
        if self._shared:
            ((self._time, self._sampled, self._period, delay),) = clocks
            self._last_moment = self._period - delay


@functools.cache
def compile_maths() -> None:
    """Makes ready all that an episode calls; after `load_libero`, which chooses where numba's cache lies.

    Compiling takes 11 s of CPU where numba's cache is empty, as on a new machine; reading the cache takes 0.4 s. Where
    another process is about to do so, this one waits for it and reads what it has compiled.
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
