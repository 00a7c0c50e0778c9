"""`python -m studies.serving`: what a network port adds to a chunk, on this machine, without a simulator.

Every observation is decided twice in a row, here and by an `rsd serve` in a process of its own, and the actions have to
be the same.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rsd.evaluation.backend import available_cores, describe_checkpoint, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import print_table
from rsd.output import shown
from rsd.serving.server import PolicyServer, reserve, serve_until_signal
from rsd.serving.service import load_served, versions_on
from rsd.targets.remote.client import RemotePolicy
from rsd.types import CAMERAS, STATE_DIM, Observation, RsdError
from studies.config import ServingBenchConfig

FORMAT = 1
LOCAL, ROUND_TRIP, NETWORK = "predict here", "round trip", "of it on the way"
START_PATIENCE = 600.0  # seconds until the server listens: it may load 15 GB


@dataclass(frozen=True)
class ServingRecord:
    """milliseconds: decoder -> what -> one number per chunk, in the order of time."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    milliseconds: dict[str, dict[str, list[float]]]


def measure_serving(config: ServingBenchConfig) -> ServingRecord:
    """Run the measurement, print the table, write the JSON."""
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    times = {decode: measure(config, decode, threads) for decode in config.decode}
    settings = {**asdict(config), "output": str(config.output), "threads": threads}
    record = ServingRecord(FORMAT, settings, versions_on(config.device), times)
    write_atomically(config.output, encode_record(record) + "\n")
    rows = [
        [name, *("{:.2f} / {:.2f}".format(*percentiles(times[d][name])) for d in config.decode)]
        for name in (LOCAL, ROUND_TRIP, NETWORK)
    ]
    print_table(Console(), f"{config.policy}: milliseconds, p50 / p95", ["", *config.decode], rows)
    print(f"results: {config.output}")
    return record


def measure(config: ServingBenchConfig, decode: str, threads: int) -> dict[str, list[float]]:
    evaluated = EvalConfig(policy=config.policy, decode=decode, device=config.device)
    policy, rng = rsd_policy(evaluated), np.random.default_rng(0)
    times: dict[str, list[float]] = {LOCAL: [], ROUND_TRIP: [], NETWORK: []}
    with server_process(evaluated, threads) as address, closing(RemotePolicy(address)) as remote:
        for turn in shown(range(config.warmup + config.rounds), f"{decode}, rounds", config.warmup + config.rounds):
            images = rng.integers(0, 256, (len(CAMERAS), policy.image_size, policy.image_size, 3), dtype=np.uint8)
            state = rng.normal(0.0, 0.3, STATE_DIM).astype(np.float32)
            observation = Observation(images, state, "pick up the black bowl")
            here, there = policy.predict(observation), remote.predict(observation)
            if not np.array_equal(here.actions, there.actions):
                raise RsdError(f"{decode}: chunk {turn} is another behind the port than here")
            if turn >= config.warmup:
                times[LOCAL].append(here.stats.latency_ms["total"])
                times[ROUND_TRIP].append(there.stats.latency_ms["total"])
                times[NETWORK].append(there.stats.latency_ms["network"])
    return times


@contextmanager
def server_process(config: EvalConfig, threads: int) -> Iterator[str]:
    """A served policy in a process of its own while the context lasts; gives its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=server_main, args=(theirs, config, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_PATIENCE):
            raise RsdError(f"the server's process did not listen within {START_PATIENCE:g} s")
        yield ours.recv()
    except EOFError:
        raise RsdError("the server's process ended before it listened; its messages are above") from None
    finally:
        process.terminate()
        process.join()
        ours.close()


def server_main(connection: Connection, config: EvalConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    door = reserve("127.0.0.1", 0)
    server = PolicyServer(load_served(config), describe_checkpoint(config), versions_on(config.device), door)
    serve_until_signal(server, connection.send)


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("serving")
