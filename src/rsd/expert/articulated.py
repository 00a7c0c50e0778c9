"""Feedback laws for what hangs on a joint: pulling a drawer open by its handle, turning a knob.

As in `expert.PickAndPlace` every action follows from where the hand and the moving part are now; remembered are only
whether the fingers are commanded closed, and counters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsd.conventions import GRIPPER_CLOSE, GRIPPER_OPEN
from rsd.expert.goals import Goal
from rsd.expert.grasps import POINTING_DOWN, about, wrist_reach, yaw_of
from rsd.expert.motion import funnel, step_towards, turn_left
from rsd.expert.scene import Scene, Vector

ARRIVED, ARRIVED_ANGLE = 0.008, 0.25  # m, rad
SLOW, SLOW_STEPS, NEAR = 0.0012, 8, 0.02  # m a step, steps, m: the hand presses against something and is close enough
CLOSING_STEPS = 8  # the fingers hold by then
CLOSED_WIDTH = 0.0015  # m, nothing between the fingers
LOST = 0.04  # m between hand and part
MAX_ATTEMPTS = 4
LEAN = np.radians(70)  # of the palm, from straight down, before a drawer
STAND_OFF, INTO_HANDLE, PULL = 0.09, 0.004, 0.04  # m
LINE_RADIUS, LINE_SLOPE = 0.008, 3.0
KNOB_DEPTH = 0.008  # m, grip site under the ridge's top
RIDGE = 0.012  # m under the top that count as the ridge
NEAREST_WRIST, MAX_INWARD_LEAN = 0.34, np.radians(40)  # m from the shoulder
TURN_LEAD = 0.35  # rad that the wrist is ahead of the knob


@dataclass(frozen=True)
class Grip:
    """Where the hand is to hold the part (point [3], rotation [3, 3]), and where to bring it from there."""

    point: Vector
    rotation: Vector
    goal: Vector
    goal_rotation: Vector
    way_in: Vector  # the hand comes along this unit vector [3]


class MovePart:
    """The law for one episode of a goal with one name: `open` a drawer's region, `turnon` a stove."""

    cramped = False

    def __init__(self, scene: Scene, goal: Goal) -> None:
        self.scene, self.goal = scene, goal
        self.attempts, self.closed = 1, False
        self._closed_steps = self._slow_steps = 0
        self._last_eef = scene.eef

    @property
    def gave_up(self) -> bool:
        """It slipped off too often."""
        return self.attempts > MAX_ATTEMPTS

    def action(self) -> Vector:
        """The clean action [7] at the present state."""
        scene, eef = self.scene, self.scene.eef
        self._slow_steps = self._slow_steps + 1 if np.linalg.norm(eef - self._last_eef) < SLOW else 0
        self._last_eef = eef
        grip = self._grip()
        if scene.env.holds(*self.goal.words):
            return self.leave()
        return self._move(grip) if self.closed else self._approach(grip)

    def leave(self) -> Vector:
        """The clean action [7] that opens the hand and takes it back the way it came."""
        self.closed = False
        grip = self._grip()
        freed = float(np.clip((self.scene.grip_width - 0.04) / 0.03, 0.0, 1.0))
        return step_towards(self.scene, -0.03 * freed * grip.way_in, grip.rotation, GRIPPER_OPEN)

    def _grip(self) -> Grip:
        return self._drawer() if self.goal.predicate == "open" else self._knob()

    def _approach(self, grip: Grip) -> Vector:
        """Open hand to the part: onto the line before it, then along the line."""
        scene = self.scene
        error = grip.point - scene.eef
        off = float(np.linalg.norm(error - (error @ grip.way_in) * grip.way_in))
        turn, away = turn_left(scene, grip.rotation), float(np.linalg.norm(error))
        if (away < ARRIVED and turn < ARRIVED_ANGLE) or (self._slow_steps >= SLOW_STEPS and away < NEAR):
            self.closed, self._closed_steps = True, 0
            return self._move(grip)
        back = funnel(off + 0.05 * turn, 0.0, STAND_OFF, LINE_RADIUS, LINE_SLOPE)
        return step_towards(scene, error - back * grip.way_in, grip.rotation, GRIPPER_OPEN)

    def _move(self, grip: Grip) -> Vector:
        """Fingers closing, then the part and the hand together."""
        scene = self.scene
        self._closed_steps += 1
        if scene.grip_width < CLOSED_WIDTH or float(np.linalg.norm(grip.point - scene.eef)) > LOST:
            self.attempts += 1
            self.closed = False
            return step_towards(scene, -STAND_OFF * grip.way_in, grip.rotation, GRIPPER_OPEN)
        if self._closed_steps <= CLOSING_STEPS:
            return step_towards(scene, np.zeros(3), grip.rotation, GRIPPER_CLOSE)
        return step_towards(scene, grip.goal - scene.eef, grip.goal_rotation, GRIPPER_CLOSE)

    def _drawer(self) -> Grip:
        """The bar of the handle, from the front; the fingers above and below it."""
        scene = self.scene
        part = scene.moving_part(self.goal.target)
        outward = -part.axis  # a drawer opens towards the negative end of its joint
        handle = scene.outermost(part, outward)
        sideways = np.cross([0.0, 0.0, -1.0], -outward)
        angle = float(np.arctan2(outward[1], outward[0]))
        rotation = about(sideways, LEAN) @ about(np.array([0.0, 0.0, 1.0]), yaw_of(angle)) @ POINTING_DOWN
        way_in = rotation[:, 2]
        point = handle + INTO_HANDLE * way_in
        return Grip(point, rotation, point + PULL * outward, rotation, way_in)

    def _knob(self) -> Grip:
        """The ridge on the knob, from above; the wrist leads the knob."""
        scene = self.scene
        part = scene.moving_part(self.goal.target)
        vertices = np.concatenate(scene.part_shapes(part))
        top = float(vertices[:, 2].max())
        ridge = vertices[vertices[:, 2] > top - RIDGE].mean(axis=0)
        across = scene.data.xmat[part.body].reshape(3, 3)[:, 0]
        yaw = yaw_of(float(np.arctan2(across[1], across[0])))
        point = np.array([ridge[0], ridge[1], top - KNOB_DEPTH])
        lean = inward_lean(scene.base, point)
        sense = 1.0 if self.goal.predicate == "turnon" else -1.0
        up, lead = np.array([0.0, 0.0, 1.0]), sense * TURN_LEAD * float(np.sign(part.axis[2]))
        rotation = lean @ about(up, yaw) @ POINTING_DOWN
        return Grip(point, rotation, point, lean @ about(up, yaw + lead) @ POINTING_DOWN, rotation[:, 2])


def inward_lean(base: Vector, point: Vector) -> Vector:
    """Rotation [3, 3] that points the hand at `point` back towards the robot, as far as a folded elbow asks.

    The wrist of a hand that points straight down at what stands close is nearer to the shoulder than the elbow bends.
    """
    inward = np.array([*(base - point)[:2], 0.0]) / float(np.hypot(*(point - base)[:2]))
    leans = np.arange(0.0, MAX_INWARD_LEAN, np.radians(1.0))
    lean = next((each for each in leans if wrist_reach(base, point, -each) >= NEAREST_WRIST), leans[-1])
    return about(np.cross([0.0, 0.0, -1.0], inward), float(lean))
