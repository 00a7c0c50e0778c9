"""The promise of calibrated skipping, checked on simulated episodes whose true risk is known."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from rsd.conventions import ACTION_METRES, ACTION_RADIANS
from rsd.decoding.calibration import (
    FILE_NAME,
    SkipCalibration,
    SkipPromise,
    episodes_needed,
    executed,
    fingertip_deviation,
    fit_threshold,
    may_skip,
    most_skips,
    realised_risk,
)
from rsd.decoding.calibration import (
    Test as TestName,
)
from rsd.decoding.risk_tests import clopper_pearson_upper, hoeffding_bentkus
from rsd.types import RsdError

Array = NDArray[Any]
TESTS = get_args(TestName)
ALPHA, DELTA, EPSILON, MAX_SKIPS, T = 0.15, 0.2, 10.0, 4, 12
SHA = "0123456789abcdef" * 4
SETTINGS: dict[str, Any] = {"alpha": ALPHA, "delta": DELTA, "epsilon_mm": EPSILON, "max_skips": MAX_SKIPS}
NAMES: dict[str, Any] = {"memory_chunks": 2, "score": "expected_deviation_mm", "suites": "s", "acceptance": "margin"}
NAMES |= {"weights_sha256": SHA, "test": "hoeffding-bentkus"}


def episodes(n: int, seed: int) -> tuple[Array, Array, Array]:
    """Scores, deviations, forced [n, T]. A chunk deviates the more often the higher its score and the harder its
    episode, so chunks of an episode are anything but independent; the score does not see how hard it is."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0.0, 1.5, (n, 1))
    scores = rng.gamma(2.0, 1.0, (n, T))
    deviates = rng.random((n, T)) < 1 / (1 + np.exp(4.0 - scores - hard))
    return scores, np.where(deviates, 20.0, 5.0), rng.random((n, T)) < 0.1


@cache
def population() -> tuple[Array, Array, Array]:
    return episodes(20_000, 10**6)


def losses_of(threshold: float, scores: Array, deviations: Array, forced: Array, loss: str = "share") -> Array:
    """The definition again, one chunk after the other in words of its own."""
    skips = executed(scores, threshold, MAX_SKIPS, forced)
    bad = (skips & (deviations > EPSILON)).sum(1)
    return bad > 0 if loss == "any" else bad / np.maximum(skips.sum(1), 1)


def fit(data: tuple[Array, Array, Array], **changes: Any) -> SkipCalibration:
    scores, deviations, forced = data
    promise = SkipPromise(**{**SETTINGS, **NAMES, **changes})
    return fit_threshold(list(scores), list(deviations), promise, list(forced))


def naive(data: tuple[Array, Array, Array]) -> float:
    """The largest threshold whose empirical risk is at most alpha, without any correction."""
    passing = [t for t in np.unique(data[0])[::5] if losses_of(t, *data).mean() <= ALPHA]
    return float(max(passing))


@pytest.mark.parametrize("test", TESTS)
def test_the_true_risk_is_above_alpha_at_most_in_a_share_delta_of_calibrations(test: str) -> None:
    thresholds = [fit(episodes(60, seed), test=test).threshold for seed in range(200)]
    risks = np.array([losses_of(threshold, *population()).mean() for threshold in thresholds])
    assert (risks > ALPHA).mean() <= DELTA
    assert (risks > 0.3 * ALPHA).mean() > 0.5  # not by never skipping


def test_the_empirical_risk_alone_breaks_the_promise() -> None:
    """So the test above can fail."""
    thresholds = [naive(episodes(60, seed)) for seed in range(30)]
    risks = np.array([losses_of(threshold, *population()).mean() for threshold in thresholds])
    assert (risks > ALPHA).mean() > 1.5 * DELTA


