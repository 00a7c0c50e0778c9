"""`rsd bench latency`: milliseconds per chunk of every decoder, on real observations, in one run.

The decoders take turns on the same observation, so that whatever the machine does meanwhile hits them alike: a ratio
of two columns means something even where the milliseconds themselves wander.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rsd.decoding.strategies import DECODERS, names
from rsd.evaluation.backend import available_cores, cpu_model
from rsd.evaluation.config import DEFAULT, asked_rule
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.roofline import Ceiling, Work, measure_ceiling, work_of
from rsd.evaluation.statistics import percentiles
from rsd.policy import RsdPolicy
from rsd.sim.libero import LiberoEnv
from rsd.types import AUTO, EAGER, Observation, RsdError
from rsd.versions import versions

FORMAT = 1
STAGES = ("preprocess", "vision", "prefill", "draft", "main", "verify", "decode", "total")


@dataclass(frozen=True)
class LatencyConfig:
    """Time every decoder of a policy, the first one being the baseline."""

    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory or hub id."""
    decode: tuple[str, ...] = ("ar", "l1", "parallel", "rsd", "rsd-fused")
    """Decoders, in the order of the columns."""
    suite: str = "libero_spatial"
    """Suite whose tasks give the observations: initial state 0 of each, and two chunks later."""
    num_tasks: int = 10
    """Take the observations from the first so many tasks."""
    acceptance: str = DEFAULT
    """Rule for drafted levels, as in `rsd eval`."""
    engine: str = AUTO
    """As in `rsd eval`; eager shows more stages."""
    rounds: int = 20
    """Predictions per decoder and observation."""
    warmup: int = 5
    """Rounds thrown away first."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 0
    """Torch's threads; 0 = one per core."""
    output: Path = Path("results/scratch/latency.json")
    """Raw milliseconds and the environment, as JSON."""

    def __post_init__(self) -> None:
        for name in self.decode:
            if name not in DECODERS:
                raise RsdError(f"--decode '{name}': expected some of {', '.join(DECODERS)}")
        if gated := [name for name in self.decode if name in names(gated=True)]:
            raise RsdError(
                f"--decode {gated[0]}: when it skips depends on the episode; time it in one: rsd eval --num-workers 1"
            )
        if len(set(self.decode)) < len(self.decode):
            raise RsdError(f"--decode {' '.join(self.decode)}: expected each decoder once")
        if min(self.rounds, self.num_tasks) < 1 or self.warmup < 0 or self.threads < 0 or not self.decode:
            expected = "rounds >= 1, num_tasks >= 1, warmup >= 0, threads >= 0, a decoder"
            raise RsdError(f"latency: expected {expected}; found {self}")


@dataclass(frozen=True)
class LatencyRecord:
    """milliseconds: decoder -> stage it has -> one number per prediction, in the order of time.

    ceiling: FLOP/s and bytes/s of this device; work: decoder -> FLOPs and bytes of weights read (see `roofline`)."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    milliseconds: dict[str, dict[str, list[float]]]
    ceiling: dict[str, float] = field(default_factory=dict)
    work: dict[str, dict[str, float]] = field(default_factory=dict)

    def ideal_ms(self) -> dict[str, float]:
        """The roofline's milliseconds by decoder; empty if it was not measured."""
        return {name: Work(**work).ideal_ms(Ceiling(**self.ceiling)) for name, work in self.work.items()}


def observations(suite: str, num_tasks: int, policy: RsdPolicy) -> list[Observation]:
    """Two real observations of each of the suite's first tasks: at the start, and two chunks into the motion."""
    from rsd.sim.suites import suite_tasks

    found = []
    for task in suite_tasks(suite)[:num_tasks]:
        env = LiberoEnv(suite, task.task_id, policy.image_size)
        try:
            env.reset(options={"init_state": 0})
            found.append(env.observation())
            for _ in range(2):
                env.step_chunk(policy.predict(env.observation()).actions)
            found.append(env.observation())
        finally:
            env.close()
    return found


def measure_latency(config: LatencyConfig) -> LatencyRecord:
    """Run the measurement, print the table, write the JSON."""
    torch.set_num_threads(config.threads or available_cores())
    options: dict[str, Any] = {"device": config.device, "engine": config.engine}
    options["acceptance"] = asked_rule(config.acceptance)
    policies = {name: RsdPolicy.from_pretrained(config.policy, decode=name, **options) for name in config.decode}
    first = next(iter(policies.values()))
    seen = observations(config.suite, config.num_tasks, first)
    ceiling = measure_ceiling(first.device)
    work = {}
    for name, policy in policies.items():
        plain = without_graphs(policy)
        plain.predict(seen[0])  # encodes the instruction, fills the memory
        work[name] = work_of(partial(plain.predict, seen[0]), plain.model)
    start = time.perf_counter()
    times = take_turns(policies, seen, config.warmup, config.rounds)
    machine = {
        "cpu": cpu_model(),
        "cores": str(available_cores()),
        "torch_threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else "cpu",
        "engine": first.engine,
        "wall_s": f"{time.perf_counter() - start:.1f}",
    }
    settings = {**asdict(config), "output": str(config.output)}
    counted = {name: asdict(one) for name, one in work.items()}
    record = LatencyRecord(FORMAT, settings, versions(), machine, times, asdict(ceiling), counted)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, encode_record(record) + "\n")
    Console().print(latency_table(record))
    return record


def without_graphs(policy: RsdPolicy) -> RsdPolicy:
    """The same models, every operation run: a replayed graph shows none to count."""
    same: dict[str, Any] = {"decode": policy.decode, "acceptance": policy.acceptance or None}
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, engine=EAGER, **same)


def take_turns(
    policies: Mapping[str, RsdPolicy], seen: Sequence[Observation], warmup: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by policy and stage, one number per prediction; every policy comes first in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in policies}
    order = list(policies)
    for turn in range(warmup + rounds):
        for observation in seen:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                spent = policies[name].predict(observation).stats.latency_ms
                policies[name].verify()
                if turn >= warmup:
                    for stage, milliseconds in spent.items():
                        times[name].setdefault(stage, []).append(round(milliseconds, 4))
    return times


def latency_table(record: LatencyRecord) -> Table:
    """p50 / p95 by stage and decoder, and the ratio of the first decoder's p50 to each other's."""
    table = Table(title=f"milliseconds per chunk, p50 / p95, {record.machine['device']}", title_justify="left")
    table.add_column("stage")
    for name in record.milliseconds:
        table.add_column(name, justify="right")
    for stage in STAGES:
        cells = []
        for by_stage in record.milliseconds.values():
            present = by_stage.get(stage)
            cells.append("{:.1f} / {:.1f}".format(*percentiles(present)) if present else "")
        if any(cells):
            table.add_row(stage, *cells)
    totals = [percentiles(by_stage["total"])[0] for by_stage in record.milliseconds.values()]
    if ideals := record.ideal_ms():
        table.add_row("roofline", *(f"{ideals[name]:.2f}" for name in record.milliseconds))
        shares = (ideals[name] / total for name, total in zip(record.milliseconds, totals, strict=True))
        table.add_row("share of it reached", *(f"{share:.0%}" for share in shares))
    table.add_row("speed-up of p50", "", *(f"{totals[0] / total:.2f}x" for total in totals[1:]))
    return table
