"""Equivalences of the decoding strategies on random weights, in float64: no argmax hangs on its last bit."""

from collections.abc import Callable

import pytest
import torch
from equivalence import LAST_STEP, C, L, P, as_draft, decoder_of, prefixes, same
from torch import Tensor

from rsd.decoding.acceptance import requantise
from rsd.decoding.decoders import DECODERS, names
from rsd.decoding.primitives import Primitives, likelier_gripper
from rsd.decoding.state import Blocks, DecodeResult, EpisodeState, PolicyInput
from rsd.decoding.timing import Stopwatch
from rsd.models.bundle import RsdModel
from rsd.models.target import state_features
from rsd.models.text import word_ids
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.types import Observation, RsdError


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


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], None]:
    """Make the draft propose what it is told."""

    def force(motion: Tensor, gripper: Tensor) -> None:
        monkeypatch.setattr(Primitives, "draft_from", lambda ops, features: as_draft(ops.code, motion, gripper))

    return force


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


def test_a_target_with_a_whole_block_verifies_token_by_token_as_any_other(whole: RsdModel) -> None:
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
