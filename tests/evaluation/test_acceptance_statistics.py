import re

import pytest

from rsd.decoding.acceptance import ACCEPTANCE_RULES, acceptance_rule
from rsd.evaluation.acceptance import acceptance, acceptance_rows, accepted_cell
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import unit_of

DRAFTED, ACCEPTED, LENGTHS = [20, 20, 20], [20, 16, 10], [3, 1]  # two chunks of ten scalars and three levels


@pytest.mark.parametrize(
    ("rule", "per_level", "length", "cell"),
    [
        ("exact", [1.0, 0.5, 0.5], 3.0, "76.7 % of tokens"),
        ("agreement(0.7)", [1.0, 0.5, 0.5], 3.0, "76.7 % of tokens"),
        ("margin", [1.0, 0.8, 0.5], 3.3, "76.7 % of tokens"),
        ("blind(0.95)", [], 3.0, "50.0 % of chunks"),
        ("own(0.95)", [], 3.0, "50.0 % of chunks"),
        ("residual", [], 3.0, "50.0 % of chunks"),
    ],
)
def test_what_stands_as_one_is_counted_as_one(rule: str, per_level: list[float], length: float, cell: str) -> None:
    found = acceptance(rule, DRAFTED, ACCEPTED, LENGTHS)
    assert found.acceptance_per_level == pytest.approx(per_level)
    assert found.mean_acceptance_length == pytest.approx(length)
    assert (found.chunks_accepted, found.accepted_levels) == (0.5, [0, 1, 0, 1])
    if per_level:  # vLLM's: the length is one and what the positions add
        assert found.mean_acceptance_length == pytest.approx(1 + sum(found.acceptance_per_level))
    assert accepted_cell(found) == cell
    rows = dict(acceptance_rows([found]))
    assert rows["chunks accepted"] == ["50.0 %"]
    assert (rows["mean acceptance length"] == rows["accepted per level"] == ["-"]) == (not per_level)


def test_without_a_draft_there_is_nothing_to_say() -> None:
    found = acceptance("", [], [], [])
    assert (found.acceptance_rate, found.mean_acceptance_length, found.chunks_accepted) == (None, None, None)
    assert {cell for _, cells in acceptance_rows([found]) for cell in cells} == {"-"}
    assert accepted_cell(found) == ""


@pytest.mark.parametrize("listed", ACCEPTANCE_RULES)
def test_every_rule_counts_as_it_decides(listed: str) -> None:
    rule = acceptance_rule(re.sub(r"\(.*", "", listed), RfsqConfig())
    assert (rule.unit == "chunk") == (rule.accept is None)
    assert unit_of(rule.name) == unit_of(listed) == rule.unit
