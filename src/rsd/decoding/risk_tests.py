"""Finite-sample tests and upper bounds of an expected loss, from n independent losses in [0, 1]. Pure functions.

scipy is imported where it is used: every policy imports this module, few calibrate, and scipy.stats takes 0.5 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def hoeffding_bentkus(mean: Floats, n: int, risk: float) -> Floats:
    """p-values for "the expected loss is above `risk`" given means [...] of n losses (arXiv 2110.01052, eq. 6)."""
    from scipy.special import rel_entr
    from scipy.stats import binom

    below = np.minimum(mean, risk)
    hoeffding = np.exp(-n * (rel_entr(below, risk) + rel_entr(1 - below, 1 - risk)))
    # a whole sum of losses must not be rounded up by the last bit of its mean
    bentkus = math.e * binom.cdf(np.ceil(np.round(n * mean, 9)), n, risk)
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


def betting(losses: Floats, risk: float, delta: float) -> Floats:
    """p-values for "the expected loss is above `risk`" given losses [..., n], most powerful near delta.

    A gambler bets on losses below the risk, loss by loss in their given order; if the risk were true, his capital
    would be a supermartingale and its largest value c have P(c >= 1 / p) <= p (Ville). Bets follow the variance so
    far, which is where a test wins that Hoeffding and Bentkus, who see the mean alone, do not (Waudby-Smith and
    Ramdas, arXiv 2010.09686, section 4). The episodes have to come in an exchangeable
    order, a random permutation: kind after kind, the kinds of little risk would vouch for the others.
    """
    n = losses.shape[-1]
    seen = np.arange(1, n + 1)
    mean = (0.5 + losses.cumsum(-1)) / (seen + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(-1)) / (seen + 1)
    known = np.concatenate([np.full_like(variance[..., :1], 0.25), variance[..., :-1]], axis=-1)  # before the bet
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * known)), 0.9 / (1 - risk))  # never ruined
    log_capital = np.log1p(bet * (risk - losses)).cumsum(-1)
    return np.minimum(np.exp(-log_capital.max(-1)), 1.0)


# (losses [..., n], risk, delta) -> p-values [...] for "the expected loss is above the risk"
P_VALUES: dict[str, Callable[[Floats, float, float], Floats]] = {
    "hoeffding-bentkus": lambda losses, risk, _: hoeffding_bentkus(losses.mean(-1), losses.shape[-1], risk),
    "betting": betting,
}


def hoeffding_bentkus_upper(mean: float, n: int, delta: float) -> float:
    """The largest expected loss that a mean of n losses does not reject at level delta."""
    from scipy.optimize import bisect

    if mean >= 1.0 or hoeffding_bentkus(np.float64(mean), n, 1.0 - 1e-12) > delta:
        return 1.0
    return float(bisect(lambda r: float(hoeffding_bentkus(np.float64(mean), n, r)) - delta, mean, 1.0 - 1e-12))


def clopper_pearson_upper(hits: int, n: int, delta: float) -> float:
    """Exact upper confidence bound of a rate."""
    from scipy.stats import beta

    return 1.0 if hits == n else float(beta.ppf(1.0 - delta, hits + 1, n - hits))
