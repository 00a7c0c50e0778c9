"""Verification against enumeration on a small vocabulary; what a wrong one looks like."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rsd.decoding import sampling
from rsd.decoding.acceptance import accepted_prefix
from rsd.decoding.sampling import STALE, Verified, residual, sample, verify_block

K, P, RUNS = 3, 2, 200_000  # symbols, tokens of a level
LEVELS = list(product(range(K), repeat=P))  # the 9 values of a level
LINES = torch.tensor(LEVELS)
SURE_WRONG = 1e-9  # p-value; the right implementations are above 1e-3 with this seed
Verify = Callable[[Tensor, Tensor, Tensor, torch.Generator], Verified]


class Model:
    """Level 1 of its own, level 2 given the value of level 1, level 3 given that of level 2: random tables."""

    def __init__(self, seed: int, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(1, P, K, generator=generator).expand(len(LEVELS), -1, -1)
        rest = torch.randn(2, len(LEVELS), P, K, generator=generator)
        self.tables = (sharpness * torch.cat([first.unsqueeze(0), rest])).softmax(-1)  # [level, above, P, K]

    def probs(self, level: int, above: Tensor | None) -> Tensor:
        """above int [B, P], the level above -> [B, P, K]."""
        index = torch.zeros(RUNS, dtype=torch.long) if above is None else above[:, 0] * K + above[:, 1]
        return self.tables[level][index]

    def path(self, tokens: Tensor) -> Tensor:
        """tokens [B, c, P] -> the conditionals of all their levels [B, c, P, K]."""
        above = [None, *tokens.unbind(1)]
        return torch.stack([self.probs(level, above[level]) for level in range(tokens.shape[1])], dim=1)

    def joint(self, levels: int) -> Tensor:
        """Probability of every outcome, [9 ** levels], by enumeration."""
        out = torch.ones(1, dtype=torch.float64)
        for level in range(levels):
            given = self.tables[level].double()  # [above, P, K]
            whole = given[:, 0, LINES[:, 0]] * given[:, 1, LINES[:, 1]]  # [above, 9]
            out = (out.view(-1, 1) * whole[0] if level == 0 else out.view(-1, 9, 1) * whole).flatten()
        return out


MAIN, DRAFT = Model(0), Model(1)


def verify_tokens(drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator) -> Verified:
    """The yardstick: token by token (Leviathan et al., arXiv 2211.17192), each of a level corrected on its own."""
    x = drafted.unsqueeze(-1)
    q, p = draft_probs.gather(-1, x).squeeze(-1), target_probs.gather(-1, x).squeeze(-1)
    accepted = torch.rand(drafted.shape, generator=generator) * q < p
    corrected = sample(residual(target_probs, draft_probs), generator)
    return sampling._verified(torch.where(accepted, drafted, corrected), accepted, accepted_prefix(accepted))


def draw(model: Model, levels: int, generator: torch.Generator) -> Tensor:
    tokens = torch.empty(RUNS, 0, P, dtype=torch.long)
    for level in range(levels):
        above = tokens[:, -1] if level else None
        tokens = torch.cat([tokens, sample(model.probs(level, above), generator).unsqueeze(1)], dim=1)
    return tokens


def speculate(verify: Verify, levels: int, target: Model = MAIN, draft: Model = DRAFT) -> tuple[Tensor, Verified]:
    """One round of drafting and verifying, then level by level -> the chunk's tokens [B, levels, P]."""
    generator = torch.Generator().manual_seed(7)
    drafted = draw(draft, levels, generator)
    verified = verify(drafted, draft.path(drafted), target.path(drafted), generator)
    tokens = verified.tokens.clone()
    for level in range(1, levels):
        fresh = sample(target.probs(level, tokens[:, level - 1]), generator)
        stale = verified.levels + 1 <= level
        tokens[:, level] = torch.where(stale.unsqueeze(1), fresh, tokens[:, level])
    return tokens, verified


def p_value(tokens: Tensor, target: Model = MAIN) -> float:
    """Chi-square of the outcomes against the target's enumerated distribution."""
    levels = tokens.shape[1]
    digits = tokens.flatten(1)
    code = sum(digits[:, i] * K ** (P * levels - 1 - i) for i in range(P * levels))
    counts = torch.bincount(code, minlength=9**levels)
    expected = target.joint(levels)
    return float(chisquare(counts.numpy(), (expected / expected.sum() * RUNS).numpy()).pvalue)


