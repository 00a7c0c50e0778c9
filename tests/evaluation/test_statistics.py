import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from rsd.evaluation.statistics import PairedDifference, mcnemar_exact, paired_difference, percentiles, wilson
from rsd.types import RsdError

Z95 = 1.959963984540054


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 2000))
    return draw(st.integers(0, n)), n


@given(counts())
def test_wilson_is_wilsons_formula_and_holds_the_rate(count: tuple[int, int]) -> None:
    successes, n = count
    low, high = wilson(successes, n)
    rate, scale = successes / n, 1 + Z95**2 / n
    centre, margin = rate + Z95**2 / (2 * n), Z95 * math.sqrt(rate * (1 - rate) / n + (Z95 / (2 * n)) ** 2)
    assert (low, high) == pytest.approx(((centre - margin) / scale, (centre + margin) / scale), abs=1e-9)
    assert 0.0 <= low <= successes / n <= high <= 1.0


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.27755), (10, 10, 0.72245, 1.0), (490, 500, 0.96354, 0.98911), (0, 0, 0.0, 1.0)],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(11, 10)


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (3, 3, 1.0)])
def test_mcnemar_known_values(b: int, c: int, p: float) -> None:
    assert mcnemar_exact(b, c) == pytest.approx(p)
    assert mcnemar_exact(c, b) == pytest.approx(p)


@given(
    st.dictionaries(st.integers(0, 40), st.booleans(), min_size=1),
    st.dictionaries(st.integers(0, 40), st.booleans()),
)
def test_paired_difference_is_that_of_the_common_keys(first: dict[int, bool], second: dict[int, bool]) -> None:
    common = first.keys() & second.keys()
    if not common:
        with pytest.raises(RsdError, match="in common"):
            paired_difference(first, second)
        return
    pair = paired_difference(first, second)
    assert pair.pairs == len(common)
    gap = sum(second[key] for key in common) - sum(first[key] for key in common)
    assert pair.difference == pytest.approx(gap / len(common))
    assert paired_difference(second, first).difference == -pair.difference


def test_percentiles_interpolate_and_refuse_nothing() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0]) == pytest.approx([2.5, 3.85])
    with pytest.raises(ValueError, match="empty"):
        percentiles([])


@given(st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(sum))
def test_the_bootstrap_interval_holds_the_difference_and_repeats(counts: list[int]) -> None:
    pair = PairedDifference(*counts)
    low, high = pair.interval(resamples=2000)
    assert -1 <= low <= high <= 1
    assert low - 0.05 <= pair.difference <= high + 0.05
    assert pair.interval(resamples=2000) == (low, high)


def test_the_bootstrap_interval_is_the_normal_one_where_that_holds() -> None:
    pair = PairedDifference(both=700, only_first=100, only_second=150, neither=50)
    low, high = pair.interval()
    spread = 1.96 * math.sqrt((0.25 - 0.05**2) / 1000)
    assert (low, high) == pytest.approx((0.05 - spread, 0.05 + spread), abs=0.002)
    assert pair.distinguishable
    assert not PairedDifference(both=7, only_first=1, only_second=2, neither=0).distinguishable


def test_with_tasks_as_the_unit_the_interval_is_scipys_and_wider_where_tasks_agree_with_themselves() -> None:
    gained = {0: 9, 1: 0, 2: -1, 3: 8, 4: 0, 5: 1}  # of 10 states each: a task wins or it does not
    first = {(task, state): state < -gain for task, gain in gained.items() for state in range(10)}
    second = {(task, state): state < gain for task, gain in gained.items() for state in range(10)}
    pair = paired_difference(first, second, cluster=lambda key: key[0])
    found = pair.clustered_interval()
    assert found is not None
    shares = (np.array(list(gained.values())) / 10,)
    expected = bootstrap(shares, np.mean, n_resamples=20_000, method="percentile", random_state=1).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found[1] - found[0] > 1.5 * (pair.interval()[1] - pair.interval()[0])
    assert found == pair.clustered_interval()


def test_one_task_or_none_named_has_no_interval_over_tasks() -> None:
    outcomes = {(0, state): state % 2 == 0 for state in range(8)}
    assert paired_difference(outcomes, outcomes, cluster=lambda key: key[0]).clustered_interval() is None
    assert paired_difference(outcomes, outcomes).clustered_interval() is None
