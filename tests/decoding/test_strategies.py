"""Equivalences of the decoding strategies on random weights, in float64: no argmax hangs on its last bit."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule, requantise
from rsd.decoding.decoders import DECODERS, look, names, proposed
from rsd.decoding.gate import SkipRule
from rsd.decoding.primitives import Primitives, likelier_gripper
from rsd.decoding.state import Blocks, DecodeResult, Draft, EpisodeState, PolicyInput, stacked
from rsd.decoding.timing import Stopwatch
from rsd.models.bundle import RsdModel
from rsd.models.target import state_features
from rsd.models.text import word_ids
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.types import Observation, RsdError

L, C, H, P = 8, 3, 8, 48  # levels, drafted levels, steps, scalars of a level
LAST_STEP = 2.0 ** -(L - 1)


def as_draft(code: Rfsq, motion: Tensor, gripper: Tensor) -> Draft:
    """A draft of given tokens [B, c, P] and gripper [B, H]."""
    value, prefixes = torch.zeros(motion.shape[::2], device=motion.device), []
    for level in range(1, motion.shape[1] + 1):
        value = value + code.value(motion[:, level - 1], level)
        prefixes.append(value)
    return Draft(motion, gripper, prefixes)


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], RsdModel]) -> RsdModel:
    model = make_model(1).double()
    with torch.no_grad():  # fresh weights say nearly the same of every observation, step and level
        for block in (model.target.block, model.feature_drafter.block):
            block.position *= 20
            block.level *= 20
        for layer in model.target.trunk.layers:
            layer.qkv.weight *= 4
            layer.project.weight *= 4
        model.target.level_head.weight *= 10
        model.feature_drafter.level_head.weight *= 10
        model.target.residual_head[2].weight *= 10
    return model


def decoder_of(model: RsdModel, rule: str = "exact", fine: str = "regress") -> Primitives:
    return Primitives(
        model.target, model.feature_drafter, acceptance_rule(rule, model.target.code), fine, model.visual_drafter
    )


@torch.no_grad()
def decode(name: str, ops: Primitives, prefix: Tensor) -> DecodeResult:
    given = Blindfolded(ops.target, ops.feature_drafter, ops.rule, ops.fine)
    empty = torch.zeros(len(prefix), 0)
    decoded = DECODERS[name].decode(given, PolicyInput(prefix, empty, (empty, empty)), EpisodeState())
    given.check()
    return decoded


class Blindfolded(Primitives):
    """Of which the target gets a given prefix, in the place of pixels."""

    def embed(self, seen: PolicyInput) -> Tensor:
        return seen.pixels


def prefixes(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 10, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], None]:
    """Make the draft propose what it is told."""

    def force(motion: Tensor, gripper: Tensor) -> None:
        monkeypatch.setattr(Primitives, "draft_from", lambda ops, features: as_draft(ops.code, motion, gripper))

    return force


def same(found: DecodeResult, expected: DecodeResult) -> bool:
    assert found.motion is not None
    assert expected.motion is not None
    equal = (torch.equal(a, b) for a, b in zip(outputs(found), outputs(expected), strict=True))
    return all(equal)


def outputs(decoded: DecodeResult) -> Iterator[Tensor]:
    assert decoded.motion is not None
    yield from (decoded.motion, decoded.value, decoded.gripper)


def test_random_weights_give_varied_tokens(model: RsdModel) -> None:
    """Otherwise the equivalences below would say little."""
    motion = decode("ar", decoder_of(model), prefixes(50)).motion
    assert motion is not None
    assert motion.shape == (50, L, P)
    shares = torch.bincount(motion.flatten(), minlength=7) / motion.numel()
    assert shares.min() > 0.02
    assert (motion != motion[0]).float().mean() > 0.3


def test_ar_takes_a_pass_a_level_after_the_prefill_and_decodes_to_its_tokens(model: RsdModel) -> None:
    decoder = decoder_of(model)
    decoded = decode("ar", decoder, prefixes(3))
    assert decoded.target_passes == L - 1
    assert decoded.motion is not None
    assert torch.equal(decoded.value, decoder.code.dequantise(decoded.motion))


def test_exact_sequential_rsd_is_ar_whatever_the_draft_proposes(
    model: RsdModel, forced: Callable[[Tensor, Tensor], None]
) -> None:
    decoder = decoder_of(model, "exact", "sequential")
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for index, prefix in enumerate(prefixes(100).split(1)):
        expected = decode("ar", decoder, prefix)
        assert expected.motion is not None
        right = index % (C + 1)  # levels that the draft gets right
        drafted = torch.randint(0, 7, (1, C, P), generator=generator)
        drafted[:, :right] = expected.motion[:, :right]
        if index % 2 and right < C:  # nearly right: a single scalar is wrong
            drafted[:, right] = expected.motion[:, right]
            drafted[0, right, index % P] = (drafted[0, right, index % P] + 1) % 7
        forced(drafted, 1 - expected.gripper)
        decoded = decode("rsd", decoder, prefix)
        assert same(decoded, expected)
        assert decoded.accepted_levels is not None
        assert decoded.accepted_gripper is not None
        assert decoded.accepted_levels.tolist() == [right]
        assert not decoded.accepted_gripper.any()
        # verification yields one level past those that stand, the others cost a pass each
        assert decoded.target_passes == 1 + (L - right - 1)
        seen.add(right)
    assert seen == set(range(C + 1))


def test_exact_sequential_rsd_is_ar_with_the_models_own_draft(model: RsdModel) -> None:
    decoder = decoder_of(model, "exact", "sequential")
    for prefix in prefixes(20, seed=1).split(1):
        assert same(decode("rsd", decoder, prefix), decode("ar", decoder, prefix))


def test_exact_sequential_rsd_has_the_tokens_of_ar_over_many_observations(
    model: RsdModel, make_observation: Callable[..., Observation]
) -> None:
    """From pixels, state and words on, with the model's own draft."""
    decoder = decoder_of(model, "exact", "sequential")
    words = ("bowl", "plate", "stove", "drawer", "cookie box")
    for seed in range(100):
        seen = make_observation(seed, instruction=f"put the {words[seed % 5]} on the {words[seed // 5 % 5]}")
        images = torch.from_numpy(seen.images)[None].permute(0, 1, 4, 2, 3).double() / 255 - 0.5
        state = state_features(torch.from_numpy(seen.state)[None]).double()
        with torch.no_grad():
            prefix = model.target.embed_prefix(images, state, model.target.encode_text(word_ids([seen.instruction])))
        assert same(decode("rsd", decoder, prefix), decode("ar", decoder, prefix))


