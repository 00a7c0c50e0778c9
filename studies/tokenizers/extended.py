"""Our code with what no policy uses: learned autoencoders, a refiner of decoded values, a budget of bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rsd.checks import Checked, Rules, between
from rsd.tokenizer.action_tokenizer import ActionTokenizer, ChunkTokens
from rsd.tokenizer.config import OVER_TIME, TokenizerConfig
from rsd.tokenizer.fit import PART, Prepared, count, first_step_of, prepare
from rsd.tokenizer.rfsq import Rfsq
from studies.tokenizers.allocation import active_cells, allocate
from studies.tokenizers.learned import (
    Autoencoder,
    LearnConfig,
    Refiner,
    quantise_prefix,
    train_autoencoder,
    train_refiner,
)

AUTOENCODERS = ("step-autoencoder", "chunk-autoencoder")
ALLOCATION_CHUNKS = 20_000  # the search looks at no more


@dataclass(frozen=True)
class Extension(Checked):
    """autoencoder: in the place of the transform; channels: its latents per step. bits: budget of nominal bits a chunk
    for the motion tokens, spent where they matter most; 0 gives every level of every coefficient a token. refine: learn
    to correct what a prefix of levels decodes to."""

    autoencoder: Literal["", "step-autoencoder", "chunk-autoencoder"] = ""
    channels: Annotated[int, between(1, 1024)] = 16
    bits: Annotated[float, between(0, 1e6)] = 0.0
    refine: bool = False
    learn: LearnConfig = field(default_factory=LearnConfig)

    def rules(self) -> Rules:
        yield not (self.refine and self.autoencoder), "refine with a linear transform only", self.autoencoder


class BudgetRfsq(Rfsq):
    """active [L, P] of 0 and 1: where it is 0 the digit is 0, so that the token is constant and costs nothing."""

    def __init__(self, plain: Rfsq, active: Tensor) -> None:
        super().__init__(plain.config, plain.first_step)
        self.active = active

    def digit(self, residual: Tensor, level: int, finite: bool = True) -> Tensor:
        return super().digit(residual, level, finite) * self.active[level - 1]

    def reach(self) -> Any:
        """Largest |scalar| that ends within half of its last active step [P]."""
        levels = range(1, self.config.levels + 1)
        digits = sum(self.config.half * self.step(level) * self.active[level - 1] for level in levels)
        finest = torch.full_like(self.active[0], torch.inf)
        for level in levels:
            finest = torch.where(self.active[level - 1] > 0, torch.full_like(finest, self.step(level)), finest)
        return digits + finest / 2


class ExtendedTokenizer(ActionTokenizer):
    """On the CPU; not saved. Matrix products are involved: the last bits may depend on the batch size."""

    def __init__(
        self, given: Prepared, first_step: float, matrix: Tensor | None = None, net: Autoencoder | None = None
    ) -> None:
        super().__init__(given.config, given.low, given.high, first_step, matrix)
        self.net = net
        self.refiner: Refiner | None = None
        self.active: Tensor | None = None
        if net is not None:
            self.motion_dim = net.channels
            self.reset_statistics()

    @property
    def token_count(self) -> int:
        """Motion tokens of a chunk that carry information: L * P, or fewer with a budget of bits."""
        return self.config.levels * self.scalars if self.active is None else int(self.active.sum())

    def spend(self, active: Tensor) -> None:
        self.active, self.rfsq = active, BudgetRfsq(self.rfsq, active)

    def to_coefficients(self, chunk: Tensor) -> Tensor:
        return super().to_coefficients(chunk) if self.net is None else self.net.encode(self.normalise(chunk))

    def to_normalised(self, coefficients: Tensor) -> Tensor:
        return super().to_normalised(coefficients) if self.net is None else self.net.decode(coefficients)

    def decode(self, tokens: ChunkTokens, levels: int | None = None) -> Tensor:
        motion, gripper = self._checked_tokens(tokens, levels)
        return self.to_actions(self._refined(self.rfsq.dequantise(motion), motion.shape[1]), gripper)

    def forward(self, chunk: Tensor) -> tuple[ChunkTokens, Tensor]:
        tokens, z_hat = self._quantise(chunk)
        return tokens, self.to_actions(self._refined(z_hat, self.config.levels), tokens.gripper)

    def _refined(self, value: Tensor, levels: int) -> Tensor:
        return value if self.refiner is None or levels == 0 else self.refiner(value, levels)


def fit(chunks: np.ndarray, config: TokenizerConfig, extension: Extension | None = None) -> ActionTokenizer:
    """chunks float [N, H, A] -> a tokenizer."""
    asked = extension or Extension()
    learned = bool(asked.autoencoder or asked.refine or config.transform not in OVER_TIME)
    given = prepare(chunks, config, learned)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.learn.seed)  # the networks' first weights
        tokenizer = _fitted(given, asked)
    count(tokenizer, given.chunks)
    return tokenizer


def _fitted(given: Prepared, asked: Extension) -> ExtendedTokenizer:
    config = given.config
    horizon, motion = given.normalised.shape[1:]
    if asked.autoencoder:  # its latents end at -1 and 1
        whole = asked.autoencoder == "chunk-autoencoder"
        net = Autoencoder(horizon, motion, asked.channels, whole, asked.learn.hidden)
        first_step = 1.0 / (config.rfsq.half + 0.5)
        train_autoencoder(net, given.normalised, Rfsq(config.rfsq, first_step), asked.learn)
        return ExtendedTokenizer(given, first_step, net=net)
    matrix, first_step = first_step_of(given.normalised, config)
    tokenizer = ExtendedTokenizer(given, first_step, matrix)
    coefficients = torch.cat([tokenizer.to_coefficients(part) for part in given.chunks.split(PART)])
    if asked.bits:
        some = coefficients[:: max(1, len(coefficients) // ALLOCATION_CHUNKS)].numpy()
        runs = allocate(some, config.rfsq, first_step, asked.bits)
        tokenizer.spend(torch.from_numpy(active_cells(runs, config.levels)))
    if asked.refine:
        refiner = Refiner(tokenizer.scalars, tokenizer.rfsq.steps, asked.learn.hidden)

        def decode_prefix(rows: Tensor, levels: Tensor) -> Tensor:
            return quantise_prefix(tokenizer.rfsq, coefficients[rows], levels)

        train_refiner(refiner, coefficients, decode_prefix, asked.learn)
        tokenizer.refiner = refiner
    return tokenizer
