"""Image encoder: a small residual network per camera, each stage told by the instruction what to look for.

FiLM conditioning of convolutions by language: Perez et al. 2018; as in RT-1. GroupNorm suits a batch of one.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from rsd.models.config import GROUPS
from rsd.models.fusing import fusible


def unit_images(pixels: Tensor) -> Tensor:
    """uint8 [..., S, S, 3] as cameras give them -> [..., 3, S, S] in [-0.5, 0.5], as the encoders take them."""
    dims = range(pixels.ndim)
    return pixels.permute(*dims[:-3], dims[-1], *dims[-3:-1]).float() / 255.0 - 0.5  # an exporter knows no `movedim`


class Subsample(nn.Conv2d):
    """A 1x1 convolution with a stride, as a matrix product: PyTorch's own CPU path took a quarter of vision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C', h / stride, w / stride]
        grid = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        return F.linear(grid, self.weight.flatten(1)).permute(0, 3, 1, 2)


class FilmBlock(nn.Module):
    """Two 3x3 convolutions with a skip; the condition scales and shifts the second's features."""

    def __init__(self, inputs: int, outputs: int, stride: int, condition: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.film = nn.Linear(condition, 2 * outputs)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else Subsample(inputs, outputs, stride)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # [B, C, h, w], [B, cond] -> [B, C', h', w']
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h)) * (1 + scale) + shift
        return F.silu(h + self.skip(x))


class CameraEncoder(nn.Module):
    """[B, 3, S, S] in [-0.5, 0.5] -> tokens [B, (S / 16 / shrink)^2, C]; `depth` blocks at each resolution."""

    def __init__(self, channels: tuple[int, ...], condition: int, depth: int = 2, shrink: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 5 * shrink, 2 * shrink, 2 * shrink)
        blocks = []
        for inputs, outputs in pairwise(channels):
            blocks.append(FilmBlock(inputs, outputs, 2, condition))
            blocks += [FilmBlock(outputs, outputs, 1, condition) for _ in range(depth - 1)]
        self.blocks = nn.ModuleList(blocks)

    @fusible
    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        x = F.silu(self.stem(image))
        for block in self.blocks:
            x = block(x, condition)
        return x.flatten(2).transpose(1, 2)
