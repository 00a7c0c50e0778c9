"""The visual drafter without a target of this package: with words and state scales of its own, and no memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from rsd.checks import Checked, between, multiple
from rsd.models.config import TEXT_HEADS, TargetConfig, VisualDrafterConfig
from rsd.models.target import STATE_FEATURES
from rsd.models.text import TextEncoder
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.rfsq import RfsqConfig


@dataclass(frozen=True)
class StandaloneDrafterConfig(Checked):
    """image_size: pixels a side that observations are resized to; visual: the drafter's sizes, which averages over
    visual.shrink x visual.shrink of them."""

    image_size: Annotated[int, between(32, 1024), multiple(32)] = 64
    text_dim: Annotated[int, between(1, 2**15), multiple(TEXT_HEADS)] = 128
    visual: VisualDrafterConfig = field(default_factory=lambda: VisualDrafterConfig(shrink=1))


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
        tokens, condition = self.text(ids)
        return tokens, condition

    def normalise(self, state: Tensor) -> Tensor:
        """State features [B, 11] in standard deviations of the training data."""
        return (state - self.state_mean) / self.state_std
