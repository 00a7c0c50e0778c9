"""Pools of workers, processes here or actors on Ray: who dies or hangs is replaced, its episode begun anew."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from rsd.devices import visible_gpus
from rsd.evaluation.backend import Backend, available_cores
from rsd.evaluation.batching import policy_main
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import Job, JobQueue, Outcome, VideoBudget, broken_off
from rsd.evaluation.video import VIDEOS_DIR
from rsd.evaluation.workers import Begin, Failed, Ready, failed, make_runner, worker_main
from rsd.extras import extra
from rsd.types import RsdError

START_PATIENCE = 120.0  # seconds for a process to load its policy, at least
POLICY_DIED = "the policy's process died"
PARTING = 5.0  # seconds for a process to tidy up after itself
Server = tuple[BaseProcess, Connection]  # a process, and the connection to it
MAX_FAILED_STARTS = 3  # processes in a row that die before they are ready


@dataclass(frozen=True)
class Retry:
    """An attempt at an episode that ended in an error and will be followed by another. log: what went wrong."""

    job: Job
    log: str


@dataclass
class Worker:
    """handle: its process or actor; channel: where it speaks next; deadline: when it is taken for hung
    (time.monotonic); gpu: which of the run's it uses."""

    handle: Any
    channel: Any
    deadline: float
    gpu: int = 0
    ready: bool = False
    job: Job | None = None
    task: tuple[str, int] | None = None


def worker_count(requested: str, episodes: int) -> int:
    """`auto` is one worker per core; never more than there are episodes."""
    return max(1, min(available_cores() if requested == "auto" else int(requested), episodes))


class Crew:
    """The workers of runs that follow each other, as of a comparison: who finds no episode left of one makes ready for
    the next, while others still finish theirs. A context, which ends them whatever happens."""

    def __init__(self, planned: Sequence[EvalConfig] = ()) -> None:
        """planned: the runs in their order, as `pool` is asked for them."""
        self._planned = list(planned)
        self._pool: Pool | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(error)

    @contextlib.contextmanager
    def pool(self, config: EvalConfig, backend: Backend, count: int) -> Iterator[Pool]:
        """Workers for a run: those that make ready for it already, if there are any."""
        if self._pool is None or not self._pool.expects(config, backend, count):
            self.__exit__()
            kind = RayPool if config.launcher == "ray" else ProcessPool
            self._pool = kind(config, backend, count, config.output_dir / VIDEOS_DIR).__enter__()
        pool = self._pool
        following = self._planned[self._planned.index(config) + 1 :] if config in self._planned else []
        pool.after = following[0] if following and pool.goes_on else None
        try:
            yield pool
        except BaseException as error:
            self.__exit__(type(error))
            raise
        if pool.after is None:
            self.__exit__()


