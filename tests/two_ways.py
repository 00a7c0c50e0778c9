"""A policy of one's own that continues from a draft, with what of a wrong one it is known to inherit."""

from pathlib import Path

import numpy as np
from scipy.stats import norm

from rsd.types import Observation

SEEN = Observation(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(8, np.float32), "pick up the bowl")
WAY = np.full((8, 7), 0.5, np.float32)  # one mode of TwoWays, -WAY is the other
STEPS = 10
HERE = str(Path(__file__).resolve())


class TwoWays:
    """Flow matching between noise (time 1) and two chunks that are equally right, WAY and -WAY: its velocity is known.

    What is denoised is x, the share of WAY in a chunk. Given x at time t, the clean one is expected at
    tanh((1 - t) x / t^2), whose sign is that of x: the mode is decided where the steps begin."""

    image_size, num_inference_steps = 64, STEPS

    def reset(self, seed: int = 0) -> None:
        self.noise = np.random.default_rng(seed)

    def predict(self, observation: Observation) -> np.ndarray:
        return self.denoised(self.noise.normal(), STEPS)

    def continue_from(self, observation: Observation, draft: np.ndarray, steps: int) -> np.ndarray:
        time, clean = steps / STEPS, float((draft * WAY).sum() / (WAY * WAY).sum())
        return self.denoised(time * self.noise.normal() + (1 - time) * clean, steps)

    def denoised(self, x: float, steps: int) -> np.ndarray:
        for left in range(steps, 0, -1):
            time = left / STEPS
            velocity = (x - np.tanh((1 - time) * x / time**2)) / time
            x -= velocity / STEPS
        return x * WAY


class OneWay:
    """A policy that cannot continue."""

    image_size = 64

    def reset(self) -> None: ...

    def predict(self, observation: Observation) -> np.ndarray:
        return WAY


def inherited(steps: int) -> float:
    """How often TwoWays gives up its own mode for the draft's: its noise n < 0 would lead to the other one, and
    t n + (1 - t) > 0."""
    time = steps / STEPS
    return 2 * float(norm.cdf((1 - time) / time)) - 1
