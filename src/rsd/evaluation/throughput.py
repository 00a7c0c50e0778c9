"""`rsd bench eval`: episodes per minute of `rsd eval`, and of a plain loop over the same episodes in the same run.

The plain loop rebuilds the model at every reset and draws both cameras at every step, as the published evaluation
scripts do. It gets what it can have without changing that: one process per core, scenes kept for all their episodes.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsd.evaluation.backend import LIBERO, Backend
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, EpisodeKey, EpisodeResult, read_episodes, write_atomically
from rsd.evaluation.rollout import Environment
from rsd.types import RsdError

FORMAT = 1


@dataclass(frozen=True)
class ThroughputConfig:
    """Run the same episodes by a plain loop and by `rsd eval`; compare time and outcome, episode by episode."""

    task_suite: str = "libero_spatial"
    """LIBERO suite."""
    tasks: str = "0,1,6,8"
    """Task numbers, or all."""
    num_trials: int = 1
    """Episodes per task."""
    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory or hub id."""
    decode: str = "rsd-fused"
    """Decoding strategy."""
    device: str = "cpu"
    """Where the policy runs."""
    num_workers: str = "auto"
    """Worker processes of both; auto takes one per core."""
    batch: int = 0
    """As in `rsd eval`, for `rsd eval` alone."""
    output: Path = Path("results/scratch/throughput.json")
    """The numbers, the machine and every episode's outcome, as JSON."""


@dataclass(frozen=True)
class Measured:
    """wall_s: from the command to the last result, processes and scenes included; episode_s: inside the episodes."""

    wall_s: float
    episode_s: float
    workers: int
    episodes: int
    steps: int

    @property
    def per_minute(self) -> float:
        return 60 * self.episodes / self.wall_s

    @property
    def steady_per_minute(self) -> float:
        """Once everything is started: what a long evaluation approaches."""
        return 60 * self.episodes * self.workers / self.episode_s


def plain_env(suite: str, task_id: int, image_size: int) -> Environment:
    from rsd.evaluation.failures import WatchedLibero

    return WatchedLibero(suite, task_id, image_size=image_size, fast=False)


PLAIN = replace(LIBERO, make_env=plain_env)


def measure_throughput(config: ThroughputConfig, fast: Backend = LIBERO, plain: Backend = PLAIN) -> dict[str, Any]:
    """Run both, print the table, write the JSON. Raises RsdError where an episode ended in an error."""
    shared = {k: v for k, v in asdict(config).items() if k not in ("output", "batch")}
    console = Console(stderr=True)
    measured: dict[str, Measured] = {}
    outcomes: dict[str, dict[EpisodeKey, EpisodeResult]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, backend, batch in (("plain loop", plain, 0), ("rsd eval", fast, config.batch)):
            run = EvalConfig(**shared, batch=batch, output=str(Path(folder) / name))
            start = time.perf_counter()
            summary = evaluate(run, backend=backend, console=console)
            wall = time.perf_counter() - start
            if summary.errors:
                raise RsdError(f"{name}: {summary.errors} of {summary.episodes} episodes ended in an error, see above")
            outcomes[name] = read_episodes(run.output_dir / EPISODES_FILE)
            steps = sum(episode.steps for episode in outcomes[name].values())
            measured[name] = Measured(wall, summary.episode_time_s, summary.num_workers, summary.episodes, steps)
            versions = summary.versions
    pairs = [(episode, outcomes["rsd eval"][key]) for key, episode in outcomes["plain loop"].items()]
    same = {
        "episodes": len(pairs),
        "success": sum(a.success == b.success for a, b in pairs),
        "steps": sum(a.steps == b.steps for a, b in pairs),
    }
    record = {
        "format": FORMAT,
        "config": {**asdict(config), "output": str(config.output)},
        "versions": versions,
        "measured": {name: asdict(value) for name, value in measured.items()},
        "same": same,
        "episodes": {
            name: [[*key, episode.success, episode.steps] for key, episode in found.items()]
            for name, found in outcomes.items()
        },
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, json.dumps(record, indent=1) + "\n")
    Console().print(throughput_table(measured, same))
    return record


def throughput_table(measured: dict[str, Measured], same: dict[str, int]) -> Table:
    plain, fast = measured["plain loop"], measured["rsd eval"]
    table = Table(title=f"{fast.episodes} episodes, {plain.workers} and {fast.workers} workers", title_justify="left")
    for column in ("", "plain loop", "rsd eval", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        ("episodes per minute, start-up included", plain.per_minute, fast.per_minute),
        ("episodes per minute, running", plain.steady_per_minute, fast.steady_per_minute),
        ("control steps per second, running", steps_per_second(plain), steps_per_second(fast)),
    ]
    for label, before, after in rows:
        table.add_row(label, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}x")
    table.add_row("wall time", f"{plain.wall_s:.1f} s", f"{fast.wall_s:.1f} s", "")
    table.add_row("same success, same steps", "", f"{same['success']}, {same['steps']} of {same['episodes']}", "")
    return table


def steps_per_second(measured: Measured) -> float:
    return measured.steps * measured.workers / measured.episode_s
