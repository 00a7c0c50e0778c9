"""What a client asks: openpi's LIBERO keys -> an observation of the size that the policy looks at.

Images arrive upright (LIBERO's own turned by 180 degrees, as openpi's client sends them), uint8, height x width x RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsd.checks import checked
from rsd.targets.remote.wire import Limits
from rsd.types import ACTION_DIM, CAMERAS, Observation, RsdError, Steps, real_array

IMAGES = ("observation/image", "observation/wrist_image")  # in the order of CAMERAS
STATE, PROMPT, RESET, CORRECTIONS = "observation/state", "prompt", "reset", "corrections"
DRAFT, STEPS = "draft", "steps"
KEYS = (*IMAGES, STATE, PROMPT, RESET, CORRECTIONS, DRAFT, STEPS)
# A policy of 256 px may be sent openpi's 224, not LIBERO's 128: what it looks for would not be there.
MIN_SCALE = 0.75
MAX_SIDE = 2048  # pixels
# the fields, the shapes of four arrays, a state as a list
LIMITS = Limits(text=1 << 16, array=3 * MAX_SIDE**2, elements=256)
# OpenVLA's filter. On 16 frames of 4 tasks, drawn at 256 px and sent as 224, it moved the shipped policy's chunks by
# 0.0016 on average (commands in [-1, 1]) from those of frames drawn at 128; other antialiased filters 0.0017 to 0.0024.
FILTER = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Request:
    """reset: an episode begins. observation: None where nothing but that is said. corrections: of `rsd-async`, the
    answer is always a draft, and a second message holds what the target makes of it. draft: actions [H, 7] to continue
    from, and how many denoising steps to take."""

    observation: Observation | None
    reset: bool
    corrections: bool = False
    draft: tuple[NDArray[np.float32], int] | None = None


def read_request(content: Any, image_size: int, cameras: int) -> Request:
    """An unpacked message -> request; `RsdError` names what it should have held.

    image_size: the policy's, pixels; cameras: how many it looks at, the others may be left out.
    """
    if not isinstance(content, Mapping):
        raise RsdError(f"message: expected a map with the keys {', '.join(KEYS)}, found {type(content).__name__}")
    if unknown := [excerpt(key, 40) for key in islice((key for key in content if key not in KEYS), 3)]:
        raise RsdError(f"message: expected the keys {', '.join(KEYS)}, found {', '.join(unknown)} besides")
    prompt, reset, corrections = words_of(content)
    if reset and len(content) == 1:
        return Request(None, True)
    needed = (*IMAGES[:cameras], STATE, PROMPT)
    if missing := [key for key in needed if key not in content]:
        found = ", ".join(content) or "none"
        begin = f"{{{RESET!r}: True}}"
        raise RsdError(f"message: missing {', '.join(missing)}; found {found}; an episode's begin alone is {begin}")
    views = [resized(key, content[key], image_size) for key in IMAGES if key in content]
    # a camera that this policy does not look at
    views += [np.zeros_like(views[0])] * (len(CAMERAS) - len(views))
    observation = Observation(np.stack(views), real_array(STATE, content[STATE]), prompt)
    draft = None
    if DRAFT in content or STEPS in content:
        actions = real_array(DRAFT, content.get(DRAFT), shape=("H", ACTION_DIM))
        draft = actions, checked(Steps, content.get(STEPS), STEPS)
    return Request(observation, reset, corrections, draft)


def words_of(content: Mapping[Any, Any]) -> tuple[str, bool, bool]:
    """A message's prompt, reset and corrections, "" and false where there is none; `RsdError` for other kinds."""
    prompt, flags = content.get(PROMPT, ""), {key: content.get(key, False) for key in (RESET, CORRECTIONS)}
    for key, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise RsdError(f"{key}: expected true or false, found {excerpt(flag)}")
    if not isinstance(prompt, str):
        raise RsdError(f"{PROMPT}: expected text, found {type(prompt).__name__}")
    return prompt, bool(flags[RESET]), bool(flags[CORRECTIONS])


def excerpt(value: Any, most: int = 100) -> str:
    """What an error shows of a value that a client sent; nothing longer than that is built."""
    if isinstance(value, str | bytes):
        return repr(value[:most])[: most + 2]
    return repr(value)[:most] if isinstance(value, bool | int | float | None) else type(value).__name__


def resized(key: str, image: Any, size: int) -> NDArray[np.uint8]:
    """Square uint8 [S, S, 3] -> [size, size, 3] by FILTER, antialiased; the same array if it fits already."""
    width = square(key, image).shape[0]
    if not MIN_SCALE * size <= width <= MAX_SIDE:
        expected = f"{size} x {size} pixels, or from {int(np.ceil(MIN_SCALE * size))} to {MAX_SIDE} to be resized"
        raise RsdError(f"{key}: expected {expected}, found {width} x {width}")
    if width == size:
        return np.asarray(image)
    return np.asarray(Image.fromarray(image).resize((size, size), FILTER))


def square(key: str, image: Any) -> NDArray[np.uint8]:
    """The image itself; `RsdError` unless it is square, uint8 [S, S, 3]."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise RsdError(f"{key}: expected uint8 [S, S, 3], values 0 to 255, RGB, found {found}")
    height, width, _ = image.shape
    if height != width:
        found = f"{height} x {width}"
        raise RsdError(f"{key}: expected a square image as the policy was trained on, found {found}; crop or pad it")
    return image
