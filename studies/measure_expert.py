"""How often the scripted expert succeeds, on placements that no demonstration uses.

Run it with `python -m studies.measure_expert --out results/expert/libero_spatial.json`.
"""

from __future__ import annotations

import json
import shlex
import sys
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import binomtest

from rsd.collection.workers import progress_bar, worker_environment, worker_pool
from rsd.expert import expert
from rsd.expert.goals import solvable_tasks, swapped_goals, task_goals
from rsd.expert.noise import ActionNoise, NoiseConfig
from rsd.output import refuse_to_replace, writing
from rsd.sim.libero import simulator_versions
from rsd.sim.suites import step_limit, suite_task, suite_tasks, swapped_instruction
from rsd.types import RsdError

FIRST_SEED = 2**31  # demonstrations draw their placement seeds below
MOST_PLACEMENTS = 100_000
BATCH = 10
UNRECORDED = ("out", "num_workers", "overwrite")


@dataclass(frozen=True)
class MeasureExpertConfig:
    """Which episodes are run."""

    out: Path
    """JSON file for the result."""
    suite: str = "libero_spatial"
    """Suite."""
    tasks: tuple[int, ...] = ()
    """Task ids; empty = all that the expert can do."""
    num_placements: int = 50
    """Random placements per task."""
    noisy: bool = False
    """Disturb every episode, its level drawn between 0 and the highest that demonstrations have."""
    swapped: bool = False
    """Move the other bowl of the scene instead of the task's own."""
    num_workers: int = 1
    """Processes."""
    overwrite: bool = False
    """Replace the result that is there."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_placements <= MOST_PLACEMENTS or self.num_workers < 1:
            expected = f"--num-placements of 1 to {MOST_PLACEMENTS} and --num-workers of at least 1"
            raise RsdError(f"expected {expected}, found {self.num_placements} and {self.num_workers}")


def run_batch(config: MeasureExpertConfig, task_id: int, seeds: range) -> list[dict[str, Any]]:
    """One record per placement seed: seed, success, steps, attempts, and why the expert refused it if it did."""
    env = worker_environment(config.suite, task_id, 64, cameras=False)
    goals = swapped_goals(config.suite, task_id) if config.swapped else None
    records = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        try:
            env.reset(options={"placement_seed": seed})
            noise = ActionNoise(NoiseConfig(), float(rng.random()), rng) if config.noisy else None
            found = asdict(expert.run(env, goals, rng=rng, noise=noise, tail_steps=0))
        except RsdError as error:  # a placement that the expert refuses is one that it fails on
            found = {"success": False, "steps": 0, "attempts": 0, "error": str(error)}
        records.append({"placement_seed": seed, **found})
    return records


def has_swapped_instruction(suite: str, task_id: int) -> bool:
    (goal, *_), other = task_goals(suite, task_id), swapped_goals(suite, task_id)
    return other is not None and swapped_instruction(suite, task_id, goal.target, other[0].target) is not None


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """n, successes, rate with its Wilson 95 % interval, mean steps of the successes, mean grasp attempts."""
    wins = [record for record in records if record["success"]]
    interval = binomtest(len(wins), len(records)).proportion_ci(method="wilson")
    return {
        "n": len(records),
        "successes": len(wins),
        "rate": round(len(wins) / len(records), 4),
        "wilson_95": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "mean_steps": round(float(np.mean([record["steps"] for record in wins])), 1) if wins else None,
        "mean_attempts": round(float(np.mean([record["attempts"] for record in records])), 3),
        "failed_placement_seeds": [record["placement_seed"] for record in records if not record["success"]],
    }


def measure_expert(config: MeasureExpertConfig) -> dict[str, Any]:
    """Runs the expert and writes the result; returns it."""
    refuse_to_replace(config.out, config.overwrite)
    tasks = config.tasks or solvable_tasks(config.suite)
    for task in tasks:
        task_goals(config.suite, task)
    if config.swapped:
        tasks = tuple(task for task in tasks if has_swapped_instruction(config.suite, task))
    if not tasks:
        raise RsdError(f"{config.suite}: found no task" + " with another object to ask for" * config.swapped)
    last = FIRST_SEED + config.num_placements
    starts = range(FIRST_SEED, last, BATCH)
    records: dict[int, list[dict[str, Any]]] = {task: [] for task in tasks}
    with worker_pool(config.num_workers) as pool, progress_bar() as bar:
        shown = bar.add_task("episodes", total=config.num_placements * len(tasks))
        jobs = {
            pool.submit(run_batch, config, task, range(start, min(start + BATCH, last))): task
            for task in tasks
            for start in starts
        }
        for job in as_completed(jobs):
            records[jobs[job]] += job.result()
            bar.advance(shown, len(job.result()))
    for task in tasks:
        records[task].sort(key=lambda record: record["placement_seed"])
    names = {task: suite_task(config.suite, task).name for task in tasks}
    result = {
        "what": "scripted expert on random placements, privileged state",
        "settings": {key: value for key, value in asdict(config).items() if key not in UNRECORDED},
        "noise": asdict(NoiseConfig()) if config.noisy else None,
        "max_steps": step_limit(config.suite),
        "left_out": [t.name for t in suite_tasks(config.suite) if t.task_id not in solvable_tasks(config.suite)],
        "total": summary([record for task in tasks for record in records[task]]),
        "tasks": {names[task]: {"task_id": task, **summary(records[task])} for task in tasks},
        "episodes": {names[task]: records[task] for task in tasks},
        "versions": simulator_versions(),
        "command": shlex.join(["python", "-m", "studies.measure_expert", *sys.argv[1:]]),
    }
    with writing(config.out):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    measured = measure_expert(tyro.cli(MeasureExpertConfig))
    for name, row in measured["tasks"].items():
        print(f"{row['successes']}/{row['n']} {row['mean_steps']} steps  {name}")
    print(measured["total"])
