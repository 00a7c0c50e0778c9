"""Where to take a bowl: one finger inside the rim, one outside, chosen so that the choice is predictable.

A learner copies what it can predict from the cameras. The choice is therefore an ordered list (no wrist rotation
first, left side before right) from which the first collision-free entry is taken, not the minimum of a score that
would jump about with a millimetre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from rsd.sim.scene import Scene, Vector
from rsd.types import RsdError

GraspMode = Literal["canonical", "two-sided"]

RIM_RADIUS = 0.047  # m, bowl centre to grip site
BELOW_RIM, BELOW_RIM_IN_DRAWER = 0.016, 0.012  # m, grip site under the rim's top
RADIUS_IN_DRAWER = 0.027
TIP_BELOW_SITE = 0.010
PALM_ABOVE_SITE = 0.030
PALM_HALF_LENGTH = 0.105
PALM_HALF_WIDTH = 0.035
FINGER_OPENING = 0.08
FINGER_HALF_WIDTH = 0.012
ALLOWED_OVERLAP = 0.004  # m summed over the checked points
DIRECTIONS = 72  # candidate angles; open bowls try every third
DRAWER_ANGLE = np.radians(137.5)  # the roomiest in the drawer: one finger towards a corner

POINTING_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # fingers close along world y
SHOULDER_HEIGHT = 0.333  # m above the robot's base
WRIST_BACK, WRIST_UP = 0.088, 0.204  # m from grip site to wrist, pointing down
COMFORTABLE_REACH = 0.65  # m shoulder to wrist; beyond, the straight arm is near-singular
MAX_LEAN = np.radians(30)
MAX_SIDEWAYS_LEAN = np.radians(8)


@dataclass(frozen=True)
class RimGrasp:
    """angle: direction from the bowl's centre to the gripped rim point (rad, world); below: grip site under it (m).

    radius: bowl centre to grip site (m). Less than the rim's, the outer finger needs less room and pulls the bowl
    inwards as it closes.
    """

    angle: float
    below: float = BELOW_RIM
    radius: float = RIM_RADIUS

    @property
    def direction(self) -> Vector:
        """Unit vector [2] from the bowl's centre to the gripped point, also the closing axis."""
        return np.array([np.cos(self.angle), np.sin(self.angle)])

    @property
    def yaw(self) -> float:
        """Smallest rotation about z that brings the closing axis onto the direction (rad, within +-pi/2)."""
        return float((self.angle - np.pi / 2 + np.pi / 2) % np.pi - np.pi / 2)

    def point(self, scene: Scene, target: str, opening: float = FINGER_OPENING) -> Vector:
        """Grip site for this grasp, given where the bowl is now [3]. Follows a tilted rim.

        As the fingers close (opening, m), the point moves out to the rim.
        """
        centre = scene.position(target)
        closed = 1.0 - min(1.0, opening / FINGER_OPENING)
        spot = centre[:2] + (self.radius + (RIM_RADIUS - self.radius) * closed) * self.direction
        vertices = scene.vertices(target)
        near = vertices[np.linalg.norm(vertices[:, :2] - spot, axis=1) < 0.03]
        top = float((near if len(near) else vertices)[:, 2].max())
        return np.array([spot[0], spot[1], top - self.below])


def lean_angle(base: Vector, point: Vector, limit: float) -> float:
    """How far to lean the fingers outward at `point` so that the wrist stays in comfortable reach (rad)."""
    offset = point - base
    radius, height = float(np.hypot(offset[0], offset[1])), float(offset[2]) - SHOULDER_HEIGHT
    for lean in np.arange(0.0, limit + 1e-9, np.radians(1.0)):
        out = radius - WRIST_BACK * np.cos(lean) - WRIST_UP * np.sin(lean)
        up = height + WRIST_UP * np.cos(lean) - WRIST_BACK * np.sin(lean)
        if np.hypot(out, up) <= COMFORTABLE_REACH:
            return float(lean)
    return float(limit)


def lean_limit(base: Vector, point: Vector, closing_axis: Vector) -> float:
    """Leaning across the closing axis is harmless; leaning along it puts the fingers at unequal heights."""
    outward = (point - base)[:2]
    along = abs(float(closing_axis @ outward)) / float(np.linalg.norm(outward))
    return MAX_LEAN if along < 0.5 else MAX_SIDEWAYS_LEAN


def hand_rotation(base: Vector, point: Vector, yaw: float, limit: float) -> NDArray[np.float64]:
    """Orientation of the hand at `point` [3, 3]: down, turned by yaw, leaned outward as far as the reach asks."""
    outward = (point - base)[:2] / np.linalg.norm((point - base)[:2])
    axis = np.cross([0.0, 0.0, -1.0], [outward[0], outward[1], 0.0])
    return _about(axis, lean_angle(base, point, limit)) @ _about(np.array([0.0, 0.0, 1.0]), yaw) @ POINTING_DOWN


