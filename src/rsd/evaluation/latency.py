"""`rsd bench latency`: milliseconds per chunk of every decoder, on real observations, in one run.

The decoders take turns on the same observation, so that whatever the machine does meanwhile hits them alike: a ratio
of two columns means something even where the milliseconds themselves wander.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console

from rsd.devices import cpu_model
from rsd.evaluation.acceptance import Acceptance, acceptance, acceptance_rows
from rsd.evaluation.backend import available_cores
from rsd.evaluation.bench_config import LatencyConfig
from rsd.evaluation.config import asked_rule
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.rollout import sum_per_level
from rsd.evaluation.roofline import Ceiling, Work, measure_ceiling, work_of
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import ABSENT, print_table
from rsd.output import refuse_to_replace, shown, terminal
from rsd.policy import RsdPolicy
from rsd.sim.libero import LiberoEnv
from rsd.sim.suites import SuiteTask, suite_tasks
from rsd.types import EAGER, VERIFY_PENDING, ChunkStats, Observation, RsdError
from rsd.versions import versions

FORMAT = 2  # in 1 the work of a decoder with a pending verification was that of both, its time that of the chunk alone
MARK = b'"milliseconds": {'  # in every record of a measurement
STAGES = ("preprocess", "vision", "prefill", "draft", "target", "verify", "decode", "total", VERIFY_PENDING)


@dataclass(frozen=True)
class LatencyRecord:
    """milliseconds: decoder -> stage it has -> one number per prediction, in the order of time.

    ceiling: FLOP/s and bytes/s of this device; work: decoder -> FLOPs and bytes of weights read (see `roofline`), of
    what `total` times: from the observation to the chunk, without what follows up.
    acceptance: decoder that drafts -> `Acceptance`; in records before it was kept none."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    milliseconds: dict[str, dict[str, list[float]]]
    ceiling: dict[str, float] = field(default_factory=dict)
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    acceptance: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ideal_ms(self) -> dict[str, float]:
        """The roofline's milliseconds of `total` by decoder; without those of which it was not measured."""
        return {
            name: Work(**work).ideal_ms(Ceiling(**self.ceiling))
            for name, work in self.work.items()
            if self.format > 1 or VERIFY_PENDING not in self.milliseconds[name]
        }


def first_tasks(suite: str, num_tasks: int) -> list[SuiteTask]:
    """So many tasks of a suite; raises RsdError where it has fewer, or is none."""
    tasks = suite_tasks(suite)
    if num_tasks > len(tasks):
        raise RsdError(f"--num-tasks {num_tasks}: expected 1 to {len(tasks)}, as {suite} has no more")
    return tasks[:num_tasks]


def observations(suite: str, num_tasks: int, policy: RsdPolicy) -> list[Observation]:
    """Two real observations of each of the suite's first tasks: at the start, and two chunks into the motion."""
    found, tasks = [], first_tasks(suite, num_tasks)
    for task in shown(tasks, "tasks observed", num_tasks):
        env = LiberoEnv(suite, task.task_id, policy.image_size)
        try:
            env.reset(options={"init_state": 0})
            found.append(env.observation())
            for _ in range(2):
                env.step_chunk(policy.predict(env.observation()).executed)
            found.append(env.observation())
        finally:
            env.close()
    return found


def measure_latency(config: LatencyConfig) -> LatencyRecord:
    """Run the measurement, print the table, write the JSON."""
    refuse_to_replace(config.output, config.overwrite, MARK)
    first_tasks(config.suite, config.num_tasks)  # before minutes of loading
    torch.set_num_threads(config.threads or available_cores())
    options: dict[str, Any] = {"device": config.device, "engine": config.engine}
    options |= {"acceptance": asked_rule(config.acceptance), "timed_only": True}
    decoders = shown(config.decode, "decoders loaded", len(config.decode))
    policies = {name: RsdPolicy.from_pretrained(config.policy, decode=name, **options) for name in decoders}
    first = next(iter(policies.values()))
    seen = observations(config.suite, config.num_tasks, first)
    ceiling = measure_ceiling(first.device)
    work = {name: work_to_the_chunk(policy, seen[0]) for name, policy in policies.items()}
    start = time.perf_counter()
    drafted: dict[str, list[ChunkStats]] = {}
    times = take_turns(policies, seen, config.warmup, config.rounds, drafted)
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
    found = {name: asdict(acceptance_of(policies[name].acceptance, chunks)) for name, chunks in drafted.items()}
    record = LatencyRecord(FORMAT, settings, versions(), machine, times, asdict(ceiling), counted, found)
    write_atomically(config.output, encode_record(record) + "\n")
    print_latencies(terminal(), record)
    print(f"results: {config.output}")
    return record


