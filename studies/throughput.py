"""`python -m studies.throughput`: episodes per minute of `rsd eval`, and of a plain loop over the same episodes in the
same run. 
The plain loop rebuilds the model at every reset and draws both cameras at every step, as the published evaluation
scripts do. It gets what it can have without changing that: one process per core, scenes kept for all their episodes,
the same decoder with the same CUDA graphs.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rsd.evaluation.backend import LIBERO, Backend, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, EpisodeKey, EpisodeResult, read_episodes, write_atomically
from rsd.evaluation.tables import plural, print_table
from rsd.types import BEST, RsdError

if TYPE_CHECKING:  # start-up time: MuJoCo
    from rsd.sim.failures import WatchedLibero

FORMAT = 2
FAST, PLAIN_LOOP = "rsd eval", "plain loop"


@dataclass(frozen=True)
class ThroughputConfig:
    """Run the same episodes by `rsd eval` and by a plain loop; compare time and outcome, episode by episode."""

    task_suite: str = "libero_spatial"
    """LIBERO suite."""
    tasks: str = "0,1,6,8"
    """Task numbers, or all."""
    num_trials: int = 1
    """Episodes per task."""
    init_states: str = "0"
    """As in `rsd eval`: the first initial state, or a list."""
    policy: str = "checkpoints/libero"
    """Checkpoint directory or hub id."""
    decode: str = BEST
    """Decoding strategy, as in `rsd eval`."""
    device: str = "cpu"
    """Where the policy runs."""
    num_workers: str = "auto"
    """Worker processes of both; auto takes one per core."""
    batch: int = 0
    """As in `rsd eval`, for `rsd eval` alone: the plain loop has a policy in every process."""
    batch_wait_ms: float = 4.0
    """As in `rsd eval`."""
    plain_limit_s: float = 0.0
    """After so many seconds the plain loop begins no further episode; its time for them is extrapolated. 0: none."""
    output: Path = Path("runs/bench/throughput.json")
    """The numbers, the machine and every episode's outcome, as JSON; written after either side."""

    def __post_init__(self) -> None:
        if self.plain_limit_s < 0:
            raise RsdError(f"--plain-limit-s {self.plain_limit_s:g}: expected seconds, or 0 for no limit")


@dataclass(frozen=True)
class Measured:
    """wall_s: from the command to the last result, processes and scenes included; episode_s: inside the episodes;
    cpu_s: processor time of all processes, which other work on the machine moves least."""

    wall_s: float
    episode_s: float
    cpu_s: float
    workers: int
    episodes: int
    steps: int

    def wall_for(self, steps: int) -> float:
        """Wall time had it gone on to so many steps in all, at the rate of the episodes it has done."""
        return self.wall_s + (steps - self.steps) * self.episode_s / self.steps / self.workers

    @property
    def steps_per_second(self) -> float:
        """Control steps of all workers once everything is started: what a long evaluation approaches."""
        return self.steps * self.workers / self.episode_s


def plain_env(suite: str, task_id: int, image_size: int) -> WatchedLibero:
    from rsd.sim.failures import WatchedLibero

    return WatchedLibero(suite, task_id, image_size=image_size, fast=False)


PLAIN = replace(LIBERO, make_env=plain_env)


