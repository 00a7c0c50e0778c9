"""From an error of the hand's pose to an action: proportional, within the controller's limits."""

from __future__ import annotations

import numpy as np

from rsd.expert.grasps import rotation_vector
from rsd.expert.scene import Scene, Vector

SIDEWAYS_GAIN, HEIGHT_GAIN = 22.0, 40.0  # action per metre; more sideways overshoots, the arm is damped for 20
ROTATION_GAIN = 3.0 / 0.5  # action per radian
LATE = 3.4  # steps that the hand is behind what moves: it goes SIDEWAYS_GAIN * 0.05 m * 0.265 of an error a step
FASTEST = 0.015  # m a step; what is faster has jumped


class Leading:
    """How far ahead of something to aim so that the hand is not behind it, in scenes that move."""

    def __init__(self) -> None:
        self._last: Vector = np.full(3, np.nan)
        self.way: Vector = np.zeros(3)  # m

    def see(self, place: Vector, touched: bool = False) -> None:
        """Once a step: where it is [3]; touched: it moves with the hand."""
        moved, self._last = place - self._last, place.copy()
        moved[2] = 0.0
        known = bool(np.linalg.norm(moved) <= FASTEST) and not touched  # not before the second look
        self.way = LATE * moved if known else np.zeros(3)


def step_towards(scene: Scene, error: Vector, rotation: Vector, gripper: float, turn_limit: float = 1.0) -> Vector:
    """Action [7] that takes the hand along `error` (m, [3]) and to the orientation `rotation` [3, 3]."""
    # limited apart: a common factor would leave no height control while the hand is far away
    sideways, height = limited(error[:2] * SIDEWAYS_GAIN), np.clip(error[2] * HEIGHT_GAIN, -1.0, 1.0)
    turn = rotation_vector(rotation @ scene.eef_rotation.T)
    return np.array([*sideways, height, *turn_limit * limited(turn * ROTATION_GAIN / turn_limit), gripper])


def turn_left(scene: Scene, rotation: Vector) -> float:
    """How far the hand's orientation is from `rotation` (rad)."""
    return float(np.linalg.norm(rotation_vector(rotation @ scene.eef_rotation.T)))


def funnel(off: float, low: float, high: float, radius: float, slope: float) -> float:
    """Height (m) wanted at a horizontal distance `off`: low within the radius, rising to high outside it."""
    return float(low + np.clip((off - radius) * slope, 0.0, max(0.0, high - low)))


def limited(vector: Vector) -> Vector:
    """Scales a vector so that no component exceeds 1; keeps its direction, so paths stay straight."""
    return vector / max(1.0, float(np.abs(vector).max()))
