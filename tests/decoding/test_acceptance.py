from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd.decoding.acceptance import (
    ACCEPTANCE_RULES,
    Synthetic,
    acceptance_rule,
    accepted_prefix,
    agreement,
    distance,
    exact,
    made_up,
    margin,
    typical,
    within_reach,
)
from rsd.decoding.state import Draft
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError

CODE = RfsqConfig(8, 7, 2.0)  # margins 2, 2, 2, 2, 2, 1, 1, 0


def prefers(tokens: Tensor) -> Tensor:
    """Logits [..., 7] whose greedy choice is `tokens`."""
    return torch.nn.functional.one_hot(tokens, 7).float()


@st.composite
def drafts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Drafted and target's tokens [2, c, 5]."""
    c = draw(st.integers(1, 8))
    tokens = st.lists(st.integers(0, 6), min_size=10 * c, max_size=10 * c)
    return tuple(torch.tensor(draw(tokens)).view(2, c, 5) for _ in range(2))  # type: ignore[return-value]


@st.composite
def judged(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Drafted tokens [3, c, 5] and logits [3, c, 5, 7] on a grid that sums of small whole numbers keep exactly."""
    c, seed = draw(st.integers(1, 8)), draw(st.integers(0, 2**31))
    spread = draw(st.sampled_from([1, 8, 40]))  # quarters: from nearly uniform to nearly certain, with ties
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-spread, spread + 1, (3, c, 5, 7), generator=generator) / 4
    near = (logits.argmax(-1) + torch.randint(-2, 3, (3, c, 5), generator=generator)).clamp(0, 6)
    return torch.where(torch.rand(3, c, 5, generator=generator) < 0.5, logits.argmax(-1), near), logits


shares = st.floats(0.01, 1.0).map(lambda share: f"{share:.4f}")
names = st.one_of(
    st.just("exact"),
    st.just("margin"),
    st.integers(0, 6).map(lambda bins: f"distance({bins})"),
    shares.map(lambda share: f"typical({share})"),
    st.tuples(shares, shares).map(lambda pair: f"typical({pair[0]},{pair[1]})"),
    shares.map(lambda share: f"agreement({share})"),
)


def accepted(name: str, drafted: Tensor, logits: Tensor) -> Tensor:
    return acceptance_rule(name, CODE).accept(drafted, logits)


def test_exact_by_hand() -> None:
    drafted = torch.tensor([[[3, 4, 0], [6, 6, 1]]])
    own = torch.tensor([[[3, 5, 0], [6, 0, 1]]])
    assert exact(drafted, prefers(own)).tolist() == [[[True, False, True], [True, False, True]]]


def test_margin_by_hand() -> None:
    own = torch.full((1, 8, 7), 3)
    drafted = torch.arange(7).expand(1, 8, 7)
    accepted = margin(drafted, prefers(own), CODE)[0]
    assert accepted.sum(-1).tolist() == [5, 5, 5, 5, 5, 3, 3, 1]
    assert accepted[0].tolist() == [False, True, True, True, True, True, False]
    assert accepted[7].tolist() == [False, False, False, True, False, False, False]


def test_distance_by_hand() -> None:
    drafted = torch.arange(7).expand(1, 8, 7)
    verdict = distance(drafted, prefers(torch.full((1, 8, 7), 2)), 1)
    assert verdict[0].sum(-1).tolist() == [3] * 8
    assert verdict[0, 7].tolist() == [False, True, True, True, False, False, False]


def test_typical_by_hand() -> None:
    """p = 0.5, 0.3, 0.1, 0.1 and nothing: H = 1.168 nats, exp(-H) = 0.311."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.1, 1e-9, 1e-9, 1e-9])
    drafted, logits = torch.arange(7).view(1, 1, 7), p.log().expand(1, 1, 7, 7)

    def passes(epsilon: float, delta: float) -> int:
        return int(typical(drafted, logits, epsilon, delta).sum())

    assert [passes(0.09, 0.3), passes(0.12, 0.3)] == [4, 4]  # 0.3 * 0.311 = 0.093 bounds both
    assert [passes(0.12, 0.9), passes(0.31, 0.9)] == [2, 2]  # 0.12; 0.9 * 0.311 = 0.28
    assert [passes(0.31, 1.0), passes(0.9, 1.0)] == [1, 1]


def test_typical_accepts_more_where_the_main_is_unsure() -> None:
    sure, unsure = torch.zeros(1, 1, 1, 7), torch.zeros(1, 1, 1, 7)
    sure[..., 0], unsure[..., 0] = 8.0, 0.5
    drafted = torch.tensor([[[3]]])
    assert typical(drafted, unsure, 0.3, 0.3).all()
    assert not typical(drafted, sure, 0.3, 0.3).any()


def test_typical_accepts_the_mains_choice_where_nothing_exceeds_the_threshold() -> None:
    """Equally likely symbols: 1/K > exp(-H) is false or a matter of the last bit."""
    for symbols in range(2, 40):
        assert typical(torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1, symbols), 1.0, 1.0).all()


