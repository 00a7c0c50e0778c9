"""Virtual delay: which action is executed at which step, in every mode, alone, batched and resumed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripted import SCRIPTED, CountingEnv

from rsd.collection.collect import CollectConfig
from rsd.evaluation.backend import ready
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.delay import StepByStep, VirtualDelay
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, read_episodes
from rsd.evaluation.rollout import Rollout, run_episode
from rsd.reporting.tables import load_runs, table_rows
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError, WrongOption

STEPS = 20  # until success, in which nothing is lost to a limit


class Seen(CountingEnv):
    """Says which steps were drawn. What it tells of the arm is no free motion, so that nothing is made up for."""

    def __init__(self) -> None:
        super().__init__("any", 5, 8)
        self.drawn = [0]

    def step_chunk(self, actions: np.ndarray, before_step: Callable[[], None] | None = None, draw: bool = True) -> Any:
        stepped = super().step_chunk(actions, before_step, draw)
        self.drawn += [self.steps] * draw
        return stepped


class Spelling:
    """Chunks of 8, 4 of them to be executed. An action says of which observation it is, which one it is, and whose:
    t(arget), d(raft). switches: (observation, action, whose) from which on its gripper is closed; falls: observations
    whose drafts do not stand; skips: those that skip the target."""

    image_size = 8

    def __init__(
        self, decode: str, falls: set[int] = frozenset(), switches: Any = (), skips: set[int] = frozenset()
    ) -> None:
        self.decode, self.falls, self.switches, self.skips = decode, falls, switches, skips

    def reset(self, seed: int | None = None) -> None:
        self.chunk: ActionChunk | None = None

    def predict(self, observation: Observation) -> ActionChunk:
        step = int(observation.state[2])
        skipped = step in self.skips if self.skips else None
        stats = ChunkStats(self.decode, skipped=skipped, latency_ms={"total": 1.0})
        pending = self.decode in ("draft-first", "rsd-async")
        actions = self.spelt(step, "d" if pending or skipped else "t")
        chunk = ActionChunk(actions, stats, 4)
        self.chunk = None
        if pending:
            answer = self.spelt(step, "t") if self.decode == "rsd-async" else None
            self.chunk = replace(chunk, stats=replace(stats, stood=step not in self.falls), answer=answer)
        return chunk

    def complete(self) -> ActionChunk | None:
        return self.chunk

    def spelt(self, step: int, whose: str) -> np.ndarray:
        actions = np.zeros((8, 7), np.float32)
        actions[:, 0], actions[:, 1], actions[:, 2] = (step + 1) / 100, np.arange(8) / 10, 0.5 if whose == "t" else -0.5
        actions[:, 6] = -1.0
        for begins, action, who in self.switches:
            if who == whose:
                actions[max(0, begins + action - step) :, 6] = 1.0
        return actions


class Correcting(Spelling):
    """Corrects nothing; asked: the steps at which it could."""

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.kept, self.asked = list[np.ndarray](), list[int]()

    def predict(self, observation: Observation) -> ActionChunk:
        chunk = super().predict(observation)
        self.kept = [*self.kept[-1:], chunk.actions]
        return chunk

    def correct(self, observation: Observation, index: int, before: bool) -> np.ndarray:
        self.asked.append(int(observation.state[2]))
        return self.kept[0 if before else -1][index]


class Told(Spelling):
    """told: by the step of an observation, what is committed then."""

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.told = dict[int, np.ndarray | None]()

    def predict(self, observation: Observation) -> ActionChunk:
        self.told[int(observation.state[2])] = observation.committed
        return super().predict(observation)


def spell(action: np.ndarray) -> str:
    """`t12.3`: the target's action 3 for observation 12; `-` for standing still; with a `!` if the gripper closes."""
    word = "-"
    if action[:6].any():
        word = f"{'t' if action[2] > 0 else 'd'}{round(100 * action[0]) - 1}.{round(10 * action[1])}"
    return word + "!" * int(action[6] > 0)


