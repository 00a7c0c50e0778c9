"""Residual tokens on OpenVLA's trunk, and the visual drafter beside it: every decoder of `decoding` runs on them.

The prefix is OFT's (every position sees every other) and ends with the prompt; the level blocks follow it. Heads and
block embeddings are the compact model's own, as wide as the trunk.

Two readers share what is seen, the target and a visual drafter, so a scene carries both's input: images of both cameras
[B, 2, 6, S, S] of which the target takes the first `cameras`; state [B, 19], OFT's 8 normalised numbers and the 11
features of `state_features`; text, the prompt's token ids [B, T] and the visual drafter's word ids [B, 32].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.models.config import TargetConfig, VisualDrafterConfig
from rsd.models.target import BlockTarget
from rsd.models.text import TextEncoder
from rsd.models.trunk import KVCache
from rsd.models.visual_drafter import Memory, VisualDrafter
from rsd.targets.openvla.llama import Attend, Llama, StaticCache
from rsd.targets.openvla.model import OpenVlaModel
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import STATE_DIM
from rsd.words import MAX_WORDS

IMAGE_SIZE = 128  # pixels a side of the visual drafter before the configuration's `shrink`, as in the compact policy


class LlamaTrunk(nn.Module):
    """`Trunk`'s call on a Llama: x [B, n, D], cache, mask bool [n, S + n] or None = everything so far."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, x: Tensor, cache: StaticCache | KVCache, mask: Tensor | None = None) -> Tensor:
        return self.llama(x.to(self.llama.norm.dtype), Attend(mask=mask), cache)


class OpenVlaTarget(BlockTarget):
    """Blocks and heads are `BlockTarget`'s; prefix, trunk and cache are OpenVLA's."""

    def __init__(
        self, openvla: OpenVlaModel, code: RfsqConfig, horizon: int, motion_dim: int, cameras: int = 2
    ) -> None:
        super().__init__(code, horizon, motion_dim)
        self.openvla, self.used_cameras = openvla, cameras
        self._add_blocks(openvla.config.llama.dim, lambda: LlamaTrunk(openvla.language_model))
        for name, part in self.named_children():
            if name not in ("openvla", "trunk"):  # whose matrices may be FP8 and stay so
                part.to(openvla.device, openvla.dtype)
        self.state_mean, self.state_std = self.state_mean.to(openvla.device), self.state_std.to(openvla.device)

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

    def _prefill(self, prefix: Tensor, queries: Tensor, apart: bool = False) -> tuple[list[Tensor], KVCache]:
        """The cache has room for all levels. In training it grows, as gradients need it."""
        (batch, length), blocks, mask = prefix.shape[:2], queries.shape[1] // self.horizon, None
        if blocks > 1:
            own = self._block_mask(blocks, prefix.device, apart)
            mask = torch.cat([own.new_ones(len(own), length), own], dim=1)
        llama = self.openvla.language_model
        growing = torch.is_grad_enabled()
        cache = KVCache() if growing else llama.new_cache(batch, length + self.horizon * self.code.levels)
        hidden = llama(torch.cat([prefix, queries.to(prefix.dtype)], dim=1), Attend(split=length, mask=mask), cache)
        # the same to its users: `length` and `truncate`
        return list(hidden[:, length:].split(self.horizon, dim=1)), cast(KVCache, cache)


class OpenVlaVisualDrafter(VisualDrafter):
    """`VisualDrafter` on the target's own pixels, made smaller, with a text encoder of its own; target_dim: width of
    the Llama, of whose cache its memory are values."""

    def __init__(
        self, config: VisualDrafterConfig, code: RfsqConfig, horizon: int, motion_dim: int, target_dim: int
    ) -> None:
        reads = TargetConfig(image_size=IMAGE_SIZE, dim=target_dim, heads=1)
        super().__init__(config, code, horizon, motion_dim, reads)
        self.text = TextEncoder(reads.text_dim, reads.text_tokens)

    def perceive(
        self, images: Tensor, state: Tensor, condition: Tensor, memory: Memory | None, known: Tensor | None = None
    ) -> Tensor:
        """images [B, 2, 6, S, S] as the target reads them, normalised state features [B, 11], condition: word ids int
        [B, 32], or what `encode` made of them -> [B, H, d]."""
        dtype = self.queries.dtype
        # SigLIP's three channels are the pixels in [-1, 1]
        small = F.adaptive_avg_pool2d(images[:, :, 3:].flatten(0, 1).float() / 2, IMAGE_SIZE)
        pixels = small.unflatten(0, images.shape[:2]).to(dtype)
        words = condition if condition.is_floating_point() else self.encode(condition)
        return super().perceive(pixels, state.to(dtype), words, memory, known)

    def encode(self, words: Tensor) -> Tensor:
        """Word ids int [B, 32] -> the condition [B, Dt]; constant over an episode."""
        _, condition = self.text(words)
        return condition