def test_a_correction_as_if_chunks_were_independent_breaks_the_promise() -> None:
    def by_chunk(data: tuple[Array, Array, Array]) -> float:
        scores, deviations, forced = data
        best = 0.0
        for threshold in np.unique(scores)[::5]:
            skips = executed(scores, threshold, MAX_SKIPS, forced)
            bad, count = int((skips & (deviations > EPSILON)).sum()), int(skips.sum())
            if binom.cdf(bad, count, ALPHA) <= DELTA:
                best = float(threshold)
        return best

    pool = population()

    def pooled(threshold: float) -> float:
        skips = executed(pool[0], threshold, MAX_SKIPS, pool[2])
        return float((skips & (pool[1] > EPSILON)).sum() / skips.sum())

    risks = np.array([pooled(by_chunk(episodes(60, s))) for s in range(30)])
    assert (risks > ALPHA).mean() > DELTA


def test_what_a_calibration_says_of_itself() -> None:
    data = episodes(80, 3)
    found = fit(data)
    losses = losses_of(found.threshold, *data)
    skips = executed(data[0], found.threshold, MAX_SKIPS, data[2])
    assert found.empirical_risk == pytest.approx(losses.mean())
    assert found.skip_share == pytest.approx(skips.mean())
    assert 0.1 < found.skip_share < 1.0
    assert found.p_value == pytest.approx(float(hoeffding_bentkus(losses.mean(), 80, ALPHA)))
    assert found.p_value <= DELTA
    assert (found.episodes, found.chunks) == (80, 80 * T)
    # the next threshold was tested and did not pass
    above = np.nextafter(found.threshold, np.inf)
    assert hoeffding_bentkus(losses_of(above, *data).mean(), 80, ALPHA) > DELTA
    # and every stricter one did
    stricter = np.unique(data[0][data[0] <= found.threshold])
    assert all(hoeffding_bentkus(losses_of(t, *data).mean(), 80, ALPHA) <= DELTA for t in stricter)


def test_no_threshold_beyond_the_first_that_fails_is_looked_at() -> None:
    """A third of the episodes deviate on their most certain chunk alone. Their shares fall again as more chunks are
    executed, but looking further until something passes is how a promise is broken."""
    scores = np.tile(np.arange(1.0, T + 1), (60, 1)) + np.arange(60)[:, None] / 100
    deviations = np.where((scores < 2) & (np.arange(60)[:, None] % 3 == 0), 20.0, 5.0)
    forced = np.zeros_like(scores, dtype=bool)
    assert losses_of(np.inf, scores, deviations, forced).mean() < 0.05
    for test in TESTS:
        assert fit((scores, deviations, forced), test=test).threshold < 2.0


@given(st.integers(0, 50))
def test_a_stricter_promise_never_skips_more(seed: int) -> None:
    data = episodes(60, seed)
    loose = fit(data)
    for change in ({"alpha": ALPHA / 1.5}, {"delta": DELTA / 2}, {"epsilon_mm": 4.0}):
        assert fit(data, **change).threshold <= loose.threshold


@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0.0, 6.0), st.sampled_from([None, 1, 2, 9]))
def test_executed_is_what_may_skip_says_chunk_by_chunk(
    seed: int, max_skips: int, threshold: float, per_agreement: int | None
) -> None:
    scores, _, forced = episodes(4, seed)
    stands = np.random.default_rng(seed).random(scores.shape) < 0.7
    found = executed(scores, threshold, max_skips, forced, stands, per_agreement)
    for episode in range(4):
        skipped = stood = 0
        for chunk in range(T):
            most = most_skips(max_skips, per_agreement, stood)
            allowed = may_skip(scores[episode, chunk], threshold, skipped, most, forced[episode, chunk])
            assert allowed == found[episode, chunk]
            skipped = skipped + 1 if allowed else 0
            if not allowed:
                stood = stood + 1 if stands[episode, chunk] else 0


def test_nothing_is_skipped_on_an_unknown_score() -> None:
    assert may_skip(0.0, 1.0, 0, MAX_SKIPS, False)
    assert not may_skip(float("nan"), 1.0, 0, MAX_SKIPS, False)
    assert not may_skip(0.0, 1.0, 0, MAX_SKIPS, True)
    assert not may_skip(0.0, 1.0, MAX_SKIPS, MAX_SKIPS, False)
    assert not may_skip(0.0, 0.0, 0, MAX_SKIPS, False)


