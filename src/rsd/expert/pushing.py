"""The feedback laws that push: closed fingers in front of a drawer or a door, then along the way it moves; fingers
that drag a plate along the table.

Each action follows from where the hand and the moving part are now. Remembered is only how often the arm was kept from
the place before the push, which then is nearer.
"""

from __future__ import annotations

import numpy as np

from rsd.conventions import GRIPPER_CLOSE
from rsd.expert.goals import Goal
from rsd.expert.grasps import MAX_LEAN, POINTING_DOWN, TIP_BELOW_SITE, about, hand_rotation, yaw_of
from rsd.expert.motion import funnel, step_towards, turn_left
from rsd.expert.scene import MovingPart, Scene, Vector

STAND_OFF, PAST = 0.09, 0.04  # m before what is pushed, and how far into it the hand is sent
IN_LINE, BEHIND, TURNED = 0.02, 0.03, 0.3  # m off the line of the push, m past its contact, rad
LEAN = np.radians(35)
TRAVEL_CLEARANCE = 0.08  # m under the hand, which is thicker when it leans
EDGE_BELOW, EDGE_IN = 0.02, 0.02  # m of a door's contact under its top and inside its far edge
MAX_STEPS = 300
SLOW, SLOW_STEPS, NEARER = 0.0012, 8, 0.6  # m a step, steps; the arm is blocked, this share of the stand-off remains
PLATE_FLOOR, PRESSED = 0.008, 0.05  # m over the plate's origin, m off its middle
PLATE_ROOM = 0.085  # m from the middle of a plate, whose radius is 0.07, to what it goes around
PRESS, DRAG = 0.005, 0.03  # m that the hand is sent down and along


class Pushing:
    """What laws have in common that push until the goal holds."""

    cramped = False
    attempts = 1
    closed = False  # it holds nothing that it would have to finish with

    def __init__(self, scene: Scene, goal: Goal) -> None:
        self.scene, self.goal = scene, goal
        self._steps = 0

    @property
    def gave_up(self) -> bool:
        """It pushes without effect."""
        return self._steps > MAX_STEPS


class PushPart(Pushing):
    """The law for one episode of a goal `close` of a drawer's region or of a microwave."""

    def __init__(self, scene: Scene, goal: Goal) -> None:
        super().__init__(scene, goal)
        self._stand_off, self._slow_steps, self._last_eef = STAND_OFF, 0, scene.eef

    def action(self) -> Vector:
        """The clean action [7] at the present state."""
        if self.scene.env.holds(*self.goal.words):
            return self.leave()
        self._steps += 1
        scene = self.scene
        contact, way, rotation = self._contact()
        error = contact - scene.eef
        along = float(error @ way)
        off = float(np.linalg.norm(error - along * way))
        if off < IN_LINE and -BEHIND < along < STAND_OFF + BEHIND and turn_left(scene, rotation) < TURNED:
            return step_towards(scene, error + PAST * way, rotation, GRIPPER_CLOSE)
        self._slow_steps = self._slow_steps + 1 if np.linalg.norm(scene.eef - self._last_eef) < SLOW else 0
        self._last_eef = scene.eef
        if self._slow_steps >= SLOW_STEPS:  # something behind holds the arm
            self._stand_off, self._slow_steps = NEARER * self._stand_off, 0
        before = error - self._stand_off * way
        goal = contact - self._stand_off * way
        free = scene.corridor_top(scene.eef, goal, ignore=()) + TRAVEL_CLEARANCE
        away = float(np.linalg.norm(before[:2]))
        before[2] = funnel(away, goal[2], max(free, goal[2]), IN_LINE / 2, 3.0) - scene.eef[2]
        before[:2] *= np.clip(1.0 - (before[2] - 0.010) / 0.030, 0.0, 1.0)
        return step_towards(scene, before, rotation, GRIPPER_CLOSE)

    def leave(self) -> Vector:
        """The clean action [7] that takes the hand back and up."""
        _, way, rotation = self._contact()
        return step_towards(self.scene, np.array([0.0, 0.0, 0.02]) - 0.03 * way, rotation, GRIPPER_CLOSE)

    def _contact(self) -> tuple[Vector, Vector, Vector]:
        """Where the fingertips push [3], which way [3], and the hand's orientation [3, 3]."""
        scene = self.scene
        part = scene.moving_part(self.goal.target)
        if abs(part.axis[2]) > 0.5:
            return self._door(part)
        handle = scene.outermost(part, -part.axis)
        sideways = np.cross([0.0, 0.0, -1.0], part.axis)
        angle = float(np.arctan2(part.axis[1], part.axis[0]))
        rotation = about(sideways, LEAN) @ about(np.array([0.0, 0.0, 1.0]), yaw_of(angle + np.pi / 2)) @ POINTING_DOWN
        return handle - 0.01 * part.axis, part.axis, rotation

    def _door(self, part: MovingPart) -> tuple[Vector, Vector, Vector]:
        """The outer face near the edge that is far from the hinge, from above."""
        vertices = np.concatenate(self.scene.part_shapes(part))
        hinge = self.scene.hinge(self.goal.target)
        radius = vertices[:, :2] - hinge[:2]
        far = radius[np.argmax(np.linalg.norm(radius, axis=1))]
        out = far / np.linalg.norm(far)
        way = np.cross(part.axis, [out[0], out[1], 0.0])  # the joint's positive sense closes it
        face = float((radius @ way[:2]).min())  # how far the outer face is before the hinge
        length = float((radius @ out).max()) - EDGE_IN
        point = np.array([*(hinge[:2] + length * out + face * way[:2]), vertices[:, 2].max() - EDGE_BELOW])
        yaw = yaw_of(float(np.arctan2(way[1], way[0])) + np.pi / 2)
        return point - 0.01 * way, way, about(np.array([0.0, 0.0, 1.0]), yaw) @ POINTING_DOWN


