"""Decoders at a temperature, end to end, against the target's enumerated distribution; what a wrong one looks like."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from rsd.decoding import acceptance, sampling
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.primitives import Primitives
from rsd.decoding.sampling import Sampler, Verified
from rsd.decoding.state import DecodeResult, EpisodeState, PolicyInput
from rsd.models.bundle import RsdModel
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.models.target import TargetConfig, TargetModel
from rsd.models.visual_drafter import VisualDrafter, VisualDrafterConfig
from rsd.tokenizer.rfsq import RfsqConfig

K, DIM, TEMPERATURE = 3, 16, 1.5  # not 1: a forgotten temperature has to show
RUNS = {"ar": 20_000, "parallel": 20_000, "rsd": 1_000, "rsd-fused": 1_000}  # `rsd` goes sample by sample
SURE_WRONG = 1e-9  # p-value; the right implementations are above 1e-3 with these seeds
SHAPES = ((2, 2), (1, 3))  # (steps of a chunk, levels): two tokens on a level, and three levels, two of them drafted


class Given(Primitives):
    """Of which the target gets a given prefix, in the place of pixels."""

    def embed(self, seen: PolicyInput) -> Tensor:
        return seen.pixels


def given(prefix: Tensor) -> PolicyInput:
    nothing = torch.zeros(len(prefix), 0)
    return PolicyInput(prefix, torch.zeros(len(prefix), 11), (nothing, nothing))


def make_decoder(horizon: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> Primitives:
    """Random weights that make distributions neither flat nor sure, the drafts' others than the target's."""
    torch.manual_seed(horizon)
    code = RfsqConfig(levels, K, 2.0)
    config = TargetConfig(32, (16, 16, 16, 16), DIM, layers=1, heads=2, text_dim=8)
    coarse = DrafterConfig(levels - 1, DIM, layers=1, heads=2)
    target = TargetModel(config, code, horizon, 1)
    draft = FeatureDrafter(coarse, code, horizon, 1, DIM)
    visual_drafter = VisualDrafter(
        VisualDrafterConfig(2, (16, 16, 16, 16), DIM, 1, 2, coarse), code, horizon, 1, config
    )
    with torch.no_grad():
        for model in (target, draft, visual_drafter.levels):
            model.block.position *= 20
            model.level_head.weight *= 8
        target.parallel_head.weight *= 4
    looks = torch.randn(1, horizon, DIM)
    monkeypatch.setattr(visual_drafter, "perceive", lambda *seen: looks)  # convolutions would take most of the time
    parts: tuple[nn.Module, ...] = (target, draft, visual_drafter)
    for part in parts:
        part.eval()
    sampler = Sampler(TEMPERATURE, torch.Generator().manual_seed(7))
    return Given(target, draft, acceptance_rule("exact", code), "sequential", visual_drafter, sampler=sampler)


PREFIX = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(0))


def decide(name: str, ops: Primitives, seen: PolicyInput) -> DecodeResult:
    return DECODERS[name].decode(ops, seen, EpisodeState())


@torch.no_grad()
def draw(name: str, decoder: Primitives, runs: int) -> Tensor:
    """-> motion tokens [runs, L, P] of one and the same observation."""
    batch = 1 if DECODERS[name].drafts else runs
    rounds = runs // batch
    decoded = [decide(name, decoder, given(PREFIX.expand(batch, -1, -1))) for _ in range(rounds)]
    decoder.check()
    return torch.cat([one.motion for one in decoded if one.motion is not None])


@torch.no_grad()
def enumerate_main(decoder: Primitives, parallel: bool) -> Tensor:
    """Probability of every outcome [K ** (L * P)], by teacher forcing, the tokens in the order of `codes`."""
    target, code = decoder.target, decoder.code
    width, levels = target.horizon, target.code.levels
    lines = torch.tensor(list(product(range(K), repeat=width)))  # [K ** P, P]
    features, _ = target.prefill(PREFIX)
    at_once = target.parallel_logits(features)  # [1, L, P, K]
    gripper = (target.gripper_logits(features) > 0).long()
    paths, probs = torch.zeros(1, 0, width, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    for level in range(1, levels + 1):
        count = len(paths)
        block, cache = target.prefill(PREFIX.expand(count, -1, -1))
        if level > 1:
            told = [code.dequantise(paths[:, :above]) for above in range(1, level)]
            block = target.extend(told, gripper.expand(count, -1), 2, cache)[-1]
        logits = at_once[:, level - 1].expand(count, -1, -1) if parallel else target.logits(block, level)
        given = (logits.double() / TEMPERATURE).softmax(-1)  # [paths, P, K]
        whole = torch.stack([given[:, p, lines[:, p]] for p in range(width)]).prod(0)  # [paths, K ** P]
        probs = (probs[:, None] * whole).flatten()
        both = paths.repeat_interleave(len(lines), 0), lines.repeat(count, 1)[:, None]
        paths = torch.cat(both, dim=1)
    return probs


def p_value(motion: Tensor, expected: Tensor) -> float:
    """Chi-square of tokens [N, L, P] against probabilities; outcomes expected less than five times count as one."""
    digits = motion.flatten(1)
    places = K ** torch.arange(digits.shape[1] - 1, -1, -1)
    counts = np.bincount((digits * places).sum(1), minlength=len(expected))
    wanted = expected.numpy() * len(motion)
    rare = wanted < 5
    found, due = (np.append(x[~rare], x[rare].sum()) for x in (counts, wanted))
    return float(chisquare(found[due > 0], due[due > 0]).pvalue)


@pytest.mark.parametrize(("horizon", "levels"), SHAPES)
@pytest.mark.parametrize("name", RUNS)
def test_tokens_have_the_mains_distribution(
    name: str, horizon: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(horizon, levels, monkeypatch)
    expected = enumerate_main(decoder, name == "parallel")
    assert expected.sum().item() == pytest.approx(1.0)
    assert (expected * RUNS[name] >= 5).sum() > 10  # many outcomes can be told apart
    assert p_value(draw(name, decoder, RUNS[name]), expected) > 1e-3


def accept_everything(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Verified:
    return Verified(drafted, torch.ones_like(drafted, dtype=torch.bool), torch.full((1,), drafted.shape[1]))


def accept_what_is_likeliest(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Verified:
    """Drawn tokens that are the target's greedy choice stand, others are drawn anew: looks exact, favours the mode."""
    accepted = drafted == target.argmax(-1)
    tokens = torch.where(accepted, drafted, sampling.sample(target, generator))
    return Verified(tokens, accepted, accepted.all(-1).long().cumprod(1).sum(1))


