from pathlib import Path

import pytest

from goldens.golden_cases import episodes
from rsd.policy import RsdPolicy
from rsd.sim.suites import suite_tasks
from rsd.types import EAGER, Observation, RsdError
from studies.substitution import Substitution, substitution

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "libero_spatial"


@pytest.fixture(scope="module")
def observations() -> list[Observation]:
    return [observation for episode in episodes() for observation in episode]


@pytest.fixture(scope="module")
def others(observations: list[Observation]) -> list[str]:
    sentences = [task.language for task in suite_tasks("libero_spatial")]
    return [
        next(s for s in sentences[i % len(sentences) :] + sentences if s != observation.instruction)
        for i, observation in enumerate(observations)
    ]


def measured(rule: str, observations: list[Observation], others: list[str]) -> Substitution:
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode="rsd-fused", acceptance=rule, engine=EAGER)
    return substitution(policy, observations, others)


@pytest.mark.parametrize(("rule", "most"), [("blind(0.95)", 0.10), ("blind(0.95,moving)", 0.06)])
def test_a_wrong_draft_hardly_moves_what_a_verifying_rule_executes(
    rule: str, most: float, observations: list[Observation], others: list[str]
) -> None:
    found = measured(rule, observations, others)
    assert found.draft_pull <= most
    assert found.apart > 0.1  # the drafts are wrong indeed
    assert found.own_stand > found.wrong_stand


def test_the_default_rule_of_the_shipped_policy_verifies(observations: list[Observation], others: list[str]) -> None:
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode="rsd-fused", engine=EAGER)
    assert substitution(policy, observations, others).draft_pull <= 0.10


def test_a_rule_that_executes_what_it_was_told_is_found_out(
    observations: list[Observation], others: list[str]
) -> None:
    assert measured("residual", observations, others).draft_pull > 0.4


def test_what_substitutes_nothing_is_refused(observations: list[Observation], others: list[str]) -> None:
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode="l1", engine=EAGER)
    with pytest.raises(RsdError, match="expected rsd-fused on engine eager, found l1"):
        substitution(policy, observations[:1], others[:1])
