"""A robot's pace, on a clock that only the test moves; and that a pending verification really runs beside the
simulator."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripted import SCRIPTED, CountingEnv, ScriptedPolicy

from reporting.test_report import write_run
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.realtime import Pace, RealTime
from rsd.evaluation.results import (
    EPISODES_FILE,
    EpisodeResult,
    RunRecord,
    append_episode,
    encode_record,
    read_episodes,
)
from rsd.evaluation.rollout import Rollout, run_episode
from rsd.reporting.tables import load_runs, table_rows
from rsd.types import ActionChunk, Observation, RsdError

HZ = 20.0  # a period is 50 ms


class Clock:
    """Seconds, moved by whoever takes time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Later(Future[float]):
    """A call beside the caller's on the same clock: its result is there when the caller's time has come to it."""

    def __init__(self, clock: Clock, call: Callable[[], float]) -> None:
        super().__init__()
        self.clock, begun = clock, clock.now
        try:
            self.set_result(call())
        except Exception as error:
            self.set_exception(error)
        self.end, clock.now = clock.now, begun

    def done(self) -> bool:
        return self.clock.now >= self.end

    def result(self, timeout: float | None = None) -> float:
        self.clock.now = max(self.clock.now, self.end)
        return super().result()


class Beside(Executor):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def submit(self, call: Callable[..., float], /, *_: Any, **__: Any) -> Future[float]:  # type: ignore[override]
        return Later(self.clock, call)


class TimedEnv(CountingEnv):
    """Every step's physics takes `physics` ms, drawing `drawing` ms at the end of a chunk; `slow`: some steps' own."""

    def __init__(self, clock: Clock, task_id: int = 3, physics: float = 20.0, drawing: float = 100.0) -> None:
        super().__init__("any", task_id, 8)
        self.clock, self.physics, self.drawing = clock, physics, drawing
        self.slow: dict[int, float] = {}
        self.begun: list[float] = []

    def step_once(self) -> None:
        self.begun.append(self.clock.now)
        self.clock.now += self.slow.get(len(self.begun), self.physics) / 1e3

    def step_chunk(
        self, actions: np.ndarray, before_step: Callable[[], None] | None = None, draw: bool = True
    ) -> Any:
        answer = super().step_chunk(actions, before_step, draw)
        self.clock.now += self.drawing / 1e3
        self.drawing_s += self.drawing / 1e3
        return answer


class AheadPolicy(ScriptedPolicy):
    """Decides in 10 ms and follows up in `follow_up_ms`, as chunk `fails` in an error."""

    def __init__(self, clock: Clock, follow_up_ms: float = 45.0, fails: int = -1) -> None:
        super().__init__()
        self.clock, self.follow_up_ms, self.fails, self.followed = clock, follow_up_ms, fails, 0

    def predict(self, observation: Observation) -> ActionChunk:
        self.clock.now += 0.01
        chunk = super().predict(observation)
        self.chunk = replace(chunk, stats=replace(chunk.stats, latency_ms={"total": 10.0}))
        return self.chunk

    def complete(self) -> ActionChunk:
        self.clock.now += self.follow_up_ms / 1e3
        self.followed += 1
        if self.followed == self.fails:
            raise RuntimeError("the pending verification broke")
        latency = {**self.chunk.stats.latency_ms, "verify-pending": self.follow_up_ms}
        return replace(self.chunk, stats=replace(self.chunk.stats, latency_ms=latency))


def roll(env: CountingEnv, policy: Any, pace: Pace | None, warmup: int = 0) -> Rollout:
    names: dict[str, Any] = {"suite": "any", "task_id": env.task_id, "task_name": "a task", "init_state": 0}
    return run_episode(env, policy, **names, seed=7, decode="draft-first", warmup=warmup, pace=pace)


def paced(env: TimedEnv, policy: Any, warmup: int = 0) -> EpisodeResult:
    clock = env.clock
    return roll(env, policy, RealTime(HZ, clock, clock.sleep, Beside(clock)), warmup).result


def timeless(result: EpisodeResult) -> EpisodeResult:
    """Without what time alone decides."""
    motion = ("pause_ms", "pause_without_drawing_ms", "waited", "late_steps", "late_ms")
    stats = {name: values for name, values in result.chunk_stats.items() if name not in motion}
    return replace(result, wall_s=0.0, latency_ms={}, chunk_stats=stats, sources=[])


def test_actions_begin_at_their_deadlines_and_the_robot_stands_still_while_it_is_drawn_and_decided() -> None:
    clock = Clock()
    env = TimedEnv(clock)  # 14 steps: chunks of 4, 4, 4, 2
    result = paced(env, AheadPolicy(clock))
    assert (result.success, result.steps, result.chunks) == (True, 14, 4)
    assert np.diff(env.begun)[:3] == pytest.approx([0.05] * 3)
    # the last action's period has 30 ms left when drawing begins: 70 of its 100 ms, then 10 to decide
    assert np.diff(env.begun)[3] == pytest.approx(0.05 + 0.07 + 0.01)
    motion = result.chunk_stats
    assert motion["pause_ms"] == pytest.approx([None, 80.0, 80.0, 80.0])
    assert motion["pause_without_drawing_ms"] == pytest.approx([None, 10.0, 10.0, 10.0])
    assert motion["late_steps"] == motion["late_ms"] == [0.0] * 4
    assert motion["waited"] == [None, 0.0, 0.0, 0.0]
    assert result.latency_ms == {"total": [10.0] * 4, "verify-pending": [45.0] * 4}
    result.check("here")


