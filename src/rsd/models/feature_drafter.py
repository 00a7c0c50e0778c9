"""The draft: a small network on the target's prefill features that proposes the coarse levels in turn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd.models.config import DrafterConfig
from rsd.models.target import BlockEmbedding, LevelHead
from rsd.models.trunk import KVCache, Trunk
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError


class FeatureDrafter(nn.Module):
    """Reads the target's block-1 features [B, H, D_target]; level after level, only H positions wide and without
    a cache: what the levels so far decode to is all a level needs to know of them."""

    def __init__(self, config: DrafterConfig, code: RfsqConfig, horizon: int, motion_dim: int, target_dim: int) -> None:
        super().__init__()
        if not 1 <= config.levels < code.levels:
            allowed = f"1 to {code.levels - 1} levels for a code of {code.levels}"
            raise RsdError(f"draft: expected {allowed}, found {config.levels}")
        self.config = config
        self.features_in = nn.Linear(target_dim, config.dim)
        self.block = BlockEmbedding(config.dim, horizon, motion_dim, code.levels)
        self.trunk = Trunk(config.dim, config.layers, config.heads)
        self.level_head = LevelHead(config.dim, motion_dim, config.levels, code.symbols)
        self.gripper_head = nn.Linear(config.dim, 1)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Block-1 features of the target -> what `logits` reads [B, H, d], gripper logits [B, H]."""
        read = self.features_in(features)
        return read, self.gripper_head(torch.nn.functional.silu(read)).squeeze(-1)

    def logits(self, read: Tensor, prefix: Tensor, gripper: Tensor, level: int) -> Tensor:
        """Logits [B, H*M, K] of `level`, given what the levels above decode to [B, H*M], gripper [B, H]."""
        return self.level_head(self.think(read, prefix, gripper, level), level)

    def think(self, read: Tensor, prefix: Tensor, gripper: Tensor, level: int) -> Tensor:
        """Features [B, H, d] of `level`, given what the levels above it decode to."""
        return self.trunk(read + self.block(prefix.unsqueeze(1), gripper, level), KVCache())