@given(names, judged())
def test_exact_implies_every_rule(name: str, case: tuple[Tensor, Tensor]) -> None:
    """Level by level: a level that is the target's own stands, whatever happens in the others."""
    drafted, logits = case
    own = exact(drafted, logits).all(-1)
    assert accepted(name, drafted, logits).all(-1)[own].all()
    if not name.startswith("agreement"):  # which judges whole levels
        assert accepted(name, drafted, logits)[exact(drafted, logits)].all()
    assert accepted(name, logits.argmax(-1), logits).all()


@given(judged(), st.integers(0, 5), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_rules_loosen_with_their_setting(
    case: tuple[Tensor, Tensor], bins: int, strict: float, delta: float
) -> None:
    drafted, logits = case
    assert torch.equal(distance(drafted, logits, 0), exact(drafted, logits))
    assert (distance(drafted, logits, bins + 1) | ~distance(drafted, logits, bins)).all()
    assert distance(drafted, logits, 6).all()
    loose = strict / 2
    assert (typical(drafted, logits, loose, delta) | ~typical(drafted, logits, strict, delta)).all()
    assert (typical(drafted, logits, strict, delta / 2) | ~typical(drafted, logits, strict, delta)).all()
    assert (agreement(drafted, logits, loose) | ~agreement(drafted, logits, strict)).all()


@given(names, judged(), st.integers(-50, 50))
def test_rules_see_only_differences_of_logits(name: str, case: tuple[Tensor, Tensor], shift: int) -> None:
    drafted, logits = case
    assert torch.equal(accepted(name, drafted, logits + shift), accepted(name, drafted, logits))
    by_token = shift * torch.arange(5).view(1, 1, 5, 1)
    assert torch.equal(accepted(name, drafted, logits + by_token), accepted(name, drafted, logits))


@given(names, judged())
def test_a_batch_is_judged_sample_by_sample(name: str, case: tuple[Tensor, Tensor]) -> None:
    drafted, logits = case
    together = accepted(name, drafted, logits)
    assert together.shape == drafted.shape
    assert together.dtype == torch.bool
    for index in range(len(drafted)):
        alone = accepted(name, drafted[index : index + 1], logits[index : index + 1])
        assert torch.equal(alone[0], together[index])


@given(judged(), st.sampled_from([1.5, 2.0, 3.0, 4.0, 7.0]), st.integers(3, 8))
def test_margin_is_the_distance_that_rho_and_the_levels_give(
    case: tuple[Tensor, Tensor], rho: float, levels: int
) -> None:
    """Nothing else goes in: at every level the verdict is that of the largest error the finer levels reach."""
    drafted, logits = case
    code = RfsqConfig(levels, 7, rho)
    drafted, logits = drafted[:, :levels], logits[:, :levels]
    verdict = margin(drafted, logits, code)
    for level in range(1, drafted.shape[1] + 1):
        reach = sum(3 * rho ** -(finer - level) for finer in range(level + 1, levels + 1))
        half_last = 0.5 * rho ** -(levels - level)
        bins = max(0, int(reach + half_last - 0.5 + 1e-9))
        assert torch.equal(verdict[:, level - 1], distance(drafted, logits, bins)[:, level - 1])


def test_agreement_counts_whole_levels() -> None:
    own = torch.zeros(1, 3, 10, dtype=torch.long)
    drafted = own.clone()
    drafted[0, 0, :3] = 1  # 7 of 10 agree
    drafted[0, 1, :4] = 1  # 6 of 10
    assert agreement(drafted, prefers(own), 0.7)[0].all(-1).tolist() == [True, False, True]
    assert agreement(drafted, prefers(own), 0.7)[0].any(-1).tolist() == [True, False, True]
    assert agreement(drafted, prefers(own), 0.6)[0].all(-1).tolist() == [True, True, True]


@given(drafts())
def test_margin_is_exact_where_a_code_has_no_redundancy(pair: tuple[Tensor, Tensor]) -> None:
    drafted, own = pair
    same = exact(drafted, prefers(own))
    assert torch.equal(margin(drafted, prefers(own), RfsqConfig(8, 7, 7.0)), same)
    assert (margin(drafted, prefers(own), CODE) | ~same).all()


@given(drafts(), st.floats(0.01, 1.0))
def test_agreement_is_monotone_in_the_share(pair: tuple[Tensor, Tensor], share: float) -> None:
    drafted, own = pair
    every, some = agreement(drafted, prefers(own), 1.0), agreement(drafted, prefers(own), share)
    assert torch.equal(every, exact(drafted, prefers(own)).all(-1, keepdim=True).expand_as(every))
    assert (some | ~every).all()


@given(drafts())
def test_accepted_prefix_is_the_first_level_with_a_rejection(pair: tuple[Tensor, Tensor]) -> None:
    drafted, own = pair
    accepted = (drafted - own).abs() <= 5
    expected = []
    for sample in accepted.tolist():
        rejected = [index for index, level in enumerate(sample) if not all(level)]
        expected.append(rejected[0] if rejected else len(sample))
    assert accepted_prefix(accepted).tolist() == expected


def test_rules_by_name() -> None:
    own = torch.full((1, 1, 10), 3)
    drafted = own.clone()
    drafted[..., :3] = 4
    drafted[..., 0] = 5
    logits = prefers(own) * 2
    logits[..., 4] += 1.5  # p(3) = 0.44, p(4) = 0.27, the others 0.06; exp(-H) = 0.2
    verdicts = {
        "exact": 7,
        "margin": 10,
        "distance": 9,
        "distance(0)": 7,
        "distance(1)": 9,
        "distance(2)": 10,
        "typical(0.02)": 10,
        "typical(0.3)": 9,
        "typical(0.3,0.1)": 10,
        "typical(1, 1)": 9,
        "agreement": 10,
        "agreement(0.7)": 10,
        "agreement(.71)": 0,
        "agreement(1)": 0,
    }
    assert {name: accepted(name, drafted, logits).sum().item() for name in verdicts} == verdicts


def test_a_rule_names_its_settings_and_reads_that_name_again() -> None:
    written = {"distance": "distance(1)", "typical": "typical(0.09)", "typical(.3, 1)": "typical(0.3,1)"}
    written |= {"agreement": "agreement(0.7)", "exact": "exact", "margin": "margin", "residual": "residual"}
    written |= {"blind": "blind(0.95)", "blind(.9, moving)": "blind(0.9,moving)", "own": "own(0.95)"}
    for name, full in written.items():
        assert acceptance_rule(name, CODE).name == full
        assert acceptance_rule(full, CODE).name == full
    kinds = {name.split("(")[0] for name in ACCEPTANCE_RULES}
    assert kinds == {name.split("(")[0] for name in written}
    judged_alone = {kind for kind in kinds if acceptance_rule(kind, CODE).unit == "scalar"}
    assert judged_alone == {"margin", "distance", "typical"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Exact",
        "margin(2)",
        "distance()",
        "distance(-1)",
        "distance(1.5)",
        "typical()",
        "typical(0)",
        "typical(1.1)",
        "typical(0.3,0)",
        "typical(0.3,2)",
        "typical(0.3,)",
        "typical(,0.3)",
        "typical(nan)",
        "blind()",
        "blind(0)",
        "blind(1.1)",
        "blind(0.9,still)",
        "own(0)",
        "agreement()",
        "agreement(0)",
        "agreement(1.01)",
        "agreement(-0.5)",
        "agreement(1.2.3)",
        "agreement(.)",
        "agreement(0.7",
        f"distance({'9' * 5000})",
        None,
        7,
    ],
)
def test_unknown_rules_and_shares_are_refused(name: Any) -> None:
    expected = r"expected exact, margin, residual, blind\(SHARE\), own\(SHARE\), distance\(D\), typical\(EPSILON\), agr"
    with pytest.raises(RsdError, match=expected):
        acceptance_rule(name, CODE)


