"""The gate of `rsd-skip` that trusts only after agreement."""

from collections.abc import Callable
from typing import Any

import pytest

from rsd.decoding.calibration import may_skip, most_skips
from rsd.decoding.gate import SkipRule
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import ChunkStats, Observation, RsdError

ALWAYS, NEVER = "distance(6)", "blind(1)"  # no two of seven symbols are further apart; random drafts are never all near


@pytest.fixture
def model(make_model: Callable[[int], RsdModel]) -> RsdModel:
    model = make_model(0)
    assert model.visual_drafter is not None
    for gripper in (model.target.gripper_head, model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout: no switch forces the target
    return model


def run(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    config: PolicyConfig,
    see: Callable[..., Observation],
    rule: SkipRule,
    acceptance: str,
    **options: Any,
) -> list[ChunkStats]:
    policy = RsdPolicy.of(model, tokenizer, config, decode="rsd-skip", skip=rule, acceptance=acceptance, **options)
    return [policy.predict(see(seed)).stats for seed in range(11)]


@pytest.mark.parametrize(
    ("rule", "acceptance", "passes"),
    [
        (SkipRule(1e9, 3, skips_per_agreement=1), ALWAYS, [1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0]),  # earned, up to max_skips
        (SkipRule(1e9, 3, skips_per_agreement=3), ALWAYS, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]),  # the first one will do
        (SkipRule(1e9, 3, skips_per_agreement=1), NEVER, [1] * 11),
        (SkipRule(1e9, 3), NEVER, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]),  # without the option nobody asks
    ],
)
def test_the_target_is_skipped_as_often_as_its_agreement_allows(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    make_observation: Callable[..., Observation],
    rule: SkipRule,
    acceptance: str,
    passes: list[int],
) -> None:
    stats = run(model, tokenizer, tiny_config, make_observation, rule, acceptance)
    assert [one.prefills for one in stats] == passes
    assert {one.stood for one in stats if one.prefills} == {acceptance == ALWAYS}
    assert {one.stood for one in stats if not one.prefills} <= {None}
    audited = run(model, tokenizer, tiny_config, make_observation, rule, acceptance, audit=True)
    assert {one.stood for one in audited} == {acceptance == ALWAYS}


def test_agreement_is_lost_with_the_first_draft_that_does_not_stand() -> None:
    assert [most_skips(6, 2, stood) for stood in range(5)] == [0, 2, 4, 6, 6]
    assert most_skips(6, None, 0) == 6
    assert not may_skip(0.0, 1.0, 0, most_skips(6, 2, 0), False)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "2"])
def test_only_whole_chunks_can_be_earned(number: object) -> None:
    with pytest.raises(RsdError, match="skips_per_agreement: expected"):
        SkipRule(skips_per_agreement=number)  # type: ignore[arg-type]
