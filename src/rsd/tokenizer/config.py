"""What a tokenizer is made to, and what it counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from rsd.checks import Checked, Count, Rules, Where, above, between
from rsd.conventions import CHUNK_SIZE

OVER_TIME = ("dct", "identity")  # fixed, the same matrix for every dimension
MAX_HORIZON = 64
Horizon = Annotated[int, between(1, MAX_HORIZON)]
Levels = Annotated[int, between(1, 1024)]
Symbols = Annotated[int, between(3, 1023), Where(lambda count: count % 2, "that is odd")]
Rho = Annotated[float, above(1, 1023)]

MOST_REDUCED = 1e30  # the first step by the last, which float32 has to hold


def code_rules(code: RfsqConfig | TokenizerConfig) -> Rules:
    """Fine enough by no more than float32 can tell."""
    yield code.rho <= code.symbols, f"rho of at most {code.symbols}, the symbols", code.rho
    finest = (code.levels - 1) * math.log(code.rho) <= math.log(MOST_REDUCED)
    yield finest, f"levels and rho with rho**(levels - 1) of at most {MOST_REDUCED:g}", code.levels


@dataclass(frozen=True)
class RfsqConfig(Checked):
    """levels L, symbols K (odd) per level, redundancy rho in (1, K]."""

    levels: Levels = 8
    symbols: Symbols = 7
    rho: Rho = 2.0

    def rules(self) -> Rules:
        yield from code_rules(self)

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
class TokenizerConfig(Checked):
    """The code and how it is calibrated."""

    horizon: Horizon = CHUNK_SIZE
    """Steps in a chunk, 1 to 64."""
    transform: Literal["dct", "identity", "pca"] = "dct"
    """dct over time (orthonormal); identity; or pca, over time and dimensions."""
    levels: Levels = 8
    """Residual levels L."""
    symbols: Symbols = 7
    """Symbols K of a level, odd."""
    rho: Rho = 2.0
    """How much finer each level is than the one above; below K the code is redundant."""
    normalisation: Literal["reach", "quantile", "minmax", "standard"] = "reach"
    """What is 1 in a dimension: its largest coefficient but for 1 in 10,000 (reach), its 1 % and 99 % quantiles, its
    extremes, or its standard deviation."""
    binary: tuple[Annotated[int, between(-1024, 1023)], ...] = (-1,)
    """Dimensions that are one exact binary symbol a step (grippers), e.g. 6 13 for two arms of 7; no number: none."""
    binary_values: tuple[tuple[float, float], ...] = ()
    """The lower and the upper value of each of them, e.g. 0 1; empty: the two that the data hold."""
    limit: Annotated[float, between(0, 1e9)] = 1.0
    """Size of the largest action that is sent: what is decoded is clipped to it; 0: no limit (joint angles)."""

    def rules(self) -> Rules:
        pairs, count = self.binary_values, len(self.binary)
        yield from code_rules(self)
        yield len(pairs) in (0, count), f"{count} pairs of binary values, or none", len(pairs)
        yield all(low < high for low, high in pairs), "the lower binary value first", pairs
        largest = max((abs(value) for pair in pairs for value in pair), default=0.0)
        yield not self.limit or largest <= self.limit, f"binary values within the limit {self.limit:g}", largest

    @property
    def rfsq(self) -> RfsqConfig:
        return RfsqConfig(self.levels, self.symbols, self.rho)


@dataclass(frozen=True)
class EncodeStatistics(Checked):
    """What `encode` and `forward` have seen. A coefficient beyond the code's reach is clipped to it, and counted.

    clipped_coefficients: number per coefficient [P]. clipped_chunks: chunks with at least one of them.
    """

    chunks: Count
    clipped_chunks: Count
    clipped_coefficients: list[Count]

    @property
    def clipped_share(self) -> float:
        """Share of all coefficients seen that were clipped."""
        seen = self.chunks * len(self.clipped_coefficients)
        return sum(self.clipped_coefficients) / seen if seen else 0.0