def test_episodes_of_different_lengths_count_once_each() -> None:
    scores, deviations, forced = episodes(60, 5)
    cut = [slice(0, 3 + i % (T - 3)) for i in range(60)]
    ragged = [[row[part] for row, part in zip(rows, cut, strict=True)] for rows in (scores, deviations, forced)]
    found = fit(tuple(ragged))  # type: ignore[arg-type]
    padded = np.full_like(scores, 1e9)
    for i, part in enumerate(cut):
        padded[i, part] = scores[i, part]
    assert found.empirical_risk == pytest.approx(losses_of(found.threshold, padded, deviations, forced).mean())
    assert found.chunks == sum(len(row) for row in ragged[0])


def test_a_draft_that_never_deviates_is_executed_wherever_it_was_seen_and_no_further() -> None:
    scores, deviations, forced = episodes(60, 1)
    found = fit((scores, 0 * deviations, forced))
    assert found.threshold > scores.max()
    assert found.threshold == pytest.approx(scores.max())
    assert found.empirical_risk == 0.0


def test_a_draft_that_always_deviates_is_hardly_ever_executed() -> None:
    """Only in so few episodes that the risk, an expectation over all episodes, keeps within alpha."""
    scores, deviations, forced = episodes(60, 1)
    found = fit((scores, deviations + 99, forced))
    assert losses_of(found.threshold, *population()[:1], population()[1] + 99, population()[2]).mean() <= ALPHA
    assert found.skip_share < 0.01
    everywhere = fit((np.ones_like(scores), deviations + 99, forced))  # all scores the same: all or nothing
    assert (everywhere.threshold, everywhere.skip_share, everywhere.empirical_risk) == (0.0, 0.0, 0.0)


def test_a_main_that_is_always_forced_promises_nothing() -> None:
    scores, deviations, forced = episodes(60, 1)
    assert fit((scores, deviations, np.ones_like(forced))).threshold == 0.0


@pytest.mark.parametrize("test", TESTS)
def test_too_few_episodes_are_an_error_that_says_how_many_it_takes(test: str) -> None:
    scores, _, forced = episodes(60, 0)
    needed = episodes_needed(ALPHA, DELTA, test)
    assert needed == {"betting": 11}.get(test, 10)  # 0.85 ** 10 = 0.197 <= 0.2
    enough, few = ([rows[:n] for rows in (scores, 0 * scores, forced)] for n in (needed, needed - 1))
    assert fit(tuple(enough), test=test).threshold > 0  # type: ignore[arg-type]
    with pytest.raises(RsdError, match=f"at least {needed} calibration episodes, found {needed - 1}"):
        fit(tuple(few), test=test)  # type: ignore[arg-type]


def test_betting_skips_more_for_the_same_promise() -> None:
    by = {test: np.mean([fit(episodes(100, s), test=test).skip_share for s in range(10)]) for test in TESTS}
    assert by["betting"] > 1.1 * by["hoeffding-bentkus"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, d, f: (s[:0], d[:0], f[:0]), "of the same episodes, found 0, 0 and 0"),
        (lambda s, d, f: (s, d[:-1], f), "of the same episodes, found 60, 59 and 60"),
        (lambda s, d, f: (s[:, 1:], d, f), r"episode 0: expected one number a chunk each, found shapes \(11,\)"),
        (lambda s, d, f: (s[:, :0], d[:, :0], f[:, :0]), "episode 0: expected one number a chunk"),
        (lambda s, d, f: (np.where(s == s[2, 0], np.nan, s), d, f), "episode 2: expected finite scores"),
        (lambda s, d, f: (s - s[0].min() - 0.1, d, f), "expected finite scores and deviations >= 0"),
        (lambda s, d, f: (s, np.full_like(d, np.inf), f), "episode 0: expected finite scores and deviations"),
    ],
)
def test_bad_episodes_are_refused(spoil: Callable[..., tuple[Array, Array, Array]], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        fit(spoil(*episodes(60, 0)))


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"delta": float("nan")},
        {"epsilon_mm": 0.0},
        {"max_skips": 0},
        {"test": "binomial"},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RsdError, match=f"{next(iter(change))}: expected"):
        fit(episodes(60, 0), **change)