def roll(
    policy: Any, delay: int, early: int = 0, pace: VirtualDelay | None = None, **options: Any
) -> tuple[Seen, Rollout]:
    env = Seen()
    names: dict[str, Any] = {"suite": "any", "task_id": 5, "task_name": "a task", "init_state": 0, "seed": 7}
    pace = pace or VirtualDelay(delay, early, **options)
    return env, run_episode(env, policy, **names, decode=policy.decode, pace=pace)


def of(whose: str, step: int, first: int, last: int) -> list[str]:
    return [f"{whose}{step}.{action}" for action in range(first, last + 1)]


STILL = ["-"]
T0 = STILL * 2 + of("t", 0, 0, 3)  # an episode's beginning at a delay of 2


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        (Spelling("l1"), {"delay": 0}, of("t", 0, 0, 3) + of("t", 4, 0, 3) + of("t", 8, 0, 3)),
        (Spelling("l1"), {"delay": 2}, T0 + STILL * 2 + of("t", 6, 0, 3) + STILL * 2 + of("t", 12, 0, 3)),
        (
            Spelling("l1"),
            {"delay": 2, "meanwhile": "tail"},
            T0 + of("t", 0, 4, 5) + of("t", 6, 2, 5) + of("t", 10, 2, 5) + of("t", 14, 2, 5),
        ),
        # a gripper switch that was missed: as it is, and made up for
        *(
            (Spelling("l1", switches=[(6, 1, "t")]), {"delay": 2, "meanwhile": mode}, [*T0, "t0.4", "t0.5", *then])
            for mode, then in {
                "tail": ["t6.2!", "t6.3!", "t6.4!", "t6.5!", "t10.2!"],
                "corrected": ["t6.1!", "t6.2!", "t6.3!", "t6.4!", "t10.2!"],
            }.items()
        ),
        # one observation at a time: the next one when the answer is there, at which the chunk before is over
        (
            Spelling("l1"),
            {"delay": 6, "meanwhile": "tail"},
            STILL * 6 + of("t", 0, 0, 7) + STILL * 2 + of("t", 10, 6, 7) + STILL * 2,
        ),
        # the first chunk skips the target and is there at once
        (
            Spelling("rsd-skip", skips={0, 10}),
            {"delay": 2, "early": 1},
            [*STILL, *of("d", 0, 0, 3), *STILL * 2, *of("t", 5, 0, 3), *STILL * 2, *of("t", 11, 0, 3)],
        ),
        (Spelling("draft-first"), {"delay": 4}, of("d", 0, 0, 3) + of("d", 4, 0, 3) + of("d", 8, 0, 3)),
        # the target is still busy with the observation before
        (Spelling("draft-first"), {"delay": 6}, of("d", 0, 0, 3) + STILL * 2 + of("d", 6, 0, 3) + STILL * 2),
        (
            Spelling("draft-first"),
            {"delay": 6, "meanwhile": "tail"},
            of("d", 0, 0, 5) + of("d", 6, 0, 5) + of("d", 12, 0, 5),
        ),
        # drafts that stand: nothing changes, whatever the delay
        *(
            (Spelling("rsd-async"), {"delay": d}, STILL * d + of("t", 0, 0, 3) + of("d", d + 4, 0, 3))
            for d in (0, 1, 4)
        ),
        (
            Spelling("rsd-async", falls={6, 14}),
            {"delay": 2},
            T0 + of("d", 6, 0, 1) + of("t", 6, 2, 3) + of("d", 10, 0, 3) + of("d", 14, 0, 1) + of("t", 14, 2, 3),
        ),
        (
            Spelling("rsd-async", falls={6}),
            {"delay": 2, "early": 1},
            T0 + of("t", 0, 4, 4) + of("d", 6, 1, 1) + of("t", 6, 2, 4) + of("d", 10, 1, 4) + of("d", 14, 1, 3),
        ),
        # as late as the next observation
        (
            Spelling("rsd-async", falls={8}),
            {"delay": 4},
            STILL * 4 + of("t", 0, 0, 3) + of("d", 8, 0, 3) + of("d", 12, 0, 3) + of("d", 16, 0, 3),
        ),
        (Spelling("rsd-async", falls={4}), {"delay": 0}, of("t", 0, 0, 3) + of("t", 4, 0, 3) + of("d", 8, 0, 3)),
        # beyond the executed steps the draft goes on until the answer is there
        (Spelling("rsd-async", falls={10}), {"delay": 6}, STILL * 6 + of("t", 0, 0, 3) + of("d", 10, 0, 5)),
        # where a draft would switch the gripper unverified the robot stands still, and the answer goes on from there
        (
            Spelling("rsd-async", falls={6}, switches=[(6, 1, "d"), (6, 3, "t")]),
            {"delay": 2},
            [*T0, "d6.0", *STILL, "t6.1", "t6.2", "t6.3!", "d11.0!"],
        ),
        # or the draft, if it stood
        (
            Spelling("rsd-async", switches=[(6, 1, "d"), (6, 1, "t")]),
            {"delay": 2},
            [*T0, "d6.0", *STILL, *(f"d6.{n}!" for n in (1, 2, 3)), "d11.0!"],
        ),
        # what was waited for is not missed, and steps before the draft are steps of the chunk
        (
            Spelling("rsd-async", falls={10}, switches=[(10, 0, "d")]),
            {"delay": 6},
            STILL * 6 + of("t", 0, 0, 3) + STILL * 6 + of("t", 10, 0, 3),
        ),
        (
            Spelling("rsd-async", switches=[(6, 1, "d"), (6, 1, "t")]),
            {"delay": 2, "early": 1},
            [*T0, "t0.4", *STILL, *(f"d6.{n}!" for n in (1, 2, 3, 4)), "d11.1!"],
        ),
        # unless the answer before switches then, or a step later
        *(
            (Spelling("rsd-async", switches=[(6, 1, "d"), (6, n - 6, "t")]), {"delay": 2}, [*T0, "d6.0", *then])
            for n, then in ((5, ["d6.1!", "d6.2!"]), (6, ["d6.1!", "d6.2!"]), (7, [*STILL, "d6.1!"]))
        ),
        # a later switch has been verified
        (
            Spelling("rsd-async", switches=[(2, 3, "t"), (6, 3, "d")]),
            {"delay": 2},
            [*T0, *of("d", 6, 0, 2), "d6.3!", "d10.0!"],
        ),
        # the answer should have switched before it was there: it goes on from its switch
        (
            Spelling("rsd-async", falls={6}, switches=[(6, 1, "t"), (6, 3, "d")]),
            {"delay": 2},
            [*T0, "d6.0", "d6.1", "t6.1!", "t6.2!", "d10.0!"],
        ),
    ],
)
def test_each_step_executes_what_its_mode_says(policy: Any, options: dict[str, Any], expected: list[str]) -> None:
    env, rollout = roll(policy, **options)
    assert [spell(action) for action in env.executed][: len(expected)] == expected
    assert rollout.result.success
    assert rollout.result.steps == STEPS == len(env.executed)
    assert set(env.drawn[1:]) <= set(np.cumsum([len(actions) for actions in rollout.actions]))  # for observations alone
    assert np.array_equal(np.concatenate(rollout.actions), env.executed)
    rollout.result.check("here")
    check_sources(rollout, env)


