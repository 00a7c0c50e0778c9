"""Where an evaluation's workers are: processes here, actors of a Ray cluster, or whole shards as SLURM jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import LIBERO, Backend
from rsd.evaluation.config import EvalConfig, OptionError
from rsd.evaluation.episodes import EpisodeRunner, Job, JobQueue, Outcome, broken_off
from rsd.evaluation.workers import MAX_FAILED_STARTS, Ready, Retry, WorkerPool
from rsd.extras import extra
from rsd.types import BEST, RsdError


def make_pool(config: EvalConfig, backend: Backend, workers: int, videos: Path) -> WorkerPool | RayPool:
    if config.launcher == "ray":
        return RayPool(config, backend, workers, videos)
    return WorkerPool(config, backend, workers, videos)


class Simulator:
    """A Ray actor: simulator and policy together, as in a worker process."""

    def __init__(self, config: EvalConfig, backend: Backend, videos: Path) -> None:
        import torch

        torch.set_num_threads(config.threads)
        policy = backend.make_policy(config)
        self._ready = Ready(backend.versions(config.device), backend.describe_policy(config))
        self._runner = EpisodeRunner(config, backend, policy, videos)

    def ready(self) -> Ready:
        return self._ready

    def run(self, job: Job) -> Outcome:
        return self._runner.run(job)


class RayPool:
    """`WorkerPool`'s twin on Ray; the results stay with this process, actors need no shared disk but the checkpoint.

    num_workers actors with one CPU each, with a GPU's share if the policy wants one; Ray places them. An actor that
    dies or hangs is replaced.
    """

    def __init__(self, config: EvalConfig, backend: Backend, count: int, videos: Path) -> None:
        with extra("ray"):
            import ray
        self._ray: Any = ray
        self._arguments, self._count = (config, backend, videos), count
        self._config, self._started_ray = config, False
        self._actors: list[Any] = []

    def __enter__(self) -> RayPool:
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
            self._started_ray = True
        self._actors = [self._start() for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def _start(self) -> Any:
        gpus = 1 / self._count if self._config.device.startswith("cuda") else 0
        return self._ray.remote(Simulator).options(num_cpus=1, num_gpus=gpus).remote(*self._arguments)

    def run(self, queue: JobQueue, videos_left: int) -> Iterator[Ready | Retry | Outcome]:
        """As `WorkerPool.run`. videos_left is not used: actors make no videos."""
        calls: dict[Any, tuple[Any, Job | None, float]] = {}
        tasks: dict[Any, tuple[str, int]] = {}
        failed_starts = 0

        def call(actor: Any, job: Job | None) -> None:
            # nobody knows how long a cluster takes to find room for an actor
            patience = float("inf") if job is None else self._config.episode_timeout
            reference = actor.ready.remote() if job is None else actor.run.remote(job)
            calls[reference] = (actor, job, time.monotonic() + patience)

        for actor in self._actors:
            call(actor, None)
        while calls:
            done, _ = self._ray.wait(list(calls), timeout=1.0)
            overdue = [ref for ref, (_, _, deadline) in calls.items() if time.monotonic() > deadline]
            for reference in done or overdue:
                actor, job, _ = calls.pop(reference)
                try:
                    message = self._ray.get(reference, timeout=0)
                except self._ray.exceptions.RayTaskError as error:  # an exception of ours: set-up, not an episode
                    cause = error.cause
                    text = str(cause) if isinstance(cause, RsdError) else f"{type(cause).__name__}: {cause}"
                    raise RsdError(text) from error
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError) as error:
                    hung = isinstance(error, self._ray.exceptions.GetTimeoutError)
                    reason = f"hung: nothing for {self._config.episode_timeout:g} s" if hung else "died"
                    replacement = self._replace(actor)
                    call(replacement, None)
                    if job is None:
                        failed_starts += 1
                        if failed_starts > MAX_FAILED_STARTS:
                            raise RsdError(f"Ray's actors keep ending before they run an episode: {error}") from error
                        continue
                    yield self._finished(queue, broken_off(self._config, job, f"Ray actor {reason}"))
                    continue
                if isinstance(message, Ready):
                    failed_starts = 0
                    yield message
                else:
                    yield self._finished(queue, message)
                following = queue.take(tasks.get(actor))
                if following is not None:
                    tasks[actor] = following.task
                    call(actor, following)

    def _finished(self, queue: JobQueue, outcome: Outcome) -> Outcome | Retry:
        again = queue.again(outcome.job) if outcome.result.is_error else None
        return outcome if again is None else Retry(outcome.job, outcome.log or outcome.result.failure)

    def _replace(self, actor: Any) -> Any:
        self._ray.kill(actor)
        self._actors.remove(actor)
        self._actors.append(self._start())
        return self._actors[-1]


def run_shard(config: EvalConfig) -> str:
    """One shard of a run, as a cluster's job runs it; returns its directory."""
    from rsd.evaluation.evaluate import evaluate

    evaluate(config, backend=LIBERO)
    return str(config.output_dir)


def shard_configs(config: EvalConfig, shards: int) -> list[EvalConfig]:
    """The parts of a run; all write into directories of their own in `config.output_dir`."""
    if shards < 1:
        raise OptionError(f"--shards {shards}: expected at least 1")
    return [replace(config, shard=f"{part}/{shards}", output=str(config.output_dir)) for part in range(shards)]


def submit_shards(
    config: EvalConfig, shards: int, cluster: str = "slurm", parameters: dict[str, Any] | None = None
) -> Sequence[Any]:
    """Submit one job a shard by submitit and return the jobs; `merge_shards` puts the results together afterwards.

    cluster: slurm, or local for processes of this machine (to try it out). parameters: submitit's, such as
    slurm_partition, timeout_min, cpus_per_task.
    """
    with extra("slurm"):
        import submitit
    executor = submitit.AutoExecutor(folder=config.output_dir / "jobs", cluster=cluster)
    executor.update_parameters(name="rsd-eval", **(parameters or {}))
    return executor.map_array(run_shard, shard_configs(config, shards))


def cloud_config(
    task_suite: str, num_trials: int, use_speculative_decoding: str, policy: str, videos: str, root: Path
) -> EvalConfig:
    """The run that `deploy/modal_app.py` is asked for. Raises OptionError for what cannot be run."""
    decodes = {"true": BEST, "false": "ar"}  # which one is best is seen where the checkpoint is
    decode = decodes.get(use_speculative_decoding.lower())
    if decode is None:
        raise OptionError(f"--use-speculative-decoding '{use_speculative_decoding}': expected True or False")
    options: dict[str, Any] = {"policy": policy, "decode": decode, "videos": videos, "device": "cuda"}
    config = EvalConfig(task_suite, num_trials, **options)
    return replace(config, output=str(root / f"{'+'.join(config.suites)}-{decode}"))