class Pool(ABC):
    """Runs jobs in workers; use as a context manager, which ends them whatever happens."""

    noun: str
    goes_on = False  # whether its workers can begin another run

    def __init__(self, config: EvalConfig, backend: Backend, count: int, videos: Path) -> None:
        """after: the run that workers make ready for when nothing is left of this one."""
        self.config, self.backend, self.count, self.videos = config, backend, count, videos
        self.after: EvalConfig | None = None
        self._workers: list[Worker] = []
        self._failed_starts = 0

    def expects(self, config: EvalConfig, backend: Backend, count: int) -> bool:
        """Whether all workers make ready for this run, which then is the pool's."""
        if (config, backend, count) != (self.after, self.backend, self.count):
            return False
        self.config, self.videos = config, config.output_dir / VIDEOS_DIR
        for worker in self._workers:
            worker.deadline = time.monotonic() + self._start_patience
        return True

    @abstractmethod
    def __enter__(self) -> Pool: ...

    @abstractmethod
    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None: ...

    @abstractmethod
    def _start(self) -> Worker: ...

    @abstractmethod
    def _end(self, worker: Worker) -> None:
        """At once: it may be dead or hang."""

    @abstractmethod
    def _send(self, worker: Worker, order: Job | Begin | None) -> None:
        """None: there is nothing left for it. One that died just now is noticed when it is heard next."""

    @abstractmethod
    def _wait(self, channels: Sequence[Any], patience: float) -> Sequence[Any]:
        """The channels on which something was said, after `patience` seconds maybe none."""

    @abstractmethod
    def _receive(self, worker: Worker) -> Ready | Failed | Outcome | str:
        """What it said; a text says why it will say no more."""

    def run(self, queue: JobQueue, videos_left: int) -> Iterator[Ready | Retry | Outcome]:
        """Yields each worker's Ready, each broken-off attempt and each job's Outcome as they come.

        Raises RsdError if set-up fails.
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
                if job is not None:
                    job = videos.allot(job)
                    worker.job, worker.task = job, job.task
                    worker.deadline = time.monotonic() + self.config.episode_timeout
                else:
                    busy.remove(worker)
                self._send(worker, self._following(worker) if job is None else job)

    def _following(self, worker: Worker) -> Begin | None:
        """What a worker does when no episode is left."""
        if self.after is None:
            return None
        worker.ready, worker.task = False, None
        return Begin(self.after, self.after.output_dir / VIDEOS_DIR)

    def _messages(self, busy: list[Worker]) -> Iterator[tuple[Worker, Ready | Failed | Outcome | str]]:
        """What the workers said since the last call, or why one of them will say no more; waits for something."""
        by_channel = {worker.channel: worker for worker in busy}
        spoke = self._wait(list(by_channel), max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))
        for channel in spoke:
            yield by_channel[channel], self._receive(by_channel[channel])
        for channel, worker in by_channel.items():
            if channel not in spoke and time.monotonic() > worker.deadline:
                patience = self.config.episode_timeout if worker.ready else self._start_patience
                yield worker, f"{self.noun} hung: nothing for {patience:g} s"

    @property
    def _start_patience(self) -> float:
        return max(START_PATIENCE, self.config.episode_timeout)

    def _replace(self, worker: Worker, reason: str) -> Worker:
        if not worker.ready and reason != POLICY_DIED:
            self._count_failed_start("workers", reason)
        self._end(worker)
        self._workers.remove(worker)
        self._workers.append(self._start())
        return self._workers[-1]

    def _count_failed_start(self, who: str, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS:
            raise RsdError(f"{who} keep ending before they run an episode ({reason}); their messages are above")


class ProcessPool(Pool):
    """Processes of this machine; with --batch one more for each GPU, which owns a policy."""

    noun = "worker process"

    def __enter__(self) -> ProcessPool:
        self.goes_on = not self.config.batch  # a policy's own process serves one run
        self._gpus, self._servers = visible_gpus(self.config.device)[: self.count], list[Server]()
        try:
            if self.config.batch:
                self._servers += [self._spawn(policy_main, gpu) for gpu in range(len(self._gpus))]
            for _ in range(self.count):
                self._workers.append(self._start())
            for server in self._servers:
                self._await_server(server)  # the workers make ready meanwhile
            for worker in self._workers:
                worker.deadline = time.monotonic() + self._start_patience
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        processes = [worker.handle for worker in self._workers]
        for worker in self._workers:
            worker.channel.close()  # which ends one that waits for a job
        deadline = time.monotonic() + (PARTING if error is None else 0.0)
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            processes += [server for server, _ in self._servers]
            for process in processes:
                process.kill()  # a hung one ignores a polite request
            for process in processes:
                process.join()

    def _spawn(self, body: Any, gpu: int, *arguments: Any) -> Server:
        """A process that runs body(connection, config, backend, threads, its GPU, *arguments)."""
        # spawn: a forked process would share the parent's GL and torch state, which neither survives.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        threads = max(1, available_cores() // self.count)
        arguments = (theirs, self.config, self.backend, threads, self._gpus[gpu], *arguments)
        process = context.Process(target=body, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _start(self) -> Worker:
        deadline = time.monotonic() + self._start_patience
        gpu = min(range(len(self._gpus)), key=[worker.gpu for worker in self._workers].count)
        if not self._servers:
            return Worker(*self._spawn(worker_main, gpu, self.videos, None), deadline, gpu)
        server, control = self._servers[gpu]
        policys, simulators = multiprocessing.Pipe()
        with policys, simulators:  # they live on in the two processes
            with contextlib.suppress(OSError):  # the policy died just now: the next round notices
                send_handle(control, policys.fileno(), server.pid)
            return Worker(*self._spawn(worker_main, gpu, self.videos, simulators), deadline, gpu)

    def _end(self, worker: Worker) -> None:
        worker.handle.kill()
        worker.handle.join()
        worker.channel.close()

    def _send(self, worker: Worker, order: Job | Begin | None) -> None:
        with contextlib.suppress(BrokenPipeError):
            worker.channel.send(order)

    def _wait(self, channels: Sequence[Any], patience: float) -> Sequence[Any]:
        """Nothing where a policy's process ended, which matters more."""
        ends = [server.sentinel for server, _ in self._servers]
        spoke = multiprocessing.connection.wait([*channels, *ends], patience)
        return [] if any(end in spoke for end in ends) else spoke

    def _receive(self, worker: Worker) -> Ready | Failed | Outcome | str:
        try:
            message: Ready | Failed | Outcome = worker.channel.recv()
            return message
        except (EOFError, OSError):
            worker.handle.join()
            return f"worker process died with exit code {worker.handle.exitcode}"

    def _messages(self, busy: list[Worker]) -> Iterator[tuple[Worker, Ready | Failed | Outcome | str]]:
        dead = [gpu for gpu, (server, _) in enumerate(self._servers) if not server.is_alive()]
        if not dead:
            yield from super()._messages(busy)
            return
        self._count_failed_start("the policy's process", "died")
        for gpu in dead:
            self._servers[gpu][1].close()
            self._servers[gpu] = self._spawn(policy_main, gpu)
            self._await_server(self._servers[gpu])
        for worker in [worker for worker in busy if worker.gpu in dead]:
            yield worker, POLICY_DIED

    def _await_server(self, server: Server) -> None:
        """Waits until it is ready. Raises RsdError where the policy cannot be loaded, or cannot be batched."""
        process, connection = server
        try:
            message = connection.recv() if connection.poll(self._start_patience) else None
        except (EOFError, OSError):
            message = None
        if isinstance(message, Failed):
            raise RsdError(message.message) from RuntimeError(message.traceback)
        if message is None:
            process.kill()
            process.join()
            raise RsdError(f"the policy's process ended with exit code {process.exitcode}; its messages are above")


