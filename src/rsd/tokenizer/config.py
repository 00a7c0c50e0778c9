"""What a tokenizer is made to, and what it counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rsd.conventions import CHUNK_SIZE
from rsd.types import RsdError

OVER_TIME = ("dct", "identity")  # fixed, the same matrix for every dimension
LINEAR = (*OVER_TIME, "pca")
AUTOENCODERS = ("step-autoencoder", "chunk-autoencoder")
TRANSFORMS = (*LINEAR, *AUTOENCODERS)
NORMALISATIONS = ("reach", "quantile", "minmax", "standard")
MAX_HORIZON = 64
MAX_SIZE = 1024


@dataclass(frozen=True)
class RfsqConfig:
    """levels L, symbols K (odd) per level, redundancy rho in (1, K]."""

    levels: int = 8
    symbols: int = 7
    rho: float = 2.0

    def __post_init__(self) -> None:
        if self.levels < 1 or self.symbols < 3 or self.symbols % 2 == 0 or not 1.0 < self.rho <= self.symbols:
            expected = "levels >= 1, an odd number of symbols >= 3 and 1 < rho <= symbols"
            raise RsdError(f"RFSQ: expected {expected}, found {self}")

    @property
    def half(self) -> int:
        """Largest digit (K-1)/2."""
        return (self.symbols - 1) // 2

    def weight(self, level: int) -> float:
        """D_level / D_1 for level = 1..L."""
        return float(self.rho ** -(level - 1))

    def tail_reach(self, level: int) -> float:
        """How far the levels below `level` can reach, in units of D_1: (K-1)/2 * sum_{j > level} D_j."""
        return self.half * sum(self.weight(j) for j in range(level + 1, self.levels + 1))

    def reach(self, level: int) -> float:
        """Largest |residual after `level` levels| that the finer ones take out to within half the last step, in D_1."""
        return self.tail_reach(level) + 0.5 * self.weight(self.levels)

    def span(self) -> float:
        """Largest |scalar| whose residual stays within half the last step, in units of D_1."""
        return self.reach(0)

    def margin(self, level: int) -> int:
        """Largest error of a digit at `level` that the finer levels take out whatever the scalar (0 if none).

        A rounded residual is within D_l/2; a digit wrong by m leaves (m + 1/2) D_l, which the tail plus half
        of the last step must reach.
        """
        return max(0, int((self.reach(level) / self.weight(level)) - 0.5 + 1e-9))


@dataclass(frozen=True)
class LearnConfig:
    """Sizes and training of the learned parts, on the CPU in a minute or two."""

    hidden: int = 256
    """Width of the hidden layers (the step autoencoder keeps the 64 of the original)."""
    steps: int = 4000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.hidden, self.steps, self.batch_size
        if min(sizes) < 1 or self.hidden > 2**15 or not 0.0 < self.learning_rate < 1.0:
            raise RsdError(f"tokenizer learning: expected sizes >= 1 and a learning rate in (0, 1), found {self}")


@dataclass(frozen=True)
class TokenizerConfig:
    """The code and how it is calibrated."""

    horizon: int = CHUNK_SIZE
    """Steps in a chunk, 1 to 64."""
    transform: Literal["dct", "identity", "pca", "step-autoencoder", "chunk-autoencoder"] = "dct"
    """dct over time (orthonormal); identity; pca, over time and dimensions; or a learned autoencoder."""
    levels: int = 8
    """Residual levels L."""
    symbols: int = 7
    """Symbols K of a level, odd."""
    rho: float = 2.0
    """How much finer each level is than the one above; below K the code is redundant."""
    normalisation: Literal["reach", "quantile", "minmax", "standard"] = "reach"
    """What is 1 in a dimension: its largest coefficient but for 1 in 10,000 (reach), its 1 % and 99 % quantiles, its
    extremes, or its standard deviation."""
    binary: tuple[int, ...] = (-1,)
    """Dimensions that are one exact binary symbol a step (grippers), e.g. 6 13 for two arms of 7; without a number:
    none."""
    binary_values: tuple[tuple[float, float], ...] = ()
    """The lower and the upper value of each of them, e.g. 0 1; empty: the two that the data hold."""
    limit: float = 1.0
    """Size of the largest action that is sent: what is decoded is clipped to it; 0: no limit (joint angles)."""
    channels: int = 16
    """Latents per step of an autoencoder."""
    bits: float = 0.0
    """Budget of nominal bits a chunk for the motion tokens, spent where they matter most; 0 gives every level of
    every coefficient a token, as the policies here expect."""
    refine: bool = False
    """Learn to correct what a prefix of levels decodes to."""
    learn: LearnConfig = field(default_factory=LearnConfig)

    def __post_init__(self) -> None:
        def expect(holds: bool, expected: str, found: object) -> None:
            if not holds:
                raise RsdError(f"tokenizer: expected {expected}, found {found}")

        sizes = (self.levels, self.symbols, self.channels)
        expect(max(sizes) <= MAX_SIZE, f"levels, symbols and channels of at most {MAX_SIZE}", sizes)
        expect(1 <= self.horizon <= MAX_HORIZON, f"a horizon of 1 to {MAX_HORIZON} steps", self.horizon)
        expect(self.transform in TRANSFORMS, f"transform to be one of {', '.join(TRANSFORMS)}", self.transform)
        known = f"normalisation to be one of {', '.join(NORMALISATIONS)}"
        expect(self.normalisation in NORMALISATIONS, known, self.normalisation)
        expect(self.channels >= 1 and self.bits >= 0, "channels >= 1 and bits >= 0", (self.channels, self.bits))
        pairs = self.binary_values
        expect(len(pairs) in (0, len(self.binary)), f"{len(self.binary)} pairs of binary values, or none", len(pairs))
        expect(all(low < high for low, high in pairs), "the lower binary value first", pairs)
        expect(self.limit >= 0, "a limit >= 0", self.limit)
        largest = max((abs(value) for pair in pairs for value in pair), default=0.0)
        expect(not self.limit or largest <= self.limit, f"binary values within the limit {self.limit:g}", largest)
        learned = self.transform in AUTOENCODERS
        expect(not (self.refine and learned), "refine with a linear transform only", self.transform)
        _ = self.rfsq  # raises where levels, symbols or rho make no code

    @property
    def rfsq(self) -> RfsqConfig:
        return RfsqConfig(self.levels, self.symbols, self.rho)


@dataclass(frozen=True)
class EncodeStatistics:
    """What `encode` and `forward` have seen. A coefficient beyond the code's reach is clipped to it, and counted.

    clipped_coefficients: number per coefficient [P]. clipped_chunks: chunks with at least one of them.
    """

    chunks: int
    clipped_chunks: int
    clipped_coefficients: list[int]

    @property
    def clipped_share(self) -> float:
        """Share of all coefficients seen that were clipped."""
        seen = self.chunks * len(self.clipped_coefficients)
        return sum(self.clipped_coefficients) / seen if seen else 0.0