def measure_throughput(config: ThroughputConfig, fast: Backend = LIBERO, plain: Backend = PLAIN) -> dict[str, Any]:
    """Run both, print the table, write the JSON. Raises RsdError where an episode ended in an error.

    `rsd eval` goes first: what the operating system then has read already is in favour of the plain loop.
    """
    own = ("output", "batch", "batch_wait_ms", "plain_limit_s")
    shared = {name: value for name, value in asdict(config).items() if name not in own}
    run, chosen = settle(EvalConfig(**shared, batch=config.batch, batch_wait_ms=config.batch_wait_ms), fast)
    config = replace(config, decode=run.decode)
    console = Console(stderr=True)
    if chosen:
        console.print(chosen, soft_wrap=True, highlight=False)
    record: dict[str, Any] = {"format": FORMAT, "config": {**asdict(config), "output": str(config.output)}}
    measured: dict[str, Measured] = {}
    outcomes: dict[str, dict[EpisodeKey, EpisodeResult]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = ((FAST, fast, run, math.inf), (PLAIN_LOOP, plain, replace(run, batch=0), config.plain_limit_s))
        for name, backend, side, limit in sides:
            console.print(f"{name}:", style="bold", highlight=False)
            side = replace(side, output=str(Path(folder) / name))
            start, cpu = time.perf_counter(), cpu_seconds()
            summary = evaluate(side, backend=backend, console=console, time_limit_s=limit or math.inf)
            wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            if summary.errors:
                of = plural(summary.episodes, "episode")
                raise RsdError(f"{name}: {summary.errors} of {of} ended in an error, see above")
            found = outcomes[name] = read_episodes(side.output_dir / EPISODES_FILE)
            steps = sum(episode.steps for episode in found.values())
            measured[name] = Measured(wall, summary.episode_time_s, cpu, summary.num_workers, len(found), steps)
            record["versions"] = summary.versions
            record["measured"] = {name: asdict(value) for name, value in measured.items()}
            record["episodes"] = {
                name: [[*key, episode.success, episode.steps] for key, episode in found.items()]
                for name, found in outcomes.items()
            }
            save(config.output, record)
    record["same"] = agreement(outcomes[FAST], outcomes[PLAIN_LOOP])
    record["ratios"] = ratios(measured)
    save(config.output, record)
    print_throughput(Console(), measured, record["ratios"], record["same"])
    return record


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def save(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def agreement(
    fast: Mapping[EpisodeKey, EpisodeResult], plain: Mapping[EpisodeKey, EpisodeResult]
) -> dict[str, Any]:
    """Over the episodes that both ran: how many ended alike, how many at the same step, and which did not."""
    common = [key for key in fast if key in plain]
    return {
        "episodes": len(common),
        "success": sum(fast[key].success == plain[key].success for key in common),
        "steps": sum(fast[key].steps == plain[key].steps for key in common),
        "different": [list(key) for key in common if fast[key].success != plain[key].success],
    }


def ratios(measured: Mapping[str, Measured]) -> dict[str, float]:
    """How many times as fast `rsd eval` is. All but `wall` are per control step, whatever episodes were run."""
    fast, plain = measured[FAST], measured[PLAIN_LOOP]
    return {
        "wall": plain.wall_for(fast.steps) / fast.wall_s,
        "running": fast.steps_per_second / plain.steps_per_second,
        "cpu": plain.cpu_s / plain.steps / (fast.cpu_s / fast.steps),
    }


def print_throughput(
    console: Console, measured: Mapping[str, Measured], ratios: Mapping[str, float], same: Mapping[str, Any]
) -> None:
    plain, fast = measured[PLAIN_LOOP], measured[FAST]
    walls = plain.wall_for(fast.steps), fast.wall_s
    rates = [60 * fast.episodes / wall for wall in walls]
    running = [60 * side.steps_per_second * fast.episodes / fast.steps for side in (plain, fast)]
    processor = [side.cpu_s * fast.steps / side.steps / fast.episodes for side in (plain, fast)]
    rows = [
        ["episodes per minute, start-up included", *(f"{rate:.2f}" for rate in rates), f"{ratios['wall']:.2f}x"],
        ["episodes per minute, running", *(f"{rate:.2f}" for rate in running), f"{ratios['running']:.2f}x"],
        ["processor seconds per episode", *(f"{value:.2f}" for value in processor), f"{ratios['cpu']:.2f}x"],
        ["wall time", *(f"{wall:.1f} s" for wall in walls), ""],
    ]
    if plain.episodes < fast.episodes:
        done = f"{plain.episodes} in {plain.wall_s:.1f} s"
        rows.append(["episodes run (the rest extrapolated)", done, f"{fast.episodes}", ""])
    rows.append(["same success, same steps", "", f"{same['success']}, {same['steps']} of {same['episodes']}", ""])
    if same["different"]:
        other = ", ".join(f"{task}.{state}" for _, task, state in same["different"])
        rows.append(["task.state with another success", "", other, ""])
    workers = f"{plain.workers} and {plural(fast.workers, 'worker')}"
    print_table(console, f"{plural(fast.episodes, 'episode')}, {workers}", ["", PLAIN_LOOP, FAST, "ratio"], rows)


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("throughput")
