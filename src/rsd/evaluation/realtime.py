"""How policy and robot take turns: one after the other, as fast as possible, or in real time as on a robot.

In real time an action begins every 1/hz seconds of wall time, and what the policy has left to do once its chunk is out
(`Completes`) is done in a thread of its own while that chunk is executed. Nothing that is computed depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rsd.chunks import checked_chunk
from rsd.decoding.course import letter
from rsd.types import ActionChunk, ChunkStats, Completes, Observation, Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rsd.evaluation.rollout import Environment

WAIT = "wait"  # the stage of a chunk that had to wait for the pending verification of the one before; in `total`, too
Stepped = tuple[Any, float, bool, bool, dict[str, Any]]


@dataclass
class Motion:
    """How the robot came to a chunk, and how it moved by it. Of an episode's first chunk the first three are None.

    pause_ms: how long the robot stood still before it: from the end of the last action's period to the beginning of
        this chunk's first action. Cameras are drawn in that time, it is waited for a pending verification, and
        predicted.
    pause_without_drawing_ms: less the drawing, which a robot's cameras do by themselves; what of it was needed by the
        pending verification anyway stays in.
    waited: whether the pending verification was still under way when the observation was there; None of a policy
    without one. late_steps: actions whose physics was not computed when their period ended. late_ms: the latest of them
    by so much.
    """

    pause_ms: float | None = None
    pause_without_drawing_ms: float | None = None
    waited: bool | None = None
    late_steps: int = 0
    late_ms: float = 0.0


@dataclass
class Meanwhile:
    """What the robot did of a chunk's steps while it waited for answers (`evaluation.delay`); None: a matter of other
    decoders.

    held_steps: it stood still. tail_steps: it went on with the answer before. drafted_steps: of a draft before the
    target's answer to the same observation was there; replaced: the share of the chunk's steps from then on that the
    target's answer took from the draft; replaced_mm: how far apart the two lead.
    By the wall clock: draft_delay, answer_delay: steps until they were there; late_steps: actions whose physics was not
    computed when their period ended, late_ms: the latest of them by so much.
    """

    held_steps: int = 0
    tail_steps: int = 0
    drafted_steps: int | None = None
    replaced: float | None = None
    replaced_mm: float | None = None
    draft_delay: int | None = None
    answer_delay: int | None = None
    late_steps: int | None = None
    late_ms: float | None = None


class Pace:
    """One episode's turns, as fast as possible: the simulator rests while the policy computes, and the other way round.

    A context: leaving it, nothing is under way any more. stats: one a chunk, complete as soon as what was left of it is
    done. motions: one a chunk, if known. executed: a chunk's actions, float32 [n, 7]; seen: the images before it;
    sources: whose each of them is, letters of `decoding.course`, where time counts.
    """

    def __init__(self) -> None:
        self.stats: list[ChunkStats] = []
        self.motions: list[Motion | Meanwhile] = []
        self.executed: list[NDArray[np.float32]] = []
        self.seen: list[NDArray[np.uint8]] = []
        self.sources: list[str] = []

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def warm_up(self, policy: Policy, observation: Observation) -> None:
        """A prediction that nobody executes, and what follows it."""
        policy.predict(observation)

    def turn(self, policy: Policy, env: Environment) -> Stepped:
        """One chunk: observe, predict, execute."""
        observation = env.observation()
        self.seen.append(observation.images)
        return self.execute(policy, env, self.predict(policy, observation))

    def predict(self, policy: Policy, observation: Observation) -> ActionChunk:
        chunk = checked_chunk(policy.predict(observation))  # what is recorded has to be readable
        self.stats.append(chunk.stats)
        return chunk

    def execute(self, policy: Policy, env: Environment, chunk: ActionChunk) -> Stepped:
        self.stats[-1] = completed(policy, chunk).stats
        return self.kept(chunk, env.step_chunk(chunk.executed))

    def kept(self, chunk: ActionChunk, stepped: Stepped) -> Stepped:
        """What came of a chunk, written down."""
        self.executed.append(chunk.actions[: stepped[4]["steps"]].copy())
        return stepped


def completed(policy: Policy, chunk: ActionChunk) -> ActionChunk:
    """The policy's last chunk with all that it still finds of it, which takes its time."""
    found = policy.complete() if isinstance(policy, Completes) else None
    return chunk if found is None else checked_chunk(found)