class DragPlate(Pushing):
    """The law for one goal `on` of a plate and a region of the table: closed fingers press on it and take it along,
    around what stands in the way."""

    def action(self) -> Vector:
        """The clean action [7] at the present state."""
        scene, plate = self.scene, self.goal.target
        if scene.env.holds(*self.goal.words):
            return self.leave()
        self._steps += 1
        middle, eef = scene.position(plate), scene.eef
        left = self._left(middle[:2])
        floor = float(middle[2]) + PLATE_FLOOR + TIP_BELOW_SITE
        rotation = hand_rotation(scene.base, middle, 0.0, MAX_LEAN)
        error = middle - eef
        off = float(np.linalg.norm(error[:2]))
        if off < PRESSED and eef[2] < floor + 0.006:
            ahead = left * DRAG / float(np.linalg.norm(left))
            return step_towards(scene, np.array([*ahead, -PRESS]), rotation, GRIPPER_CLOSE)
        free = scene.corridor_top(eef, middle, ignore=(plate,)) + TIP_BELOW_SITE + 0.02
        height = funnel(off + 0.1 * turn_left(scene, rotation), floor - 0.005, max(free, floor), IN_LINE, 3.0)
        error[2] = height - eef[2]
        return step_towards(scene, error, rotation, GRIPPER_CLOSE)

    def _left(self, middle: Vector) -> Vector:
        """Way [2] from the plate's middle [2] to its place, or to beside the first thing that stands before it."""
        scene, way = self.scene, self.scene.site(self.goal.destination)[:2] - middle
        nearest = float(np.linalg.norm(way))
        along, across = way / nearest, np.array([-way[1], way[0]]) / nearest
        for name in (name for name in scene.movable if name != self.goal.target):
            outline = scene.vertices(name)[:, :2]
            thing = (outline.min(axis=0) + outline.max(axis=0)) / 2 - middle
            room = float(np.ptp(outline, axis=0).max()) / 2 + PLATE_ROOM
            if 0.0 < thing @ along < nearest and abs(thing @ across) < room:
                nearest = float(thing @ along)
                way = thing - room * float(np.sign(thing @ across)) * across
        return way

    def leave(self) -> Vector:
        """The clean action [7] that lifts the hand off."""
        return step_towards(self.scene, np.array([0.0, 0.0, 0.02]), self.scene.eef_rotation, GRIPPER_CLOSE)
