"""Free-text instructions: words hashed to embeddings, a small encoder, a few language tokens.

Hashing needs no vocabulary file and no English word is ever refused; two words share an embedding only by collision.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rsd.checks import shown
from rsd.models.config import TEXT_HEADS
from rsd.types import RsdError

MAX_WORDS = 32
KNOWN = {*string.ascii_letters, *string.digits, *string.punctuation}
BUCKETS = 4096  # id 0 is the padding
FLAGS = 731  # of `word_flags`: no two words of LIBERO share one, and a width that no state of a robot has


def word_ids(instructions: list[str]) -> Tensor:
    """Texts -> int64 [B, MAX_WORDS], zero-padded. Case, accents and punctuation do not matter.

    `RsdError` for longer texts, letters of other alphabets, and signs that may mean something, such as emoji."""
    if isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
        raise RsdError(f"instructions: expected a list of texts, found {shown(instructions)}")
    rows = [[1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words_of(text)] for text in instructions]
    return torch.tensor([ids + [0] * (MAX_WORDS - len(ids)) for ids in rows])


def word_flags(instruction: str) -> NDArray[np.float32]:
    """Which words an instruction has, without their order: [FLAGS], 1 where one is hashed to. Errors as `word_ids`."""
    flags = np.zeros(FLAGS, np.float32)
    flags[[zlib.crc32(word.encode()) % FLAGS for word in words_of(instruction)]] = 1
    return flags


def words_of(text: str) -> list[str]:
    # accents off, as in "bläck": the vocabulary is of English words
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    if odd := sorted({c for c in plain if not (c in KNOWN or c.isspace() or unicodedata.category(c)[0] in "PZ")}):
        found = f"{''.join(odd[:20])!r} in {shown(text)}"
        raise RsdError(f"instruction: expected words of the letters a to z and digits, found {found}")
    words = re.findall(r"[a-z0-9]+", plain)
    if not 0 < len(words) <= MAX_WORDS:
        raise RsdError(f"instruction: expected 1 to {MAX_WORDS} words, found {len(words)} in {shown(text)}")
    return words


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