def test_a_quick_camera_leaves_the_last_action_its_whole_period() -> None:
    clock = Clock()
    env = TimedEnv(clock, drawing=2.0)
    motion = paced(env, AheadPolicy(clock)).chunk_stats
    assert motion["pause_ms"] == motion["pause_without_drawing_ms"] == pytest.approx([None, 10.0, 10.0, 10.0])
    assert np.diff(env.begun)[3] == pytest.approx(0.06)


def test_the_wait_for_a_follow_up_is_in_the_total_and_in_both_runs() -> None:
    clock = Clock()
    # 270 ms of motion and drawing, then 30 more to wait; without drawing it would have to be waited for 100
    result = paced(TimedEnv(clock), AheadPolicy(clock, follow_up_ms=300.0))
    assert result.latency_ms["wait"] == pytest.approx([0.0, 30.0, 30.0, 30.0])
    assert result.latency_ms["total"] == pytest.approx([10.0, 40.0, 40.0, 40.0])
    motion = result.chunk_stats
    assert motion["waited"] == [None, 1.0, 1.0, 1.0]
    assert motion["pause_ms"] == motion["pause_without_drawing_ms"] == pytest.approx([None, 110.0, 110.0, 110.0])

    motion = paced(TimedEnv(clock), AheadPolicy(clock, follow_up_ms=240.0)).chunk_stats
    assert motion["waited"] == [None, 0.0, 0.0, 0.0]
    assert motion["pause_ms"] == pytest.approx([None, 80.0, 80.0, 80.0])
    assert motion["pause_without_drawing_ms"] == pytest.approx([None, 50.0, 50.0, 50.0])  # 40 of them drawing


def test_a_late_step_is_recorded_and_shifts_nothing_that_comes_after() -> None:
    clock = Clock()
    env = TimedEnv(clock, drawing=0.0)
    env.slow = {2: 95.0, 12: 62.0}
    motion = paced(env, AheadPolicy(clock)).chunk_stats
    # the second action ends 45 ms late, the third begins at once and ends 15 ms late, the fourth is on time again
    assert np.subtract(env.begun[:4], env.begun[0]) == pytest.approx([0.0, 0.05, 0.145, 0.165])
    assert env.begun[4] - env.begun[0] == pytest.approx(0.21)
    # the last of the third chunk: the robot moves until its physics is computed, only then it stands still
    assert motion["late_steps"] == [2.0, 0.0, 1.0, 0.0]
    assert motion["late_ms"] == pytest.approx([45.0, 0.0, 12.0, 0.0])
    assert motion["pause_ms"] == pytest.approx([None, 10.0, 10.0, 10.0])


def test_a_policy_that_has_nothing_to_follow_up_waits_for_nothing() -> None:
    clock = Clock()
    result = paced(TimedEnv(clock), ScriptedPolicy("l1"))
    assert "waited" not in result.chunk_stats
    assert result.chunk_stats["pause_ms"] == pytest.approx([None, 70.0, 70.0, 70.0])


def test_warming_up_is_in_no_pause_and_no_wait() -> None:
    clock = Clock()
    cold = paced(TimedEnv(clock), AheadPolicy(clock, follow_up_ms=500.0))
    policy = AheadPolicy(clock, follow_up_ms=500.0)
    warm = paced(TimedEnv(clock), policy, warmup=2)
    assert policy.followed == cold.chunks + 2
    for name, values in cold.chunk_stats.items():
        assert warm.chunk_stats[name] == pytest.approx(values)
    assert warm.latency_ms["wait"] == pytest.approx(cold.latency_ms["wait"])


@pytest.mark.parametrize("hz", [HZ, 1e6])
def test_the_episode_is_that_of_taking_turns(hz: float) -> None:
    clock = Clock()
    turns = roll(TimedEnv(clock), AheadPolicy(clock), Pace())
    pace = RealTime(hz, clock, clock.sleep, Beside(clock))
    real = roll(TimedEnv(clock), AheadPolicy(clock), pace)
    assert timeless(real.result) == timeless(turns.result)
    assert list(map(len, real.result.sources)) == list(map(len, turns.actions))
    assert all(np.array_equal(a, b) for a, b in zip(real.actions, turns.actions, strict=True))


@pytest.mark.parametrize("fails", [1, 4])
def test_what_a_follow_up_raises_is_the_episodes_error(fails: int) -> None:
    clock = Clock()
    rollout = roll(TimedEnv(clock), AheadPolicy(clock, fails=fails), RealTime(1e6))  # in a thread
    assert rollout.result.failure == "error: RuntimeError: the pending verification broke"
    assert rollout.result.chunks == fails  # the fourth is the last, at whose end the task is solved
    assert "in complete" in rollout.traceback
    rollout.result.check("here")


