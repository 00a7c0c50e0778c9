"""The visual drafter without a target of this package: with words and state scales of its own, and no memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd.models.config import StandaloneDrafterConfig, TargetConfig
from rsd.models.target import STATE_FEATURES
from rsd.models.text import TextEncoder
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.rfsq import RfsqConfig


class StandaloneDrafter(nn.Module):
    """What decoding's primitives ask of a target where only the drafter runs, and the drafter itself, `visual`."""

    state_mean: Tensor
    state_std: Tensor

    def __init__(self, config: StandaloneDrafterConfig, code: RfsqConfig, horizon: int, motion_dim: int) -> None:
        super().__init__()
        self.code, self.horizon, self.motion_dim = code, horizon, motion_dim
        self.text = TextEncoder(config.text_dim, 1)
        # the smallest that its projection of a target's memory can have: none is ever read
        unseen = TargetConfig(config.image_size, dim=1, heads=1, text_dim=config.text_dim)
        self.visual = VisualDrafter(config.visual, code, horizon, motion_dim, unseen)
        self.register_buffer("state_mean", torch.zeros(STATE_FEATURES))
        self.register_buffer("state_std", torch.ones(STATE_FEATURES))

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word ids [B, 32] -> language tokens [B, 1, Dt], condition [B, Dt]."""
        return self.text(ids)

    def normalise(self, state: Tensor) -> Tensor:
        """State features [B, 11] in standard deviations of the training data."""
        return (state - self.state_mean) / self.state_std
