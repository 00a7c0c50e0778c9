"""OpenVLA's eyes: DINOv2-L and SigLIP-So400m side by side, and the projector into the language model.

Plain vision transformers whose parameters bear timm's names, so that published weights load by name. Features are
those after the last block but one, as OpenVLA takes them: the last block, the final norm and SigLIP's pooling are in
the checkpoints but take no part, and do not exist here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsd.checks import Checked, Rules, between
from rsd.models.config import Layers, Width
from rsd.models.streams import together


@dataclass(frozen=True)
class VitConfig(Checked):
    """Sizes of one vision transformer. depth counts the checkpoint's blocks, of which the last is not run."""

    dim: Width
    depth: Layers
    heads: Width
    mlp_dim: Width
    image_size: Annotated[int, between(1, 1024)] = 224
    patch: Annotated[int, between(1, 1024)] = 14
    registers: Annotated[int, between(0, 64)] = 0
    """Register tokens; a model with registers also has a class token."""
    layer_scale: bool = False

    def rules(self) -> Rules:
        yield self.dim % self.heads == 0, f"heads that divide dim {self.dim}", self.heads
        yield self.patch <= self.image_size, f"a patch of at most image_size {self.image_size}", self.patch

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


# timm's names for the two towers of `dinosiglip-vit-so-224px`
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
TIMM_MODELS = {
    DINO: VitConfig(1024, 24, 16, 4096, registers=4, layer_scale=True),
    SIGLIP: VitConfig(1152, 27, 16, 4304),
}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))  # OpenVLA's name for timm's `gamma`


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel where the model has layer scales."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim, eps=1e-6), nn.LayerNorm(config.dim, eps=1e-6)
        self.attn, self.mlp = Attention(config.dim, config.heads), Mlp(config.dim, config.mlp_dim)
        self.ls1 = LayerScale(config.dim) if config.layer_scale else None
        self.ls2 = LayerScale(config.dim) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:  # [B, n, D]
        x = _add(x, self.attn(self.norm1(x)), self.ls1)
        return _add(x, self.mlp(self.norm2(x)), self.ls2)


def _add(x: Tensor, update: Tensor, scale: LayerScale | None) -> Tensor:
    return x + update if scale is None else torch.addcmul(x, update, scale.scale_factor)


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one matrix product; the weight keeps the convolution's shape."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch, config.patch)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, patches, D]
        size = self.proj.kernel_size[0]
        grid = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, 3, h, p, w, p]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """pixels [B, 3, S, S], normalised -> patch features [B, patches, D] after the last block but one."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # see `Llama`
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.dim))
        if config.registers:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.pos_embed
        extra = 0
        if self.config.registers:
            tokens = torch.cat([self.cls_token, self.reg_token], dim=1)
            extra = tokens.shape[1]
            x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x[:, extra:]


class FusedVision(nn.Module):
    """Both towers on the same images, their features side by side.

    On a GPU the towers run on two streams: one image's matrices are too small to fill it."""

    def __init__(self, configs: tuple[VitConfig, VitConfig]) -> None:
        super().__init__()
        self.featurizer, self.fused_featurizer = VisionTransformer(configs[0]), VisionTransformer(configs[1])

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, cameras, 6, S, S], three channels normalised for each tower -> [B, cameras*patches, D1+D2]."""
        batch, cameras = pixels.shape[:2]
        images = pixels.flatten(0, 1)
        first, second = images[:, :3], images[:, 3:]
        towers = [partial(self.fused_featurizer, second), partial(self.featurizer, first)]
        right, left = together(towers, pixels.device)
        return torch.cat([left, right], dim=2).unflatten(0, (batch, cameras)).flatten(1, 2)


class Projector(nn.Module):
    """Vision features -> language model embeddings, three layers."""

    def __init__(self, vision_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2, self.fc3 = nn.Linear(4 * vision_dim, dim), nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