def test_a_simulator_that_breaks_meanwhile_hides_no_follow_up() -> None:
    class Breaking(TimedEnv):
        def step_once(self) -> None:
            raise RuntimeError("the simulator broke")

    clock = Clock()
    rollout = roll(Breaking(clock), AheadPolicy(clock, fails=1), RealTime(1e6))
    assert "the pending verification broke" in rollout.result.failure
    assert "the simulator broke" in rollout.traceback
    rollout.result.check("here")
    rollout = roll(Breaking(clock), AheadPolicy(clock), RealTime(1e6))
    assert rollout.result.failure == "error: RuntimeError: the simulator broke"


def test_the_follow_up_runs_in_a_thread_of_its_own_while_the_robot_moves() -> None:
    moved, thought = threading.Event(), threading.Event()

    class Meeting(TimedEnv):
        def step_once(self) -> None:
            super().step_once()
            moved.set()
            assert thought.wait(10), "the pending verification has not begun while the robot moves"

    class Thinking(AheadPolicy):
        def complete(self) -> ActionChunk:
            thought.set()
            assert moved.wait(10), "the robot does not move while the pending verification runs"
            assert threading.current_thread() is not threading.main_thread()
            moved.clear()
            return super().complete()

    clock = Clock()
    result = roll(Meeting(clock, task_id=0), Thinking(clock), RealTime(1e6)).result
    assert (result.failure, result.chunks) == ("", 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify-pending")]


def test_an_evaluation_in_real_time_has_the_same_outcomes_and_a_table_of_standstills(tmp_path: Path) -> None:
    config = EvalConfig(num_trials=2, tasks="0", policy="good", decode="rsd")
    real = replace(config, control_hz=500.0, output=str(tmp_path / "real"))
    assert real.hash != config.hash
    summary = evaluate(real, backend=SCRIPTED, console=Console(quiet=True))
    assert summary.num_workers == 1  # of --num-workers auto
    env, policy = SCRIPTED.make_env("libero_spatial", 0, 8), SCRIPTED.make_policy(config)
    names: dict[str, Any] = {"suite": "libero_spatial", "task_id": 0, "task_name": "task_0", "decode": "rsd"}
    alone = [run_episode(env, policy, **names, init_state=state, seed=config.seed).result for state in (0, 1)]
    found = read_episodes(real.output_dir / EPISODES_FILE).values()
    assert [timeless(result) for result in found] == [timeless(result) for result in alone]

    standstill = summary.decoding.chunk_stats["pause_ms"]
    assert standstill["n"] == 2  # of four chunks two are first ones
    assert 0 < standstill["p50"] <= standstill["p95"]
    turns = write_run(tmp_path / "turns", "ar", set(), 80.0)
    rows = dict(table_rows(load_runs([turns, real.output_dir])))
    p50, p95 = standstill["p50"], standstill["p95"]
    assert rows["standstill between chunks, p50 / p95"] == ["-", f"{p50:.1f} / {p95:.1f} ms"]
    assert rows["the same without drawing"][0] == "-"
    assert rows["late steps"][0] == "-"
    assert rows["late steps"][1].split(",")[0].endswith(" of 11")
    assert "chunks that waited for the pending verification" not in rows  # the scripted policy has none
    assert not any("pause_ms" in row for row in rows)


def test_the_table_says_how_often_a_follow_up_was_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    runs = []
    for name, follow_up_ms in (("quick", 45.0), ("slow", 300.0)):
        result = replace(paced(TimedEnv(clock), AheadPolicy(clock, follow_up_ms)), suite="libero_spatial")
        directory = tmp_path / name
        directory.mkdir()
        plan = {"tasks": "3", "num_trials": 1, "task_suite": "libero_spatial", "control_hz": HZ}
        (directory / "config.json").write_text(encode_record(RunRecord(plan, "hash", {}, {})))
        append_episode(directory / EPISODES_FILE, result)
        runs.append(directory)
    rows = dict(table_rows(load_runs(runs)))
    assert rows["standstill between chunks, p50 / p95"] == ["80.0 / 80.0 ms", "110.0 / 110.0 ms"]
    assert rows["the same without drawing"] == ["10.0 / 10.0 ms", "110.0 / 110.0 ms"]
    assert rows["pending verification while the robot moves, p50 / p95"] == ["45.0 / 45.0 ms", "300.0 / 300.0 ms"]
    assert rows["chunks that waited for the pending verification"] == ["0.0 %", "100.0 %"]
    assert rows["late steps"] == ["0 of 14", "0 of 14"]


@pytest.mark.parametrize("hz", [-1.0, math.inf, math.nan])
def test_a_pace_that_is_none_is_refused(hz: float) -> None:
    with pytest.raises(RsdError, match=f"control_hz: expected a number that is 0 or from 0.01 to 1000, found {hz:g}"):
        EvalConfig(control_hz=hz)


def test_robots_do_not_wait_for_a_batch() -> None:
    with pytest.raises(RsdError, match=r"expected --control-hz without --batch, .* found --batch 2"):
        EvalConfig(control_hz=20.0, batch=2)