# the risk that came of it


def test_realised_risk_by_hand() -> None:
    skipped = [np.array([True, True, False]), np.array([True, True, True, True]), np.array([False, False])]
    nan = np.nan
    apart = [np.array([1.0, 11.0, nan]), np.array([10.0, 1.0, 1.0, 30.0]), np.array([99.0, nan])]
    found = realised_risk(skipped, apart, epsilon_mm=EPSILON, delta=0.1)
    assert (found.episodes, found.chunks, found.executed, found.beyond, found.gripper_only) == (3, 9, 6, 2, None)
    assert found.share == pytest.approx((1 / 2 + 1 / 4 + 0) / 3)
    assert found.any == pytest.approx(2 / 3)
    assert found.share < found.share_upper <= 1.0
    assert found.any_upper == pytest.approx(clopper_pearson_upper(2, 3, 0.1))


def test_a_gripper_that_differs_deviates_and_is_counted_apart() -> None:
    skipped, apart = [np.array([True, True, True, False])], [np.array([11.0, 1.0, 1.0, 1.0])]
    differs = [np.array([True, True, False, True])]  # the first is beyond epsilon anyway, the last was not executed
    found = realised_risk(skipped, apart, differs, epsilon_mm=EPSILON, delta=0.1)
    assert (found.executed, found.beyond, found.gripper_only) == (3, 1, 1)
    assert found.share == pytest.approx(2 / 3)


def test_realised_risk_of_the_calibration_set_is_its_empirical_risk() -> None:
    scores, deviations, forced = data = episodes(80, 3)
    calibration = fit(data)
    skips = executed(scores, calibration.threshold, MAX_SKIPS, forced)
    found = realised_risk(list(skips), list(deviations), epsilon_mm=EPSILON, delta=DELTA)
    assert found.share == pytest.approx(calibration.empirical_risk)
    assert found.executed == pytest.approx(calibration.skip_share * calibration.chunks)
    assert found.share_upper <= ALPHA + 1e-9  # the same test, inverted


def test_realised_risk_bounds_hold_as_often_as_they_say() -> None:
    threshold = 2.0
    true = [losses_of(threshold, *population(), loss).mean() for loss in ("share", "any")]
    missed = np.zeros(2)
    for seed in range(200):
        scores, deviations, forced = episodes(40, seed)
        skips = executed(scores, threshold, MAX_SKIPS, forced)
        found = realised_risk(list(skips), list(deviations), epsilon_mm=EPSILON, delta=DELTA)
        missed += [found.share_upper < true[0], found.any_upper < true[1]]
    assert (missed / 200 <= DELTA + 0.03).all()
    assert missed[1] > 0  # Clopper-Pearson is nearly tight


def test_realised_risk_needs_the_deviation_of_every_executed_chunk() -> None:
    with pytest.raises(RsdError, match="no finite deviation"):
        realised_risk([np.array([True])], [np.array([np.nan])], epsilon_mm=1.0, delta=0.1)
    with pytest.raises(RsdError, match="one flag and one deviation a chunk"):
        realised_risk([np.array([True])], [np.array([1.0, 2.0])], epsilon_mm=1.0, delta=0.1)
    with pytest.raises(RsdError, match="expected episodes"):
        realised_risk([], [], epsilon_mm=1.0, delta=0.1)


