"""Where to take an object, chosen so that the choice is predictable: a bowl with one finger inside the rim and one
outside, anything else across its narrow side.

A learner copies what it can predict from the cameras. The choice is therefore an ordered list (no wrist rotation
first, left side before right) from which the first collision-free entry is taken, not the minimum of a score that
would jump about with a millimetre.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rsd.expert.scene import Scene, Vector
from rsd.sim.physics import mujoco
from rsd.types import RsdError

GraspMode = Literal["canonical", "two-sided", "two-sided-late"]

BELOW_RIM, BELOW_RIM_IN_DRAWER = 0.016, 0.012  # m, grip site under the rim's top
INWARD_IN_DRAWER = 0.02
TIP_BELOW_SITE = 0.010
PALM_ABOVE_SITE = 0.030
PALM_HALF_LENGTH = 0.105
PALM_HALF_WIDTH = 0.035
FINGER_OPENING = 0.08
FINGER_HALF_WIDTH = 0.012
SPAN_ABOVE_FLOOR = 0.013  # m, grip site; tips off the floor
SPAN_DIRECTIONS = 72  # candidate angles on the half circle
WIDTH_STEP = 0.004  # m; widths that differ by less are one to choose from
WIDEST_SPAN = 0.07
ALONG_HANDLE = (0.0, -0.02, 0.02, -0.04, -0.06, -0.08)  # m
LOST = 0.03  # m between the grip site and what it held
ALLOWED_OVERLAP = 0.004  # m summed over the checked points
DIRECTIONS = 72  # candidate angles; open bowls try every third
DRAWER_ANGLE = np.radians(137.5)  # the roomiest in the drawer: one finger towards a corner

POINTING_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # fingers close along world y
SHOULDER_HEIGHT = 0.333  # m above the robot's base
WRIST_BACK, WRIST_UP = 0.088, 0.204  # m from grip site to wrist, pointing down
COMFORTABLE_REACH = 0.65  # m shoulder to wrist; beyond, the straight arm is near-singular
FOLDED_REACH = 0.22  # m; nearer, the elbow is folded to its limit
MAX_LEAN = np.radians(30)
LAST_JOINT, LEANING_JOINT = 2.75, 2.0  # rad, of a hand that leans; the limit is 2.897
LEANS = np.radians((14, 18, 22))  # away from what is over an object; more, and two of the wrist's axes are in line
ALONG_OUT = 0.6  # of a closing axis with the way that the palm keeps away; more, and it hardly does
MAX_SIDEWAYS_LEAN = np.radians(8)


def yaw_of(angle: float) -> float:
    """Smallest rotation about z that brings the closing axis onto a direction (rad, within +-pi/2)."""
    return float((angle - np.pi / 2 + np.pi / 2) % np.pi - np.pi / 2)


@dataclass(frozen=True)
class Grasp(ABC):
    """angle: direction of the closing axis in the world (rad); lean: of the hand about it, its palm to the right."""

    angle: float
    _: KW_ONLY
    lean: float = 0.0

    @property
    def direction(self) -> Vector:
        """Unit vector [2] along the closing axis; for a rim, from the bowl's centre to the gripped point."""
        return np.array([np.cos(self.angle), np.sin(self.angle)])

    @property
    def upward(self) -> Vector:
        """Way [3], of height 1, up the hand from the grip site."""
        aside = np.tan(self.lean) * self.direction
        return np.array([aside[1], -aside[0], 1.0])

    @property
    def yaw(self) -> float:
        return yaw_of(self.angle)

    @abstractmethod
    def point(self, scene: Scene, target: str, opening: float = FINGER_OPENING) -> Vector:
        """Grip site for this grasp, given where the object is now and how far the fingers are open (m) [3]."""

    @abstractmethod
    def release_point(self, centre: Vector) -> Vector:
        """Roughly where the hand is when it lets go over `centre` [3]: how far it has to reach there."""

    @abstractmethod
    def freed(self, width: float) -> float:
        """0..1, how far opening fingers, `width` apart (m), have come free of the object."""

    @abstractmethod
    def lost(self, scene: Scene, target: str) -> bool:
        """The object is not where a held one would be. Contact alone flickers while carrying."""


@dataclass(frozen=True)
class Rim:
    """Lengths of a bowl or mug (m). radius: of the rim, to the grip site; height: of the rim over the foot; ahead: of
    the rim's centre before the object's origin, along its own x axis (a mug's origin is off towards the handle)."""

    radius: float
    height: float
    ahead: float = 0.0

    def centre(self, scene: Scene, target: str) -> Vector:
        """[2]"""
        return scene.position(target)[:2] + self.ahead * scene.rotation(target)[:2, 0]


