"""By the wall clock, on one that only the test moves: when answers are there, and what the robot does until then."""

from typing import Any

import numpy as np
import pytest
from test_delay import STILL, Seen, Spelling, check_sources, of, spell
from test_realtime import Beside, Clock

from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import pace_of
from rsd.evaluation.realtime import RealTime
from rsd.evaluation.rollout import Rollout, run_episode
from rsd.evaluation.wall_clock import WallClock
from rsd.types import ActionChunk, Observation

HZ = 20.0  # a period is 50 ms


class Ticking(Seen):
    """A step's physics takes 20 ms, drawing 10 ms; some steps take their own time."""

    def __init__(self, clock: Clock, slow: dict[int, float]) -> None:
        super().__init__()
        self.clock, self.slow, self.begun = clock, slow, list[float]()

    def step_once(self) -> None:
        self.begun.append(self.clock.now)
        self.clock.now += self.slow.get(len(self.begun), 20.0) / 1e3

    def redraw(self) -> None:
        self.clock.now += 0.01
        self.drawn.append(self.steps)


class Thinking(Spelling):
    """Drafts, or predicts, in `first` ms, then completes in `then`; breaks: at its completion of that number."""

    def __init__(self, clock: Clock, decode: str, first: float, then: float, breaks: int = 0, **told: Any) -> None:
        super().__init__(decode, **told)
        self.clock, self.first, self.then, self.breaks, self.count = clock, first, then, breaks, 0

    def predict(self, observation: Observation) -> ActionChunk:
        self.clock.now += self.first / 1e3
        return super().predict(observation)

    def complete(self) -> ActionChunk | None:
        self.clock.now += self.then / 1e3
        self.count += 1
        if self.count == self.breaks:
            raise RuntimeError("the target broke")
        return super().complete()


def roll(
    decode: str, first: float, then: float, tail: bool = False, slow: Any = (), **told: Any
) -> tuple[Ticking, Rollout]:
    clock = Clock()
    env, policy = Ticking(clock, dict(slow)), Thinking(clock, decode, first, then, **told)
    names: dict[str, Any] = {"suite": "any", "task_id": 5, "task_name": "a task", "init_state": 0, "seed": 7}
    pace = WallClock(HZ, "tail" if tail else None, clock=clock, sleep=clock.sleep, executor=Beside(clock))
    return env, run_episode(env, policy, **names, decode=decode, pace=pace)


@pytest.mark.parametrize(
    ("decode", "first", "then", "tail", "expected", "delays"),
    [
        ("l1", 80.0, 0.0, False, STILL * 2 + of("t", 0, 0, 3) + STILL * 2 + of("t", 6, 0, 3), [2, 2]),
        ("l1", 80.0, 0.0, True, STILL * 2 + of("t", 0, 0, 5) + of("t", 6, 2, 5) + of("t", 10, 2, 5), [2, 2]),
        # the tail is over before the answer is there
        ("l1", 280.0, 0.0, True, STILL * 6 + of("t", 0, 0, 7) + STILL * 2 + of("t", 10, 6, 7), [6, 6]),
        (
            *("draft-first", 20.0, 65.0, True),
            [*STILL, *of("d", 0, 0, 4), *of("d", 5, 1, 4), *of("d", 9, 1, 4)],
            [2, 2],
        ),
        ("rsd-async", 20.0, 65.0, False, STILL * 2 + of("t", 0, 0, 4) + of("d", 6, 1, 3) + of("d", 6, 4, 4), [2, 2]),
    ],
)
def test_the_robot_moves_while_the_policy_thinks(
    decode: str, first: float, then: float, tail: bool, expected: list[str], delays: list[int]
) -> None:
    env, rollout = roll(decode, first, then, tail)
    assert [spell(action) for action in env.executed][: len(expected)] == expected
    assert rollout.result.success
    assert rollout.result.chunk_stats["answer_delay"][:2] == delays
    assert np.diff(env.begun)[1:4] == pytest.approx([0.05] * 3)
    assert np.array_equal(np.concatenate(rollout.actions), env.executed)
    rollout.result.check("here")
    check_sources(rollout, env)


def test_an_answer_overrules_the_rest_of_a_draft_when_it_is_there() -> None:
    env, rollout = roll("rsd-async", 20.0, 100.0, falls={7})
    assert [spell(action) for action in env.executed][3:13] == [
        *of("t", 0, 0, 3),
        *of("t", 0, 4, 4),
        *of("d", 7, 1, 2),
        *of("t", 7, 3, 4),
        *of("d", 11, 1, 1),
    ]
    stats = rollout.result.chunk_stats
    assert (stats["draft_delay"][1], stats["answer_delay"][1]) == (1.0, 3.0)
    assert (stats["drafted_steps"][1], stats["replaced"][1]) == (2.0, pytest.approx(1 / 3))
    assert rollout.result.sources[:2] == ["hhhtttt", "tddr"]


def test_before_a_drafted_switch_of_the_gripper_the_robot_stands_still_until_the_target_has_answered() -> None:
    env, rollout = roll("rsd-async", 20.0, 100.0, falls={7}, switches=[(7, 2, "d"), (7, 3, "t")])
    assert [spell(action) for action in env.executed][3:14] == [
        *of("t", 0, 0, 4),
        "d7.1",
        *STILL,
        "t7.2",
        *(f"t7.{n}!" for n in (3, 4)),
        "d12.1!",
    ]
    assert rollout.result.sources[1] == "tdhrr"
    assert rollout.result.chunk_stats["drafted_steps"][1] == 1.0


def test_a_drafted_switch_that_the_last_answer_makes_too_is_made_at_once() -> None:
    env, rollout = roll("rsd-async", 20.0, 100.0, switches=[(7, 2, "d"), (0, 6, "t")])
    assert [spell(action) for action in env.executed][7:12] == ["t0.4", "d7.1", *(f"d7.{n}!" for n in (2, 3, 4))]
    assert "h" not in rollout.result.sources[1]


def test_late_physics_is_counted_and_caught_up() -> None:
    env, rollout = roll("l1", 80.0, 0.0, True, slow={5: 85.0, 9: 130.0})
    stats = rollout.result.chunk_stats
    assert sum(stats["late_steps"]) == 3
    assert stats["late_ms"][1] == pytest.approx(80.0)
    assert np.diff(env.begun)[3:6] == pytest.approx([0.05, 0.085, 0.03])  # the last of them after drawing


@pytest.mark.parametrize(("first", "breaks"), [(20.0, 1), (20.0, 3)])
def test_what_the_policy_raises_ends_the_episode(first: float, breaks: int) -> None:
    rollout = roll("rsd-async", first, 80.0, breaks=breaks)[1]
    assert rollout.result.failure == "error: RuntimeError: the target broke"
    rollout.result.check("here")


def test_who_asks_for_it_gets_it() -> None:
    real = EvalConfig(decode="l1", control_hz=20.0)
    assert isinstance(pace_of(real), RealTime)
    for other in ({"meanwhile": "tail"}, {"meanwhile": "corrected"}, {"meanwhile": "hold"}, {"decode": "rsd-async"}):
        pace = pace_of(EvalConfig(**{"decode": "l1", "control_hz": 20.0, **other}))  # type: ignore[arg-type]
        with pace:
            assert isinstance(pace, WallClock)
            assert pace.tail == (other.get("meanwhile") in ("tail", "corrected"))
            assert pace.corrected == (other.get("meanwhile") == "corrected")
