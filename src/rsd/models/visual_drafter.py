"""The draft with a small perception of its own: few image tokens and the state of now, and what the target remembers.

It runs before the target, so that its tokens can ride in the target's prefill, or the target need not run at all.
Precise positions of things it has from the target's key/value cache of an earlier chunk: what stands still needs no
second look.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsd.models.config import VisualDrafterConfig
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.fusing import fusible
from rsd.models.streams import together
from rsd.models.target import STATE_FEATURES, TargetConfig
from rsd.models.trunk import KVCache, Trunk
from rsd.models.vision import CameraEncoder
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import CAMERAS, RsdError


class Memory(NamedTuple):
    """What the draft keeps of the target's last run, per layer of its own: keys and values [B, heads, S, head_dim].

    known: bool [B], rows that have one; None where all have."""

    keys: list[Tensor]
    values: list[Tensor]
    known: Tensor | None = None


class VisualDrafter(nn.Module):
    """Observation and memory -> features [B, H, d] of the chunk's steps; from them tokens, a chunk, a forecast."""

    def __init__(
        self, config: VisualDrafterConfig, code: RfsqConfig, horizon: int, motion_dim: int, target: TargetConfig
    ) -> None:
        super().__init__()
        if target.image_size % (16 * config.shrink):
            expected = f"an image size that is a multiple of 16 x {config.shrink}"
            raise RsdError(f"visual drafter: expected {expected}, found {target.image_size}")
        self.config, self.code = config, code
        dim, side = config.dim, target.image_size // config.shrink // 16
        self.cameras = nn.ModuleList(
            CameraEncoder(config.channels, target.text_dim, config.depth, config.shrink) for _ in CAMERAS
        )
        self.image_in = nn.Linear(config.channels[-1], dim)
        self.image_position = nn.Parameter(torch.randn(len(CAMERAS) * side**2, dim) * 0.02)
        self.state_in = nn.Sequential(nn.Linear(STATE_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text_in = nn.Linear(target.text_dim, dim)
        self.queries = nn.Parameter(torch.randn(horizon, dim) * 0.02)
        self.memory_in = nn.Linear(2 * target.dim, 2 * config.layers * dim)
        self.trunk = Trunk(dim, config.layers, config.heads)
        self.levels = FeatureDrafter(config.levels, code, horizon, motion_dim, dim)
        self.residual_head = nn.Linear(config.levels.dim, motion_dim)
        self.deviation_head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    @staticmethod
    def reads(cache: KVCache, length: int) -> list[Tensor]:
        """What `remember` reads of the first `length` positions of the target's cache (`BlockTarget.remembered`): the
        values of a middle and of the last layer, what the target's own queries take from its prefix."""
        middle = len(cache.values) // 2 - 1 if len(cache.values) > 1 else 0
        return [cache.values[layer][:, :, :length] for layer in (middle, -1)]

    @fusible
    def remember(self, read: list[Tensor]) -> Memory:
        """What `reads` takes of the target's cache -> what this draft attends to."""
        seen = torch.cat([values.transpose(1, 2).flatten(2) for values in read], dim=-1)
        both = self.memory_in(seen)  # [B, S, 2 * layers * d]
        keys, values = both.unflatten(-1, (2, self.config.layers, self.config.heads, -1)).permute(2, 3, 0, 4, 1, 5)
        return Memory(list(keys), list(values))

    def perceive(
        self, images: Tensor, state: Tensor, condition: Tensor, memory: Memory | None, known: Tensor | None = None
    ) -> Tensor:
        """images [B, 2, 3, S, S] in [-0.5, 0.5], normalised state features [B, 11], instruction [B, Dt] -> [B, H, d].

        known bool [B]: where False, the memory is out of sight (an episode's first chunk has none)."""
        cameras = [partial(camera, images[:, i], condition) for i, camera in enumerate(self.cameras)]
        return self._attend(together(cameras, images.device), state, condition, memory, known)

    @fusible
    def _attend(
        self, tokens: list[Tensor], state: Tensor, condition: Tensor, memory: Memory | None, known: Tensor | None
    ) -> Tensor:
        """`perceive` from the cameras' tokens on."""
        single = torch.stack([self.state_in(state), self.text_in(condition)], dim=1)
        queries = self.queries.expand(len(single), -1, -1).to(single.dtype)
        seen = self.image_in(torch.cat(tokens, dim=1)) + self.image_position
        x = torch.cat([seen, single, queries], dim=1)
        cache = KVCache() if memory is None else KVCache(list(memory.keys), list(memory.values))
        mask = None
        if known is not None:
            row = torch.cat([known[:, None].expand(-1, cache.length), known.new_ones(len(x), x.shape[1])], dim=1)
            mask = row[:, None, None].expand(-1, 1, x.shape[1], -1)
        return self.trunk(x, cache, mask)[:, -len(self.queries) :]

    def remainder(self, features: Tensor, prefix: Tensor, gripper: Tensor) -> Tensor:
        """What all coarse levels together, decoded [B, H*M], still miss: [B, H*M] in first steps."""
        level = self.config.levels.levels + 1
        read, _ = self.levels.read(features)
        scale = 2.0 * self.code.weight(level)
        return self.residual_head(self.levels.think(read, prefix, gripper, level)).flatten(1) * scale

    def log_deviation(self, features: Tensor) -> Tensor:
        """Log of 1 mm + how far its chunk leads the fingertip away from the target's, as it expects it: [B]."""
        return self.deviation_head(features.mean(1)).squeeze(-1)