def rotation_vector(rotation: NDArray[np.float64]) -> Vector:
    """[3, 3] -> axis times angle (rad) [3], angle at most pi."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def choose_rim_grasp(
    scene: Scene,
    target: str,
    destination: Vector,
    mode: GraspMode = "canonical",
    rng: np.random.Generator | None = None,
    walled: bool = False,
    avoid: tuple[float, ...] = (),
) -> RimGrasp:
    """The first free grasp in the order of preference, or the least blocked one.

    destination: where the bowl's lowest point goes [3]; the palm must be free there too.
    mode "two-sided" tosses a coin (rng) between the two sides of the rim where both are free.
    walled: the bowl is in the drawer; shallower, and angles near the roomiest come first.
    avoid: angles that failed before (rad); they and their neighbours come last.
    """
    if mode not in ("canonical", "two-sided"):
        raise RsdError(f"grasp mode: expected canonical or two-sided, found {mode!r}")
    if mode == "two-sided" and rng is None:
        raise RsdError("grasp mode two-sided: expected a random generator, found none")
    angles = [2 * np.pi * k / DIRECTIONS for k in range(0, DIRECTIONS, 1 if walled else 3)]
    below, radius = (BELOW_RIM_IN_DRAWER, RADIUS_IN_DRAWER) if walled else (BELOW_RIM, RIM_RADIUS)
    least: tuple[float, RimGrasp] | None = None
    free: list[RimGrasp] = []
    for angle in sorted(angles, key=lambda angle: _preference(angle, walled, avoid)):
        grasp = RimGrasp(angle, below, radius)
        overlap = _overlap(scene, target, grasp, destination)
        if least is None or overlap < least[0]:
            least = (overlap, grasp)
        if overlap <= ALLOWED_OVERLAP:
            if mode == "canonical":
                return grasp
            free.append(grasp)
    if free:
        sides = [grasp for grasp in free if np.isclose(abs(grasp.yaw), abs(free[0].yaw))]
        assert rng is not None
        return sides[int(rng.integers(len(sides)))]
    assert least is not None
    return least[1]


def _preference(angle: float, walled: bool, avoid: tuple[float, ...]) -> tuple[float, float, float]:
    nearest_failure = max((np.cos(angle - other) for other in avoid), default=-1.0)
    failed = float(nearest_failure > (0.99 if walled else 0.8))
    if walled:
        return (failed, -round(float(np.cos(angle - DRAWER_ANGLE)), 3), angle)
    return (failed, round(abs(RimGrasp(angle).yaw), 3), -round(float(np.sin(angle)), 3))


def _overlap(scene: Scene, target: str, grasp: RimGrasp, destination: Vector) -> float:
    """How deep the open hand would sink into the scene at the grasp, and the palm at the destination (m, summed)."""
    centre = grasp.point(scene, target)
    along, across = grasp.direction, np.array([-grasp.direction[1], grasp.direction[0]])
    fingers = np.array(
        [
            side * (FINGER_OPENING / 2 + out) * along + q * across
            for side in (-1, 1)
            for out in np.linspace(0.001, 0.027, 7)  # dense: drawer walls are thin
            for q in np.linspace(-FINGER_HALF_WIDTH, FINGER_HALF_WIDTH, 7)
        ]
    )
    palm = np.array(
        [
            r * along + q * across
            for r in np.linspace(-PALM_HALF_LENGTH, PALM_HALF_LENGTH, 9)
            for q in (-PALM_HALF_WIDTH, 0.0, PALM_HALF_WIDTH)
        ]
    )
    tips, palm_height = centre[2] - TIP_BELOW_SITE, centre[2] + PALM_ABOVE_SITE
    others = scene.heights(np.concatenate([fingers, palm]) + centre[:2], ignore=(target,))
    own = scene.heights(fingers + centre[:2])  # the bowl's floor under the inner finger
    bottom = float(scene.vertices(target)[:, 2].min())
    moved = centre + np.array([*(destination[:2] - scene.position(target)[:2]), destination[2] - bottom])
    there = scene.heights(palm + moved[:2], ignore=(target,))
    sunk = np.concatenate(
        [
            others[: len(fingers)] - (tips - 0.002),
            own - (tips - 0.001),
            others[len(fingers) :] - (palm_height - 0.004),
            there - (moved[2] + PALM_ABOVE_SITE - 0.004),
        ]
    )
    return float(np.maximum(sunk, 0.0).sum())


def _about(axis: Vector, angle: float) -> NDArray[np.float64]:
    """Rotation by `angle` (rad) about a unit axis [3] (Rodrigues)."""
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]], dtype=np.float64)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)
