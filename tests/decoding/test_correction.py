"""What was missed is made up for on an arm that moves as the controller's closed form says."""

from typing import Any

import numpy as np
import pytest

from rsd.decoding import correction
from rsd.decoding.correction import FOLLOWED, SPREAD, led, moved_freely, rest_of_chunk

GONE = 4  # steps of another course before the chunk goes on
FINE = 100  # parts of a step in which the arm is integrated, independently of the closed form


class Arm:
    """A critically damped arm whose goal is set from the pose reached, at every step. blocked: from that step on
    something holds it."""

    def __init__(self, blocked: int = 1000) -> None:
        self.position, self.speed, self.blocked = np.zeros(3), np.zeros(3), blocked
        self.poses, self.actions = [self.pose()], list[np.ndarray]()

    def pose(self) -> np.ndarray:
        return np.concatenate([self.position, np.zeros(5)]).astype(np.float32)

    def go(self, actions: np.ndarray) -> "Arm":
        for action in actions:
            goal, part = self.position + 0.05 * action[:3], 0.05 / FINE
            for _ in range(FINE if len(self.actions) < self.blocked else 0):
                self.speed += part * (150.0 * (goal - self.position) - 2.0 * 150.0**0.5 * self.speed)
                self.position = self.position + part * self.speed
            self.actions.append(action)
            self.poses.append(self.pose())
        return self

    def rest(self) -> np.ndarray:
        return self.go(np.zeros((30, 7))).position


def course(seed: int, steps: int, size: float = 0.3) -> np.ndarray:
    actions = np.zeros((steps, 7), np.float32)
    actions[:, :6] = np.clip(np.random.default_rng(seed).normal(0.0, size, (steps, 6)), -1, 1)
    actions[:, 6] = -1.0
    return actions


def begun(arm: Arm, seed: int = 0) -> int:
    """It moves when the observation is taken."""
    arm.go(course(seed, 3))
    return len(arm.actions)


def test_a_command_moves_where_the_arm_comes_to_rest_by_a_quarter_of_it() -> None:
    assert pytest.approx(0.265, abs=1e-3) == FOLLOWED
    actions = course(1, 6)
    assert Arm().go(actions).rest() == pytest.approx(led(actions)[:3], abs=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_arm_ends_where_the_whole_chunk_would_have_led_it(seed: int) -> None:
    chunk, other = course(seed, 12), course(seed + 1, GONE)
    wanted, arm = Arm(), Arm()
    start = begun(arm)
    begun(wanted)
    arm.go(other)
    rest = rest_of_chunk(chunk, arm.poses, arm.actions, start)
    assert len(rest) == len(chunk) - GONE
    assert np.abs(rest).max() <= 1
    assert np.array_equal(rest[SPREAD:], chunk[GONE + SPREAD :]) or np.abs(rest[:SPREAD]).max() == 1
    assert arm.go(rest).rest() == pytest.approx(wanted.go(chunk).rest(), abs=5e-4)
    assert led(chunk)[3:] == pytest.approx(led(other)[3:] + led(rest)[3:], abs=1e-6)


def test_what_was_done_as_the_chunk_says_changes_nothing() -> None:
    arm, chunk = Arm(), course(5, 12)
    start = begun(arm)
    assert rest_of_chunk(chunk, arm.poses, arm.actions, start) is chunk
    arm.go(chunk[:GONE])
    assert rest_of_chunk(chunk, arm.poses, arm.actions, start) == pytest.approx(chunk[GONE:], abs=1e-6)


def test_nothing_is_made_up_for_where_the_arm_was_held() -> None:
    arm, chunk, push = Arm(blocked=4), course(5, 12), course(6, GONE)
    push[:, 2] = -1.0  # down, onto something
    start = begun(arm)
    arm.go(push)
    assert not moved_freely(arm.poses, arm.actions, start)
    assert np.array_equal(rest_of_chunk(chunk, arm.poses, arm.actions, start), chunk[GONE:])


def test_what_was_waited_for_is_not_missed() -> None:
    arm, chunk = Arm(), course(5, 12)
    start = begun(arm)
    arm.go(chunk[: GONE - 2]).go(course(0, 2, size=0.0))
    rest = rest_of_chunk(chunk, arm.poses, arm.actions, start, waited=2)
    assert rest == pytest.approx(chunk[GONE - 2 :], abs=1e-6)


def test_what_the_limits_do_not_let_through_comes_later() -> None:
    arm, chunk, away = Arm(), course(5, 12, size=0.0), course(6, GONE, size=0.0)
    chunk[:, 0], away[:, 0] = 0.9, -0.9
    start = begun(arm)
    arm.go(away)
    rest = rest_of_chunk(chunk, arm.poses, arm.actions, start)
    assert rest[:, 0] == pytest.approx(1.0)  # 0.1 of 7.2 a step


@pytest.mark.parametrize(
    ("closes", "executed", "first"),
    [(2, -1.0, 2), (2, 1.0, GONE), (9, -1.0, GONE), (0, -1.0, 0), (9, 1.0, GONE)],
    ids=["missed", "made", "to come", "closed from the start", "not of the chunk"],
)
def test_a_gripper_switch_that_was_missed_is_made_first(closes: int, executed: float, first: int) -> None:
    arm, chunk, other = Arm(), course(5, 12), course(6, GONE)
    chunk[closes:, 6], other[:, 6] = 1.0, executed
    start = begun(arm)
    arm.go(other)
    rest = rest_of_chunk(chunk, arm.poses, arm.actions, start)
    assert np.array_equal(rest[:, 6], chunk[first:, 6])
    assert led(chunk[first:])[:3] + led(chunk[:first])[:3] - led(other)[:3] == pytest.approx(led(rest)[:3], abs=1e-6)


def test_the_constants_are_the_simulators() -> None:
    osc: Any = pytest.importorskip("robosuite.controllers")
    config = osc.load_controller_config(default_controller="OSC_POSE")
    assert (config["kp"], config["damping_ratio"]) == (correction.STIFFNESS, 1)
    assert config["output_max"] == list(correction.SCALE)