@pytest.mark.parametrize("delay", [0, 2, 6])
def test_a_corrector_is_asked_at_every_step_of_a_tail(delay: int) -> None:
    policy = Correcting("l1", switches=[(4, 1, "t")])
    env, rollout = roll(policy, delay, pace=StepByStep(delay))
    words = [spell(action) for action in env.executed]
    plain, same = roll(Spelling("l1", switches=[(4, 1, "t")]), delay, meanwhile="tail")
    assert words == [spell(action) for action in plain.executed]
    assert rollout.result.sources == same.result.sources
    assert policy.asked == [step for step, word in enumerate(words) if word[0] != "-"]
    assert rollout.result.chunk_stats == same.result.chunk_stats
    assert env.drawn == [0, *range(1, len(words) + 1)]
    assert "found 8 of 8" in roll(Correcting("l1"), 8, pace=StepByStep(8))[1].result.failure


@pytest.mark.parametrize("delay", [0, 2, 6])
def test_a_target_is_told_what_will_have_been_executed_when_its_answer_is_there(delay: int) -> None:
    policy = Told("l1", switches=[(4, 1, "t")])
    env, rollout = roll(policy, delay, meanwhile="rtc")
    plain, same = roll(Spelling("l1", switches=[(4, 1, "t")]), delay, meanwhile="tail")
    assert np.array_equal(env.executed, plain.executed)
    assert rollout.result.sources == same.result.sources
    assert len(policy.told) > 2
    for step, told in policy.told.items():
        if delay == 0 or step == 0:  # an episode's first chunk misses nothing
            assert told is None
        else:
            done = env.executed[step : step + delay]  # less at the end
            assert told is not None
            assert len(told) == delay
            assert np.array_equal(told[: len(done)], done)