@pytest.mark.parametrize("rule", ["distance(1)", "typical(0.09)", "typical(0.3)"])
def test_rsd_under_the_other_published_rules_accepts_part_of_the_draft(model: RsdModel, rule: str) -> None:
    decoder = decoder_of(model, rule)
    decoded = decode("rsd", decoder, prefixes(40))
    assert decoded.accepted is not None
    assert 0.05 < decoded.accepted.float().mean() < 0.95
    assert decoded.target_passes == 1
    assert torch.equal(decoded.value, decoder.code.dequantise(decoded.motion))


def test_sequential_margin_corrects_the_first_level_outside_the_margin(
    model: RsdModel, forced: Callable[[Tensor, Tensor], None]
) -> None:
    decoder = decoder_of(model, "margin", "sequential")
    for index, prefix in enumerate(prefixes(30).split(1)):
        expected = decode("ar", decoder, prefix)
        assert expected.motion is not None
        drafted = expected.motion[:, :C].clone()
        scalar = index % P
        own = int(expected.motion[0, 0, scalar])
        drafted[0, 0, scalar] = own + 3 if own < 3 else own - 3  # the margin is 2
        forced(drafted, expected.gripper)
        decoded = decode("rsd", decoder, prefix)
        assert decoded.accepted_levels is not None
        assert decoded.accepted_levels.tolist() == [0]
        assert same(decoded, expected)

        drafted[0, 0, scalar] = own + 2 if own < 3 else own - 2
        forced(drafted, expected.gripper)
        decoded = decode("rsd", decoder, prefix)
        assert decoded.motion is not None
        assert decoded.motion[0, 0, scalar] == drafted[0, 0, scalar]


@pytest.mark.parametrize("rule", ["exact", "margin", "residual", "agreement(0.7)"])
def test_regressed_rsd_takes_one_pass_and_its_tokens_decode_to_its_value(model: RsdModel, rule: str) -> None:
    decoder = decoder_of(model, rule)
    decoded = decode("rsd", decoder, prefixes(40))
    assert decoded.target_passes == 1
    assert decoded.motion is not None
    assert decoded.motion.shape == (40, L, P)
    decoder.code.check(decoded.motion)
    assert torch.equal(decoded.value, decoder.code.dequantise(decoded.motion))
    assert decoded.num_draft_tokens == [P] * C


