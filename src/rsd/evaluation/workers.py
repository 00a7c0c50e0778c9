"""What runs in a worker process: episodes, each with a simulator of its own, by a policy here or in another process."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import Backend
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import EpisodeRunner
from rsd.output import reason
from rsd.processes import begin_worker
from rsd.types import ActionChunk, Observation, RsdError


@dataclass(frozen=True)
class Ready:
    """A worker's, or the policy process's, first message: what it runs with."""

    versions: dict[str, str]
    policy: dict[str, Any]
    image_size: int


@dataclass(frozen=True)
class Begin:
    """The run that a worker goes on with, and where its videos are; the worker says Ready or Failed again."""

    config: EvalConfig
    videos: Path


@dataclass(frozen=True)
class Failed:
    """A worker could not be set up, so no episode can run: the message is for the user."""

    message: str
    traceback: str


def failed(error: BaseException) -> Failed:
    return Failed(reason(error), "".join(traceback.format_exception(error)))


def prepare_process(threads: int, gpu: str | None) -> None:
    """gpu: the one that this process sees, as CUDA_VISIBLE_DEVICES names it, and where robosuite draws by EGL."""
    begin_worker()
    # Without it OSMesa draws with as many threads as there are cores, in every worker.
    os.environ.setdefault("LP_NUM_THREADS", str(threads))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def make_runner(config: EvalConfig, backend: Backend, videos: Path) -> tuple[Ready, EpisodeRunner]:
    """A simulator with a policy of its own."""
    policy = backend.make_policy(config)
    ready = Ready(backend.versions(config.device), backend.describe_policy(config), policy.image_size)
    return ready, EpisodeRunner(config, backend, policy, videos)


def worker_main(
    connection: Connection,
    config: EvalConfig,
    backend: Backend,
    threads: int,
    gpu: str | None,
    videos: Path,
    policy_process: Connection | None,
) -> None:
    """Body of a worker process: says Ready or Failed, then answers each Job with an Outcome until None. After a Begin
    it is ready for another run; imports, compiled scene and drawing context stay.

    policy_process: with --batch, where the policy answers."""
    prepare_process(threads, gpu)
    try:
        if policy_process is None:
            ready, runner = make_runner(config, backend, videos)
        else:
            # whatever task comes first in the end: most of what a scene takes is the same for all
            suite = config.suites[0]
            backend.prepare(suite, config.task_ids(suite, [number for number, *_ in backend.list_tasks(suite)])[0])
            policy = RemotePolicy(policy_process)
            ready, runner = policy.ready, EpisodeRunner(config, backend, policy, videos)
        connection.send(ready)
        while (order := connection.recv()) is not None:
            if isinstance(order, Begin):
                runner.close()
                del runner  # its policy goes before the next one comes
                ready, runner = make_runner(order.config, backend, order.videos)
                connection.send(ready)
            else:
                connection.send(runner.run(order))
        runner.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent, or the policy's process, is gone
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            connection.send(failed(error))


class RemotePolicy:
    """The policy of another process, as a simulator's own. Raises EOFError when that process is gone."""

    def __init__(self, connection: Connection) -> None:
        """Waits until the policy is there."""
        self._connection, self._first = connection, True
        self.ready: Ready = connection.recv()
        self.image_size = self.ready.image_size

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far, with the next observation; what draws is not batched."""
        self._first = True

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `queue` is the wait for the batch to fill and begin, `total` holds it, too."""
        start = time.perf_counter()
        self._connection.send((observation, self._first))
        self._first = False
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RsdError(f"the policy's process could not predict: {answer}")
        total = 1000 * (time.perf_counter() - start)
        computed = answer.stats.latency_ms
        latency = {"queue": max(0.0, total - computed.get("total", 0.0)), **computed, "total": total}
        return replace(answer, stats=replace(answer.stats, latency_ms=latency))
