from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import SCRIPTED, STEP_LIMIT, CountingEnv, ScriptedPolicy

from rsd.chunks import checked_chunk
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import EpisodeRunner, Job
from rsd.evaluation.realtime import Pace, RealTime
from rsd.evaluation.results import EpisodeResult, decode_record, encode_record
from rsd.evaluation.rollout import Rollout, episode_seed, run_episode
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError


def roll(
    env: CountingEnv, policy: Any, init_state: int = 0, warmup: int = 0, decode: str = "rsd", **how: Any
) -> Rollout:
    return run_episode(
        env,
        policy,
        suite="any",
        task_id=env.task_id,
        task_name="a task",
        init_state=init_state,
        seed=7,
        decode=decode,
        warmup=warmup,
        **how,
    )


def test_a_success_stops_inside_its_chunk_and_counts_only_executed_steps() -> None:
    rollout = roll(CountingEnv("any", 0, 8), ScriptedPolicy())
    result = rollout.result
    assert (result.success, result.failure, result.steps, result.chunks) == (True, "", 5, 2)
    assert [len(actions) for actions in rollout.actions] == [4, 1]
    assert result.num_draft_tokens == [20, 20, 20]
    assert result.num_accepted_tokens == [20, 16, 10]
    assert result.accepted_levels == [0, 1]
    assert (result.prefills, result.target_passes, result.acceptance) == (2, 2, "margin")
    result.check("here")


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
def test_a_policy_that_would_end_its_worker_costs_an_attempt(raised: type[BaseException], tmp_path: Path) -> None:
    runner = EpisodeRunner(EvalConfig(decode="rsd"), SCRIPTED, ScriptedPolicy(), tmp_path)
    job = Job("any", 0, "a task", "do it", 0, attempt=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedPolicy, "predict", lambda *_: (_ for _ in ()).throw(raised(0)))
        outcome = runner.run(job)
    assert (outcome.result.failure, outcome.result.attempts) == (f"error: {raised.__name__}, raised by the policy", 2)
    assert runner.run(job).result.success


class Fresh(ScriptedPolicy):
    """Nothing is ready before the first `reset`."""

    ready = False

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.ready = True

    def predict(self, observation: Observation) -> ActionChunk:
        assert self.ready
        return super().predict(observation)


def test_a_policy_is_reset_before_it_is_warmed_up() -> None:
    assert roll(CountingEnv("any", 0, 8), Fresh(), warmup=2).result.success


class Cautious(ScriptedPolicy):
    def predict(self, observation: Observation) -> ActionChunk:
        return replace(super().predict(observation), execute=3)


@pytest.mark.parametrize("pace", [Pace, partial(RealTime, 1000.0)])
def test_what_is_not_to_be_executed_is_a_tail(pace: Callable[[], Pace]) -> None:
    rollout = roll(CountingEnv("any", 0, 8), Cautious(), pace=pace())
    assert [len(actions) for actions in rollout.actions] == [3, 2]
    assert (rollout.result.success, rollout.result.steps) == (True, 5)


@pytest.mark.parametrize("execute", [0, 5, 2.0, True])
def test_a_chunk_has_as_many_actions_as_are_executed(execute: Any) -> None:
    with pytest.raises(RsdError, match="policy: execute: expected an integer from 1 to 4, found"):
        checked_chunk(ActionChunk(np.zeros((4, 7)), ChunkStats("rsd"), execute))


def test_the_step_limit_is_a_failure_of_the_policy() -> None:
    result = roll(CountingEnv("any", 5, 8), ScriptedPolicy(), init_state=3).result
    assert (result.success, result.failure, result.steps) == (False, "step limit", STEP_LIMIT)
    assert not result.is_error


def test_without_a_draft_there_is_no_acceptance() -> None:
    result = roll(CountingEnv("any", 0, 8), ScriptedPolicy("ar"), decode="ar").result
    assert (result.num_drafts, result.num_draft_tokens, result.accepted_levels) == (0, [], [])
    assert result.target_passes == 14


def test_warm_up_predictions_are_in_no_latency() -> None:
    cold = roll(CountingEnv("any", 0, 8), ScriptedPolicy()).result
    warm = roll(CountingEnv("any", 0, 8), ScriptedPolicy(), warmup=2).result
    assert cold.latency_ms["total"] == [1.0, 2.0]  # the scripted latency is the number of the prediction
    assert warm.latency_ms["total"] == [3.0, 4.0]
    assert warm.chunks == cold.chunks


@pytest.mark.parametrize(("behaviour", "reason"), [("raises", "the policy broke"), ("nan", "NaN")])
def test_a_broken_policy_is_an_error_episode_and_moves_nothing(behaviour: str, reason: str) -> None:
    env = CountingEnv("any", 0, 8)
    rollout = roll(env, ScriptedPolicy(behaviour=behaviour))
    assert rollout.result.is_error
    assert reason in rollout.result.failure
    assert "Traceback" in rollout.traceback
    assert env.executed == []
    rollout.result.check("here")


@pytest.mark.parametrize(
    "actions",
    [np.zeros(7), np.zeros((0, 7)), np.zeros((4, 6)), np.full((4, 7), 1.5), np.full((4, 7), np.inf)],
)
def test_chunks_that_are_no_actions_are_refused(actions: np.ndarray) -> None:
    with pytest.raises(RsdError, match="policy"):
        checked_chunk(ActionChunk(actions, ChunkStats("rsd")))


class SamplingPolicy(ScriptedPolicy):
    def predict(self, observation: Observation) -> ActionChunk:
        chunk = super().predict(observation)
        return ActionChunk(self.rng.random((4, 7)), chunk.stats)


def test_an_episode_does_not_depend_on_what_ran_before_it() -> None:
    env, policy = CountingEnv("any", 1, 8), SamplingPolicy()
    alone = roll(env, policy, init_state=2)
    roll(env, policy, init_state=3)
    again = roll(env, policy, init_state=2, warmup=2)
    assert all(np.array_equal(a, b) for a, b in zip(alone.actions, again.actions, strict=True))
    other = roll(env, policy, init_state=3)
    assert not np.array_equal(alone.actions[0], other.actions[0])


def test_episode_seeds_differ() -> None:
    seeds = {episode_seed(seed, task, state) for seed in (0, 7) for task in range(10) for state in range(50)}
    assert len(seeds) == 2 * 10 * 50


@pytest.mark.parametrize(
    "changes",
    [
        {"skipped": True},
        {"num_accepted_tokens": [11, 8, 5]},
        {"accepted_levels": 9},
        {"latency_ms": {"total": 1.0, "draft": 2.0}},
        {"prefills": -1},
    ],
)
def test_impossible_statistics_cost_the_episode_and_not_the_run(changes: dict[str, Any]) -> None:
    class Odd(ScriptedPolicy):
        def predict(self, observation: Observation) -> ActionChunk:
            chunk = super().predict(observation)
            return replace(chunk, stats=replace(chunk.stats, **changes))

    result = roll(CountingEnv("any", 0, 8), Odd()).result
    assert result.is_error
    assert decode_record(EpisodeResult, encode_record(result), "here") == result
    result.check("here")