def test_regressed_margin_takes_each_scalar_from_the_block_after_its_own_accepted_levels(model: RsdModel) -> None:
    decoder = decoder_of(model, "margin")
    prefix = prefixes(40)
    with torch.no_grad():
        features, cache = model.target.prefill(prefix)
        proposed = decoder.draft_from(features)
        drafted, gripper = proposed.motion, likelier_gripper(decoder, features)
        blocks = decoder.verify(proposed, Blocks([features], gripper, cache)).features
        own = torch.stack([model.target.logits(blocks[i], i + 1).argmax(-1) for i in range(C)], dim=1)
        missing = [model.target.residual(block, k + 1) for k, block in enumerate(blocks)]
    within = (drafted - own).abs() <= 2
    assert 0.1 < within.float().mean() < 0.99

    decoded = decode("rsd", decoder, prefix)
    assert decoded.motion is not None
    assert decoded.accepted is not None
    assert torch.equal(decoded.accepted, within)
    kept = within.long().cumprod(1).sum(1)
    assert set(kept.flatten().tolist()) == set(range(C + 1))
    span = decoder.code.config.span()
    for k in range(C + 1):
        here = kept == k
        estimate = decoder.code.dequantise(drafted[:, :k]) + missing[k]
        inside = here & (estimate.abs() <= span)
        assert ((decoded.value - estimate).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()


def test_a_draft_judged_as_a_whole_stands_where_the_finer_levels_take_out_what_it_misses(model: RsdModel) -> None:
    decoder = decoder_of(model, "residual")
    prefix = prefixes(40)
    with torch.no_grad():
        features, cache = model.target.prefill(prefix)
        proposed = decoder.draft_from(features)
        gripper = likelier_gripper(decoder, features)
        (last,) = model.target.extend(proposed.prefixes[-1:], gripper, C + 1, cache)  # one block, told everything
        missing, alone = model.target.residual(last, C + 1), model.target.residual(features, 1)
    within = missing.abs() <= decoder.code.config.reach(C)
    assert 0.1 < within.float().mean() < 0.99

    decoded = decode("rsd", decoder, prefix)
    assert decoded.motion is not None
    assert decoded.accepted is not None
    assert torch.equal(decoded.accepted, within[:, None].expand(-1, C, -1))
    assert decoded.accepted_levels is not None
    assert torch.equal(decoded.accepted_levels, C * within.all(-1).long())
    estimate = torch.where(within, proposed.prefixes[-1] + missing, alone)
    inside = estimate.abs() <= decoder.code.config.span()
    assert ((decoded.value - estimate).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()
    stands = within[:, None].expand(-1, C, -1)
    assert torch.equal(decoded.motion[:, :C][stands], proposed.motion[stands])


@pytest.fixture
def whole(model: RsdModel) -> Iterator[RsdModel]:
    """The model as one whose target is trained to judge a whole draft in the place of block 1."""
    model.target.whole_block = True
    yield model
    model.target.whole_block = False


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


def test_a_main_with_a_whole_block_verifies_token_by_token_as_any_other(whole: RsdModel) -> None:
    for rule in ("exact", "margin"):
        found = decode("rsd", decoder_of(whole, rule), prefixes(20))
        whole.target.whole_block = False
        assert same(found, decode("rsd", decoder_of(whole, rule), prefixes(20)))
        whole.target.whole_block = True


@pytest.mark.parametrize("rho", [2.0, 3.0, 7.0])
def test_requantise_reaches_the_value_whatever_was_drafted(rho: float) -> None:
    code = Rfsq(RfsqConfig(L, 7, rho))
    generator = torch.Generator().manual_seed(1)
    value = (2 * torch.rand(200, P, generator=generator) - 1) * code.config.span()
    drafted = torch.randint(0, 7, (200, C, P), generator=generator)
    kept = torch.randint(0, C + 1, (200, P), generator=generator)
    motion, decoded = requantise(code, value, drafted, kept)
    code.check(motion)
    assert torch.equal(decoded, code.dequantise(motion))
    last = code.config.weight(L)
    assert ((code.dequantise(motion) - value).abs() <= last / 2 + 1e-5).all()


@pytest.mark.parametrize("kept", range(C + 1))
def test_requantise_begins_with_drafted_digits_that_are_off_within_the_margin(kept: int) -> None:
    """One level off by its margin is taken out by the finer ones, so the drafted digits stay."""
    code = Rfsq(RfsqConfig(L, 7, 2.0))
    generator = torch.Generator().manual_seed(kept)
    value = 3 * (2 * torch.rand(30, P, generator=generator) - 1)
    drafted = code.quantise(value)[0][:, :C]
    move = torch.randint(-2, 3, drafted[:, 0].shape, generator=generator)
    wrong = (drafted[:, :1] + move.unsqueeze(1)).clamp(0, 6)
    drafted = wrong
    for level in range(2, C + 1):
        digit = code.digit(value - code.dequantise(drafted), level).long() + code.config.half
        drafted = torch.cat([drafted, digit.unsqueeze(1)], dim=1)
    motion, _ = requantise(code, value, drafted, torch.full((30, P), kept))
    assert torch.equal(motion[:, :kept], drafted[:, :kept])
    assert ((code.dequantise(motion) - value).abs() <= LAST_STEP / 2 + 1e-5).all()


def test_l1_draft_and_parallel_take_no_pass_of_the_main(model: RsdModel) -> None:
    decoder = decoder_of(model)
    levels = {"parallel": L, "coarse-only": C, "l1": 0}
    for name, expected in levels.items():
        decoded = decode(name, decoder, prefixes(3))
        assert decoded.target_passes == 0
        assert decoded.value.shape == (3, P)
        assert (0 if decoded.motion is None else decoded.motion.shape[1]) == expected


def test_a_draft_that_is_right_decides_the_draft_strategy(
    model: RsdModel, forced: Callable[[Tensor, Tensor], None]
) -> None:
    decoder = decoder_of(model)
    expected = decode("ar", decoder, prefixes(5))
    assert expected.motion is not None
    forced(expected.motion[:, :C], expected.gripper)
    decoded = decode("coarse-only", decoder, prefixes(5))
    assert torch.equal(decoded.value, decoder.code.dequantise(expected.motion[:, :C]))
    assert torch.equal(decoded.gripper, expected.gripper)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "exact") for name in names(visual=False)]
    + [("rsd", rule) for rule in ("margin", "residual", "agreement(0.3)")],
)
def test_a_batch_decodes_as_its_samples_do_alone(model: RsdModel, name: str, rule: str) -> None:
    decoder = decoder_of(model, rule)
    prefix = prefixes(12, seed=2)
    together = decode(name, decoder, prefix)
    for index in range(len(prefix)):
        alone = decode(name, decoder, prefix[index : index + 1])
        assert torch.allclose(alone.value[0], together.value[index], atol=1e-9)
        assert torch.equal(alone.gripper[0], together.gripper[index])
        if together.motion is not None and alone.motion is not None:
            assert torch.equal(alone.motion[0], together.motion[index])
        if together.accepted is not None and alone.accepted is not None:
            assert torch.equal(alone.accepted[0], together.accepted[index])