def work_to_the_chunk(policy: RsdPolicy, observation: Observation) -> Work:
    """What `total` times: a prediction alone, without the pending verification of the one before or its own."""
    # every operation run: a replayed graph shows none to count
    same: dict[str, Any] = {"decode": policy.decode, "acceptance": policy.acceptance or None, "timed_only": True}
    plain = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, engine=EAGER, **same)
    plain.predict(observation)  # encodes the instruction, fills the memory
    plain.verify()
    return work_of(partial(plain.predict, observation), plain.model)


def take_turns(
    policies: Mapping[str, RsdPolicy],
    seen: Sequence[Observation],
    warmup: int,
    rounds: int,
    drafted: dict[str, list[ChunkStats]] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by policy and stage, one number per prediction; every policy comes first in turn.

    drafted: takes what is known of the chunks of those that draft."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in policies}
    order = list(policies)
    for turn in shown(range(warmup + rounds), "rounds", warmup + rounds):
        for observation in seen:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                policies[name].core.seed(turn)
                chunk = policies[name].predict(observation)
                stats = policies[name].verify() or chunk.stats
                if turn >= warmup:
                    for stage, milliseconds in stats.latency_ms.items():
                        times[name].setdefault(stage, []).append(round(milliseconds, 4))
                    if drafted is not None and stats.num_draft_tokens:
                        drafted.setdefault(name, []).append(stats)
    return times


def acceptance_of(rule: str, chunks: Sequence[ChunkStats]) -> Acceptance:
    """What became of the drafts of one decoder's chunks."""
    counts = (sum_per_level(c.num_draft_tokens for c in chunks), sum_per_level(c.num_accepted_tokens for c in chunks))
    return acceptance(rule, *counts, [c.accepted_levels for c in chunks])


def print_latencies(console: Console, record: LatencyRecord) -> None:
    """p50 / p95 by stage and decoder, and the ratio of the first decoder's p50 to each other's."""
    rows = []
    for stage in STAGES:
        found = [by_stage.get(stage) for by_stage in record.milliseconds.values()]
        if any(found):
            label = f"{stage}, after the chunk" if stage == VERIFY_PENDING else stage
            rows.append([label, *("{:.1f} / {:.1f}".format(*percentiles(ms)) if ms else "" for ms in found)])
    totals = {name: percentiles(by_stage["total"])[0] for name, by_stage in record.milliseconds.items()}
    if ideals := record.ideal_ms():
        rows.append(["roofline of total", *(f"{ideals[name]:.2f}" if name in ideals else "" for name in totals)])
        shares = (f"{ideals[name] / total:.0%}" if name in ideals else "" for name, total in totals.items())
        rows.append(["share of it reached", *shares])
    first, *others = totals.values()
    rows.append(["speed-up of p50", "", *(f"{first / total:.2f}x" for total in others)])
    nothing = asdict(acceptance("", [], [], []))
    for label, cells in acceptance_rows([Acceptance(**record.acceptance.get(name, nothing)) for name in totals]):
        if any(cell != ABSENT for cell in cells):
            rows.append([label, *("" if cell == ABSENT else cell for cell in cells)])
    title = f"milliseconds per chunk, p50 / p95, {record.machine['device']}"
    if (rule := str(record.config.get("acceptance"))).startswith("synthetic"):
        title = f"SYNTHETIC acceptance, {rule}: what stands is made up, only the times mean anything\n{title}"
    print_table(console, title, ["stage", *record.milliseconds], rows)
