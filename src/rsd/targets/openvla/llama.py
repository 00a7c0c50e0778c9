"""Llama-2 as OpenVLA's trunk, over a key/value cache allocated once.

Every shape and offset is a Python number, so a whole decoding procedure (prefill and all passes after it) can be
captured in one CUDA graph per prompt length, without masks over unused cache and without a synchronisation.
Queries, keys and values come from one matrix, and so do the MLP's gate and up projections; the loader fills them from
the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsd.checks import Checked, Rules, Some, above, between
from rsd.models.config import Layers, Width
from rsd.models.trunk import KVCache
from rsd.types import RsdError


@dataclass(frozen=True)
class LlamaConfig(Checked):
    """Sizes; the defaults are transformers' own for Llama, which OpenVLA's config.json leaves out."""

    vocab_size: Some = 32064
    dim: Width = 4096
    layers: Layers = 32
    heads: Width = 32
    mlp_dim: Annotated[int, between(1, 2**18)] = 11008
    norm_eps: Annotated[float, above(0, 1)] = 1e-6
    rope_theta: Annotated[float, above(0, 1e12)] = 10000.0
    max_positions: Some = 2048

    def rules(self) -> Rules:
        yield self.dim % self.heads == 0, f"heads that divide dim {self.dim}", self.heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class StaticCache:
    """Keys and values [layers, B, heads, capacity, head_dim], of which the first `length` positions are filled."""

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.heads, capacity, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.capacity, self.length = capacity, 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, heads, n, head_dim] behind the filled positions; -> all keys and values so far.

        `length` moves only when the whole pass is over (`Llama.forward`)."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise RsdError(f"key/value cache: room for {self.capacity} positions, asked for {end}")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions (rejected blocks)."""
        self.length = min(self.length, length)


@dataclass(frozen=True)
class Attend:
    """Who sees whom. causal: as Llama was trained; otherwise everything so far, or `mask` bool [n, S + n].

    split: the first `split` positions see one another only, the rest what `mask` [n - split, S + n] lets them: a
    prefix that must not depend on the queries behind it, and is read without a mask, which is faster."""

    causal: bool = False
    mask: Tensor | None = None
    split: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, n, head_dim] each; q may be the last positions only of what k and v hold."""
        if self.causal and q.shape[2] > 1:
            if q.shape[2] != k.shape[2]:
                raise RsdError("causal attention: expected queries for every position (a first pass, nothing cut)")
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.split is not None and q.shape[2] == k.shape[2]:
            at = self.split
            first = F.scaled_dot_product_attention(q[:, :, :at], k[:, :, :at], v[:, :, :at])
            rest = F.scaled_dot_product_attention(q[:, :, at:], k, v, attn_mask=self.mask)
            return torch.cat([first, rest], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class LlamaLayer(nn.Module):
    """Pre-norm attention with rotary positions and a gated MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        dim, self.head_dim, self.eps = config.dim, config.head_dim, config.norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(dim))
        self.post_attention_layernorm = nn.Parameter(torch.ones(dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, dim, bias=False)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, D] -> rotated queries and keys, values, each [B, heads, n, head_dim]."""
        hidden = F.rms_norm(x, x.shape[-1:], self.input_layernorm, self.eps)
        qkv = self.qkv(hidden).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3)  # [B, heads, 3, n, hd]
        rotated = rotate(qkv[:, :, :2], cos, sin)
        return rotated[:, :, 0], rotated[:, :, 1], qkv[:, :, 2]

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, n, D], attended [B, heads, n, head_dim] -> x [B, n, D]."""
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = F.rms_norm(x, x.shape[-1:], self.post_attention_layernorm, self.eps)
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., n, head_dim], halves paired as in Llama; cos, sin [n, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Llama(nn.Module):
    """Embeddings in, normalised hidden states out; positions follow the cache."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """In training, keep only every layer's input and compute its inside anew in the backward pass."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = [LlamaLayer(config) for _ in range(config.layers)]
        self.layers = nn.ModuleList(self.blocks)  # registers them; the list keeps their type
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_rotary()

    def reset_rotary(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Tables [max_positions, head_dim / 2], computed in float32 whatever the model's type, as published."""
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        positions = torch.arange(self.config.max_positions, dtype=torch.float32, device=device)
        angles = torch.outer(positions, 1.0 / self.config.rope_theta**half)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        return StaticCache(self.config, batch, capacity, self.norm)

    def forward(
        self, x: Tensor, attend: Attend, cache: StaticCache | KVCache | None = None, keep: int | None = None
    ) -> Tensor:
        """x [B, n, D] behind what `cache` holds -> hidden [B, n, D], or of the last `keep` positions only.

        The last layer's MLP runs on kept positions alone. Where gradients are wanted the cache is a `KVCache`."""
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        if end > self.config.max_positions:
            raise RsdError(f"sequence of {end} positions: the language model has {self.config.max_positions}")
        cos, sin = self.cos[start:end], self.sin[start:end]
        for index, layer in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = self._checkpointed(index, x, cos, sin, attend, cache)
                continue
            q, k, v = layer.before(x, cos, sin)
            if cache is not None:
                k, v = cache.append(index, k, v)
            if keep and index == len(self.blocks) - 1 and (keep == 1 or not attend.causal):
                # with a split, what is kept lies behind it
                q, x = q[:, :, -keep:], x[:, -keep:]
            x = layer.after(x, attend(q, k, v))
        if isinstance(cache, StaticCache):
            cache.length = end
        x = x if keep is None else x[:, -keep:]
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.norm_eps)

    def _checkpointed(
        self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: StaticCache | KVCache | None
    ) -> Tensor:
        if isinstance(cache, StaticCache):
            raise RsdError("training: a static cache is written in place, which no gradient survives; use a KVCache")
        layer, past = self.blocks[index], list[Tensor]()
        if cache is not None and len(cache.keys) > index:
            past = [cache.keys[index], cache.values[index]]

        def run(x: Tensor, *past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = layer.before(x, cos, sin)
            keys, values = (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)) if past else (k, v)
            return layer.after(x, attend(q, keys, values)), k, v

        # nothing in a layer is random
        x, key, value = checkpoint(run, x, *past, use_reentrant=False, preserve_rng_state=False)
        if cache is not None:
            cache.append(index, key, value)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32 [..., vocabulary]; compared in float32 as published."""
        return self.lm_head(hidden).float()
