"""`python -m studies.expert`: how many tasks of whole suites the scripted expert solves on random placements that no
demonstration uses, and why it fails where it does. Needs no renderer.

Every finished episode is a line of OUT's neighbour `.jsonl` at once, so a count that was cut off goes on with the same
command; OUT itself is the summary of those lines.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import numpy as np

from rsd.checks import Checked, Rules, above, between, from_json
from rsd.collection.workers import Workers, worker_pool
from rsd.evaluation.config import EvalConfig, Moving
from rsd.expert.expert import ExpertResult, run
from rsd.expert.failures import failure_class
from rsd.expert.goals import goals_of
from rsd.expert.noise import ActionNoise, NoiseConfig
from rsd.output import writing
from rsd.sim.libero import LiberoEnv, simulator_versions
from rsd.sim.motion import Motion
from rsd.sim.suites import MAIN_SUITES, scene_file, step_limit, suite_task, suite_tasks
from rsd.types import RsdError

FIRST_SEED = 2**31  # demonstrations draw their placement seeds below
BATCH = 5  # placements that share a started simulator
GOOD = 0.9  # share of a task's placements that makes it one that the expert solves
SHOW_EVERY = 5.0  # s


class TooLong(BaseException):
    """Of BaseException, so that no handler in between takes it for its own."""


@dataclass(frozen=True)
class CountExpertConfig(Checked):
    """Run the scripted expert over whole suites; count what it solves and why it fails."""

    out: Path = Path("results/expert.json")
    """Summary as JSON. Beside it, with the ending jsonl, one line an episode: what is there is not run again."""
    suites: tuple[str, ...] = MAIN_SUITES
    """Suites, all their tasks."""
    tasks: tuple[Annotated[int, between(0, 1000)], ...] = ()
    """Only these task ids of each suite; empty = all."""
    num_placements: Annotated[int, between(1, 100_000)] = 20
    """Random placements per task."""
    num_workers: Workers = 1
    """Processes."""
    episode_seconds: Annotated[float, between(1.0, 3600.0)] = 60.0
    """An episode that takes longer counts as failed."""
    motion: Moving = "none"
    """The scene moves, as of `rsd eval`."""
    motion_speed: Annotated[float, above(0, 0.2)] = 0.02
    """The same, m/s."""
    noisy: bool = False
    """Disturb every episode, its level drawn between 0 and the highest that demonstrations have."""
    minutes: Annotated[float, between(0.1, 100_000.0)] = 100_000.0
    """After so long no further episode begins; the same command goes on later."""

    def rules(self) -> Rules:
        yield self.out.suffix == ".json", "--out to be a file whose name ends in .json", self.out
        yield bool(self.suites), "--suites to be at least one suite", "none"

    @property
    def kind(self) -> str:
        """What sets its episodes apart from others of the same placements."""
        moving = "" if self.motion == "none" else f"{self.motion} at {self.motion_speed:g} m/s"
        return ", ".join(filter(None, ["noisy" * self.noisy, moving]))


@dataclass(frozen=True)
class Episode(Checked):
    """One placement of a task. steps: until success, or until it gave up; attempts: grasps; seconds: with the reset;
    why: what kept it from success; kind: see `CountExpertConfig`."""

    suite: str
    task: int
    seed: int
    success: bool
    steps: int
    attempts: int
    seconds: float
    why: str
    kind: str = ""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong inside the body after so long. Only in a process's main thread."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run_batch(suite: str, task: int, seeds: tuple[int, ...], config: CountExpertConfig, until: float) -> list[Episode]:
    """One episode a placement seed; those that have not begun by `until` (time.time()) are left out."""
    episodes, env, seconds = list[Episode](), None, config.episode_seconds
    motion = None if config.motion == "none" else Motion(config.motion, config.motion_speed, EvalConfig.seed)
    for seed in seeds:
        if time.time() > until:
            break
        result, why, started = ExpertResult(False, 0, 0), "", time.perf_counter()
        rng = np.random.default_rng(seed)
        noise = ActionNoise(NoiseConfig(), float(rng.random()), rng) if config.noisy else None
        try:
            env = env or LiberoEnv(suite, task, 64, cameras=False)
            env.motion = motion
            started = time.perf_counter()
            with time_limit(seconds):
                env.reset(options={"placement_seed": seed})
                result = run(env, rng=rng, noise=noise, tail_steps=0)
                why = "" if result.success else failure_class(env, result.steps)
        except TooLong:
            why, env = f"took longer than {seconds:g} s", None  # what it was in the middle of is unknown
        except Exception as error:  # the expert's own mistakes are failures like any other
            why = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        took = round(time.perf_counter() - started, 2)
        episodes.append(Episode(suite, task, seed, **asdict(result), seconds=took, why=why, kind=config.kind))
    if env is not None:
        env.close()
    return episodes


def refusal(suite: str, task: int) -> str:
    """Why the expert does not even begin with a task; empty where it does."""
    scene = scene_file(suite, task)
    wanted = " and ".join(" ".join(words) for words in scene.goal)
    return "" if goals_of(scene.goal, scene.start) else f"beyond the expert: {wanted}"


def read_episodes(path: Path, kind: str = "") -> list[Episode]:
    """The finished episodes of an earlier run; a last line that was cut off does not count. Raises RsdError for a file
    of something else, and for episodes of another kind."""
    episodes = list[Episode]()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else (), 1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise RsdError(f"{path} line {number}: expected an episode; remove the file or name another --out")
        episodes.append(from_json(Episode, content, f"{path} line {number}"))
        if (found := episodes[-1].kind) != kind:
            expected = f"episodes that are {kind or 'plain'}, found {found or 'plain'} ones"
            raise RsdError(f"{path} line {number}: expected {expected}; name another --out")
    return episodes


def summary(episodes: Sequence[Episode], placements: int) -> dict[str, Any]:
    """By suite and task: solved, n, mean steps and attempts, seconds, how often it failed for which reason."""
    suites = dict[str, Any]()
    for suite in dict.fromkeys(each.suite for each in episodes):
        rows = {
            task.task_id: task_summary(task.language, found)
            for task in suite_tasks(suite)
            if (found := [each for each in episodes if (each.suite, each.task) == (suite, task.task_id)])
        }
        suites[suite] = {
            "tasks_at_90_percent": sum(row["solved"] >= GOOD * row["n"] for row in rows.values()),
            "of_tasks": len(rows),
            "solved": sum(row["solved"] for row in rows.values()),
            "n": sum(row["n"] for row in rows.values()),
            "max_steps": step_limit(suite),
            "tasks": rows,
        }
    total = {key: sum(s[key] for s in suites.values()) for key in ("tasks_at_90_percent", "of_tasks", "solved", "n")}
    return {
        "what": "scripted expert on random placements, from privileged state",
        "kind": episodes[0].kind if episodes else "",
        "placements_per_task": placements,
        "first_placement_seed": FIRST_SEED,
        "versions": simulator_versions(),
        "total": total,
        "suites": suites,
    }


def task_summary(instruction: str, episodes: Sequence[Episode]) -> dict[str, Any]:
    """Of one task's episodes."""
    solved = [each for each in episodes if each.success]
    run_at_all = [each.seconds for each in episodes if each.seconds]
    return {
        "instruction": instruction,
        "solved": len(solved),
        "n": len(episodes),
        "mean_steps": round(sum(each.steps for each in solved) / len(solved), 1) if solved else None,
        "mean_attempts": round(sum(each.attempts for each in episodes) / len(episodes), 3),
        "mean_seconds": round(sum(run_at_all) / len(run_at_all), 2) if run_at_all else None,
        "failures": dict(Counter(each.why for each in episodes if not each.success).most_common()),
        "failed_seeds": [each.seed for each in episodes if not each.success and each.seconds],
    }