BOWL = Rim(0.047, 0.05)


@dataclass(frozen=True)
class RimGrasp(Grasp):
    """One finger inside a bowl or mug, one outside. below: grip site under the rim (m).

    inward: how much nearer to the centre than the rim the open hand comes (m). The outer finger then needs less room
    and pulls the bowl inwards as it closes.
    """

    rim: Rim = BOWL
    below: float = BELOW_RIM
    inward: float = 0.0

    def point(self, scene: Scene, target: str, opening: float = FINGER_OPENING) -> Vector:
        """Follows a tilted rim. As the fingers close, the point moves out to the rim."""
        closed = 1.0 - min(1.0, opening / FINGER_OPENING)
        out = self.rim.radius - self.inward + self.inward * closed
        spot = self.rim.centre(scene, target) + out * self.direction
        vertices = scene.vertices(target)
        near = vertices[np.linalg.norm(vertices[:, :2] - spot, axis=1) < 0.03]
        top = float((near if len(near) else vertices)[:, 2].max())
        return np.array([spot[0], spot[1], top - self.below])

    def release_point(self, centre: Vector) -> Vector:
        return centre + np.array([*(self.rim.radius * self.direction), self.rim.height - self.below])

    def freed(self, width: float) -> float:
        return float(np.clip((width - 0.03) / 0.04, 0.0, 1.0))

    def lost(self, scene: Scene, target: str) -> bool:
        return float(np.linalg.norm(scene.eef - self.point(scene, target, 0.0))) > LOST


@dataclass(frozen=True)
class Span:
    """What of an object goes between the fingers (m). below: grip site under the top, as deep as the palm allows by
    default; crown: how much under the top counts, all by default (of a lid with a knob only the knob); tail: how much
    of the far end along its own x axis counts (of a pan only the handle)."""

    below: float = 0.030
    crown: float = np.inf
    tail: float = np.inf

    def vertices(self, scene: Scene, target: str) -> Vector:
        """World vertices of that part [n, 3]."""
        vertices = scene.vertices(target)
        along = vertices @ scene.rotation(target)[:, 0]
        vertices = vertices[along >= along.max() - self.tail]
        return vertices[vertices[:, 2] >= vertices[:, 2].max() - self.crown]


WHOLE = Span()


@dataclass(frozen=True)
class SpanGrasp(Grasp):
    """The fingers on both sides of an object. above: grip site over its lowest point (m); along: of the middle, along
    the object's own x axis (m)."""

    above: float = SPAN_ABOVE_FLOOR
    span: Span = WHOLE
    along: float = 0.0

    def point(self, scene: Scene, target: str, opening: float = FINGER_OPENING) -> Vector:
        """Over the middle of the outline, as deep as palm and floor allow."""
        vertices = self.span.vertices(scene, target)
        low, high = scene.vertices(target).min(axis=0), vertices.max(axis=0)
        across = np.array([-self.direction[1], self.direction[0]])
        along = vertices[:, :2] @ np.stack([self.direction, across], axis=1)
        middle = (along.min(axis=0) + along.max(axis=0)) / 2
        height = max(high[2] - self.span.below, low[2] + SPAN_ABOVE_FLOOR)
        spot = middle[0] * self.direction + middle[1] * across + self.along * scene.rotation(target)[:2, 0]
        return np.array([*spot, height])

    def release_point(self, centre: Vector) -> Vector:
        return centre + np.array([0.0, 0.0, self.above])

    def freed(self, width: float) -> float:
        """Only open fingers: a carton that is still between them would be hooked and carried off."""
        return float(np.clip((width - 0.07) / 0.006, 0.0, 1.0))

    def lost(self, scene: Scene, target: str) -> bool:
        """The grip site is away from the box around the object, which may hang askew."""
        vertices, eef = scene.vertices(target), scene.eef
        outside = np.maximum(vertices.min(axis=0) - eef, eef - vertices.max(axis=0))
        return float(np.linalg.norm(np.maximum(outside, 0.0))) > LOST


def wrist_reach(base: Vector, point: Vector, lean: float) -> float:
    """Shoulder to wrist (m) with the hand at `point` leaned outward by `lean` (rad)."""
    offset = point - base
    radius, height = float(np.hypot(offset[0], offset[1])), float(offset[2]) - SHOULDER_HEIGHT
    out = radius - WRIST_BACK * np.cos(lean) - WRIST_UP * np.sin(lean)
    up = height + WRIST_UP * np.cos(lean) - WRIST_BACK * np.sin(lean)
    return float(np.hypot(out, up))


