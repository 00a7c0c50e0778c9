"""Worker processes that run episodes, each with its own simulator and policy, and their queue."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import Backend, available_cores
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.results import ERROR_PREFIX, EpisodeResult
from rsd.types import RsdError


@dataclass(frozen=True)
class Job:
    """One episode to run. video: "" or the condition ("all", "failures") under which it gets one."""

    task_id: int
    task_name: str
    instruction: str
    init_state: int
    video: str = ""


@dataclass(frozen=True)
class Ready:
    """A worker's first message: what it runs with."""

    versions: dict[str, str]
    policy: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A worker could not be set up, so no episode can run: the message is for the user."""

    message: str
    traceback: str


@dataclass(frozen=True)
class Outcome:
    """One episode's end. log: traceback of an error episode, or why its video could not be made."""

    job: Job
    result: EpisodeResult
    log: str = ""
    video: Path | None = None


class JobQueue:
    """Jobs by task. A worker keeps its task while that has jobs left, because another scene costs seconds."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs: dict[int, deque[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.task_id, deque()).append(job)
        self._workers: Counter[int] = Counter()

    def take(self, current_task: int | None) -> Job | None:
        """The next job for a worker that has `current_task` loaded, None when nothing is left."""
        if current_task is not None and self._jobs.get(current_task):
            return self._jobs[current_task].popleft()
        if current_task is not None:
            self._workers[current_task] -= 1
        waiting = [task for task, jobs in self._jobs.items() if jobs]
        if not waiting:
            return None
        # The task with the most work per worker; the first one of equals.
        task = max(waiting, key=lambda task: len(self._jobs[task]) / (1 + self._workers[task]))
        self._workers[task] += 1
        return self._jobs[task].popleft()


def worker_count(requested: str, episodes: int) -> int:
    """`auto` is one worker per core; never more than there are episodes."""
    return max(1, min(available_cores() if requested == "auto" else int(requested), episodes))


def worker_main(connection: Connection, config: EvalConfig, backend: Backend, threads: int, videos: Path) -> None:
    """Body of a worker process: says Ready or Failed, then answers each Job with an Outcome until None."""
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without it OSMesa draws with as many threads as there are cores, in every worker.
    os.environ.setdefault("LP_NUM_THREADS", str(threads))
    try:
        import torch

        from rsd.evaluation.rollout import WARMUP_PREDICTIONS, run_episode
        from rsd.evaluation.video import replay_video, video_name

        torch.set_num_threads(threads)
        policy = backend.make_policy(config)
        connection.send(Ready(backend.versions(config.device), backend.describe_policy(config)))
        env, warmup, task_id = None, WARMUP_PREDICTIONS, None
        while (job := connection.recv()) is not None:
            if env is None or job.task_id != task_id:
                if env is not None:
                    env.close()
                env, task_id = (
                    backend.make_env(config.task_suite, job.task_id, policy.image_size),
                    job.task_id,
                )
            rollout = run_episode(
                env,
                policy,
                suite=config.task_suite,
                task_id=job.task_id,
                task_name=job.task_name,
                init_state=job.init_state,
                seed=config.seed,
                decode=config.decode,
                warmup=warmup,
            )
            warmup, log, video = 0, rollout.traceback, None
            if not rollout.result.is_error and wants_video(job.video, rollout.result):
                video = videos / video_name(rollout.result)
                try:
                    replay_video(env, rollout, video)
                except Exception:
                    log, video = traceback.format_exc(), None
            if log:  # whatever went wrong may have left the simulator in any state
                env.close()
                env = None
            connection.send(Outcome(job, rollout.result, log, video))
        if env is not None:
            env.close()
    except EOFError:
        return  # the parent is gone
    except Exception as error:
        message = str(error) if isinstance(error, RsdError) else f"{type(error).__name__}: {error}"
        connection.send(Failed(message, traceback.format_exc()))


def wants_video(condition: str, result: EpisodeResult) -> bool:
    return condition == "all" or (condition == "failures" and not result.success)


@dataclass
class Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    task_id: int | None = None


class WorkerPool:
    """Runs jobs in processes; use as a context manager, which ends the processes whatever happens."""

    def __init__(self, config: EvalConfig, backend: Backend, count: int, videos: Path) -> None:
        self._arguments = (config, backend, max(1, available_cores() // count), videos)
        self._config, self._count = config, count
        self._workers: list[Worker] = []

    def __enter__(self) -> WorkerPool:
        self._workers = [self._start() for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _start(self) -> Worker:
        # spawn: a forked process would share the parent's GL and torch state, which neither survives.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def run(self, queue: JobQueue, videos_left: int) -> Iterator[Ready | Outcome]:
        """Yields each worker's Ready and each job's Outcome as they come; raises RsdError if set-up fails.

        A worker that dies during an episode makes that an error episode and is replaced.
        """
        busy = list(self._workers)
        while busy:
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    message = self._died(worker)
                    busy.remove(worker)
                    worker = self._replace(worker)
                    busy.append(worker)
                if isinstance(message, Failed):
                    raise RsdError(message.message) from RuntimeError(message.traceback)
                if isinstance(message, Outcome):
                    videos_left += bool(message.job.video) and message.video is None
                yield message
                if worker.job is None and isinstance(message, Outcome):
                    continue  # the replacement of a dead worker says Ready first
                job = queue.take(worker.task_id)
                if job is None:
                    worker.connection.send(None)
                    busy.remove(worker)
                    continue
                if videos_left <= 0:
                    job = replace(job, video="")
                # Reserved here and given back above if the episode turns out to need none: never too many.
                videos_left -= bool(job.video)
                worker.job, worker.task_id = job, job.task_id
                with contextlib.suppress(BrokenPipeError):  # it died just now: the next round notices
                    worker.connection.send(job)

    def _died(self, worker: Worker) -> Outcome:
        worker.process.join()
        reason = f"worker process died with exit code {worker.process.exitcode}"
        if worker.job is None:
            raise RsdError(f"a {reason} before its first episode; its messages are above")
        job, config = worker.job, self._config
        result = EpisodeResult(
            suite=config.task_suite,
            task_id=job.task_id,
            task_name=job.task_name,
            instruction=job.instruction,
            init_state=job.init_state,
            seed=config.seed,
            decode=config.decode,
            acceptance="",
            success=False,
            steps=0,
            chunks=0,
            failure=f"{ERROR_PREFIX}{reason}",
            latency_ms={},
            num_drafts=0,
            num_draft_tokens=[],
            num_accepted_tokens=[],
            accepted_levels=[],
            prefills=0,
            main_passes=0,
            wall_s=0.0,
        )
        return Outcome(job, result, reason)

    def _replace(self, worker: Worker) -> Worker:
        worker.connection.close()
        self._workers.remove(worker)
        self._workers.append(self._start())
        return self._workers[-1]