@pytest.mark.parametrize("moving", [False, True])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1.0))
def test_a_whole_chunk_stands_if_enough_of_it_is_meant(moving: bool, seed: int, share: float) -> None:
    """The target's own always stands, one out of reach everywhere never; whichever of the two says what."""
    own = 3.0 * torch.randn(5, 48, generator=torch.Generator().manual_seed(seed))
    reach = 0.4
    assert within_reach(own, own, reach, share, moving).all()
    assert not within_reach(own + 1.0, own, reach, share, moving).any()
    draft = own + torch.randn(5, 48, generator=torch.Generator().manual_seed(seed + 1)) * 0.4
    stands = within_reach(draft, own, reach, share, moving)
    assert torch.equal(stands, within_reach(own, draft, reach, share, moving))
    stricter = within_reach(draft, own, reach, min(1.0, share + 0.2), moving)
    assert (stands | ~stricter).all()


def test_scalars_without_motion_vote_for_no_draft_where_only_motion_counts() -> None:
    """46 coefficients that are zero whatever is meant, and two that say which way: these are opposite."""
    draft, own = torch.zeros(2, 1, 48)
    draft[:, :2], own[:, :2] = 2.0, -2.0
    assert within_reach(draft, own, 0.4, 0.95)
    assert not within_reach(draft, own, 0.4, 0.95, moving=True)
    assert within_reach(torch.zeros(1, 48), torch.zeros(1, 48), 0.4, 0.95, moving=True)  # to stand still is meant


def test_made_up_answers_are_of_the_chunk_the_turn_and_the_seed_at_the_given_rate() -> None:
    tokens = torch.randint(0, 7, (200, 3, 5), generator=torch.Generator().manual_seed(0))
    draft, of = Draft(tokens, torch.zeros(200, 8), []), Synthetic(0.7, 3)
    found = made_up(draft, of, turn=0)
    assert found.shape == (200, 4)
    assert abs(float(found.float().mean()) - 0.7) < 0.06
    alone = Draft(tokens[7:8], torch.zeros(1, 8), [])
    assert torch.equal(made_up(alone, of, turn=0), found[7:8])  # whatever else is in the batch
    for other in (made_up(draft, of, turn=1), made_up(draft, Synthetic(0.7, 4), turn=0)):
        assert not torch.equal(other, found)
    stricter = made_up(draft, Synthetic(0.4, 3), turn=0)
    assert not (stricter & ~found).any()  # the same numbers are drawn for every rate
    assert [bool(made_up(draft, Synthetic(rate, 0), 0).any()) for rate in (0.0, 1.0)] == [False, True]
    assert made_up(draft, Synthetic(1.0, 0), 0).all()
