"""Worker processes that run episodes, each with its own simulator; who dies or hangs is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import Backend, available_cores
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import EpisodeRunner, Job, JobQueue, Outcome, VideoBudget, broken_off
from rsd.evaluation.socket_folder import socket_folder
from rsd.types import Policy, RsdError

START_PATIENCE = 120.0  # seconds for a process to load its policy, at least
POLICY_DIED = "the policy's process died"
PARTING = 5.0  # seconds for a process to tidy up after itself
MAX_FAILED_STARTS = 3  # processes in a row that die before they are ready


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
class Retry:
    """An attempt at an episode that ended in an error and will be followed by another. log: what went wrong."""

    job: Job
    log: str


def worker_count(requested: str, episodes: int) -> int:
    """`auto` is one worker per core; never more than there are episodes."""
    return max(1, min(available_cores() if requested == "auto" else int(requested), episodes))


def failed(error: Exception) -> Failed:
    message = str(error) if isinstance(error, RsdError) else f"{type(error).__name__}: {error}"
    return Failed(message, traceback.format_exc())


def die_with_parent() -> None:
    """Ends this process when its parent ends, even by SIGKILL: nothing goes on computing for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def prepare_process(threads: int) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    # Without it OSMesa draws with as many threads as there are cores, in every worker.
    os.environ.setdefault("LP_NUM_THREADS", str(threads))


def worker_main(
    connection: Connection, config: EvalConfig, backend: Backend, threads: int, videos: Path
) -> None:
    """Body of a worker process: says Ready or Failed, then answers each Job with an Outcome until None.

    With --batch the policy lies in another process: the first message that comes is where that one listens.
    """
    prepare_process(threads)
    try:
        policy: Policy
        if not config.batch:
            import torch

            torch.set_num_threads(config.threads)
            policy = backend.make_policy(config)
            ready = Ready(backend.versions(config.device), backend.describe_policy(config))
        else:
            from rsd.evaluation.batching import RemotePolicy

            prepare_first_task(config, backend)
            policy = remote = RemotePolicy(connection.recv())
            ready = Ready(remote.versions, remote.description)
        connection.send(ready)
        runner = EpisodeRunner(config, backend, policy, videos)
        while (job := connection.recv()) is not None:
            connection.send(runner.run(job))
        runner.close()
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            connection.send(failed(error))


def prepare_first_task(config: EvalConfig, backend: Backend) -> None:
    """Whatever task comes first in the end: most of what a scene takes is the same for all."""
    if backend.prepare is not None:
        suite = config.suites[0]
        backend.prepare(suite, config.task_ids(suite, [number for number, *_ in backend.list_tasks(suite)])[0])


@dataclass
class Worker:
    """deadline: when it is taken for hung (time.monotonic)."""

    process: BaseProcess
    connection: Connection
    deadline: float
    ready: bool = False
    job: Job | None = None
    task: tuple[str, int] | None = None


@dataclass
class PolicyProcess:
    """connection: where it says once that it listens at `address`, or why it cannot."""

    process: BaseProcess
    connection: Connection
    address: str
    listens: bool = False


