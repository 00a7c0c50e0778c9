"""The RFSQ main model on OpenVLA's trunk: `MainModel`'s interface, so that every strategy of `decoding` runs on it.

The prefix is OFT's (every position sees every other) and ends with the prompt; the level blocks follow it. Heads and
block embeddings are the compact model's own, as wide as the trunk.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rsd.models.main import BlockEmbedding, LevelHead, MainModel
from rsd.models.openvla import OpenVlaModel
from rsd.models.openvla_llama import Attend, Llama, StaticCache
from rsd.models.trunk import KVCache
from rsd.tokenizer.rfsq import RfsqConfig


class LlamaTrunk(nn.Module):
    """`Trunk`'s call on a Llama: x [B, n, D], cache, mask bool [n, S + n] or None = everything so far."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, x: Tensor, cache: StaticCache, mask: Tensor | None = None) -> Tensor:
        return self.llama(x, Attend(mask=mask), cache)


class OpenVlaMain(MainModel):
    """`logits`, `residual`, `extend` and the like are `MainModel`'s; prefix, trunk and cache are OpenVLA's."""

    def __init__(self, openvla: OpenVlaModel, code: RfsqConfig, horizon: int, motion_dim: int) -> None:
        nn.Module.__init__(self)  # not MainModel's: none of its cameras and words
        self.code, self.horizon, self.motion_dim = code, horizon, motion_dim
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

    def embed_prefix(self, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Pixels [B, cameras, 6, S, S] normalised, state [B, 8] normalised, text: prompt ids [B, T] (twice, the
        interface has a pair) -> prefix [B, N, D]."""
        given = None if self.openvla.proprio_projector is None else state
        return self.openvla.embed_prefix(self.openvla.embed_images(images), text[0], given)

    def prefill_blocks(
        self, prefix: Tensor, prefixes: list[Tensor], gripper: Tensor | None
    ) -> tuple[list[Tensor], KVCache]:
        """`MainModel.prefill_blocks`; the cache has room for all levels."""
        (batch, length), queries = prefix.shape[:2], self._queries(prefix, prefixes, gripper)
        mask = None
        if prefixes:
            own = self._block_mask(1 + len(prefixes), prefix.device)
            mask = torch.cat([own.new_ones(len(own), length), own], dim=1)
        llama = self.openvla.language_model
        cache = llama.new_cache(batch, length + self.horizon * self.code.levels)
        hidden = llama(torch.cat([prefix, queries], dim=1), Attend(split=length, mask=mask), cache)
        # the same to its users: `length` and `truncate`
        return list(hidden[:, length:].split(self.horizon, dim=1)), cast(KVCache, cache)
