"""Free-text instructions: words hashed to embeddings, a small encoder, a few language tokens.

Hashing needs no vocabulary file and no English word is ever refused; two words share an embedding only by collision.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.checks import shown
from rsd.models.config import TEXT_HEADS
from rsd.types import RsdError
from rsd.words import MAX_WORDS, words_of

BUCKETS = 4096  # id 0 is the padding


def word_ids(instructions: list[str]) -> Tensor:
    """Texts -> int64 [B, MAX_WORDS], zero-padded. Case, accents and punctuation do not matter.

    `RsdError` for longer texts, letters of other alphabets, and signs that may mean something, such as emoji."""
    if isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
        raise RsdError(f"instructions: expected a list of texts, found {shown(instructions)}")
    rows = [[1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words_of(text)] for text in instructions]
    return torch.tensor([ids + [0] * (MAX_WORDS - len(ids)) for ids in rows])


class TextEncoder(nn.Module):
    """Word ids [B, MAX_WORDS] -> language tokens [B, N, D] and a condition [B, D] for the image encoders."""

    def __init__(self, dim: int, tokens: int, layers: int = 2, heads: int = TEXT_HEADS) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS, dim, padding_idx=0)
        self.position = nn.Parameter(torch.randn(MAX_WORDS, dim) * 0.02)
        self.queries = nn.Parameter(torch.randn(tokens + 1, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.words(ids) + self.position, self.queries.expand(len(ids), -1, -1)], dim=1)
        queries = len(self.queries)
        padding = F.pad(ids == 0, (0, queries))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        out = self.norm(x[:, -queries:])
        return out[:, 1:], out[:, 0]