def check_sources(rollout: Rollout, env: Seen) -> None:
    """What is recorded of each step is whose it was."""
    allowed = {"-": "h", "d": "d", "t": "rt"}
    words = [spell(action) for action in env.executed]
    found = "".join(rollout.result.sources)
    assert all(letter in allowed[word[0]] for word, letter in zip(words, found, strict=True)), (words, found)


def test_what_was_held_drafted_and_replaced_is_counted() -> None:
    stats = roll(Spelling("rsd-async", falls={6, 14}), 2)[1].result.chunk_stats
    assert stats["held_steps"] == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert stats["drafted_steps"] == [None, 2.0, 2.0, 2.0, 2.0]
    assert stats["replaced"] == [None, 0.5, 0.0, 0.5, None]  # the last answer comes too late
    sources = roll(Spelling("rsd-async", falls={6, 14}), 2)[1].result.sources
    assert sources == ["hhtttt", "ddrr", "dddd", "ddrr", "dd"]
    apart = pytest.approx(2 * 50.0 * 0.2655, rel=1e-3)  # mm: in the two steps the two differ by 1 in height
    assert stats["replaced_mm"] == [None, apart, None, apart, None]
    assert roll(Spelling("l1"), 2, meanwhile="tail")[1].result.chunk_stats["tail_steps"] == [0.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("policy", [Spelling("l1"), Spelling("rsd-async")])
def test_a_chunk_of_which_nothing_could_be_used_ends_the_run(policy: Any) -> None:
    with pytest.raises(WrongOption, match="fewer steps than the policy's chunk has, found 8, after which nothing"):
        roll(policy, 8, meanwhile="tail")


@pytest.mark.parametrize("decode", ["rsd", "rsd-async"])
def test_outcomes_are_the_same_batched_and_resumed(decode: str, tmp_path: Path) -> None:
    meanwhile = None if decode == "rsd-async" else "tail"
    options = {"num_trials": 2, "tasks": "2,3", "policy": "good", "num_workers": "2"}
    whole = EvalConfig(
        **options,
        decode=decode,
        delay=2,
        meanwhile=meanwhile,
        output=str(tmp_path / "whole"),  # type: ignore[arg-type]
    )
    parts = replace(whole, batch=2, output=str(tmp_path / "parts"))
    quiet = Console(quiet=True)
    evaluate(whole, backend=SCRIPTED, console=quiet)
    assert evaluate(parts, backend=SCRIPTED, console=quiet, time_limit_s=0.0).episodes == 2
    assert evaluate(parts, backend=SCRIPTED, console=quiet).episodes == 4
    alone, batched = (
        {
            key: (episode.steps, episode.chunks, episode.chunk_stats["held_steps"], episode.chunk_stats["tail_steps"])
            for key, episode in read_episodes(config.output_dir / EPISODES_FILE).items()
        }
        for config in (whole, parts)
    )
    assert alone == batched
    rows = dict(table_rows(load_runs([whole.output_dir])))
    assert "steps stood still a chunk, mean" in rows
    assert ("actions that the target's answer replaced" in rows) == (decode == "rsd-async")


def test_a_delay_is_part_of_what_a_run_is() -> None:
    plain = EvalConfig(decode="drafter-only")
    assert plain.hash == EvalConfig(decode="drafter-only", delay=0, drafter_delay=0, meanwhile=None).hash
    others = {"delay": 4}, {"drafter_delay": 4}, {"delay": 4, "meanwhile": "tail"}
    assert len({plain.hash, *(replace(plain, **other).hash for other in others)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay: expected an integer from 0 to 1000, found -1"),
        ({"delay": 4, "control_hz": 20.0}, "--control-hz, by whose clock answers come, without virtual delays"),
        ({"decode": "rsd-skip", "delay": 2, "drafter_delay": 3}, "expected --drafter-delay of at most --delay"),
        ({"meanwhile": "tail"}, "expected a --delay, --drafter-delay or --control-hz with"),
        ({"decode": "rsd-async", "delay": 2, "meanwhile": "hold"}, "expected no --meanwhile with --decode rsd-async"),
        (
            {"delay": 2, "meanwhile": "a2c2"},
            "expected --meanwhile a2c2 and --corrector together, found --meanwhile a2c2",
        ),
        ({"delay": 2, "corrector": "x"}, "expected --meanwhile a2c2 and --corrector together, found --meanwhile hold"),
        (
            {"delay": 2, "meanwhile": "a2c2", "corrector": "x", "batch": 2},
            "expected --corrector without --batch, found --batch 2",
        ),
        (
            {"delay": 2, "meanwhile": "rtc", "decode": "rsd-fused"},
            "expected --meanwhile rtc with --decode l1 of a checkpoint, without --drafter and --control-hz, found",
        ),
    ],
)
def test_delays_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        EvalConfig(**{"decode": "l1", **options})


def test_where_nobody_corrects_a_draft_it_is_refused() -> None:
    with pytest.raises(RsdError, match="expected --policy-decode other than rsd-async"):
        CollectConfig(Path("any"), policy="any", policy_decode="rsd-async")


def test_a_delay_beyond_the_chunk_is_refused_before_anything_is_started(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsd.evaluation.backend.preflight", lambda config: None)
    config = EvalConfig(policy=str(checkpoint), decode="l1", delay=7, meanwhile="tail")
    ready(config)
    for beyond in (replace(config, delay=8), replace(config, decode="rsd-async", delay=8, meanwhile=None)):
        with pytest.raises(RsdError, match=r"expected at most 7, found 8: the chunks of .* have 8 steps"):
            ready(beyond)
    ready(replace(config, delay=8, meanwhile="hold"))


def test_a_delay_beyond_a_policys_own_chunk_ends_the_run_at_once(tmp_path: Path) -> None:
    config = EvalConfig(policy="good", num_trials=2, tasks="0", delay=4, meanwhile="tail", num_workers="1")
    with pytest.raises(RsdError, match=r"^--delay: expected fewer steps than the policy's chunk has, found 4"):
        evaluate(replace(config, output=str(tmp_path)), backend=SCRIPTED, console=Console(quiet=True))
    assert not (tmp_path / EPISODES_FILE).exists()
    assert not (tmp_path / "errors.log").exists()
    again = replace(config, delay=3, output=str(tmp_path))  # what holds no episode is in nobody's way
    assert evaluate(again, backend=SCRIPTED, console=Console(quiet=True)).episodes == 2
