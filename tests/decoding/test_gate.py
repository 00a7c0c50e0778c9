"""The gate of `rsd-skip` that trusts only after agreement."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rsd.decoding.calibration import may_skip, most_skips
from rsd.decoding.gate import SkipRule
from rsd.decoding.state import EpisodeState, Forecast
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


def test_while_something_is_held_the_target_is_asked_sooner() -> None:
    rule, skipped, closed = SkipRule(1e9, 5, max_skips_held=2), (1, 2, 2, 4, 5), (1, 1, 0, 0, 0)
    state = EpisodeState(skipped=skipped, gripper=closed, seen=(True,) * 5, stood=(0,) * 5)
    assert rule.most(state) == (2, 2, 5, 5, 5)
    forecast = Forecast(torch.zeros(5, 4), torch.zeros(5))
    assert rule.trusts(forecast, state, (False,) * 5) == (True, False, True, True, False)
    assert SkipRule(1e9, 5, max_skips_held=0).trusts(forecast, state, (False,) * 5) == (False, False, True, True, False)
    assert SkipRule(1e9, 5).most(state) == SkipRule(1e9, 5, max_skips_held=5).most(state) == (5,) * 5
    with pytest.raises(RsdError, match="expected max_skips_held of at most max_skips, 5, found 6"):
        SkipRule(1e9, 5, max_skips_held=6)
    assert replace(rule, skips_per_agreement=1).most(state) == (0,) * 5


def test_a_closed_gripper_is_known_from_what_was_executed(
    model: RsdModel, tokenizer: ActionTokenizer, tiny_config: PolicyConfig, make_observation: Callable[..., Observation]
) -> None:
    more = make_observation, SkipRule(1e9, 3, max_skips_held=1), NEVER
    assert [one.prefills for one in run(model, tokenizer, tiny_config, *more)] == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert model.visual_drafter is not None
    for gripper in (model.target.gripper_head, model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(100.0)  # closed from the first chunk on
    assert [one.prefills for one in run(model, tokenizer, tiny_config, *more)] == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "2"])
def test_only_whole_chunks_can_be_earned(number: object) -> None:
    with pytest.raises(RsdError, match="skips_per_agreement: expected"):
        SkipRule(skips_per_agreement=number)  # type: ignore[arg-type]
