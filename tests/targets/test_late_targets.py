"""A target of somebody else's whose answers are late: its drafter's chunk begins, and the answer overrules the rest."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evaluation.scripted import SCRIPTED, CountingEnv
from foreign_server import foreign
from rsd.cli.eval import EvalArguments, plan_runs
from rsd.evaluation.backend import describe_checkpoint, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.delay import VirtualDelay
from rsd.evaluation.episodes import pace_of
from rsd.evaluation.evaluate import evaluate, run_differences
from rsd.evaluation.foreign import check_foreign
from rsd.evaluation.realtime import Pace
from rsd.evaluation.results import EPISODES_FILE, read_episodes
from rsd.evaluation.rollout import Rollout, run_episode
from rsd.evaluation.wall_clock import WallClock
from rsd.reporting.tables import load_runs, table_rows
from rsd.targets.black_box import Drafter, SpeculatingPolicy
from rsd.targets.custom import identity
from rsd.targets.remote.openpi import OpenpiPolicy
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError
from two_ways import HERE, SEEN

STEPS = 20  # until success
BACKEND = replace(SCRIPTED, make_policy=rsd_policy, describe_policy=describe_checkpoint)


class Target:
    """Answers by `answer`, after `takes` s; asked: the steps of the observations."""

    image_size = 64

    def __init__(self, answer: Callable[[Observation], np.ndarray], takes: float = 0.0) -> None:
        self.answer, self.takes, self.asked = answer, takes, list[int]()

    def reset(self, seed: int | None = None) -> None:
        self.asked = []

    def predict(self, observation: Observation) -> ActionChunk:
        self.asked.append(int(observation.state[2]))
        time.sleep(self.takes)
        return ActionChunk(self.answer(observation), ChunkStats("target-only"))


def spelt(observation: Observation) -> np.ndarray:
    """Actions that say of which observation they are, and which of its they are, the gripper open."""
    actions = np.zeros((8, 7), np.float32)
    actions[:, 0], actions[:, 1], actions[:, 6] = observation.state[2] / 100, np.arange(8) / 10 - 0.9, -1.0
    return actions


def drafts_of(drafter: Drafter, open_gripper: bool = False) -> Callable[[Observation], np.ndarray]:
    """What the drafter drafts, from now on with the gripper open if that is said."""
    if open_gripper:
        propose = drafter.propose

        def kept_open(*arguments: Any) -> Any:
            proposal = propose(*arguments)
            proposal.actions[:, 6] = -1.0
            return replace(proposal, draft=replace(proposal.draft, gripper=proposal.draft.gripper * 0))

        drafter.propose = kept_open  # type: ignore[method-assign]
    policy = SpeculatingPolicy(drafter, None, drafter.skip_rule(), "drafter-only")
    return lambda observation: policy.predict(observation).actions


def roll(policy: Any, pace: Pace) -> tuple[list[np.ndarray], Rollout]:
    env = CountingEnv("any", 5, 64)
    names: dict[str, Any] = {"suite": "any", "task_id": 5, "task_name": "a task", "init_state": 0, "seed": 7}
    rollout = run_episode(env, policy, **names, decode=policy.decode, pace=pace)  # type: ignore[arg-type]
    assert rollout.result.success, rollout.traceback
    rollout.result.check("here")
    return env.executed, rollout


def late(drafter: Drafter, target: Target) -> SpeculatingPolicy:
    return SpeculatingPolicy(drafter, target, drafter.skip_rule(), "rsd-async")


@pytest.mark.parametrize(("delay", "early"), [(0, 0), (2, 0), (5, 1)])
def test_of_a_drafter_that_is_the_target_nothing_is_replaced(drafter: Drafter, delay: int, early: int) -> None:
    target = Target(drafts_of(drafter, open_gripper=True))
    executed, rollout = roll(late(drafter, target), VirtualDelay(delay, early))
    stats = rollout.result.chunk_stats
    assert len(stats["stood"]) == len(target.asked) == rollout.result.prefills > 1
    assert set(stats["stood"]) == {1.0}
    assert set(stats["replaced"]) <= {None, 0.0}
    sources = "".join(rollout.result.sources)
    assert sources.startswith("h" * delay + "t" * 8)  # the target decides what an episode begins with
    assert set(sources[delay + 8 :]) <= ({"d", "t", "h"} if early else {"d", "t"})
    assert len(executed) == STEPS


def test_a_wrong_draft_leaves_no_trace_without_a_delay(drafter: Drafter) -> None:
    drafter.stored.__dict__["epsilon_mm"] = 1e-9
    target = Target(spelt)
    executed, rollout = roll(late(drafter, target), VirtualDelay(0))
    alone, _ = roll(SpeculatingPolicy(drafter, Target(spelt), drafter.skip_rule(), "target-only"), VirtualDelay(0))
    np.testing.assert_array_equal(executed, alone)
    assert target.asked == [0, 8, 16]
    assert rollout.result.sources == ["t" * 8, "r" * 8, "r" * 4]
    assert rollout.result.chunk_stats["stood"] == [0.0] * 3
    assert rollout.result.chunk_stats["replaced"] == [None, 1.0, 1.0]
    assert "forced" not in rollout.result.chunk_stats
    assert rollout.result.latency_ms.keys() == {"draft", "target", "total", "verify-pending"}


def test_with_a_delay_a_wrong_draft_only_begins(drafter: Drafter) -> None:
    drafts = drafts_of(drafter, open_gripper=True)
    drafter.stored.__dict__["epsilon_mm"] = 1e-9
    executed, rollout = roll(late(drafter, Target(spelt)), VirtualDelay(3))
    assert rollout.result.sources == ["hhh" + "t" * 8, "ddd" + "r" * 5, "d"]
    env = CountingEnv("any", 5, 64)
    env.reset(options={"init_state": 0})
    env.steps = 11
    np.testing.assert_array_equal(executed[11:14], drafts(env.observation())[:3])
    np.testing.assert_array_equal(executed[14:19], spelt(env.observation())[3:])


def test_a_draft_never_switches_the_gripper_before_the_answer(drafter: Drafter) -> None:
    drafter.stored.__dict__["epsilon_mm"] = 1e-9
    propose, closed = drafter.propose, np.where(np.arange(8) > 0, 1.0, -1.0)

    def closes(*arguments: Any) -> Any:
        proposal = propose(*arguments)
        proposal.actions[:, 6] = closed
        return proposal

    drafter.propose = closes  # type: ignore[method-assign]
    executed, rollout = roll(late(drafter, Target(spelt)), VirtualDelay(3))
    assert all(action[6] == -1.0 for action in executed)
    assert rollout.result.sources[1].startswith("dhh")


def test_by_the_wall_clock_the_draft_moves_the_robot_until_the_answer_is_there(drafter: Drafter) -> None:
    drafts_of(drafter, open_gripper=True)
    drafter.stored.__dict__["epsilon_mm"] = 1e-9
    target = Target(spelt, takes=0.15)
    _, rollout = roll(late(drafter, target), WallClock(25.0))
    first, second = rollout.result.sources[:2]
    assert first.strip("h") == "t" * 8
    assert second.lstrip("th").startswith("d")
    assert "r" in second


def test_a_comparison_takes_late_answers(drafter: Drafter, tmp_path: Path) -> None:
    place, policy = tmp_path / "drafter", f"{HERE}:OneWay"
    replace(drafter.stored, target=identity(policy)).save(place)
    config = EvalConfig(policy=policy, drafter=str(place), delay=3, drafter_delay=1)
    runs = [run for run, _ in plan_runs(EvalArguments(config, compare=True))]
    found = [(run.decode, run.delay, run.drafter_delay) for run in runs]
    assert found == [("target-only", 3, 0), ("rsd-skip", 3, 1), ("drafter-only", 3, 1)]
    for run in runs:
        assert rsd_policy(run).image_size in (64, 128)


def test_what_a_target_lost_ends_its_episode_and_no_other(drafter: Drafter) -> None:
    def answer(observation: Observation) -> np.ndarray:
        if observation.state[2] > 0:
            raise RsdError("the server is lost")
        return spelt(observation)

    policy = late(drafter, Target(answer))
    env = CountingEnv("any", 5, 64)
    names: dict[str, Any] = {"suite": "any", "task_id": 5, "task_name": "a task", "init_state": 0, "seed": 7}
    rollout = run_episode(env, policy, **names, decode="rsd-async", pace=VirtualDelay(2))  # type: ignore[arg-type]
    assert "the server is lost" in rollout.result.failure
    policy.target = Target(spelt)
    roll(policy, VirtualDelay(2))


def test_predicting_again_begins_with_what_was_left(drafter: Drafter) -> None:
    target = Target(spelt)
    policy = late(drafter, target)
    policy.reset()
    policy.predict(SEEN)
    assert target.asked == []
    policy.predict(SEEN)
    assert target.asked == [0]
    found = policy.complete()
    assert found is not None
    np.testing.assert_array_equal(found.answer, spelt(SEEN))
    assert policy.complete() is None
    policy.predict(SEEN)
    policy.reset()
    assert policy.complete() is None


@pytest.mark.parametrize("meanwhile", [None, "hold", "tail", "corrected"])
@pytest.mark.parametrize("decode", ["target-only", "rsd-skip"])
def test_the_other_modes_wait_for_late_answers(drafter: Drafter, decode: str, meanwhile: str | None) -> None:
    target = Target(drafts_of(drafter, open_gripper=True))
    policy = SpeculatingPolicy(drafter, target, drafter.skip_rule(1e9, 1), decode)
    _, rollout = roll(policy, VirtualDelay(3, 0, meanwhile))
    sources = "".join(rollout.result.sources)
    begins = sources.removeprefix("hhh" + "t" * 8)
    if decode == "rsd-skip":
        assert begins == "d" * 8 + "h"
    else:
        assert begins == ("hhhtttttt" if meanwhile in (None, "hold") else "hhhttttth")


def test_an_openpi_server_has_a_tail_for_late_answers() -> None:
    with foreign({}, answer=lambda _: np.full((10, 7), 0.5, np.float32)) as (address, _):
        policy = OpenpiPolicy(address)
        _, rollout = roll(policy, VirtualDelay(2, meanwhile="tail"))
        policy.close()
    assert rollout.result.sources == ["hhttttt", *["ttttt"] * 2, "ttt"]
    assert rollout.result.chunk_stats["tail_steps"] == [0.0, 2.0, 2.0, 2.0]


@contextmanager
def class_of_ones_own() -> Iterator[str]:
    yield f"{HERE}:OneWay"


@contextmanager
def server() -> Iterator[str]:
    with foreign({"model": "any"}, answer=lambda _: np.full((8, 7), 0.5, np.float32)) as (address, _):
        yield address


@pytest.mark.parametrize(
    ("target", "how"),
    [(class_of_ones_own, {"delay": 2, "drafter_delay": 1}), (server, {"control_hz": 50.0})],
)
def test_rsd_eval_runs_and_goes_on_with_late_targets(
    drafter: Drafter, tmp_path: Path, target: Any, how: dict[str, Any]
) -> None:
    place, quiet = tmp_path / "drafter", Console(quiet=True)
    with target() as policy:
        named = identity(policy) if target is class_of_ones_own else {"metadata": {"model": "any"}}
        replace(drafter.stored, target=named, epsilon_mm=1e-3).save(place)
        options: dict[str, Any] = {"tasks": "4", "num_trials": 2, "num_workers": "1", "output": str(tmp_path / "run")}
        config = EvalConfig(policy=policy, drafter=str(place), decode="rsd-async", **options, **how)
        check_foreign(config)
        assert type(pace_of(config)) is (WallClock if config.control_hz else VirtualDelay)
        if not config.control_hz:
            assert evaluate(config, backend=BACKEND, console=quiet, time_limit_s=0.0).episodes == 1
        assert evaluate(config, backend=BACKEND, console=quiet).success.n == 2
    for episode in read_episodes(config.output_dir / EPISODES_FILE).values():
        assert episode.success, episode.failure
        assert "r" in "".join(episode.sources[1:])
    (run,) = load_runs([config.output_dir])
    gate = run.record.policy.pop("drafter_gate")
    assert gate == {"epsilon_mm": 1e-3, "delta": None}
    assert run_differences(run.record, run.record.versions, {**run.record.policy, "drafter_gate": gate}) == ""  # older
    rows = dict(table_rows(load_runs([config.output_dir])))
    assert rows["drafts beyond epsilon"][0].endswith("(0.001 mm)")
    for row in ("drafted steps before the target's answer, mean", "actions that the target's answer replaced"):
        assert rows[row] != ["-"], rows.keys()
