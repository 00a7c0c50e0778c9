"""The feedback law that picks up an object and puts it where a goal wants it, from privileged state.

It is a feedback law, not a script of waypoints: every action follows from where the hand, the object and its
destination are now, so it recovers from pushes by itself and its actions are what a policy should do at any visited
state. The only memory is the chosen grasp, whether the fingers are commanded closed, and short counters.

The path is a funnel: far from the grasp the hand travels at a free height, and the closer it is (horizontally), the
lower it may go. The same law brings the object to its destination.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rsd.conventions import GRIPPER_CLOSE, GRIPPER_OPEN
from rsd.expert.goals import OVER_WALLS, SLOT, Goal, destination, drawer_points, kind, slot_turn, way_out
from rsd.expert.grasps import (
    MAX_LEAN,
    POINTING_DOWN,
    TIP_BELOW_SITE,
    WHOLE,
    Grasp,
    GraspMode,
    RimGrasp,
    Span,
    about,
    choose_grasp,
    hand_rotation,
    lean_away,
    lean_limit,
    rim_grasps,
    span_grasps,
    turned_back,
)
from rsd.expert.motion import Leading, funnel, step_towards, turn_left
from rsd.expert.scene import UP, Scene, Vector

AT_GRASP, AT_GRASP_HEIGHT = 0.006, 0.006  # m
AT_GRASP_ANGLE = 0.2  # rad
SLOW, SLOW_STEPS = 0.0012, 8  # m per step; the hand presses against something and will not get closer
NEAR_GRASP = 0.013  # m, close enough to close when slow
BLOCKED_BELOW = 0.06  # m; slow and lower than this over the grasp, a finger stands on something
GRASPED_STEPS = 3
CLOSED_STEPS = 14  # the fingers have met by then
CLOSED_WIDTH = 0.0015  # m, nothing between the fingers
FUNNEL_SLOPE, FUNNEL_RADIUS = 2.0, 0.010  # height per horizontal distance outside the radius (m)
TIGHT_SLOPE, TIGHT_RADIUS = 3.0, 0.005  # walls stand close, or the fingers go past both sides of the object
PLACE_SLOPE, PLACE_RADIUS = 2.0, 0.010
SLOT_SLOPE = 50.0  # a caddy's walls are higher than where the object is let go
SLOT_RADIUS, SLOT_TURN = 0.005, 0.03  # m, rad: a book has 5 mm to either side
TRAVEL_CLEARANCE, CARRY_CLEARANCE = 0.02, 0.025  # m over the highest point on the way
OVER = 0.012  # m off the object's middle, close enough to choose a side
RELEASE_GAP = 0.006  # m of free fall
RELEASE_RADIUS = 0.012  # m off the destination's middle; the plate's predicate allows 30 mm
LEANING_SLOPE, LEAD = 5.0, 0.03  # m that a leaning hand aims ahead of itself on its line
OUT, RISE = 0.01, 0.01  # m that the hand is sent aside, beyond what it needs, and up from under it
CARRY_TURN = 0.35  # turning a held object faster drags it over its support
FALLEN_UP = 0.7  # z of the own z axis; lower, and neither a rim nor a knob can be taken
MAX_ATTEMPTS = 4


class PickAndPlace:
    """The law for one goal of an episode. Call `action` once per step."""

    def __init__(
        self, scene: Scene, goal: Goal, mode: GraspMode = "canonical", rng: np.random.Generator | None = None
    ) -> None:
        self.scene, self.goal, self.target = scene, goal, goal.target
        self.attempts, self.closed = 0, False
        self._mode: GraspMode = mode
        self._rng = rng
        self._failed: list[float] = []
        self._grasp: Grasp | None = None
        self._walled, self._into_slot = False, bool(SLOT.fullmatch(kind(goal.destination)))
        self._turn = self._half_turn = 0.0  # rad, of the hand
        self._grasped_steps = self._closed_steps = self._slow_steps = 0
        self._last_eef, self._aside = scene.eef, 0.0  # m that it moved sideways in the last step
        self._ahead, self._ahead_there = Leading(), Leading()  # of the object, of its destination

    @property
    def cramped(self) -> bool:
        """The hand works in or under the drawer, where a push would shut it or hit a wall."""
        return self._leans() or (self._walled and self._grasped_steps < GRASPED_STEPS)

    @property
    def gave_up(self) -> bool:
        """What is only taken upright has fallen over, or the object was missed too often."""
        fallen = self.goal.hold is not WHOLE and bool(self.scene.rotation(self.target)[2, 2] < FALLEN_UP)
        return fallen or self.attempts > MAX_ATTEMPTS

    def action(self) -> Vector:
        """The clean action [7] at the present state."""
        moved = self.scene.eef - self._last_eef
        self._aside = float(np.linalg.norm(moved[:2]))
        self._slow_steps = self._slow_steps + 1 if np.linalg.norm(moved) < SLOW else 0
        self._last_eef = self.scene.eef
        if self.scene.env.motion is not None:
            self._ahead.see(self.scene.position(self.target), self.scene.touched(self.target))
            self._ahead_there.see(destination(self.scene, self.goal)[0])
        if self._placed():
            return self.leave()
        if self.closed and self._holding():
            return self._carry()
        if self.closed:
            return self._close()
        return self._approach()

    def leave(self) -> Vector:
        """The clean action [7] that opens the hand and lifts it as the fingers come free."""
        self.closed = False
        freed = (self._grasp or RimGrasp(np.pi / 2)).freed(self.scene.grip_width)
        goal = self.scene.eef + np.array([0.0, 0.0, 0.03 * freed]) + self._ahead_there.way
        return self._move(goal, self._orientation(self._place_point()), GRIPPER_OPEN, CARRY_TURN)

    # -- phases ---------------------------------------------------------------------------------------------------

    def _approach(self) -> Vector:
        """Open hand to the grasp, through the funnel over it."""
        scene = self.scene
        if self._grasp is None:
            middle = scene.position(self.target)
            if self._mode == "two-sided-late" and np.linalg.norm((middle - scene.eef)[:2]) > OVER:
                # nothing tells yet which side it will be
                over = np.array([*middle[:2], self._free_height(middle)])
                return self._move(over, self._orientation(over), GRIPPER_OPEN)
            self._plan()
        assert self._grasp is not None
        eef, goal = scene.eef, self._grasp.point(scene, self.target)
        rotation = self._orientation(goal)
        turn, above = turn_left(scene, rotation), float(eef[2] - goal[2])
        line = goal + max(0.0, above) * self._grasp.upward  # a leaning hand comes in along itself
        off = float(np.linalg.norm((line - eef)[:2]))
        arrived = off < AT_GRASP and abs(above) < AT_GRASP_HEIGHT and turn < AT_GRASP_ANGLE
        stuck = self._slow_steps >= SLOW_STEPS and off < NEAR_GRASP and abs(above) < NEAR_GRASP
        if self._slow_steps >= SLOW_STEPS and not stuck and 0.0 < above < BLOCKED_BELOW and off < BLOCKED_BELOW:
            self._failed += [self._grasp.angle, self._grasp.angle]
            self._slow_steps = 0
            self._plan()
            return self._approach()
        if arrived or stuck:
            self.closed = True
            self._closed_steps = self._grasped_steps = 0
            return self._close()
        misaligned = off + 0.1 * max(0.0, turn - 0.1)
        tight = self._walled or isinstance(self.goal.hold, Span)
        radius, slope = (TIGHT_RADIUS, TIGHT_SLOPE) if tight else (FUNNEL_RADIUS, FUNNEL_SLOPE)
        if self._grasp.lean:
            slope, line = LEANING_SLOPE, line - min(LEAD, max(0.0, above)) * self._grasp.upward
        height = funnel(misaligned, goal[2], self._free_height(goal), radius, slope)
        return self._move(np.array([line[0], line[1], height]) + self._ahead.way, rotation, GRIPPER_OPEN)

    def _free_height(self, goal: Vector) -> float:
        """Height at which the open hand clears everything on its way to `goal`, the object included (m)."""
        scene = self.scene
        rim = float(scene.vertices(self.target)[:, 2].max())
        way = scene.corridor_top(scene.eef, goal, ignore=(self.target,), half_width=0.06)
        if self._leans():
            way = max(way, float(drawer_points(scene, self.goal)[:, 2].max()))
        return max(way + TIP_BELOW_SITE + TRAVEL_CLEARANCE, rim + TIP_BELOW_SITE + 0.03)

    def _close(self) -> Vector:
        """Fingers closing, hand staying at the grasp; decides whether the grasp holds or missed."""
        scene = self.scene
        assert self._grasp is not None
        self._closed_steps += 1
        if scene.grip_width < CLOSED_WIDTH or self._closed_steps > CLOSED_STEPS:
            self._miss()
            return self._approach()
        goal = self._grasp.point(scene, self.target, scene.grip_width)
        if np.linalg.norm(goal - scene.eef) > 0.03:  # pushed away while closing
            self.closed = False
            return self._approach()
        return self._move(goal + self._ahead.way, self._orientation(goal), GRIPPER_CLOSE)

    def _carry(self) -> Vector:
        """Object in hand: up, over, and down the funnel above its destination."""
        scene = self.scene
        eef, held = scene.eef, scene.position(self.target)
        if (out := way_out(scene, self.goal)) is not None and out.any():
            error = np.array([*out + OUT * np.sign(out), RISE])
            return step_towards(scene, error, self._orientation(eef), GRIPPER_CLOSE, CARRY_TURN)
        there, surface = destination(scene, self.goal)
        bottom = float(scene.vertices(self.target)[:, 2].min())
        off = float(np.linalg.norm((there - held)[:2]))
        if off < RELEASE_RADIUS and bottom - surface < RELEASE_GAP + 0.003:
            return self.leave()
        way = scene.corridor_top(held, there, ignore=(self.target,), half_width=0.06)
        over = max(way + CARRY_CLEARANCE, surface + 0.01)
        radius, slope = PLACE_RADIUS, SLOT_SLOPE if "caddy" in self.goal.destination else PLACE_SLOPE
        if self._into_slot:
            radius = SLOT_RADIUS
            walls = surface - OVER_WALLS + float(np.ptp(scene.vertices(self.target)[:, 2]))
            over = max(over, walls + CARRY_CLEARANCE)  # what lies below a short way is the floor inside
            off += self._aside + 0.1 * max(0.0, turn_left(scene, self._orientation(self._place_point())) - SLOT_TURN)
        height = funnel(off, surface + RELEASE_GAP, over, radius, slope)
        goal = np.array([*(there + eef - held)[:2], height + eef[2] - bottom]) + self._ahead_there.way
        return self._move(goal, self._orientation(self._place_point()), GRIPPER_CLOSE, CARRY_TURN)

    # -- decisions ------------------------------------------------------------------------------------------------

    def _placed(self) -> bool:
        """The object is where it shall be (or is about to drop there from an opening hand)."""
        scene = self.scene
        there, surface = destination(scene, self.goal)
        off = float(np.linalg.norm((scene.position(self.target) - there)[:2]))
        gap = float(scene.vertices(self.target)[:, 2].min()) - surface
        if self.closed:
            return off < RELEASE_RADIUS and gap < 0.003
        return off < 0.025 and gap < RELEASE_GAP + 0.006

    def _holding(self) -> bool:
        """Both fingers have touched the object for a moment, so the hand may lift it."""
        if self.scene.grasped(self.target):
            self._grasped_steps += 1
        elif self._grasped_steps >= GRASPED_STEPS:
            assert self._grasp is not None
            if self._grasp.lost(self.scene, self.target) or self.scene.grip_width < CLOSED_WIDTH:
                self._miss()
                self._grasped_steps = 0
        else:
            self._grasped_steps = 0
        return self._grasped_steps >= GRASPED_STEPS

    def _plan(self) -> None:
        scene = self.scene
        self.attempts += 1
        there, surface = destination(scene, self.goal)
        spot = np.array([*there[:2], surface])
        self._grasp = choose_grasp(scene, self.target, self._candidates(), spot, self._mode, self._rng)
        here = self._grasp.point(scene, self.target)
        points = (here, here + there - scene.position(self.target))
        self._half_turn = np.pi * turned_back(scene.base, points, self._grasp.yaw, self._grasp.lean != 0.0)
        if self._into_slot:
            self._turn = slot_turn(scene, self.goal, self._grasp.angle)

    def _candidates(self) -> Iterable[Grasp]:
        """Grasps of the target, best first."""
        # angles missed twice: the first miss may be a push's fault
        hopeless = tuple(angle for angle in set(self._failed) if self._failed.count(angle) > 1)
        if isinstance(self.goal.hold, Span):
            return span_grasps(self.scene, self.target, self.goal.hold, hopeless)
        self._walled = self._in_drawer()
        grasps, out = rim_grasps(self.goal.hold, self._walled, hopeless), way_out(self.scene, self.goal)
        if out is None or not out.any():
            return grasps
        back = self.scene.position(self.target) - self.scene.site(self.goal.destination)
        return lean_away(grasps, out / np.linalg.norm(out), back[:2])

    def _in_drawer(self) -> bool:
        """The bowl stands inside a cabinet's bounds, well below its top."""
        bowl, cabinets = self.scene.position(self.target), (name for name in self.scene.bodies if "cabinet" in name)
        boxes = (self.scene.vertices(name) for name in cabinets)
        return any(((box.min(axis=0) + 0.02 * UP < bowl) & (bowl < box.max(axis=0) - 0.03 * UP)).all() for box in boxes)

    def _miss(self) -> None:
        if self._grasp is not None:
            self._failed.append(self._grasp.angle)
        self._grasp = None
        self.closed = False

    def _place_point(self) -> Vector:
        """Where the hand is when it lets go [3]."""
        grasp = self._grasp or RimGrasp(np.pi / 2)  # none yet: the object is in its place already
        return grasp.release_point(destination(self.scene, self.goal)[0])

    # -- motion ---------------------------------------------------------------------------------------------------

    def _leans(self) -> bool:
        """The hand took the object, or comes to take it, from under a drawer, over which it is not yet."""
        return self._grasp is not None and self._grasp.lean != 0.0 and way_out(self.scene, self.goal) is not None

    def _orientation(self, point: Vector) -> Vector:
        """The hand's orientation wanted at `point` [3, 3].

        `point` is where the phase ends, not where the hand is: a lean that follows the hand feeds back into its
        position near the singular reach and overshoots by 10 cm.
        """
        grasp, base = self._grasp, self.scene.base
        # with an object in hand the fingers' heights no longer matter, the reach over its destination does
        limit = MAX_LEAN if grasp is None or self.closed else lean_limit(base, point, grasp.direction)
        yaw = 0.0 if grasp is None else grasp.yaw + self._half_turn
        if grasp is not None and self._leans():
            lean = about(np.array([*grasp.direction, 0.0]), grasp.lean)
            return lean @ about(UP, yaw) @ POINTING_DOWN
        if grasp is not None and self._into_slot and self._grasped_steps >= GRASPED_STEPS:
            yaw += self._turn
        return hand_rotation(base, point, yaw, limit)

    def _move(self, goal: Vector, rotation: Vector, gripper: float, turn_limit: float = 1.0) -> Vector:
        """Proportional step towards a pose. Sideways waits while the hand is too low for it."""
        error = goal - self.scene.eef
        too_low = max(0.0, float(error[2]))
        error[:2] *= np.clip(1.0 - (too_low - 0.010) / 0.030, 0.0, 1.0)
        return step_towards(self.scene, error, rotation, gripper, turn_limit)
