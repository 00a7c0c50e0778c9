"""Does the policy see? A black and a white image must not lead to the same features.

With transformers 4.50 and later OpenVLA's own remote code silently ignores the image, and the robot moves all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd.types import CAMERAS, STATE_DIM, Observation, Policy

MIN_RELATIVE_CHANGE = 1e-3  # rounding in bfloat16 alone, on identical input, is zero: kernels are deterministic


@dataclass(frozen=True)
class ImageSelfTest:
    """relative_change: per camera, black to white, of the features (of the actions where a policy shows none)."""

    relative_change: dict[str, float]
    compared: str

    @property
    def blind(self) -> list[str]:
        """Cameras whose image changes nothing."""
        return [camera for camera, change in self.relative_change.items() if change < MIN_RELATIVE_CHANGE]

    @property
    def passed(self) -> bool:
        return not self.blind

    def __str__(self) -> str:
        changes = ", ".join(f"{camera} {change:.1%}" for camera, change in self.relative_change.items())
        verdict = "the policy sees" if self.passed else f"the policy does NOT see {', '.join(self.blind)}"
        return f"black against white image, change of the {self.compared}: {changes}: {verdict}"


def image_self_test(policy: Policy) -> ImageSelfTest:
    """Turn one camera at a time from black to white; cameras that the policy says it does not use are left out."""
    features = getattr(policy, "features", None)
    used = getattr(getattr(policy, "settings", None), "cameras", None) or len(CAMERAS)

    def look(white: int | None) -> NDArray[np.float32]:
        images = np.zeros((len(CAMERAS), policy.image_size, policy.image_size, 3), np.uint8)
        if white is not None:
            images[white] = 255
        if reset := getattr(policy, "reset", None):  # what it saw last must not matter
            reset()
        observation = Observation(images, np.zeros(STATE_DIM, np.float32), "pick up the black bowl")
        return np.asarray(features(observation) if features else policy.predict(observation).actions)

    black = look(None)
    scale = float(np.linalg.norm(black)) or 1.0
    change = {CAMERAS[index]: float(np.linalg.norm(look(index) - black)) / scale for index in range(used)}
    return ImageSelfTest(change, "features" if features else "actions")
