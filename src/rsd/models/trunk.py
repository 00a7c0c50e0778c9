"""Decoder-only trunk with a key/value cache: `prefill` calls it on an empty, `extend` on a filled cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.models.fusing import fusible


@dataclass
class KVCache:
    """Keys and values of every layer, each [B, heads, S, head_dim]; grows with each call, differentiable."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions (rejected blocks)."""
        self.keys = [key[:, :, :length] for key in self.keys]
        self.values = [value[:, :, :length] for value in self.values]


class TrunkLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:  # x: [B, n, D]
        q, k, v = self.before(x)
        keys, values = cache.append(layer, k, v)
        return self.after(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))

    @fusible
    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [B, heads, n, head_dim]."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    @fusible
    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What is left to do with what was attended to [B, heads, n, head_dim]."""
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """x [B, n, D] and a cache of S positions -> hidden [B, n, D] (normalised); the cache grows to S + n.

    mask: bool [n, S + n], True = may attend; None = everything so far."""

    def __init__(self, dim: int, layers: int, heads: int, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TrunkLayer(dim, heads, mlp_ratio, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.lower(x, cache, len(self.layers), mask))

    def lower(self, x: Tensor, cache: KVCache, layers: int, mask: Tensor | None = None) -> Tensor:
        """The first so many layers, not normalised."""
        for index, layer in enumerate(self.layers[:layers]):
            x = layer(x, cache, index, mask)
        return x
