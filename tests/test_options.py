"""What is asked for and what a checkpoint has settle how it decodes: a pure function of the two."""

from dataclasses import replace
from typing import Any

import pytest

from rsd.decoding.calibration import SkipCalibration
from rsd.decoding.decoders import DECODERS, names
from rsd.decoding.gate import ANY_MM, SkipRule
from rsd.options import Checkpoint, DecodeOptions, RuntimeOptions, options_of, resolve
from rsd.types import BEST, RsdError

PROMISE: dict[str, Any] = {
    **{"threshold": 20.0, "max_skips": 3, "memory_chunks": 1, "epsilon_mm": 50.0, "alpha": 0.1},
    **{"score": "expected_deviation_mm", "delta": 0.1, "loss": "share", "test": "betting", "p_value": 0.05},
    **{"empirical_risk": 0.05, "skip_share": 0.5},
    **{"episodes": 9, "chunks": 90, "suites": "s", "acceptance": "margin", "weights_sha256": "0" * 64},
}
CHECKPOINT = Checkpoint(visual_drafter=True, calibration=SkipCalibration(**PROMISE))


@pytest.mark.parametrize("decode", DECODERS)
def test_what_is_left_open_is_the_checkpoints(decode: str) -> None:
    found = resolve(replace(CHECKPOINT, calibration=None), DecodeOptions(decode))
    assert (found.decode, found.why, found.rule.name, found.fine) == (decode, "", "margin", "regress")
    assert found.skip == SkipRule()


def test_a_calibration_brings_its_rule_and_a_given_threshold_goes_without_it() -> None:
    found = resolve(CHECKPOINT, DecodeOptions("rsd-skip"))
    assert found.skip == SkipRule(20.0, 3, 1)
    assert (found.rule.name, found.fine) == ("margin", "regress")
    given = resolve(CHECKPOINT, DecodeOptions("rsd-skip", skip=SkipRule(5.0)))
    assert given.skip == SkipRule(5.0)
    assert given.rule.name == "margin"
    why = "no calibration here"
    missing = replace(CHECKPOINT, calibration=why)
    with pytest.raises(RsdError, match=why):
        resolve(missing, DecodeOptions("rsd-skip"))
    assert resolve(missing, DecodeOptions("rsd-fused")).decode == "rsd-fused"  # others need none
    with pytest.raises(RsdError, match="calibrated with acceptance margin and fine regress, found acceptance exact"):
        resolve(CHECKPOINT, DecodeOptions("rsd-skip", acceptance="exact"))


def test_without_a_calibration_a_checkpoint_may_keep_a_schedule() -> None:
    scheduled = replace(CHECKPOINT, calibration=None, max_skips=3)
    skip = resolve(scheduled, DecodeOptions("rsd-skip")).skip
    assert skip == SkipRule(ANY_MM, 3, memory_chunks=3)
    assert skip.target_at_reset
    assert resolve(scheduled, DecodeOptions("rsd-skip", skip=SkipRule(5.0))).skip == SkipRule(5.0)
    assert resolve(replace(CHECKPOINT, max_skips=3), DecodeOptions("rsd-skip")).skip == SkipRule(20.0, 3, 1)


def test_by_a_schedule_the_target_is_not_told_the_draft_at_its_looks() -> None:
    blind = replace(CHECKPOINT, calibration=None, max_skips=3, acceptance="blind(0.9,moving)")
    assert resolve(blind, DecodeOptions("rsd-skip")).rule.name == "own(0.9,moving)"
    assert resolve(blind, DecodeOptions("rsd-skip", "margin")).rule.name == "margin"
    assert resolve(blind, DecodeOptions("rsd-fused")).rule.name == "blind(0.9,moving)"
    assert resolve(blind, DecodeOptions("rsd-skip", skip=SkipRule(5.0))).rule.name == "blind(0.9,moving)"
    assert resolve(replace(blind, acceptance="margin"), DecodeOptions("rsd-skip")).rule.name == "margin"
    with pytest.raises(RsdError, match="the target is told nothing that rsd could verify; take l1"):
        resolve(blind, DecodeOptions("rsd", "own(0.9)"))


def test_made_up_acceptance_is_for_measuring_time_alone() -> None:
    asked = DecodeOptions("rsd-fused", "synthetic(0.5)")
    with pytest.raises(RsdError, match="makes up what the target says, expected in rsd bench latency alone"):
        resolve(CHECKPOINT, asked)
    found = resolve(CHECKPOINT, replace(asked, timed_only=True))
    assert (found.rule.name, found.fine) == ("synthetic(0.5,0)", "sequential")
    with pytest.raises(RsdError, match="expected fine 'sequential', found 'regress'"):
        resolve(CHECKPOINT, replace(asked, timed_only=True, fine="regress"))
    with pytest.raises(RsdError, match="RATE from 0 to 1"):
        resolve(CHECKPOINT, DecodeOptions("rsd", "synthetic(1.5)", timed_only=True))


def test_the_target_at_reset_goes_with_any_skip_rule() -> None:
    for skip in (None, SkipRule(5.0)):
        assert resolve(CHECKPOINT, DecodeOptions("rsd-skip", skip=skip)).skip.target_at_reset
        without = resolve(CHECKPOINT, DecodeOptions("rsd-skip", skip=skip, target_at_reset=False))  # the ablation
        assert not without.skip.target_at_reset


