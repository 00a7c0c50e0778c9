"""The statistics behind every number a results table shows: pure functions over counts and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rsd.types import RsdError

Key = TypeVar("Key", bound=Hashable)
Z = 1.959963984540054  # below which the normal distribution has 97.5 %


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson 95 % score interval of a success rate, both ends in [0, 1].

    Unlike the normal interval it stays inside [0, 1] and is not empty at 0 or n successes. Without any
    observation (n = 0) nothing is known: (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    rate, whole = successes / n, 2 * (n + Z**2)
    middle, reach = (2 * n * rate + Z**2) / whole, Z / whole * math.sqrt(4 * n * rate * (1 - rate) + Z**2)
    return middle - reach if successes else 0.0, middle + reach if successes < n else 1.0


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value of the discordant pairs: b won only by the first, c by the second.

    Under the null hypothesis each discordant pair falls either way with probability 1/2; pairs on which both
    agree carry no information. Without discordant pairs the p-value is 1.
    """
    return min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))


@dataclass(frozen=True)
class PairedDifference:
    """Two runs on the same initial states.

    difference: success rate of the second minus that of the first, in [-1, 1], over the common pairs.
    clusters: of each cluster of pairs, such as a task, (only_second - only_first, pairs); empty if nobody named any.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    clusters: tuple[tuple[int, int], ...] = ()

    @property
    def pairs(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        return (self.only_second - self.only_first) / self.pairs

    @property
    def p_value(self) -> float:
        return mcnemar_exact(self.only_first, self.only_second)

    @property
    def distinguishable(self) -> bool:
        """Whether these pairs tell the runs apart at the 5 % level."""
        return self.p_value < 0.05

    def interval(self, resamples: int = 20_000) -> tuple[float, float]:
        """Bootstrap 95 % interval of `difference`: the pairs drawn anew with replacement, percentile method.

        It speaks of other initial states of these very tasks. Resampling n pairs is drawing the four counts from a
        multinomial, which needs no loop. Seeded, so that a table does not change from one print to the next.
        Degenerate where no pair disagrees: McNemar speaks then.
        """
        counts = np.array([self.both, self.only_first, self.only_second, self.neither])
        draws = np.random.default_rng(0).multinomial(self.pairs, counts / self.pairs, size=resamples)
        low, high = np.percentile((draws[:, 2] - draws[:, 1]) / self.pairs, [2.5, 97.5])
        return float(low), float(high)

    def clustered_interval(self, resamples: int = 20_000) -> tuple[float, float] | None:
        """The same with whole clusters drawn anew, so that it speaks of other tasks like these; None below two.

        Episodes of one task succeed and fail together, so pairs drawn one by one promise too much about new tasks. With
        few clusters it is too narrow still, as every bootstrap is. Seeded, percentile method.
        """
        n = len(self.clusters)
        if n < 2:
            return None
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, clusters]
        differences, pairs = (drawn @ np.array(self.clusters)).T
        low, high = np.percentile(differences / pairs, [2.5, 97.5])
        return float(low), float(high)


def paired_difference(
    first: Mapping[Key, bool], second: Mapping[Key, bool], cluster: Callable[[Key], Hashable] | None = None
) -> PairedDifference:
    """Success by episode key (task, initial state) of two runs -> counts over the keys that both have.

    cluster: what of a key names its cluster, for `clustered_interval`.
    Raises RsdError where the runs share no key: such runs cannot be paired.
    """
    common = first.keys() & second.keys()
    if not common:
        raise RsdError("cannot pair the runs: they have no finished episode (task, initial state) in common")
    counts = dict.fromkeys(((True, True), (True, False), (False, True), (False, False)), 0)
    clusters: dict[Hashable, tuple[int, int]] = {}
    for key in common:
        counts[bool(first[key]), bool(second[key])] += 1
        if cluster is not None:
            difference, pairs = clusters.get(cluster(key), (0, 0))
            clusters[cluster(key)] = (difference + bool(second[key]) - bool(first[key]), pairs + 1)
    return PairedDifference(
        both=counts[True, True],
        only_first=counts[True, False],
        only_second=counts[False, True],
        neither=counts[False, False],
        clusters=tuple(sorted(clusters.values())),
    )


def percentiles(values: Sequence[float], points: Sequence[float] = (50.0, 95.0)) -> list[float]:
    """Percentiles (0 .. 100, linear interpolation) of a sample; raises ValueError on an empty one."""
    if not len(values):
        raise ValueError("percentiles of an empty sample")
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), points)]