class RealTime(Pace):
    """An action every 1/hz seconds. The periods of a chunk are counted from its first action, so that nothing drifts;
    a step that takes longer than its period is recorded as late, and the next one begins at once."""

    def __init__(
        self,
        hz: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        executor: Executor | None = None,
    ) -> None:
        """executor: runs one pending verification at a time, beside the caller; by default a thread."""
        super().__init__()
        self._period = 1.0 / hz
        self._clock, self._sleep = clock, sleep
        self._executor = executor or ThreadPoolExecutor(1, "verify-pending")
        self._following: Future[tuple[ActionChunk | None, float]] | None = None
        self._followed = -math.inf  # when the last pending verification was done
        self._waited: bool | None = None
        self._still: float | None = None  # since when the robot stands still
        self._drawn = 0.0  # when its cameras' images were there

    def __exit__(self, *_: object) -> None:
        """Wait for the pending verification, whatever happened: its exception, beside another, ends the episode."""
        try:
            self._join()
        finally:
            self._executor.shutdown()

    def warm_up(self, policy: Policy, observation: Observation) -> None:
        policy.predict(observation)
        self._verify_pending(policy)
        self._join()

    def predict(self, policy: Policy, observation: Observation) -> ActionChunk:
        asked = self._clock()
        self._waited = self._join()
        wait_ms = 1e3 * (self._clock() - asked)
        chunk = checked_chunk(policy.predict(observation))
        if self._waited:
            total = chunk.stats.latency_ms["total"] + wait_ms
            latency = {**chunk.stats.latency_ms, WAIT: wait_ms, "total": total}
            chunk = replace(chunk, stats=replace(chunk.stats, latency_ms=latency))
        self.stats.append(chunk.stats)
        return chunk

    def execute(self, policy: Policy, env: Environment, chunk: ActionChunk) -> Stepped:
        motion = Motion(waited=self._waited)
        self.motions.append(motion)
        times: list[float] = []  # when the chunk began, then when the physics of each of its actions was computed

        def before_step() -> None:
            now = self._clock()
            if times:
                self._wait_until(times[0] + len(times) * self._period)
            else:
                self._end_pause(motion, now)
                self._verify_pending(policy)  # the robot moves already
            times.append(now)

        drawing_s = env.drawing_s
        stepped = self.kept(chunk, env.step_chunk(chunk.executed, before_step))
        self.sources.append(letter(chunk.stats) * len(self.executed[-1]))
        self._drawn = self._clock()
        times.append(self._drawn - (env.drawing_s - drawing_s))  # drawing is the last that happens
        due = [times[0] + k * self._period for k in range(len(times))]
        late = [end - until for end, until in zip(times[1:], due[1:], strict=True) if end > until]
        motion.late_steps, motion.late_ms = len(late), 1e3 * max(late, default=0.0)
        self._still = max(due[-1], times[-1])
        self._wait_until(self._still)
        return stepped

    def _end_pause(self, motion: Motion, now: float) -> None:
        if self._still is None:
            return
        motion.pause_ms = 1e3 * (now - self._still)
        drawing = max(0.0, self._drawn - max(self._still, self._followed))
        motion.pause_without_drawing_ms = motion.pause_ms - 1e3 * drawing

    def _verify_pending(self, policy: Policy) -> None:
        if isinstance(policy, Completes):
            self._following = self._executor.submit(lambda: (policy.complete(), self._clock()))

    def _join(self) -> bool | None:
        """Wait for the pending verification and raise what it raised -> whether it was still at work; None: none."""
        following, self._following = self._following, None
        if following is None:
            return None
        waited = not following.done()
        found, self._followed = following.result()
        if found is not None and self.stats:
            complete, before = checked_chunk(found).stats, self.stats[-1].latency_ms
            kept = {stage: before[stage] for stage in (WAIT, "total") if stage in before}
            self.stats[-1] = replace(complete, latency_ms={**complete.latency_ms, **kept})
        return waited

    def _wait_until(self, due: float) -> None:
        if (left := due - self._clock()) > 0:
            self._sleep(left)