def test_a_batch_accepts_sample_by_sample_and_regresses_what_the_accepted_levels_miss(
    model: RsdModel, forced: Callable[[Tensor, Tensor], None]
) -> None:
    decoder = decoder_of(model, "exact")
    prefix = prefixes(C + 1, seed=3)
    expected = decode("ar", decoder, prefix)
    assert expected.motion is not None
    drafted = expected.motion[:, :C].clone()
    for sample in range(C):  # sample s errs first at level s + 1
        drafted[sample, sample, 0] = (drafted[sample, sample, 0] + 1) % 7
    forced(drafted, expected.gripper)
    decoded = decode("rsd", decoder, prefix)
    assert decoded.motion is not None
    assert decoded.accepted_levels is not None
    assert decoded.accepted_levels.tolist() == list(range(C + 1))
    with torch.no_grad():
        features, cache = model.target.prefill(prefix)
        given = as_draft(decoder.code, drafted, expected.gripper)
        blocks = decoder.verify(given, Blocks([features], expected.gripper, cache)).features
        missing = [model.target.residual(block, level) for level, block in enumerate(blocks, start=1)]
    for kept in range(C + 1):
        accepted = drafted[kept, :kept]
        estimate = decoder.code.dequantise(accepted) + missing[kept][kept]
        config = decoder.code.config
        reachable = torch.stack(
            [
                (estimate - decoder.code.dequantise(accepted[:level])).abs()
                <= config.tail_reach(level) + 0.5 * config.weight(config.levels)
                for level in range(kept + 1)
            ]
        ).all(0)
        assert torch.equal(decoded.motion[kept, :kept][:, reachable], accepted[:, reachable])
        inside = estimate.abs() <= config.span()
        assert inside.float().mean() > 0.5
        assert ((decoded.value[kept] - estimate).abs()[inside] <= LAST_STEP / 2 + 1e-5).all()


def test_sequential_fine_levels_refuse_a_batch(model: RsdModel) -> None:
    with pytest.raises(RsdError, match="one observation at a time, found a batch of 2"):
        decode("rsd", decoder_of(model, "exact", "sequential"), prefixes(2))


def test_stopwatch_adds_up_a_stage() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.stage("verify"):
            first = watch.ms.get("verify", 0.0)
    assert watch.ms["verify"] > first > 0.0


# a draft with its own perception


def seen(model: RsdModel, seed: int) -> PolicyInput:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 2, 3, 32, 32, generator=generator, dtype=torch.float64) - 0.5
    state = torch.randn(1, 11, generator=generator, dtype=torch.float64)
    return PolicyInput(images, state, model.target.encode_text(word_ids(["open the drawer"])))


@torch.no_grad()
def run(name: str, ops: Primitives, scene: PolicyInput, state: EpisodeState | None = None) -> DecodeResult:
    return DECODERS[name].decode(ops, scene, state or EpisodeState())


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
