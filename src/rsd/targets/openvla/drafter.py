"""The visual drafter beside OpenVLA: it reads the target's own pixels, made smaller, and has a text encoder of its own.

Its memory are values of the Llama's cache, as with the compact target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rsd.models.target import TargetConfig
from rsd.models.text import TextEncoder
from rsd.models.visual_drafter import Memory, VisualDrafter, VisualDrafterConfig
from rsd.tokenizer.rfsq import RfsqConfig

IMAGE_SIZE = 128  # pixels a side before the configuration's `shrink`, as for the compact policy


class OpenVlaVisualDrafter(VisualDrafter):
    """target_dim: width of the Llama. The rest is `VisualDrafter`'s, but for what `perceive` is given."""

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
