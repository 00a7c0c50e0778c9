"""Messages as openpi's LIBERO client sends them."""

from typing import Any

import numpy as np

from rsd.types import Observation


def content_of(observation: Observation, **more: Any) -> dict[str, Any]:
    image, wrist = observation.images
    return {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": observation.state.astype(np.float64),
        "prompt": observation.instruction,
        **more,
    }
