"""A residual head over a stale chunk, run at every control step (A2C2, arXiv 2509.23224): a baseline for late answers.

It looks at the newest observation, at what the target's chunk says from now on, at how far into that chunk now is, and
at what the target saw when it made it, and adds a correction to the action that is due.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsd.models.config import VisualDrafterConfig
from rsd.models.target import STATE_FEATURES, BlockTarget, TargetModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer

OCTAVES = 4  # in which the place within the chunk is shown


class Stale(NamedTuple):
    """A target's chunk [B, H, 7], and what the corrector reads of the cache that it left (`VisualDrafter.reads`)."""

    chunk: Tensor
    read: list[Tensor]


class ChunkCorrector(nn.Module):
    """The visual drafter's trunk, told the stale chunk beside the state, with a head for what the chunk lacks."""

    def __init__(self, config: VisualDrafterConfig, target: TargetModel) -> None:
        super().__init__()
        dim, self.horizon, self.scalars = config.dim, target.horizon, target.motion_dim + 1
        self.eyes = VisualDrafter(config, target.code, self.horizon, target.motion_dim, target.config)
        told = STATE_FEATURES + self.horizon * self.scalars + 2 * OCTAVES
        self.eyes.state_in = nn.Sequential(nn.Linear(told, dim), nn.SiLU(), nn.Linear(dim, dim))
        for unused in (self.eyes.levels, self.eyes.residual_head, self.eyes.deviation_head):
            unused.requires_grad_(False)
        self.head = nn.Linear(dim, self.scalars)
        nn.init.zeros_(self.head.weight)  # at first nothing is corrected
        nn.init.zeros_(self.head.bias)

    def forward(
        self, images: Tensor, state: Tensor, condition: Tensor, read: list[Tensor], rest: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """images, normalised state, condition: of now, as of `VisualDrafter.perceive`; read: of the observation that
        the chunk is of; rest [B, H, 7]: the chunk from now on (`rest_of`); index int [B]: of its first action in the
        chunk -> the corrected motion [B, H, 6] of now and the steps after it, and logits [B, H] that the gripper
        closes."""
        angles = torch.pi * index[:, None] / self.horizon * 2.0 ** torch.arange(OCTAVES, device=index.device)
        told = torch.cat([state, rest.flatten(1), angles.sin(), angles.cos()], dim=1)
        found = self.head(self.eyes.perceive(images, told, condition, self.eyes.remember(read)))
        return rest[..., :-1] + found[..., :-1], 2.0 * rest[..., -1] + found[..., -1]


def rest_of(chunk: Tensor, index: Tensor) -> Tensor:
    """chunk [B, H, 7] from its action index int [B] on, the last one repeated: [B, H, 7]."""
    steps = torch.arange(chunk.shape[1], device=chunk.device) + index[:, None]
    return chunk.gather(1, steps.clamp(max=chunk.shape[1] - 1)[..., None].expand_as(chunk))


@torch.no_grad()
def stale_run(
    target: BlockTarget, tokenizer: ActionTokenizer, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]
) -> Stale:
    """The target's own chunk (`l1`) of an observation; state features [B, 11], not normalised."""
    prefix = target.embed_prefix(images, state, text)
    features, cache = target.prefill(prefix)
    value, closed = target.residual(features, 1).float(), target.gripper_logits(features) > 0
    chunk = tokenizer.actions_of(value * tokenizer.first_step, closed.long())
    return Stale(chunk, VisualDrafter.reads(cache, target.remembered(prefix.shape[1])))