# the file


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    calibration = fit(episodes(60, 2))
    calibration.save(tmp_path)
    assert SkipCalibration.load(tmp_path) == calibration
    assert json.loads((tmp_path / FILE_NAME).read_text())["alpha"] == ALPHA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format 3, found 2; calibrate again"),
        ({"alpha": None}, r"missing \['alpha'\]"),
        ({"beta": 1}, r"unknown \['beta'\]"),
        ({"threshold": "1.0"}, "field threshold: expected a number from 0 to .*, found '1.0'"),
        ({"max_skips": True}, "field max_skips: expected an integer from 1 to 1000000, found True"),
        ({"format_version": True}, "format 3, found True"),
        ({"threshold": float("nan")}, "holds NaN"),
        ({"threshold": float("inf")}, "holds Infinity"),
        ({"threshold": -1.0}, "field threshold: expected a number from 0"),
        ({"max_skips": 0}, "field max_skips: expected an integer from 1"),
        ({"max_skips": 2.5}, "field max_skips: expected an integer"),
        ({"skip_share": 1.1}, "field skip_share: expected a number from 0 to 1, found 1.1"),
        ({"alpha": 1.5}, "field alpha: expected a number between 0 and 1, found 1.5"),
        ({"weights_sha256": "abc"}, "field weights_sha256: expected a SHA-256"),
        ({"threshold": 1.0, "p_value": 0.9}, "expected p_value at most delta"),
        ({"acceptance": "most"}, "acceptance .most.: expected exact"),
    ],
)
def test_an_odd_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {**fit(episodes(60, 2)).to_json(), **change}
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(RsdError, match=message):
        SkipCalibration.load(tmp_path)


def test_a_calibration_belongs_to_its_weights() -> None:
    calibration = fit(episodes(60, 2))
    calibration.check_belongs(SHA)
    with pytest.raises(RsdError, match="made for weights 0123456789ab, found ffffffffffff; calibrate"):
        calibration.check_belongs("f" * 64)
    assert asdict(calibration)["weights_sha256"] == SHA


# the deviation


def test_deviation_by_hand() -> None:
    target = np.zeros((8, 7))
    draft = target.copy()
    draft[2, 0], draft[3, 1] = 0.3, 0.4  # 15 mm, then 20 mm to the side of it: 25 mm
    draft[5, 0], draft[5, 1] = -0.3, -0.4  # and back
    draft[:, 6] = 1.0  # the gripper does not count
    assert fingertip_deviation(draft, target) == pytest.approx(25.0)
    draft[3, 3] = -0.2  # 0.1 rad on a lever of 0.1 m
    assert fingertip_deviation(draft, target) == pytest.approx(35.0)
    draft[0, 2], target[0, 2] = 3.0, 1.0  # the controller clamps
    assert fingertip_deviation(draft, target) == pytest.approx(35.0)


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_deviation_is_a_distance_of_commands(seed: int, scale: float) -> None:
    a, b, c = np.random.default_rng(seed).uniform(-1, 1, (3, 5, 8, 7))
    apart = fingertip_deviation(a, b)
    assert apart.shape == (5,)
    assert np.array_equal(apart, fingertip_deviation(b, a))
    assert (fingertip_deviation(a, a) == 0).all()
    assert (apart <= fingertip_deviation(a, c) + fingertip_deviation(c, b) + 1e-9).all()
    assert np.allclose(fingertip_deviation(scale * a, scale * b), scale * apart)


def test_deviation_of_tensors_is_that_of_arrays_and_stays_where_it_is() -> None:
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, 8, 7)).astype(np.float32)
    found = fingertip_deviation(torch.tensor(a), torch.tensor(b))
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found.numpy(), fingertip_deviation(a, b), rtol=1e-5)
    on_no_device = torch.empty(2, 8, 7, device="meta")  # any read of a value would fail there
    assert fingertip_deviation(on_no_device, on_no_device).device.type == "meta"


@pytest.mark.parametrize("shape", [(8, 6), (7,), (2, 8, 7)])
def test_deviation_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(RsdError, match=r"chunk: expected \[.*, 7\], found"):
        fingertip_deviation(np.zeros(shape), np.zeros((8, 7)))


def test_the_reach_of_an_action_is_the_installed_controllers() -> None:
    spec = find_spec("robosuite")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "controllers" / "config" / "osc_pose.json"
    config = json.loads(path.read_text())
    assert config["output_max"] == [ACTION_METRES] * 3 + [ACTION_RADIANS] * 3
    assert config["output_min"] == [-x for x in config["output_max"]]
    assert (config["input_max"], config["input_min"], config["control_delta"]) == (1, -1, True)
