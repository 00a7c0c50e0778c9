"""Disturbances on the executed action (DART, Laskey et al. 2017), so that demonstrations show recoveries.

The label stays the clean action at the visited state. Independent noise averages out over a chunk and never leads far
away; correlated noise and short constant pushes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Checked, Rules, Share, between

Steps = Annotated[int, between(1, 1000)]


class Disturbance(Protocol):
    """Turns the expert's clean action into the executed one."""

    def disturb(self, action: NDArray[np.float64], strength: float = 1.0) -> NDArray[np.float64]:
        """Clean action [7] -> executed action [7]; strength is below 1 where there is little room (the drawer)."""


@dataclass(frozen=True)
class NoiseConfig(Checked):
    """How strongly an episode may be disturbed; units are those of the action, whose range is [-1, 1]."""

    max_level: Share = 0.16
    """Standard deviation of the position noise; each episode draws its own level between 0 and this."""
    rotation_scale: Share = 0.25
    """Rotation noise relative to position noise."""
    correlation: Share = 0.85
    """Of the noise from one step to the next."""
    push_rate: Share = 0.02
    """Chance per step that a push starts, in an episode of the highest level."""
    push_steps: tuple[Steps, Steps] = (3, 6)
    """Shortest and longest push."""
    push_size: tuple[Share, Share] = (0.4, 1.0)
    """Smallest and largest length of a push (position part)."""

    def rules(self) -> Rules:
        for name, pair in (("--noise.push-steps", self.push_steps), ("--noise.push-size", self.push_size)):
            yield pair[0] <= pair[1], f"{name} with the smaller one first", pair


class ActionNoise:
    """The disturbance of one episode; `level` in [0, 1] scales the strength and how often pushes come."""

    def __init__(self, config: NoiseConfig, level: float, rng: np.random.Generator) -> None:
        self.config, self.level, self._rng = config, level, rng
        self._drift, self._push = np.zeros(6), np.zeros(6)
        self._push_left = 0

    def disturb(self, action: NDArray[np.float64], strength: float = 1.0) -> NDArray[np.float64]:
        """Clean action [7] -> executed action [7] within [-1, 1]. The gripper command is never touched."""
        config, rng = self.config, self._rng
        scale = config.max_level * self.level * np.array([1.0] * 3 + [config.rotation_scale] * 3)
        fresh = np.sqrt(1.0 - config.correlation**2)
        self._drift = config.correlation * self._drift + fresh * scale * rng.standard_normal(6)
        if self._push_left == 0 and rng.random() < config.push_rate * self.level:
            direction = rng.standard_normal(3)
            self._push[:3] = direction / np.linalg.norm(direction) * rng.uniform(*config.push_size)
            self._push[3:] = 0.1 * rng.standard_normal(3)
            self._push_left = int(rng.integers(config.push_steps[0], config.push_steps[1] + 1))
        offset = self._drift.copy()
        if self._push_left > 0:
            offset += self._push
            self._push_left -= 1
        executed = action.copy()
        executed[:6] = np.clip(action[:6] + strength * offset, -1.0, 1.0)
        return executed
