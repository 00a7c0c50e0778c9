"""Where a chunk leads between two grasps, and the moment at which that is asked."""

import numpy as np
import pytest

from rsd.sim.libero import LiberoEnv
from rsd.types import Observation
from studies.modes import FIRST_SEED, SIDEWAYS, Choice, choice_at, place_between, shares

SEEN = Observation(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(8, np.float32), "pick it up")


def chunk(sideways: float) -> np.ndarray:
    actions = np.zeros((8, 7), np.float32)
    actions[:, SIDEWAYS] = sideways / 8
    return actions


@pytest.mark.parametrize(("sideways", "place"), [(4.0, 1.0), (-5.0, -1.0), (-0.5, 0.0), (1.75, 0.5)])
def test_a_chunks_place_between_the_experts_two_ways(sideways: float, place: float) -> None:
    assert place_between(Choice(SEEN, SEEN, 4.0, -5.0), chunk(sideways)) == pytest.approx(place)


def test_averaged_and_committed_are_shares_of_the_chunks() -> None:
    assert shares([0.0, -0.2, 0.5, 0.9, -1.1]) == {"averaged": 0.4, "committed": 0.4}


@pytest.mark.simulator
def test_at_the_choice_the_expert_goes_either_way_from_the_middle() -> None:
    env = LiberoEnv("libero_spatial", 2, 64)
    try:
        choice = choice_at(env, FIRST_SEED)
    finally:
        env.close()
    assert choice is not None
    assert choice.left > 1.0
    assert choice.right < -1.0
    moved = choice.now.state[:3] - choice.before.state[:3]
    assert 0.02 < np.linalg.norm(moved) < 0.25  # a chunk of motion, m
    assert not np.array_equal(choice.now.images, choice.before.images)