def lean_angle(base: Vector, point: Vector, limit: float) -> float:
    """How far to lean the fingers outward at `point` so that the wrist stays in comfortable reach (rad); below 0 inward
    close to the robot, whatever the limit, so that the elbow is not folded too far."""
    if wrist_reach(base, point, 0.0) < FOLDED_REACH:
        inward = -np.arange(0.0, MAX_LEAN, np.radians(1.0))
        return next((float(lean) for lean in inward if wrist_reach(base, point, lean) >= FOLDED_REACH), -MAX_LEAN)
    leans = np.arange(0.0, limit + 1e-9, np.radians(1.0))
    return next((float(lean) for lean in leans if wrist_reach(base, point, lean) <= COMFORTABLE_REACH), float(limit))


def lean_limit(base: Vector, point: Vector, closing_axis: Vector) -> float:
    """Leaning across the closing axis is harmless; leaning along it puts the fingers at unequal heights."""
    outward = (point - base)[:2]
    along = abs(float(closing_axis @ outward)) / float(np.linalg.norm(outward))
    return MAX_LEAN if along < 0.5 else MAX_SIDEWAYS_LEAN


def hand_rotation(base: Vector, point: Vector, yaw: float, limit: float) -> NDArray[np.float64]:
    """Orientation of the hand at `point` [3, 3]: down, turned by yaw, leaned outward as far as the reach asks."""
    outward = (point - base)[:2] / np.linalg.norm((point - base)[:2])
    axis = np.cross([0.0, 0.0, -1.0], [outward[0], outward[1], 0.0])
    return about(axis, lean_angle(base, point, limit)) @ about(np.array([0.0, 0.0, 1.0]), yaw) @ POINTING_DOWN


