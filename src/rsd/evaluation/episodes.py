"""An episode as a job: what is to be run, what came of it, and who runs it in a worker."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import Backend
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.delay import StepByStep, VirtualDelay
from rsd.evaluation.realtime import Pace, RealTime
from rsd.evaluation.results import ERROR_PREFIX, EpisodeResult
from rsd.evaluation.rollout import WARMUP_PREDICTIONS, decoded, run_episode
from rsd.evaluation.video import replay_video, video_name
from rsd.evaluation.wall_clock import WallClock
from rsd.sim.motion import Motion
from rsd.sim.views import View
from rsd.types import RSD_ASYNC, Policy

INSTEAD = "instead"  # a video of a failure takes the place of a success's
MAX_ATTEMPTS = 3  # an episode that ends in an error is begun anew at most twice


@dataclass(frozen=True)
class Job:
    """One episode to run. video: "" or the condition ("all", "failures", "instead") under which it gets one.

    attempt: 1 for the first; the attempts before it ended in an error.
    """

    suite: str
    task_id: int
    task_name: str
    instruction: str
    init_state: int
    video: str = ""
    attempt: int = 1

    @property
    def task(self) -> tuple[str, int]:
        return self.suite, self.task_id

    def __str__(self) -> str:
        return f"{self.suite} task {self.task_id}, initial state {self.init_state}, attempt {self.attempt}"


@dataclass(frozen=True)
class Outcome:
    """One episode's end. log: traceback of an error episode, or why its video could not be made."""

    job: Job
    result: EpisodeResult
    log: str = ""
    video: Path | None = None


class JobQueue:
    """Jobs by task. A worker keeps its task while that has jobs left, because another scene costs seconds.

    until: from then on (time.monotonic) no worker gets another job; each gets one.
    """

    def __init__(self, jobs: Iterable[Job], until: float = math.inf) -> None:
        self._until = until
        self._jobs: dict[tuple[str, int], deque[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.task, deque()).append(job)
        self._workers: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def take(self, current: tuple[str, int] | None) -> Job | None:
        """The next job for a worker that has the task `current` loaded, None when nothing is left."""
        if current is not None and time.monotonic() >= self._until:
            return None
        if current is not None and self._jobs.get(current):
            return self._jobs[current].popleft()
        if current is not None:
            self._workers[current] -= 1
        waiting = [task for task, jobs in self._jobs.items() if jobs]
        if not waiting:
            return None
        # The task with the most work per worker; the first one of equals.
        task = max(waiting, key=lambda task: len(self._jobs[task]) / (1 + self._workers[task]))
        self._workers[task] += 1
        return self._jobs[task].popleft()

    def again(self, job: Job) -> Job | None:
        """Put a job that ended in an error back for its next attempt; None if it has had them all."""
        if job.attempt >= MAX_ATTEMPTS:
            return None
        job = replace(job, attempt=job.attempt + 1)
        self._jobs[job.task].append(job)
        return job


class EpisodeRunner:
    """Simulator and policy of one worker: a job in, its outcome out."""

    def __init__(self, config: EvalConfig, backend: Backend, policy: Policy, videos: Path) -> None:
        self._config, self._backend, self._policy, self._videos = config, backend, policy, videos
        self._env: Any = None
        self._task: tuple[str, int] | None = None
        self._warmup = WARMUP_PREDICTIONS

    def run(self, job: Job) -> Outcome:
        if self._env is None or job.task != self._task:
            self.close()
            self._env, self._task = self._backend.make_env(*job.task, self._policy.image_size), job.task
            if self._config.motion != "none":
                self._env.motion = Motion(self._config.motion, self._config.motion_speed, self._config.seed)
            if self._config.view:
                self._env.view = View(tuple(self._config.view.split(",")), self._config.seed)
        try:
            names, pace = names_of(self._config, job), pace_of(self._config)
            rollout = run_episode(self._env, self._policy, **names, warmup=self._warmup, pace=pace)
        except (SystemExit, KeyboardInterrupt) as error:  # the policy's own: Ctrl-C does not reach a worker
            self.close()
            return broken_off(self._config, job, f"{type(error).__name__}, raised by the policy")
        self._warmup, log, video = 0, rollout.traceback, None
        result = replace(rollout.result, attempts=job.attempt)
        if not result.is_error and wants_video(job.video, result):
            video = self._videos / video_name(result)
            try:
                replay_video(self._env, rollout, video)
            except Exception:
                log, video = traceback.format_exc(), None
        if log:  # whatever went wrong may have left the simulator in any state
            self.close()
        return Outcome(job, result, log, video)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def pace_of(config: EvalConfig) -> Pace:
    """How policy and robot take turns in one episode of a run."""
    if config.corrector:
        return StepByStep(config.delay)
    if config.control_hz and (config.meanwhile is not None or config.decode == RSD_ASYNC):
        return WallClock(config.control_hz, config.meanwhile)
    if config.control_hz:
        return RealTime(config.control_hz)
    if config.delay or config.drafter_delay or config.decode == RSD_ASYNC:
        return VirtualDelay(config.delay, config.drafter_delay, config.meanwhile)
    return Pace()


def wants_video(condition: str, result: EpisodeResult) -> bool:
    return condition == "all" or (condition in ("failures", INSTEAD) and not result.success)


class VideoBudget:
    """Who may be filmed: so many episodes more, then failures in the place of successes. Asked before an episode, for
    it is replayed by the worker that ran it, and told of its outcome."""

    def __init__(self, condition: str, left: int, folder: Path) -> None:
        """condition: `--videos`; folder: where the run's videos are."""
        self._condition, self._left = "" if condition == "none" else condition, left
        self._replaceable, self._reserved = sorted(folder.glob("*_success.mp4")), list[Path]()

    def allot(self, job: Job) -> Job:
        if self._condition and self._left > 0:
            self._left -= 1
            return replace(job, video=self._condition)
        if self._condition and self._replaceable:
            self._reserved.append(self._replaceable.pop())
            return replace(job, video=INSTEAD)
        return replace(job, video="")

    def settle(self, outcome: Outcome) -> None:
        if outcome.job.video == INSTEAD:
            reserved = self._reserved.pop()
            if outcome.video is None:
                self._replaceable.append(reserved)
            else:
                reserved.unlink(missing_ok=True)
        elif outcome.video is not None and outcome.result.success:
            self._replaceable.append(outcome.video)
        elif outcome.job.video and outcome.video is None:
            self._left += 1


def broken_off(config: EvalConfig, job: Job, reason: str) -> Outcome:
    """What is recorded of an episode whose worker left nothing: an error, never a failure of the policy."""
    ended: dict[str, Any] = {"success": False, "steps": 0, "wall_s": 0.0, **decoded([])}
    ended |= {"instruction": job.instruction, "failure": f"{ERROR_PREFIX}{reason}", "attempts": job.attempt}
    result = EpisodeResult(**names_of(config, job), **ended)
    return Outcome(job, result, reason)


def names_of(config: EvalConfig, job: Job) -> dict[str, Any]:
    """What a result says of its episode from the beginning."""
    own = {name: getattr(job, name) for name in ("suite", "task_id", "task_name", "init_state")}
    return {**own, "seed": config.seed, "decode": config.decode}
