import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule, accepted_prefix, agreement, exact, margin
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError

CODE = RfsqConfig(8, 7, 2.0)  # margins 2, 2, 2, 2, 2, 1, 1, 0


def prefers(tokens: Tensor) -> Tensor:
    """Logits [..., 7] whose greedy choice is `tokens`."""
    return torch.nn.functional.one_hot(tokens, 7).float()


@st.composite
def drafts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Drafted and main's tokens [2, c, 5]."""
    c = draw(st.integers(1, 8))
    tokens = st.lists(st.integers(0, 6), min_size=10 * c, max_size=10 * c)
    return tuple(torch.tensor(draw(tokens)).view(2, c, 5) for _ in range(2))  # type: ignore[return-value]


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
    assert not acceptance_rule("exact", CODE).per_scalar
    assert acceptance_rule("margin", CODE).per_scalar
    own = torch.full((1, 1, 10), 3)
    drafted = own.clone()
    drafted[..., :3] = 4
    verdicts = {
        name: acceptance_rule(name, CODE).accept(drafted, prefers(own)).sum().item()
        for name in ("exact", "margin", "agreement", "agreement(0.7)", "agreement(.71)", "agreement(1)")
    }
    assert verdicts == {
        "exact": 7,
        "margin": 10,
        "agreement": 10,
        "agreement(0.7)": 10,
        "agreement(.71)": 0,
        "agreement(1)": 0,
    }
    assert acceptance_rule("agreement", CODE).name == "agreement(0.7)"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Exact",
        "typical",
        "margin(2)",
        "agreement()",
        "agreement(0)",
        "agreement(1.01)",
        "agreement(-0.5)",
        "agreement(1.2.3)",
        "agreement(.)",
        "agreement(0.7",
    ],
)
def test_unknown_rules_and_shares_are_refused(name: str) -> None:
    with pytest.raises(RsdError, match="expected exact, margin, agreement"):
        acceptance_rule(name, CODE)