@dataclass
class WorkerPool:
    """Runs jobs in processes; use as a context manager, which ends the processes whatever happens."""

    config: EvalConfig
    backend: Backend
    count: int
    videos: Path
    _workers: list[Worker] = field(default_factory=list)
    _server: PolicyProcess | None = None
    _failed_starts: int = 0
    _folder: Path | None = None  # of the sockets
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> WorkerPool:
        try:
            if self.config.batch:
                self._server = self._start_server()
            self._workers = [self._start() for _ in range(self.count)]
            if self._server is not None:
                self._await(self._server)  # the workers make ready meanwhile
                for worker in self._workers:
                    self._introduce(worker, self._server)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        processes = [worker.process for worker in self._workers]
        for worker in self._workers:
            worker.connection.close()  # which ends one that waits for a job
        deadline = time.monotonic() + (PARTING if error is None else 0.0)
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            if self._server is not None:
                processes.append(self._server.process)
            for process in processes:
                process.kill()  # a hung one ignores a polite request
            for process in processes:
                process.join()
            self._open.close()

    @property
    def _threads(self) -> int:
        return max(1, available_cores() // self.count)

    def _start(self) -> Worker:
        # spawn: a forked process would share the parent's GL and torch state, which neither survives.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.config, self.backend, self._threads, self.videos)
        process = context.Process(target=worker_main, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = Worker(process, ours, time.monotonic() + self._start_patience)
        if self._server is not None and self._server.listens:
            self._introduce(worker, self._server)
        return worker

    def _introduce(self, worker: Worker, server: PolicyProcess) -> None:
        """Tells a worker where the policy listens; its time to get ready begins now."""
        worker.deadline = time.monotonic() + self._start_patience
        with contextlib.suppress(BrokenPipeError):  # it died just now: the next round notices
            worker.connection.send(server.address)

    def _start_server(self) -> PolicyProcess:
        from rsd.evaluation.batching import policy_main

        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._folder = self._folder or self._open.enter_context(socket_folder())
        address = str(self._folder / f"policy-{time.monotonic_ns()}")
        arguments = (theirs, self.config, self.backend, self._threads, self.count, address)
        process = context.Process(target=policy_main, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return PolicyProcess(process, ours, address)

    def _await(self, server: PolicyProcess) -> None:
        """Waits until it listens. Raises RsdError where the policy cannot be loaded, or cannot be batched."""
        with contextlib.closing(server.connection):
            try:
                message = server.connection.recv() if server.connection.poll(self._start_patience) else None
            except (EOFError, OSError):
                message = None
        if isinstance(message, Failed):
            raise RsdError(message.message) from RuntimeError(message.traceback)
        if message is None:
            process = server.process
            process.kill()
            process.join()
            raise RsdError(f"the policy's process ended with exit code {process.exitcode}; its messages are above")
        server.listens = True

    @property
    def _start_patience(self) -> float:
        return max(START_PATIENCE, self.config.episode_timeout)

    def run(self, queue: JobQueue, videos_left: int) -> Iterator[Ready | Retry | Outcome]:
        """Yields each worker's Ready, each broken-off attempt and each job's Outcome as they come.

        A worker that dies or hangs is replaced and its episode begun anew. Raises RsdError if set-up fails.
        """
        busy, videos = list(self._workers), VideoBudget(self.config.videos, videos_left, self.videos)
        while busy:
            for worker, message in self._messages(busy):
                if isinstance(message, str):  # why the worker is no more
                    busy.remove(worker)
                    replacement = self._replace(worker, message)
                    busy.append(replacement)
                    if worker.job is None:
                        continue
                    message = broken_off(self.config, worker.job, message)
                    worker = replacement
                if isinstance(message, Failed):
                    raise RsdError(message.message) from RuntimeError(message.traceback)
                if isinstance(message, Ready):
                    worker.ready, self._failed_starts = True, 0
                    yield message
                else:
                    worker.job = None
                    videos.settle(message)
                    again = queue.again(message.job) if message.result.is_error else None
                    yield message if again is None else Retry(message.job, message.log or message.result.failure)
                if not worker.ready:
                    continue  # the replacement of a dead worker says Ready first
                job = queue.take(worker.task)
                if job is None:
                    with contextlib.suppress(BrokenPipeError):
                        worker.connection.send(None)
                    busy.remove(worker)
                    continue
                job = videos.allot(job)
                worker.job, worker.task = job, job.task
                worker.deadline = time.monotonic() + self.config.episode_timeout
                with contextlib.suppress(BrokenPipeError):  # it died just now: the next round notices
                    worker.connection.send(job)

    def _messages(self, busy: list[Worker]) -> Iterator[tuple[Worker, Ready | Failed | Outcome | str]]:
        """What the workers said since the last call, or why one of them will say no more; waits for something."""
        by_channel: dict[Any, Worker] = {worker.connection: worker for worker in busy}
        sentinel = None if self._server is None else self._server.process.sentinel
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        channels = [*by_channel, *([] if sentinel is None else [sentinel])]
        spoke = wait(channels, timeout=patience)
        if sentinel is not None and sentinel in spoke:
            self._count_failed_start("the policy's process", "died")
            self._server = self._start_server()
            self._await(self._server)
            for worker in list(busy):
                yield worker, POLICY_DIED
            return
        for channel in spoke:
            worker = by_channel[channel]
            try:
                yield worker, worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                yield worker, f"worker process died with exit code {worker.process.exitcode}"
        for worker in by_channel.values():
            if worker.connection not in spoke and time.monotonic() > worker.deadline:
                patience = self.config.episode_timeout if worker.ready else self._start_patience
                yield worker, f"worker process hung: nothing for {patience:g} s"

    def _replace(self, worker: Worker, reason: str) -> Worker:
        if not worker.ready and reason != POLICY_DIED:
            self._count_failed_start("workers", reason)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        self._workers.append(self._start())
        return self._workers[-1]

    def _count_failed_start(self, who: str, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS:
            raise RsdError(f"{who} keep ending before they run an episode ({reason}); their messages are above")


def running_workers(pid: int) -> list[int]:
    """The workers of the evaluation that runs as process `pid`, by Linux's /proc: its spawned children.

    multiprocessing's own resource tracker, which is a child, too, is none of them.
    """
    found = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, entry.read_text().split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found