class Simulator:
    """A Ray actor: simulator and policy together, as in a worker process."""

    def ready(self, *arguments: Any) -> Ready:
        """In a call of its own: what an actor's constructor raises is not told apart from its death."""
        ready, self._runner = make_runner(*arguments)
        return ready

    def run(self, job: Job) -> Outcome:
        return self._runner.run(job)


class RayPool(Pool):
    """Actors of a Ray cluster; the results stay with this process, actors need no shared disk but the checkpoint.

    num_workers actors with one CPU each, with a GPU's share if the policy wants one; Ray places them.
    """

    noun = "Ray actor"

    def __enter__(self) -> RayPool:
        with extra("ray"):
            import ray
        self._ray: Any = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
        self._workers = [self._start() for _ in range(self.count)]
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        for worker in self._workers:
            self._end(worker)
        if self._started_ray:
            self._ray.shutdown()

    def _start(self) -> Worker:
        gpus = 1 / self.count if self.config.device.startswith("cuda") else 0
        actor = self._ray.remote(Simulator).options(num_cpus=1, num_gpus=gpus).remote()
        # infinite: nobody knows how long a cluster takes to find room for an actor
        return Worker(actor, actor.ready.remote(self.config, self.backend, self.videos), math.inf)

    def _end(self, worker: Worker) -> None:
        self._ray.kill(worker.handle)

    def _send(self, worker: Worker, order: Job | Begin | None) -> None:
        if order is not None:
            worker.channel = worker.handle.run.remote(order)

    def _wait(self, channels: Sequence[Any], patience: float) -> Sequence[Any]:
        found: Sequence[Any] = self._ray.wait(list(channels), timeout=min(patience, 1.0))[0]
        return found

    def _receive(self, worker: Worker) -> Ready | Failed | Outcome | str:
        try:
            message: Ready | Outcome = self._ray.get(worker.channel)
            return message
        except self._ray.exceptions.RayActorError:
            return "Ray actor died"
        except self._ray.exceptions.RayTaskError as error:
            return failed(error.cause)
