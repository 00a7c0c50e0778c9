"""The models of a compact policy together, and their configuration."""

from __future__ import annotations

from torch import nn

from rsd.models.config import PolicyConfig
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.target import TargetModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError


class RsdModel(nn.Module):
    """Target and drafts under one roof, so that one file holds their weights."""

    def __init__(self, config: PolicyConfig, tokenizer: ActionTokenizer) -> None:
        super().__init__()
        check_code(tokenizer)
        code, horizon, motion = tokenizer.config.rfsq, tokenizer.config.horizon, tokenizer.motion_dim
        self.target = TargetModel(config.target, code, horizon, motion)
        self.feature_drafter = FeatureDrafter(config.feature_drafter, code, horizon, motion, config.target.dim)
        self.visual_drafter = (
            VisualDrafter(config.visual_drafter, code, horizon, motion, config.target)
            if config.visual_drafter
            else None
        )


def check_code(tokenizer: ActionTokenizer) -> None:
    """Raise unless the models can learn the code."""
    if (grippers := len(tokenizer.config.binary)) != 1:
        raise RsdError(f"policy: expected a tokenizer with one gripper, found {grippers} binary dimensions")