def rotation_vector(rotation: NDArray[np.float64]) -> Vector:
    """[3, 3] -> axis times angle (rad) [3], angle at most pi."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def turned_back(base: Vector, points: Iterable[Vector], yaw: float, leans: bool = False) -> bool:
    """The last joint would reach its limit with the hand, pointing down, at one of the points [3] at that yaw (rad).
    Half a turn less closes the fingers along the same axis."""
    bearings = [float(np.arctan2(*(point - base)[1::-1])) for point in points]
    return max(bearings) + np.pi / 4 - yaw > (LEANING_JOINT if leans else LAST_JOINT)


def rim_grasps(rim: Rim = BOWL, walled: bool = False, avoid: tuple[float, ...] = ()) -> Iterator[Grasp]:
    """Grasps of a bowl's or mug's rim in the order of preference.

    walled: the bowl is in the drawer; shallower, and angles near the roomiest come first.
    avoid: angles that failed before (rad); they and their neighbours come last.
    """
    below, inward = (BELOW_RIM_IN_DRAWER, INWARD_IN_DRAWER) if walled else (BELOW_RIM, 0.0)

    def preference(angle: float) -> tuple[float, float, float]:
        nearest_failure = max((np.cos(angle - other) for other in avoid), default=-1.0)
        failed = float(nearest_failure > (0.99 if walled else 0.8))
        if walled:
            return (failed, -round(float(np.cos(angle - DRAWER_ANGLE)), 3), angle)
        return (failed, round(abs(yaw_of(angle)), 3), -round(float(np.sin(angle)), 3))

    angles = [2 * np.pi * k / DIRECTIONS for k in range(0, DIRECTIONS, 1 if walled else 3)]
    return (RimGrasp(angle, rim, below, inward) for angle in sorted(angles, key=preference))


def lean_away(grasps: Iterable[Grasp], out: Vector, back: Vector) -> list[Grasp]:
    """The same of hands that lean to one side, their palm towards `out`, a unit vector [2].

    Those first that lean across the closing axis, of these those on the side `back` [2], then those that lean least.
    """
    leaning = [
        replace(each, lean=float(np.copysign(lean, out @ [each.direction[1], -each.direction[0]])))
        for lean, each in itertools.product(LEANS, grasps)
    ]
    return sorted(leaning, key=lambda each: (abs(each.direction @ out) > ALONG_OUT, each.direction @ back < 0.0))


def span_grasps(scene: Scene, target: str, span: Span = WHOLE, avoid: tuple[float, ...] = ()) -> Iterator[Grasp]:
    """Grasps across an object: across its narrowest side first, and of those with the least wrist rotation; across a
    handle also before and behind its middle.

    avoid: as in `rim_grasps`. Raises RsdError for an object that is wider than the hand.
    """
    vertices = span.vertices(scene, target)
    angles = np.pi * np.arange(SPAN_DIRECTIONS) / SPAN_DIRECTIONS
    along = vertices[:, :2] @ np.stack([np.cos(angles), np.sin(angles)])
    widths = np.ptp(along, axis=0)
    if widths.min() > WIDEST_SPAN:
        raise RsdError(f"{target}: expected something at most {WIDEST_SPAN} m wide, found {widths.min():.3f} m")

    def preference(place: tuple[int, float]) -> tuple[bool, int, float, float, float]:
        k, along = place
        failed = any(abs(np.cos(angles[k] - other)) > 0.99 for other in avoid)
        grade = int((widths[k] - widths.min()) / WIDTH_STEP)
        return failed, grade, abs(along), round(abs(yaw_of(float(angles[k]))), 3), float(angles[k])

    above = SpanGrasp(0.0, span=span).point(scene, target)[2] - float(scene.vertices(target)[:, 2].min())
    narrow = [k for k in range(SPAN_DIRECTIONS) if widths[k] <= WIDEST_SPAN]
    ordered = sorted(itertools.product(narrow, ALONG_HANDLE if np.isfinite(span.tail) else (0.0,)), key=preference)
    return (SpanGrasp(float(angles[k]), above, span, along) for k, along in ordered)


def choose_grasp(
    scene: Scene,
    target: str,
    candidates: Iterable[Grasp],
    destination: Vector,
    mode: GraspMode = "canonical",
    rng: np.random.Generator | None = None,
) -> Grasp:
    """The first candidate that collides with nothing, or the least blocked one.

    destination: where the object's lowest point goes [3]; the palm must be free there too.
    mode "two-sided" and "two-sided-late" toss a coin (rng) between the free candidates that turn the wrist as far as
    the first one: between the two sides of a rim.
    """
    if mode not in get_args(GraspMode):
        raise RsdError(f"grasp mode: expected one of {', '.join(get_args(GraspMode))}, found {mode!r}")
    if mode != "canonical" and rng is None:
        raise RsdError(f"grasp mode {mode}: expected a random generator, found none")
    overlaps: list[tuple[float, Grasp]] = []
    free: list[Grasp] = []
    for grasp in candidates:
        overlaps.append((_overlap(scene, target, grasp, destination), grasp))
        if overlaps[-1][0] <= ALLOWED_OVERLAP:
            if rng is None or mode == "canonical":
                return grasp
            free.append(grasp)
    if not free or rng is None:
        return min(overlaps, key=lambda each: each[0])[1]
    sides = [grasp for grasp in free if np.isclose(abs(grasp.yaw), abs(free[0].yaw))]
    return sides[int(rng.integers(len(sides)))]


def _overlap(scene: Scene, target: str, grasp: Grasp, destination: Vector) -> float:
    """How deep the open hand would sink into the scene at the grasp, and the palm at the destination (m, summed)."""
    centre = grasp.point(scene, target)
    along, across = grasp.direction, np.array([-grasp.direction[1], grasp.direction[0]])

    def grid(lengths: Iterable[float], widths: Iterable[float]) -> Vector:
        return np.array([r * along + q * across for r, q in itertools.product(lengths, widths)])

    sides = [side * (FINGER_OPENING / 2 + out) for side in (-1, 1) for out in np.linspace(0.001, 0.027, 7)]
    fingers = grid(sides, np.linspace(-FINGER_HALF_WIDTH, FINGER_HALF_WIDTH, 7))  # dense: drawer walls are thin
    dense = isinstance(grasp, SpanGrasp) and np.isfinite(grasp.span.tail)  # beside a pot's spout, thinner than the grid
    across_palm = np.linspace(-PALM_HALF_WIDTH, PALM_HALF_WIDTH, 9 if dense else 3)
    palm = grid(np.linspace(-PALM_HALF_LENGTH, PALM_HALF_LENGTH, 17 if dense else 9), across_palm)
    tips, palm_height = centre[2] - TIP_BELOW_SITE, centre[2] + PALM_ABOVE_SITE
    foot = (centre - centre[2] * grasp.upward)[:2]
    others = scene.heights(np.concatenate([fingers, palm]) + foot, (target,), grasp.upward)
    own = scene.heights(fingers + foot, (), grasp.upward)  # the bowl's floor under the inner finger
    bottom = float(scene.vertices(target)[:, 2].min())
    moved = centre + np.array([*(destination[:2] - scene.position(target)[:2]), destination[2] - bottom])
    there = scene.heights(palm + moved[:2], ignore=(target,))
    sunk = [others[: len(fingers)] - (tips - 0.002), own - (tips - 0.001)]
    sunk += [others[len(fingers) :] - (palm_height - 0.004), there - (moved[2] + PALM_ABOVE_SITE - 0.004)]
    return float(np.maximum(np.concatenate(sunk), 0.0).sum())


def about(axis: Vector, angle: float) -> NDArray[np.float64]:
    """Rotation by `angle` (rad) about a unit axis [3] (Rodrigues)."""
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]], dtype=np.float64)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)
