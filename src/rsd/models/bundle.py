"""The models of a compact policy together, and their configuration."""

from __future__ import annotations

from torch import nn

from rsd.checks import checked
from rsd.models.config import PolicyConfig
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.target import BlockTarget, TargetModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError


class RsdModel(nn.Module):
    """Target and drafters under one roof, so that one file holds their weights."""

    def __init__(
        self, target: BlockTarget, feature_drafter: FeatureDrafter, visual_drafter: VisualDrafter | None
    ) -> None:
        super().__init__()
        self.target, self.feature_drafter, self.visual_drafter = target, feature_drafter, visual_drafter

    @classmethod
    def of(cls, config: PolicyConfig, tokenizer: ActionTokenizer) -> RsdModel:
        """The compact models of these sizes, with random weights."""
        config = checked(PolicyConfig, config, "RsdModel.of: config")
        sizes = code_sizes(tokenizer)
        target = TargetModel(config.target, *sizes)
        feature_drafter = FeatureDrafter(config.feature_drafter, *sizes, config.target.dim)
        visual = config.visual_drafter
        return cls(target, feature_drafter, VisualDrafter(visual, *sizes, config.target) if visual else None)


def code_sizes(tokenizer: ActionTokenizer) -> tuple[RfsqConfig, int, int]:
    """The code, steps of a chunk and motion scalars of a step; `RsdError` unless the models can learn the code."""
    config = checked(ActionTokenizer, tokenizer, "policy: tokenizer").config
    if (grippers := len(config.binary)) != 1:
        raise RsdError(f"policy: expected a tokenizer with one gripper, found {grippers} binary dimensions")
    return config.rfsq, config.horizon, tokenizer.motion_dim
