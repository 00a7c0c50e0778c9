"""`python -m studies.serving`: what a network port adds to a chunk, on this machine, without a simulator.

Every observation is decided twice in a row, here and by an `rsd serve` in a process of its own, and the actions have to
be the same; with `rsd-async` the draft's, then the correction's.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rsd.evaluation.backend import available_cores, describe_checkpoint, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import ABSENT, print_table
from rsd.output import shown
from rsd.serving.server import PolicyServer, reserve, until_signal
from rsd.serving.service import load_served, versions_on
from rsd.targets.remote.openpi import served_at
from rsd.types import CAMERAS, STATE_DIM, ActionChunk, Completes, Observation, Policy, RsdError
from studies.config import ServingBenchConfig
from studies.processes import process_of

FORMAT = 1
LOCAL, ROUND_TRIP, NETWORK = "predict here", "round trip", "of it on the way"
CORRECTION, CPU = "from the request to the correction", "the server's CPU time of a chunk, all of it, mean"


@dataclass(frozen=True)
class ServingRecord:
    """milliseconds: decoder, or proxy -> what -> one number per chunk, in the order of time."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    milliseconds: dict[str, dict[str, list[float]]]


def measure_serving(config: ServingBenchConfig) -> ServingRecord:
    """Run the measurement, print the table, write the JSON."""
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    if config.proxy:
        from studies.proxying import measure_proxy

        times = {"proxy": measure_proxy(config, threads)}
    else:
        times = {decode: measure(config, decode, threads) for decode in config.decode}
        show(config, times)
    settings = {**asdict(config), "output": str(config.output), "threads": threads}
    record = ServingRecord(FORMAT, settings, versions_on(config.device), times)
    write_atomically(config.output, encode_record(record) + "\n")
    print(f"results: {config.output}")
    return record


def show(config: ServingBenchConfig, times: dict[str, dict[str, list[float]]]) -> None:
    rows = [
        [name, *("{:.2f} / {:.2f}".format(*percentiles(found)) if (found := times[d][name]) else ABSENT for d in times)]
        for name in (LOCAL, ROUND_TRIP, NETWORK, CORRECTION)
    ]
    rows.append([CPU, *(f"{times[d][CPU][0]:.2f}" for d in times)])
    print_table(Console(), f"{config.policy}: milliseconds, p50 / p95", ["", *config.decode], rows)


def measure(config: ServingBenchConfig, decode: str, threads: int) -> dict[str, list[float]]:
    evaluated = EvalConfig(policy=config.policy, decode=decode, device=config.device)
    policy, rng = rsd_policy(evaluated), np.random.default_rng(0)
    times: dict[str, list[float]] = {LOCAL: [], ROUND_TRIP: [], NETWORK: [], CORRECTION: []}
    with process_of(server_main, evaluated, threads) as (address, process), closing(served_at(address)) as remote:
        spent = 0.0
        for turn in shown(range(config.warmup + config.rounds), f"{decode}, rounds", config.warmup + config.rounds):
            images = rng.integers(0, 256, (len(CAMERAS), policy.image_size, policy.image_size, 3), dtype=np.uint8)
            state = rng.normal(0.0, 0.3, STATE_DIM).astype(np.float32)
            observation = Observation(images, state, "pick up the black bowl")
            spent = cpu_seconds(process) if turn == config.warmup else spent
            here, corrected = decided(policy, observation)[:2]
            there, answer, took_ms = decided(remote, observation)
            if not np.array_equal(here.actions, there.actions) or not np.array_equal(corrected, answer):
                raise RsdError(f"{decode}: chunk {turn} is another behind the port than here")
            if turn >= config.warmup:
                times[CORRECTION] += [took_ms] * isinstance(remote, Completes)
                times[LOCAL].append(here.stats.latency_ms["total"])
                times[ROUND_TRIP].append(there.stats.latency_ms["total"])
                times[NETWORK].append(there.stats.latency_ms["network"])
        times[CPU] = [1e3 * (cpu_seconds(process) - spent) / config.rounds]
    return times


def decided(policy: Policy, observation: Observation) -> tuple[ActionChunk, Any, float]:
    """A chunk, the target's answer to it of a policy that corrects (else None), and how long both took, ms."""
    started = time.perf_counter()
    chunk = policy.predict(observation)
    whole = policy.complete() if isinstance(policy, Completes) else None
    return chunk, None if whole is None else whole.answer, 1e3 * (time.perf_counter() - started)


def cpu_seconds(process: int) -> float:
    """What a process has computed so far, with all its threads; Linux."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def server_main(connection: Connection, config: EvalConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    door = reserve("127.0.0.1", 0)
    server = PolicyServer(load_served(config), describe_checkpoint(config), versions_on(config.device), door)
    until_signal(lambda stop: server.run(stop, connection.send))


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("serving")
