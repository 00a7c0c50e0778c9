"""Equivalences of the decoders whose visual drafter proposes before the target looks, and of judging a whole draft."""

import copy
from dataclasses import replace

import pytest
import torch
from equivalence import LAST_STEP, C, H, P, as_draft, decoder_of, prefixes, run, same, seen
from torch import Tensor

from rsd.decoding.decoders import look, proposed
from rsd.decoding.gate import SkipRule
from rsd.decoding.state import DecodeResult, Draft, EpisodeState, PolicyInput, stacked
from rsd.models.bundle import RsdModel


def test_fused_and_exact_gives_the_tokens_of_ar_whatever_the_light_draft_proposes(model: RsdModel) -> None:
    model = copy.deepcopy(model)
    decoder = decoder_of(model, "exact", "sequential")
    agreed = set[bool]()
    for seed in range(30):
        with torch.no_grad():  # a draft that is as sure of the open as of the closed gripper
            model.visual_drafter.levels.gripper_head.bias.fill_(100.0 if seed % 2 else -100.0)
            model.target.gripper_head.bias.fill_(100.0 if seed % 3 else -100.0)
        scene = seen(model, seed)
        expected = run("ar", decoder, scene)
        state = EpisodeState()
        for _ in range(2):  # without and with a memory
            found = run("rsd-fused", decoder, scene, state)
            assert same(found, expected)
            assert found.draft is not None
            assert found.memory is not None
            state = EpisodeState(found.memory)
            agreed.add(torch.equal(found.draft.gripper, expected.gripper))
    assert agreed == {True, False}  # both ways were tried


@pytest.mark.parametrize("rule", ["margin", "residual"])
def test_riding_in_the_prefill_is_prefill_and_verification_in_one(model: RsdModel, rule: str) -> None:
    decoder = decoder_of(model, rule)
    scene = seen(model, 0)
    with torch.no_grad():
        prefix, given = decoder.embed(scene), decoder.draft(scene, None)
        looked = decoder.prefill(prefix, True)
        two = decoder.verify(given, replace(looked, gripper=given.gripper)).features
        fused = decoder.prefill_with(prefix, given)
        read = decoder.drafter.reads(looked.cache, model.target.remembered(prefix.shape[1]))
        one, memory = fused.features, decoder.drafter.remember(read)
    assert len(one) == (2 if rule == "residual" else C + 1)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, two, strict=True))
    assert fused.memory is not None
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(fused.memory.keys, memory.keys, strict=True))
    assert run("rsd-fused", decoder, scene).target_passes == 0