def test_enumeration_agrees_with_sampling_the_main_and_tells_the_draft_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    assert MAIN.joint(3).sum().item() == pytest.approx(1.0)
    for levels in (1, 2, 3):
        assert p_value(draw(MAIN, levels, generator)) > 1e-3
        assert p_value(draw(DRAFT, levels, generator)) < SURE_WRONG


@pytest.mark.parametrize("verify", [verify_block, verify_tokens])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_outcome_has_the_mains_distribution(verify: Verify, levels: int) -> None:
    tokens, verified = speculate(verify, levels)
    assert torch.bincount(verified.levels).tolist()[levels] > 0.02 * RUNS  # all levels stand at times,
    assert torch.bincount(verified.levels).tolist()[0] > 0.2 * RUNS  # and none
    assert p_value(tokens) > 1e-3


def test_the_outcome_has_the_mains_distribution_after_a_greedy_draft() -> None:
    draft = Model(1, sharpness=1e4)
    assert draft.tables.max(-1).values.min() > 0.999
    assert p_value(speculate(verify_block, 2, draft=draft)[0]) > 1e-3


def test_a_draft_that_is_the_main_always_stands() -> None:
    tokens, verified = speculate(verify_block, 3, draft=MAIN)
    assert (verified.levels == 3).all()
    assert verified.accepted.all()
    assert p_value(tokens) > 1e-3


@pytest.mark.parametrize("levels", [1, 2])
def test_a_correction_from_the_main_itself_is_caught(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "residual", lambda target, draft, otherwise=None: target)
    assert p_value(speculate(verify_block, levels)[0]) < SURE_WRONG


def test_accepting_too_gladly_is_caught() -> None:
    def greedy(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Verified:
        return verify_block(drafted, draft, (target + 0.1 * draft) / 1.1, generator)

    assert p_value(speculate(greedy, 1)[0]) < SURE_WRONG


def test_keeping_levels_below_a_correction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Level 2 was drafted and judged given the drafted level 1, not the corrected one."""

    def kept(tokens: Tensor, accepted: Tensor, levels: Tensor) -> Verified:
        return Verified(tokens, accepted, torch.full_like(levels, tokens.shape[1]))

    monkeypatch.setattr(sampling, "_verified", kept)
    assert p_value(speculate(verify_block, 2)[0]) < SURE_WRONG
    assert p_value(speculate(verify_block, 1)[0]) > 1e-3  # a single level has nothing below it


def test_what_stands_is_the_drafts_and_what_does_not_is_no_token() -> None:
    generator = torch.Generator().manual_seed(3)
    drafted = draw(DRAFT, 3, generator)
    tokens, accepted, levels = verify_block(drafted, DRAFT.path(drafted), MAIN.path(drafted), generator)
    number = torch.arange(3).expand(RUNS, 3)
    assert torch.equal(tokens[accepted], drafted[accepted])
    assert torch.equal(accepted.all(-1), number < levels.unsqueeze(1))
    below = number > levels.unsqueeze(1)
    assert (tokens[below] == STALE).all()
    assert not accepted[below].any()
    assert ((tokens[~below] >= 0) & (tokens[~below] < K)).all()


def test_a_block_keeps_more_tokens_and_levels_than_single_tokens_do() -> None:
    """On 3 levels; the theorem is about the prefix of tokens, so the corrected ones of a level do not count."""

    def prefix(verified: Verified) -> Tensor:
        return verified.accepted.flatten(1).long().cumprod(1).float().mean(0)  # P(t >= i)

    by_token, by_block = (speculate(verify, 3)[1] for verify in (verify_tokens, verify_block))
    noise = 4 * 0.5 * (2 / RUNS) ** 0.5
    assert (prefix(by_block) > prefix(by_token) - noise).all()
    assert by_block.levels.float().mean() > by_token.levels.float().mean() + 0.02


def test_sample_never_draws_what_has_no_weight() -> None:
    weights = torch.tensor([0.0, 0.2, 0.0, 0.6]).expand(100_000, 4)
    counts = torch.bincount(sample(weights, torch.Generator().manual_seed(0)), minlength=4)
    assert counts.tolist()[0::2] == [0, 0]
    assert chisquare(counts[1::2].numpy(), [25_000, 75_000]).pvalue > 1e-3


def test_residual_where_nothing_is_left_is_the_mains_own() -> None:
    target = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    assert residual(target, torch.tensor([[0.5, 0.5], [0.3, 0.7]])).tolist() == [[0.5, 0.5], [0.5, 0.0]]
