"""The feedback law that puts an object into what is open at its front: a layer of a shelf, a microwave.

The object is taken from above, as everywhere; then the hand leans until the object's foot leads the way in (a pan, held
by its handle, stays level), and goes in along the opening's axis. The hand itself stays outside.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rsd.conventions import GRIPPER_CLOSE
from rsd.expert.grasps import POINTING_DOWN, Grasp, Rim, Span, about, yaw_of
from rsd.expert.motion import funnel, step_towards, turn_left
from rsd.expert.pick_and_place import CARRY_CLEARANCE, CARRY_TURN, GRASPED_STEPS, PickAndPlace
from rsd.expert.scene import UP, Vector

LEAN, RIM_LEAN = np.radians(50), np.radians(76)  # of the hand, from straight down; with what it holds by a rim
DEPTH = {"shelf": 0.03, "microwave": 0.06}  # m of the object's origin behind the front of the region
STAND_OFF = 0.14  # m before that, where the object is still outside
ENTRY_GAP = 0.012  # m under the object
ENTRY_RADIUS, ENTRY_SLOPE = 0.012, 4.0
ARRIVED = 0.012  # m


class Insert(PickAndPlace):
    """The law for one goal of an episode whose destination is a `LAYER`."""

    @property
    def gave_up(self) -> bool:
        """As everywhere, but what it holds may lean."""
        return super().gave_up and not self.closed

    @property
    def inward(self) -> Vector:
        """Unit vector [3] through the opening."""
        owner = self.scene.owner(self.goal.destination)
        assert owner is not None
        return self.scene.rotation(owner)[:, 1]

    def _there(self) -> Vector:
        """Where the object's origin shall come, at the height of the floor inside [3]."""
        scene, region = self.scene, self.goal.destination
        half, depth = scene.region_size(region), DEPTH["microwave" if "microwave" in region else "shelf"]
        inside = scene.site(region) - (abs(half @ self.inward) - depth) * self.inward
        before = inside - 2 * STAND_OFF * self.inward
        table = float(scene.heights(before[None, :2], ignore=scene.movable)[0])
        return np.array([*inside[:2], max(float(scene.site(region)[2] - half[2]), table)])

    def _carry(self) -> Vector:
        scene = self.scene
        eef, held, there = scene.eef, scene.position(self.target), self._there()
        rotation = self._orientation(there)
        bottom = float(scene.vertices(self.target)[:, 2].min())
        error = np.array([*(there - held)[:2], there[2] + ENTRY_GAP - bottom])
        along = float(error @ self.inward)
        aside = float(np.linalg.norm((error - along * self.inward)[:2]))
        turn = turn_left(scene, rotation)
        back = funnel(aside + abs(error[2]) + 0.1 * max(0.0, turn - 0.1), 0.0, STAND_OFF, ENTRY_RADIUS, ENTRY_SLOPE)
        if along > STAND_OFF - 0.02:  # still outside: over what stands in the way
            way = scene.corridor_top(held, there - STAND_OFF * self.inward, ignore=(self.target,))
            over = max(way + CARRY_CLEARANCE, there[2] + ENTRY_GAP)
            error[2] = funnel(aside + 0.1 * turn, there[2] + ENTRY_GAP, over, ENTRY_RADIUS, 2.0) - bottom
        error[:2] -= back * self.inward[:2]
        return self._move(eef + error, rotation, GRIPPER_CLOSE, CARRY_TURN)

    def _placed(self) -> bool:
        inside = self.scene.env.holds(*self.goal.words)
        return inside and float((self._there() - self.scene.position(self.target)) @ self.inward) < ARRIVED

    def leave(self) -> Vector:
        """The clean action [7] that opens the hand and draws it back."""
        self.closed = False
        freed = float(np.clip((self.scene.grip_width - 0.05) / 0.02, 0.0, 1.0))
        return step_towards(self.scene, freed * (0.02 * UP - 0.04 * self.inward), self.scene.eef_rotation, -1.0)

    def _orientation(self, point: Vector) -> Vector:
        if self._grasp is None or self._grasped_steps < GRASPED_STEPS:
            return super()._orientation(point)
        inward, hold = self.inward, self.goal.hold
        angle = float(np.arctan2(inward[1], inward[0]))
        if isinstance(hold, Span) and np.isfinite(hold.tail):  # its handle shall point out, level
            axis = self.scene.rotation(self.target)[:, 0]
            yaw = float(np.arctan2(axis[1], axis[0]))
            left = (angle + np.pi - yaw + np.pi) % (2 * np.pi) - np.pi
            closing = self.scene.eef_rotation[:2, 0]
            return about(UP, left) @ about(UP, yaw_of(float(np.arctan2(closing[1], closing[0])))) @ POINTING_DOWN
        sideways = np.cross([0.0, 0.0, -1.0], inward)
        across = np.pi / 2 if isinstance(hold, Rim) else 0.0  # a rim is held at its side, so that the hand is low
        return about(sideways, RIM_LEAN if across else LEAN) @ about(UP, yaw_of(angle + across)) @ POINTING_DOWN

    def _candidates(self) -> Iterable[Grasp]:
        candidates = super()._candidates()
        if not isinstance(self.goal.hold, Rim):
            return candidates
        scene, inward = self.scene, self.inward[:2]
        door = (scene.hinge(self.goal.destination.split("_heating")[0]) - scene.site(self.goal.destination))[:2]
        return sorted(candidates, key=lambda each: (abs(each.direction @ inward) > 0.3, each.direction @ door > 0.0))