def test_judged_in_place_of_block_1_the_correction_is_added_and_the_gripper_is_that_blocks(whole: RsdModel) -> None:
    decoder = decoder_of(whole, "residual")
    scene = seen(whole, 0)
    with torch.no_grad():
        prefix = decoder.embed(scene)
        drafted = decoder.draft(scene, None)
        features, cache = whole.target.prefill_whole(prefix, drafted.prefixes[-1])
        _, plain = whole.target.prefill(prefix)
        apart = whole.target.whole(drafted.prefixes[-1], plain, prefix.shape[1])
        missing = whole.target.residual(features, C + 1)
    assert torch.allclose(features, apart, atol=1e-9)  # sees the prefix alone, riding in the prefill or after it
    assert plain.length == cache.length == prefix.shape[1] + H

    decoded = run("rsd-fused", decoder, scene)
    assert decoded.target_passes == 0
    assert decoded.accepted is not None
    assert torch.equal(decoded.accepted[:, 0], missing.abs() <= decoder.code.config.reach(C))
    assert torch.equal(decoded.gripper, (whole.target.gripper_logits(features) > 0).long())
    estimate = drafted.prefixes[-1] + missing
    inside = estimate.abs() <= decoder.code.config.span()
    assert ((decoded.value - estimate).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()
    assert decoded.memory is not None
    assert decoded.memory.keys[0].shape[2] == prefix.shape[1]  # what was drafted is not remembered


# blind verification


@torch.no_grad()
def judged_blind(model: RsdModel, rule: str, draft: Draft) -> tuple[DecodeResult, Tensor, Tensor]:
    """What comes out of a given draft, the target's own estimate, and what the told block finds missing."""
    ops, scene = decoder_of(model, rule), seen(model, 0)
    prefix = ops.embed(scene)
    own, cache = model.target.prefill(prefix)
    told = model.target.whole(draft.prefixes[-1], cache, prefix.shape[1])
    return look(ops, scene, draft), model.target.residual(own, 1), model.target.residual(told, C + 1)


def draft_of(model: RsdModel, value: Tensor) -> Draft:
    ops = decoder_of(model)
    return as_draft(ops.code, ops.code.quantise(value)[0][:, :C], torch.zeros(len(value), H, dtype=torch.long))


def test_blind_the_two_blocks_are_those_of_passes_of_their_own(whole: RsdModel) -> None:
    """Each sees the prefix and itself alone: the told one not what was decided, the other not the draft."""
    prefix, value = prefixes(3)[:, :, :], torch.randn(3, P, dtype=torch.float64)
    with torch.no_grad():
        (own, told), _ = whole.target.prefill_blind(prefix, value)
        alone, _ = whole.target.prefill(prefix)
        in_place, _ = whole.target.prefill_whole(prefix, value)
    assert torch.allclose(own, alone, atol=1e-9)
    assert torch.allclose(told, in_place, atol=1e-9)


@pytest.mark.parametrize("rule", ["blind(0.95)", "blind(0.95,moving)"])
def test_blind_a_draft_that_means_the_same_stands_and_another_gives_way(whole: RsdModel, rule: str) -> None:
    nothing = draft_of(whole, torch.zeros(1, P, dtype=torch.float64))
    _, own, _ = judged_blind(whole, rule, nothing)
    span, reach = whole.target.code.span(), whole.target.code.reach(C)
    assert (own.abs() > reach).any()  # it moves

    found, _, missing = judged_blind(whole, rule, near := draft_of(whole, own.clamp(-span, span)))
    assert found.accepted is not None
    assert found.accepted.all()
    refined = torch.where(missing.abs() <= reach, near.prefixes[-1] + missing, own)
    inside = refined.abs() <= span
    assert ((found.value - refined).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()

    found, _, _ = judged_blind(whole, rule, draft_of(whole, own.clamp(-span, span) + 4 * reach))
    assert found.accepted is not None
    assert not found.accepted.any()
    inside = own.abs() <= span
    assert ((found.value - own).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()


@pytest.mark.parametrize("moving", ["", ",moving"])
def test_own_executes_the_targets_chunk_and_judges_the_draft_as_blind_does(whole: RsdModel, moving: str) -> None:
    scene = seen(whole, 0)
    own, blind = (decoder_of(whole, f"{rule}(0.95{moving})") for rule in ("own", "blind"))
    alone = run("l1", own, scene)
    span, reach = whole.target.code.span(), whole.target.code.reach(C)
    verdicts = set[bool]()
    for shift in (0.0, 4 * reach):
        given = draft_of(whole, alone.value.clamp(-span, span) + shift)
        with torch.no_grad():
            found, expected = look(own, scene, given), look(blind, scene, given)
        inside = alone.value.abs() <= span
        assert ((found.value - alone.value).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()
        assert torch.equal(found.gripper, alone.gripper)
        assert found.accepted is not None
        assert torch.equal(found.accepted, expected.accepted)
        assert found.memory is not None
        pairs = zip(found.memory.keys, expected.memory.keys, strict=True)
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)
        verdicts.add(bool(found.accepted.all()))
    assert verdicts == {True, False}


# a batch


def test_rows_of_a_batch_go_their_own_ways(model: RsdModel) -> None:
    """One remembers, one begins; one goes without the target, one does not: as each alone."""
    ops, scenes = decoder_of(model, "margin"), [seen(model, seed) for seed in range(3)]
    with torch.no_grad():
        remembering = EpisodeState(look(ops, scenes[0], ops.draft(scenes[0], None)).memory, (0,), (0,), (True,))
        states = [EpisodeState(), remembering, remembering]
        drafts = [proposed(ops, scene, state.memory) for scene, state in zip(scenes, states, strict=True)]
    # a threshold between the forecasts, no row forced
    scores = [float(forecast.deviation_mm) for _, forecast in drafts]
    last = tuple(int(draft.gripper[0, -1]) for draft, _ in drafts)
    states = [EpisodeState(s.memory, s.skipped, (g,), s.seen) for s, g in zip(states, last, strict=True)]
    both = PolicyInput(
        torch.cat([s.pixels for s in scenes]),
        torch.cat([s.state for s in scenes]),
        (torch.cat([s.text[0] for s in scenes]), torch.cat([s.text[1] for s in scenes])),
    )
    ways = set()
    low, middle, _ = sorted(scores)
    for threshold in (0.0, (low + middle) / 2, 1e9):
        ops.skip = SkipRule(threshold, target_at_reset=False)
        together = run("rsd-skip", ops, both, stacked(states))
        assert together.skipped is not None
        for row, (scene, state) in enumerate(zip(scenes, states, strict=True)):
            alone = run("rsd-skip", ops, scene, state)
            assert alone.skipped == (together.skipped[row],)
            ways |= {alone.skipped}
            assert torch.allclose(alone.value[0], together.value[row].to(alone.value.dtype), atol=1e-6)
            assert torch.equal(alone.gripper[0], together.gripper[row])
            if not alone.skipped[0]:
                assert torch.equal(alone.accepted[0], together.accepted[row])
    assert ways == {(True,), (False,)}