def test_a_checkpoint_whose_rule_executes_what_it_is_told_is_judged_blind_unless_asked() -> None:
    told = replace(CHECKPOINT, acceptance="residual")
    for decode in (BEST, "rsd", "rsd-fused", "draft-first"):
        assert resolve(told, DecodeOptions(decode)).rule.name == "blind(0.95)"
        assert resolve(told, DecodeOptions(decode, "residual")).rule.name == "residual"
        assert resolve(told, DecodeOptions(decode, "margin")).rule.name == "margin"
    assert resolve(told, DecodeOptions("rsd-fused", temperature=1.0)).rule.name == "exact"
    calibration = SkipCalibration(**{**PROMISE, "acceptance": "residual"})  # is a promise of that rule alone
    assert resolve(replace(told, calibration=calibration), DecodeOptions("rsd-skip")).rule.name == "residual"


def test_the_best_has_every_chunk_verified() -> None:
    found = resolve(CHECKPOINT, DecodeOptions())
    assert (found.decode, found.why) == ("rsd-fused", "the best that verifies every chunk")
    assert resolve(CHECKPOINT, DecodeOptions(temperature=1.0)).decode == "rsd-fused"
    assert resolve(CHECKPOINT, DecodeOptions(skip=SkipRule(5.0))).decode == "rsd-skip"
    assert resolve(replace(CHECKPOINT, visual_drafter=False), DecodeOptions()).decode == "rsd"


def test_exact_is_sequential_unless_told_otherwise() -> None:
    assert resolve(CHECKPOINT, DecodeOptions("rsd", "exact")).fine == "sequential"
    assert resolve(CHECKPOINT, DecodeOptions("rsd", "exact", "regress")).fine == "regress"
    drawn = resolve(CHECKPOINT, DecodeOptions("rsd", temperature=1.0))
    assert (drawn.rule.name, drawn.fine) == ("exact", "sequential")
    assert not drawn.recordable(True, "cuda")
    assert resolve(CHECKPOINT, DecodeOptions("rsd")).recordable(True, "cpu")
    assert not resolve(CHECKPOINT, DecodeOptions("rsd", "margin")).recordable(False, "cpu")  # OpenVLA


@pytest.mark.parametrize("rule", ["residual", "blind(0.95)", "own(0.95)"])
def test_a_rule_that_judges_a_draft_as_a_whole_is_for_compact_models_and_regressed_levels(rule: str) -> None:
    with pytest.raises(RsdError, match="not for OpenVLA"):
        resolve(replace(CHECKPOINT, compact=False), DecodeOptions("rsd-fused", rule))
    with pytest.raises(RsdError, match="expected fine 'regress', found 'sequential'"):
        resolve(CHECKPOINT, DecodeOptions("rsd-fused", rule, "sequential"))


def test_a_checkpoint_without_a_visual_drafter_has_none_of_its_decoders() -> None:
    bare = replace(CHECKPOINT, visual_drafter=False)
    for decode in names(visual=True):
        with pytest.raises(RsdError, match="has no visual drafter"):
            resolve(bare, DecodeOptions(decode))
    assert resolve(bare, DecodeOptions()).decode == "rsd"


def test_the_executed_steps_are_those_asked_for_or_the_checkpoints_or_all() -> None:
    long = replace(CHECKPOINT, horizon=16, execute=8, calibration=None)
    for asked, own, found in ((None, 8, 8), (12, 8, 12), (None, None, 16), (1, None, 1)):
        assert resolve(replace(long, execute=own), DecodeOptions("l1", execute=asked)).execute == found
    with pytest.raises(RsdError, match="execute 17: expected 1 to 16, the steps of this policy's chunk"):
        resolve(long, DecodeOptions("l1", execute=17))
    with pytest.raises(RsdError, match="execute: expected an integer from 1"):
        DecodeOptions(execute=0)


@pytest.mark.parametrize(("made", "steps"), [(None, 16), (8, 8)])  # None: before it was recorded
def test_a_calibration_is_of_as_many_executed_steps(made: int | None, steps: int) -> None:
    long = replace(CHECKPOINT, horizon=16, calibration=SkipCalibration(**PROMISE, execute=made))
    assert resolve(long, DecodeOptions("rsd-skip", execute=steps)).execute == steps
    assert resolve(long, DecodeOptions("rsd-skip", skip=SkipRule(5.0), execute=4)).execute == 4
    with pytest.raises(RsdError, match=f"of which {steps} steps are executed, found execute 4; calibrate again"):
        resolve(long, DecodeOptions("rsd-skip", execute=4))


def test_keywords_are_options_of_either_kind() -> None:
    found = options_of(decode="rsd", device="cuda:1", audit=True)
    assert found == (DecodeOptions("rsd", audit=True), RuntimeOptions("cuda:1"))
    with pytest.raises(RsdError, match="option colour: expected some of acceptance, audit, batch, decode,"):
        options_of(colour="red")


@pytest.mark.parametrize("change", [{"threshold_mm": -1.0}, {"max_skips": 0}, {"memory_chunks": 0}])
def test_a_skip_rule_says_what_it_can_be(change: dict[str, Any]) -> None:
    with pytest.raises(RsdError, match=r"(threshold_mm|max_skips|memory_chunks): expected a"):
        SkipRule(**change)


def test_what_gives_the_tokens_of_ar_is_lossless() -> None:
    for decode, rule, lossless in (("ar", None, True), ("rsd-fused", "exact", True), ("rsd", "margin", False)):
        assert resolve(CHECKPOINT, DecodeOptions(decode, rule)).lossless == lossless
    for decode in ("l1", "parallel", "draft-first", "rsd-fused", "coarse-only"):
        assert not resolve(CHECKPOINT, DecodeOptions(decode)).lossless