WRONG = [("rsd", accept_everything), ("rsd-fused", accept_everything), ("rsd", accept_what_is_likeliest)]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_verification_that_is_wrong_is_caught(
    name: str, wrong: Callable[..., Verified], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(*SHAPES[0], monkeypatch)
    monkeypatch.setattr(acceptance, "verify_block", wrong)
    assert p_value(draw(name, decoder, 1_000), enumerate_main(decoder, False)) < SURE_WRONG


@pytest.mark.parametrize("name", ["ar", "rsd"])
def test_another_temperature_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(*SHAPES[0], monkeypatch)
    assert decoder.sampler is not None
    decoder.sampler.temperature = 0.7
    colder = draw(name, decoder, 500)
    decoder.sampler.temperature = TEMPERATURE
    assert p_value(colder, enumerate_main(decoder, False)) < SURE_WRONG


def test_some_levels_stand_and_some_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the agreement above would say little."""
    decoder = make_decoder(*SHAPES[1], monkeypatch)
    with torch.no_grad():
        for name in ("rsd", "rsd-fused"):
            decoded = [decide(name, decoder, given(PREFIX)) for _ in range(60)]
            lengths = [int(one.accepted_levels) for one in decoded if one.accepted_levels is not None]
            assert min(np.bincount(lengths, minlength=3)) > 3
            for one, length in zip(decoded, lengths, strict=True):
                again = name == "rsd-fused" and not bool(one.accepted_gripper.all())  # type: ignore[union-attr]
                assert one.target_passes == (name == "rsd") + again + 3 - length - 1


@pytest.mark.parametrize("name", RUNS)
def test_a_vanishing_temperature_takes_the_likeliest(name: str, make_model: Callable[[int], RsdModel]) -> None:
    model = make_model(0).double()
    rule = acceptance_rule("exact", model.target.code)
    greedy = Primitives(model.target, model.feature_drafter, rule, "sequential", model.visual_drafter)
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        images = torch.rand(1, 2, 3, 32, 32, generator=generator).double() - 0.5
        text = torch.zeros(1, 4, 32).double(), torch.zeros(1, 32).double()
        for temperature in (1e-300, 1e-6):
            sampler = Sampler(temperature, generator)
            cold = Primitives(
                model.target, model.feature_drafter, rule, "sequential", model.visual_drafter, sampler=sampler
            )
            with torch.no_grad():
                found, expected = (
                    decide(name, ops, PolicyInput(images, torch.full((1, 11), 0.1 * index).double(), text))
                    for ops in (cold, greedy)
                )
            assert found.motion is not None
            assert expected.motion is not None
            assert torch.equal(found.motion, expected.motion)
            assert found.target_passes == expected.target_passes
