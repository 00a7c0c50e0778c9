"""What an episode leaves to its next prediction: memory, skips, pending verifications; the policy itself keeps none."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsd.decoding.gate import SkipRule
from rsd.decoding.state import EpisodeState
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.target import TargetModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import ActionChunk, Observation, RsdError

MakeObservation = Callable[..., Observation]


def light_policy(policy: RsdPolicy, decode: str, **options: Any) -> RsdPolicy:
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, **options)


def test_skipping_leaves_the_main_idle_until_it_has_to_look_again(
    policy: RsdPolicy, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout: no switch forces the target
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2), target_at_reset=False)
    looks = list[bool]()
    see = TargetModel.embed_prefix
    monkeypatch.setattr(TargetModel, "embed_prefix", lambda *a: looks.append(True) or see(*a))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(7)]
    assert [s.prefills for s in stats] == [0, 0, 1, 0, 0, 1, 0]
    assert len(looks) == 2
    assert all("prefill" not in s.latency_ms for s in stats if not s.prefills)
    assert all(np.isfinite(s.expected_deviation_mm) for s in stats)
    assert [bool(s.num_draft_tokens) for s in stats] == [bool(s.prefills) for s in stats]
    skipping.predict(make_observation(7))
    assert skipping.predict(make_observation(8)).stats.prefills == 1
    skipping.reset()
    assert skipping.predict(make_observation(9)).stats.prefills == 0


def test_a_memory_of_the_main_is_of_use_for_a_while(
    policy: RsdPolicy, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)
    known = list[bool]()
    perceive = VisualDrafter.perceive
    monkeypatch.setattr(VisualDrafter, "perceive", lambda *a: known.append(a[4] is not None) or perceive(*a))
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=3, memory_chunks=2))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(8)]
    assert [s.prefills for s in stats] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert known == [False, True, True, False, False, True, True, False]


def test_a_gripper_that_closes_at_once_forces_the_main(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    policy.model.visual_drafter.levels.gripper_head.bias.data.fill_(100.0)
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9), target_at_reset=False)
    stats = skipping.predict(make_observation(0)).stats
    assert stats.forced
    assert stats.prefills == 1


def test_a_gripper_switch_forces_the_main(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    policy.model.target.gripper_head.bias.data.fill_(-100.0)
    policy.model.visual_drafter.levels.gripper_head.bias.data.fill_(100.0)
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2))
    chunks = [skipping.predict(make_observation(seed)) for seed in range(4)]
    assert [chunk.stats.prefills for chunk in chunks] == [1, 1, 1, 1]
    assert all((chunk.actions[:, -1] == -1).all() for chunk in chunks)  # and has the last word


def test_no_threshold_no_skip(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    skipping = light_policy(policy, "rsd-skip")
    fused = light_policy(policy, "rsd-fused")
    for seed in range(4):
        observation = make_observation(seed)
        chunk = skipping.predict(observation)
        assert chunk.stats.prefills == 1
        assert np.array_equal(chunk.actions, fused.predict(observation).actions)


def test_the_memory_is_of_this_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    fused = light_policy(policy, "rsd-fused", audit=True)
    fresh = fused.predict(make_observation(3)).stats.expected_deviation_mm
    again = fused.predict(make_observation(3)).stats.expected_deviation_mm
    fused.reset()
    assert fresh != again
    assert fused.predict(make_observation(3)).stats.expected_deviation_mm == fresh


def test_a_checkpoint_without_light_draft_decodes_the_other_ways(
    tiny_config: PolicyConfig, tokenizer: ActionTokenizer, make_observation: MakeObservation, tmp_path: Path
) -> None:
    config = replace(tiny_config, visual_drafter=None)
    RsdPolicy.of(RsdModel.of(config, tokenizer), tokenizer, config).save_pretrained(tmp_path)
    RsdPolicy.from_pretrained(tmp_path, decode="rsd").predict(make_observation())
    assert RsdPolicy.from_pretrained(tmp_path).decode == "rsd"
    with pytest.raises(RsdError, match=r"decode 'rsd-fused': this checkpoint has no visual drafter; use rsd"):
        RsdPolicy.from_pretrained(tmp_path, decode="rsd-fused")


# acting before the target has looked


def acting_ahead(policy: RsdPolicy, **options: Any) -> RsdPolicy:
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="draft-first", **options)


def test_ahead_of_the_main_the_drafts_own_chunk_is_executed(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    """Beside `rsd-fused`, which drafts with the same memory of the target."""
    fused = light_policy(policy, "rsd-fused").core
    told, left_alone = acting_ahead(policy), acting_ahead(policy)
    state = EpisodeState()
    for i in range(4):
        observation = make_observation(i)
        with torch.inference_mode():
            draft = fused.ops.draft(fused.body([observation]), state.memory)
            forecast = fused.ops.forecast(draft)
        expected = fused._to_actions(forecast.value, draft.gripper)[0]
        _, (state,), _ = fused.predict([observation], [state])
        for other in (told, left_alone):
            assert np.allclose(other.predict(observation).actions, expected, atol=1e-6)
        told.verify()


def test_alone_the_light_draft_always_acts_as_at_an_episodes_start(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    alone = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="drafter-only")
    for i in range(3):
        chunk = alone.predict(make_observation(i))
        assert np.array_equal(chunk.actions, acting_ahead(policy).predict(make_observation(i)).actions)
        assert (chunk.stats.prefills, chunk.stats.target_passes, chunk.stats.skipped) == (0, 0, True)
        assert set(chunk.stats.latency_ms) == {"preprocess", "draft", "total"}


def test_the_verification_judges_the_chunk(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy, audit=True)
    first = ahead.predict(make_observation(0)).stats
    assert (first.prefills, first.skipped, first.num_draft_tokens, first.deviation_mm) == (0, False, [], None)
    assert set(first.latency_ms) == {"preprocess", "draft", "total"}
    before = replace(first, latency_ms=dict(first.latency_ms))
    stats = ahead.verify()
    assert first == before  # what was returned stays as it was
    assert stats is not None
    assert (stats.prefills, stats.target_passes, stats.skipped) == (1, 0, False)
    assert stats.num_draft_tokens == [48] * 3
    assert 0 < sum(stats.num_accepted_tokens) <= 144
    assert stats.deviation_mm is not None
    assert stats.deviation_mm > 0
    assert stats.expected_deviation_mm == first.expected_deviation_mm
    assert stats.latency_ms["verify-pending"] > 0
    assert stats.latency_ms["total"] == first.latency_ms["total"]
    assert ahead.verify() is None  # nothing is left
    unaware = acting_ahead(policy)
    unaware.predict(make_observation(0))
    ahead.predict(make_observation(1))
    # begins with what was left, so its draft remembers the same
    assert np.array_equal(unaware.predict(make_observation(1)).actions, acting_after(policy, make_observation).actions)


def acting_after(policy: RsdPolicy, make_observation: MakeObservation) -> ActionChunk:
    """The second chunk of an episode of which the first was verified at once."""
    ahead = acting_ahead(policy)
    ahead.predict(make_observation(0))
    ahead.verify()
    return ahead.predict(make_observation(1))


def test_what_is_left_to_do_ends_with_its_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy)
    fresh = ahead.predict(make_observation(0)).actions
    ahead.reset()
    assert np.array_equal(ahead.predict(make_observation(0)).actions, fresh)
    remembering = ahead.predict(make_observation(0)).actions
    assert not np.array_equal(remembering, fresh)


def test_a_prediction_leaves_nothing_in_the_policy_and_nothing_changes_what_was_given(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    """The same states give the same chunks, whatever was predicted in between, by whom."""
    core = light_policy(policy, "rsd-fused").core
    one, other = make_observation(0), make_observation(1)
    (first,), (state,), pending = core.predict([one])
    assert pending is None
    assert state.memory is not None
    held = [tensor.clone() for tensor in state.memory.keys]
    (second,), (later,), _ = core.predict([other], [state])
    core.predict([other])
    core.predict([one], [later])
    assert all(torch.equal(a, b) for a, b in zip(held, state.memory.keys, strict=True))
    assert np.array_equal(core.predict([other], [state]).chunks[0].actions, second.actions)
    assert np.array_equal(core.predict([one], [None]).chunks[0].actions, first.actions)
    assert not np.array_equal(core.predict([other]).chunks[0].actions, second.actions)


def test_pending_verifications_of_two_episodes_do_not_meet(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    core = acting_ahead(policy).core
    pending, alone = [], []
    for seed in range(2):
        pending.append(core.predict([make_observation(seed)]).pending)
        alone.append(core.verify_pending(acting_ahead(policy).core.predict([make_observation(seed)]).pending))
    for found, expected in zip(reversed(pending), reversed(alone), strict=True):
        (stats,), (state,) = core.verify_pending(found)
        assert stats.num_accepted_tokens == expected.stats[0].num_accepted_tokens
        assert all(torch.equal(a, b) for a, b in zip(state.memory.keys, expected.states[0].memory.keys, strict=True))


def test_a_failing_verification_forgets_the_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy)
    fresh = ahead.predict(make_observation(0)).actions
    kept = policy.model.target.level_head.bias.clone()
    with torch.no_grad():
        policy.model.target.level_head.bias.fill_(float("nan"))
    with pytest.raises(RsdError, match="non-finite"):
        ahead.verify()
    with torch.no_grad():
        policy.model.target.level_head.bias.copy_(kept)
    assert np.array_equal(ahead.predict(make_observation(0)).actions, fresh)


def test_a_verification_may_come_from_another_thread(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead, alone = acting_ahead(policy), acting_ahead(policy)
    with ThreadPoolExecutor(1) as aside:
        for i in range(6):
            chunk = ahead.predict(make_observation(i))
            aside.submit(ahead.verify)  # not waited for: the next prediction does it, or waits for it
            assert np.array_equal(chunk.actions, alone.predict(make_observation(i)).actions)


# the target at an episode's first observation


def test_the_target_runs_at_reset(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout: no switch forces the target
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(5)]
    assert [s.prefills for s in stats] == [1, 0, 0, 1, 0]
    assert [s.forced for s in stats] == [True, False, False, False, False]
    skipping.reset()
    assert skipping.predict(make_observation(9)).stats.prefills == 1
