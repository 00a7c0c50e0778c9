"""The RFSQ target on OpenVLA's trunk: `TargetModel`'s interface, so that every strategy of `decoding` runs on it.

The prefix is OFT's (every position sees every other) and ends with the prompt; the level blocks follow it. Heads and
block embeddings are the compact model's own, as wide as the trunk.

Two readers share what is seen, the target and a visual drafter, so a scene carries both's input: images of both cameras
[B, 2, 6, S, S] of which the target takes the first `cameras`; state [B, 19], OFT's 8 normalised numbers and the 11
features of `state_features`; text, the prompt's token ids [B, T] and the visual drafter's word ids [B, 32].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rsd.models.target import STATE_FEATURES, BlockEmbedding, LevelHead, TargetModel
from rsd.models.text import MAX_WORDS
from rsd.models.trunk import KVCache
from rsd.targets.openvla.llama import Attend, Llama, StaticCache
from rsd.targets.openvla.model import OpenVlaModel
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import STATE_DIM


class LlamaTrunk(nn.Module):
    """`Trunk`'s call on a Llama: x [B, n, D], cache, mask bool [n, S + n] or None = everything so far."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, x: Tensor, cache: StaticCache | KVCache, mask: Tensor | None = None) -> Tensor:
        return self.llama(x.to(self.llama.norm.dtype), Attend(mask=mask), cache)


class OpenVlaTarget(TargetModel):
    """`logits`, `residual`, `extend` and the like are `TargetModel`'s; prefix, trunk and cache are OpenVLA's."""

    def __init__(
        self, openvla: OpenVlaModel, code: RfsqConfig, horizon: int, motion_dim: int, cameras: int = 2
    ) -> None:
        nn.Module.__init__(self)  # not TargetModel's: none of its cameras and words
        self.code, self.horizon, self.motion_dim, self.used_cameras = code, horizon, motion_dim, cameras
        self.openvla = openvla
        dim = openvla.config.llama.dim
        self.trunk = LlamaTrunk(openvla.language_model)  # type: ignore[assignment]
        self.block = BlockEmbedding(dim, horizon, motion_dim, code.levels)
        self.level_head = LevelHead(dim, motion_dim, code.levels, code.symbols)
        self.parallel_head = nn.Linear(dim, code.levels * motion_dim * code.symbols)
        self.gripper_head = nn.Linear(dim, 1)
        self.residual_head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, motion_dim))
        for name, part in self.named_children():
            if name not in ("openvla", "trunk"):  # whose matrices may be FP8 and stay so
                part.to(openvla.device, openvla.dtype)
        self.register_buffer("state_mean", torch.zeros(STATE_FEATURES, device=openvla.device))
        self.register_buffer("state_std", torch.ones(STATE_FEATURES, device=openvla.device))

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's ids [B, 32 + T], words for the visual drafter and then the prompt -> prompt [B, T], words [B,
        32]."""
        return ids[:, MAX_WORDS:], ids[:, :MAX_WORDS]

    def normalise(self, state: Tensor) -> Tensor:
        """The visual drafter's part of the state [B, 19] -> [B, 11] in standard deviations of the training data."""
        return super().normalise(state[:, STATE_DIM:])

    def embed_prefix(self, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Normalised pixels [B, >= cameras, 6, S, S], state [B, >= 8], text: prompt ids [B, T] and what the target does
        not read -> prefix [B, N, D]."""
        given = None if self.openvla.proprio_projector is None else state[:, :STATE_DIM]
        return self.openvla.embed_prefix(self.openvla.embed_images(images[:, : self.used_cameras]), text[0], given)

    def prefill_blocks(
        self, prefix: Tensor, prefixes: list[Tensor], gripper: Tensor | None, first_level: int = 2
    ) -> tuple[list[Tensor], KVCache]:
        """`TargetModel.prefill_blocks`; the cache has room for all levels. In training it grows, as gradients need
        it."""
        (batch, length), queries = prefix.shape[:2], self._queries(prefix, prefixes, gripper, first_level)
        mask = None
        if prefixes:
            own = self._block_mask(1 + len(prefixes), prefix.device)
            mask = torch.cat([own.new_ones(len(own), length), own], dim=1)
        llama = self.openvla.language_model
        growing = torch.is_grad_enabled()
        cache = KVCache() if growing else llama.new_cache(batch, length + self.horizon * self.code.levels)
        hidden = llama(torch.cat([prefix, queries.to(prefix.dtype)], dim=1), Attend(split=length, mask=mask), cache)
        # the same to its users: `length` and `truncate`
        return list(hidden[:, length:].split(self.horizon, dim=1)), cast(KVCache, cache)