def count_expert(config: CountExpertConfig) -> None:
    """Runs what is missing; writes the summary every few seconds, at the end, and prints it."""
    until, lines_file = time.time() + 60.0 * config.minutes, config.out.with_suffix(".jsonl")
    episodes = read_episodes(lines_file, config.kind)
    done = {(each.suite, each.task, each.seed) for each in episodes}
    batches = list[tuple[str, int, tuple[int, ...]]]()
    for suite in config.suites:
        known = [task.task_id for task in suite_tasks(suite)]
        for task in config.tasks or known:
            suite_task(suite, task)  # refuses an unknown one
            seeds = range(FIRST_SEED, FIRST_SEED + config.num_placements)
            missing = tuple(seed for seed in seeds if (suite, task, seed) not in done)
            if why := refusal(suite, task):
                episodes += [Episode(suite, task, seed, False, 0, 0, 0.0, why, config.kind) for seed in missing]
                continue  # not noted: a later expert may do it
            batches += [(suite, task, missing[i : i + BATCH]) for i in range(0, len(missing), BATCH)]
    batches.sort(key=lambda batch: -step_limit(batch[0]))  # long episodes first, so that no worker ends with them
    with writing(config.out):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        cut_off_line(lines_file)
        with lines_file.open("a", encoding="utf-8") as lines, worker_pool(config.num_workers) as pool:
            jobs: set[Future[list[Episode]]] = {pool.submit(run_batch, *batch, config, until) for batch in batches}
            while jobs:
                ended, jobs = wait(jobs, timeout=SHOW_EVERY)
                for job in ended:
                    episodes += noted(job.result(), lines)
                write_summary(config, episodes)
                print(f"{sum(e.success for e in episodes)} of {len(episodes)} episodes", file=sys.stderr)
    found = write_summary(config, episodes)
    for suite, row in found["suites"].items():
        good = f"{row['tasks_at_90_percent']} of {row['of_tasks']} tasks at 90 %"
        print(f"{suite}: {row['solved']} of {row['n']} episodes, {good}")


def noted(episodes: list[Episode], lines: TextIO) -> list[Episode]:
    """The same, now also on disk."""
    lines.writelines(json.dumps(asdict(each)) + "\n" for each in episodes)
    lines.flush()
    return episodes


def cut_off_line(path: Path) -> None:
    """Removes an unfinished last line, after which nothing could be added."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def write_summary(config: CountExpertConfig, episodes: list[Episode]) -> dict[str, Any]:
    """Of the episodes so far."""
    found = summary(sorted(episodes, key=lambda each: (each.suite, each.task, each.seed)), config.num_placements)
    unfinished = config.out.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(config.out)
    return found


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("expert")
