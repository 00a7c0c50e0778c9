import numpy as np
import pytest
from scipy.stats import binom

from rsd.decoding.risk_tests import (
    P_VALUES,
    betting,
    clopper_pearson_upper,
    hoeffding_bentkus,
    hoeffding_bentkus_upper,
)

RISK = 0.15


def test_hoeffding_bentkus_is_valid_for_the_hardest_losses() -> None:
    """P(p <= d) <= d under risk = 0.15, for 0/1 losses, by enumerating the binomial."""
    for n in (20, 60, 200):
        hits = np.arange(n + 1)
        p = hoeffding_bentkus(hits / n, n, RISK)
        assert (np.diff(p) >= 0).all()
        exact = binom.cdf(hits, n, RISK)
        assert (p >= exact - 1e-12).all()
        assert p[0] == pytest.approx((1 - RISK) ** n)
        for level in (0.01, 0.05, 0.2):
            assert binom.pmf(hits, n, RISK)[p <= level].sum() <= level


def test_upper_bounds_invert_their_tests() -> None:
    for mean in (0.0, 0.01, 0.2, 0.9):
        upper = hoeffding_bentkus_upper(mean, 60, 0.1)
        assert mean < upper < 1.0
        assert hoeffding_bentkus(np.float64(mean), 60, upper + 1e-6) <= 0.1
        assert hoeffding_bentkus(np.float64(mean), 60, upper - 1e-6) > 0.1
    for hits in (0, 3, 59):
        upper = clopper_pearson_upper(hits, 60, 0.1)
        assert binom.cdf(hits, 60, upper) == pytest.approx(0.1)
        assert upper <= hoeffding_bentkus_upper(hits / 60, 60, 0.1)
    assert clopper_pearson_upper(60, 60, 0.1) == hoeffding_bentkus_upper(1.0, 60, 0.1) == 1.0
    assert clopper_pearson_upper(0, 1, 0.1) == pytest.approx(0.9)


@pytest.mark.parametrize("name", P_VALUES)
def test_p_values_are_small_as_seldom_as_they_should_be_and_fall_with_the_losses(name: str) -> None:
    """At the edge of the hypothesis, for 0/1 losses and for shares of uneven distribution."""
    rng = np.random.default_rng(0)
    uneven = rng.beta(0.3, 0.3 * (1 - RISK) / RISK, (20_000, 60))
    for losses in ((rng.random((20_000, 60)) < RISK).astype(float), uneven):
        assert losses.mean() == pytest.approx(RISK, abs=2e-3)
        for level in (0.02, 0.1, 0.3):
            p = P_VALUES[name](losses, RISK, level)
            assert p.shape == (20_000,)
            assert (p <= level).mean() <= level
            assert (P_VALUES[name](losses, RISK + 0.15, level) <= level).mean() > 2 * level  # it has power
    assert (P_VALUES[name](np.ones((1, 60)), RISK, 0.1) == 1.0).all()


def test_betting_on_losses_in_order_of_their_size_would_be_caught() -> None:
    """The order must not depend on the losses; the test above sees it if it does."""
    rng = np.random.default_rng(0)
    losses = (rng.random((20_000, 60)) < RISK).astype(float)
    assert (betting(np.sort(losses, axis=1), RISK, 0.1) <= 0.1).mean() > 0.5
