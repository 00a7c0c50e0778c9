"""What a code could learn: an autoencoder in the place of the linear transform, and a refiner of decoded values.

Both are trained with nested dropout over levels: every sample keeps a prefix of random length, so that every prefix
of levels decodes well, not just the whole code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.checks import Checked, Seed, Some, between, within
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError


@dataclass(frozen=True)
class LearnConfig(Checked):
    """Sizes and training of the learned parts, on the CPU in a minute or two. hidden: width of the hidden layers (the
    step autoencoder keeps the 64 of the original)."""

    hidden: Annotated[int, between(1, 2**15)] = 256
    steps: Some = 4000
    batch_size: Some = 1024
    learning_rate: Annotated[float, within(0, 1)] = 2e-3
    seed: Seed = 0


class Autoencoder(nn.Module):
    """Normalised motion [B, H, M] <-> latents [B, H*C] in (-1, 1).

    `step`: every step on its own, M -> 64 -> C -> 64 -> M with Mish and Tanh, the original experiment's network.
    `chunk`: the whole chunk at once, two hidden layers each way.
    """

    def __init__(self, horizon: int, motion: int, channels: int, whole_chunk: bool, hidden: int) -> None:
        super().__init__()
        self.horizon, self.motion, self.channels, self.whole_chunk = horizon, motion, channels, whole_chunk
        if whole_chunk:
            self.encoder = mlp(horizon * motion, hidden, horizon * channels)
            self.decoder = mlp(horizon * channels, hidden, horizon * motion)
        else:
            self.encoder = nn.Sequential(nn.Linear(motion, 64), nn.Mish(), nn.Linear(64, channels))
            self.decoder = nn.Sequential(nn.Linear(channels, 64), nn.Mish(), nn.Linear(64, motion))

    def encode(self, normalised: Tensor) -> Tensor:
        """[B, H, M] -> [B, H*C]."""
        x = normalised.flatten(1) if self.whole_chunk else normalised
        return torch.tanh(self.encoder(x)).flatten(1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, H*C] -> [B, H, M]."""
        z = latents if self.whole_chunk else latents.unflatten(-1, (self.horizon, self.channels))
        return self.decoder(z).reshape(-1, self.horizon, self.motion)


class Refiner(nn.Module):
    """What the levels that are missing would add on average, given what the ones above decode to.

    A uniform quantiser's middle is not the mean of what falls into its cell, and neighbouring coefficients say more
    about where in the cell the value was. The correction stays within half a step of the last level decoded, so
    a scalar that was within half a step is at most a whole one off.
    """

    def __init__(self, scalars: int, steps: list[float], hidden: int) -> None:
        """steps: D_1 .. D_L."""
        super().__init__()
        levels = len(steps)
        self.inner = nn.Linear(2 * scalars, hidden)
        self.level = nn.Parameter(torch.zeros(levels + 1, hidden))
        self.middle, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, scalars)
        nn.init.zeros_(self.outer.weight)  # starts as the plain code
        nn.init.zeros_(self.outer.bias)
        self.register_buffer("steps", torch.tensor([steps[0], *steps]))
        self.steps: Tensor

    def forward(self, value: Tensor, levels: int | Tensor) -> Tensor:
        """value [B, P] decoded from its first `levels` (a number, or int [B]) -> refined value [B, P]."""
        step = self.steps[levels].reshape(-1, 1)
        hidden = F.silu(self.inner(torch.cat([value, torch.tanh(value / (2 * step))], dim=-1)) + self.level[levels])
        hidden = hidden + F.silu(self.middle(hidden))
        return value + step * self.outer(hidden).clamp(-0.5, 0.5)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Mish(), nn.Linear(hidden, hidden), nn.Mish(), nn.Linear(hidden, outputs)
    )


def quantise_prefix(rfsq: Rfsq, x: Tensor, levels: Tensor) -> Tensor:
    """x [B, P], levels int [B] -> what the first levels[b] levels of sample b decode to."""
    value = torch.zeros_like(x)
    for level in range(1, rfsq.config.levels + 1):
        digit = rfsq.digit(x - value, level)
        value = value + digit * rfsq.step(level) * (levels >= level)[:, None]
    return value


def train_autoencoder(net: Autoencoder, normalised: Tensor, rfsq: Rfsq, config: LearnConfig) -> None:
    """Mean squared error through the quantiser (straight-through gradient), half of the samples on a short prefix."""

    def loss(sample: Tensor, generator: torch.Generator) -> Tensor:
        latents = net.encode(sample)
        levels = random_levels(len(sample), rfsq.config.levels, generator)
        whole = torch.rand(len(sample), generator=generator) < 0.5
        decoded = quantise_prefix(rfsq, latents, torch.where(whole, rfsq.config.levels, levels))
        return F.mse_loss(net.decode(latents + (decoded - latents).detach()), sample)

    train(net, normalised, loss, config)


def train_refiner(
    net: Refiner, values: Tensor, decode_prefix: Callable[[Tensor, Tensor], Tensor], config: LearnConfig
) -> None:
    """Mean squared error in units of the last step decoded, so that every prefix length weighs the same.

    values: float [N, P]. decode_prefix(rows int [B], levels int [B]) is what the first levels of the code of those
    rows of `values` decode to.
    """

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        levels = random_levels(len(rows), len(net.steps) - 1, generator)
        refined = net(decode_prefix(rows, levels), levels)
        return (((refined - values[rows]) / net.steps[levels][:, None]).clamp(-2, 2) ** 2).mean()

    train(net, torch.arange(len(values)), loss, config)


def random_levels(count: int, levels: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, levels + 1, (count,), generator=generator)


def train(
    net: nn.Module, data: Tensor, loss: Callable[[Tensor, torch.Generator], Tensor], config: LearnConfig
) -> None:
    """AdamW with a cosine to zero over random batches of data [N, ...]; leaves the weights without gradients."""
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    for step in range(config.steps):
        warm = min(1.0, (step + 1) / 100)
        rate = config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        error = loss(data[torch.randint(len(data), (config.batch_size,), generator=generator)], generator)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    if not all(torch.isfinite(parameter).all() for parameter in net.parameters()):
        raise RsdError("tokenizer fit: the learned part diverged; lower the learning rate")
    net.requires_grad_(False)
