"""Residual finite scalar quantisation (RFSQ) with global step sizes: a redundant number system.

Level l = 1..L has step D_l = D_1 * rho**-(l-1) and K (odd) symbols:
    t_l = clamp(round(r_l / D_l), -(K-1)/2, (K-1)/2),   r_{l+1} = r_l - D_l * t_l,   z_hat = sum_l D_l * t_l.
With rho < K the finer levels reach further than half a coarse step, so they can take out a coarse digit's
error (as half-bit redundancy does in a pipelined converter). The steps are constants of the code, never
statistics of a sample: every token sequence, and every prefix of its levels, decodes on its own.

Source of the idea: robust residual FSQ (arXiv 2508.15860), whose per-sample LayerNorm cannot be undone at
decode time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rsd.checks import Shape
from rsd.exact import integers, reals
from rsd.tokenizer.config import RfsqConfig
from rsd.types import RsdError


class Rfsq:
    """Quantises scalars x [..., P] with the first step D_1 into symbols [..., L, P] in 0..K-1.

    Steps are plain numbers, not tensors: a tensor on another device would stop a GPU at every use.
    """

    def __init__(self, config: RfsqConfig, first_step: float = 1.0) -> None:
        if not isinstance(config, RfsqConfig):
            raise RsdError(f"RFSQ: expected RfsqConfig, found {type(config).__name__}")
        # plain comparisons: made while models are compiled, too
        if isinstance(first_step, bool) or not isinstance(first_step, int | float) or not 0.0 < first_step < math.inf:
            raise RsdError(f"RFSQ: expected a positive finite step size, found {first_step!r}")
        self.config, self.first_step = config, first_step

    def step(self, level: int) -> float:
        """Step size D_level, level = 1..L."""
        if level not in range(1, self.config.levels + 1):
            raise RsdError(f"RFSQ: expected a level from 1 to {self.config.levels}, found {level!r}")
        return self.first_step * self.config.weight(level)

    @property
    def steps(self) -> list[float]:
        """D_1 .. D_L."""
        return [self.step(level) for level in range(1, self.config.levels + 1)]

    def digit(self, residual: Tensor, level: int, finite: bool = True) -> Tensor:
        """The digit in -(K-1)/2..(K-1)/2 that `level` gives to `residual` [..., P], as a float tensor. finite: refuse
        NaN and infinity, else NaN stays NaN (of a model's numbers, which are checked where they leave)."""
        half, residual = self.config.half, reals("residual", residual, finite=finite, wait=False)
        return torch.round(residual / self.step(level)).clamp(-half, half)

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float [..., P] -> symbols int64 [..., L, P] and what they `dequantise` to bit by bit [..., P]."""
        residual = reals("scalars", x, (..., "P"), finite=True, wait=False)
        z_hat, symbols = torch.zeros_like(residual), []
        for level in range(1, self.config.levels + 1):
            digit = self.digit(residual, level)
            value = digit * self.step(level)
            residual, z_hat = residual - value, z_hat + value
            symbols.append(digit.long() + self.config.half)
        return torch.stack(symbols, dim=-2), z_hat

    def dequantise(self, symbols: Tensor) -> Tensor:
        """symbols int [..., k, P], any prefix k = 0..L of levels -> float32 [..., P]."""
        symbols = self.check(symbols, (..., "levels", "P"), wait=False)
        levels = symbols.shape[-2]
        if levels > self.config.levels:
            raise RsdError(f"RFSQ: expected at most {self.config.levels} levels, found {levels}")
        z_hat = torch.zeros(symbols.shape[:-2] + symbols.shape[-1:], device=symbols.device)
        for level in range(1, levels + 1):
            z_hat = z_hat + self.value(symbols[..., level - 1, :], level)
        return z_hat

    def value(self, symbol: Tensor, level: int) -> Tensor:
        """What symbols int [..., P] of one level contribute: D_level * t."""
        return (self.check(symbol, wait=False) - self.config.half).float() * self.step(level)

    def reach(self) -> float:
        """Largest |scalar| that ends within half of the last step."""
        return self.config.span() * self.first_step

    def check(self, symbols: Tensor, shape: Shape = (...,), wait: bool = True) -> Tensor:
        """Symbols as int64; raises if one is no integer, or outside 0..K-1. wait: as of `exact.integers`."""
        return integers("tokens", symbols, shape, (0, self.config.symbols - 1), wait)
