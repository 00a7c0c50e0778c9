"""Calibrated skipping."""

from __future__ import annotations

from torch import Tensor

TRANSLATION_M, ROTATION_RAD = 0.05, 0.5  # what an action of 1.0 commands in one step (LIBERO's OSC pose controller)
LEVER_M = 0.1  # grip site to fingertip and beyond: turns an angle into a displacement


def fingertip_deviation(draft: Tensor, main: Tensor) -> Tensor:
    """Two chunks [..., H, 7] -> how far the commanded fingertip positions part at most, in mm [...]."""
    apart = (draft - main)[..., :6].float().cumsum(-2)
    position = apart[..., :3].norm(dim=-1) * TRANSLATION_M
    turned = apart[..., 3:].norm(dim=-1) * ROTATION_RAD * LEVER_M
    return 1e3 * (position + turned).amax(-1)
