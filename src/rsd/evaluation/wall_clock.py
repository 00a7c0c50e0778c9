"""The wall clock: an action begins every 1/hz seconds, and the physics goes on while the policy thinks beside it.

The modes are those of `delay`, but an answer can be used as soon as it is there: from the next action on. So outcomes
depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rsd.chunks import checked_chunk
from rsd.decoding.course import DRAFTED, NOTHING, OWN, Course, letter
from rsd.evaluation.delay import VirtualDelay
from rsd.evaluation.realtime import Meanwhile, Stepped, completed
from rsd.types import DRAFT_FIRST, RSD_ASYNC, ActionChunk, Policy

if TYPE_CHECKING:
    from rsd.evaluation.rollout import Environment


class WallClock(VirtualDelay):
    """One episode by the clock."""

    def __init__(
        self,
        hz: float,
        meanwhile: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        executor: Executor | None = None,
    ) -> None:
        """executor: runs one call of the policy after another, beside the caller; by default a thread."""
        super().__init__(0, meanwhile=meanwhile)
        self._period, self._clock, self._sleep = 1.0 / hz, clock, sleep
        self._executor = executor or ThreadPoolExecutor(1, "policy")
        self._due: float | None = None  # when the next action begins

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        del self.motions[len(self.stats) :]  # of a chunk that was never there

    def turn(self, policy: Policy, env: Environment) -> Stepped:
        """From one observation to the next. What the policy raises ends the episode."""
        if self._done:
            env.redraw()
        self.motions.append(Meanwhile(late_steps=0, late_ms=0.0))
        observation = env.observation()
        first = self._executor.submit(lambda: checked_chunk(policy.predict(observation)))
        answer = self._executor.submit(lambda: completed(policy, first.result()))
        stepped = self._until_answered(env, first, answer)
        chunk = answer.result()  # also where the episode has ended meanwhile
        self.stats.append(chunk.stats)
        self._ended_turn(len(self._done) - self._gone)
        return stepped

    def _until_answered(self, env: Environment, first: Future[ActionChunk], answer: Future[ActionChunk]) -> Stepped:
        """first: the chunk; answer: that chunk complete."""
        start, motion = len(self._done), self._motion
        draft, until, ahead, begun = NOTHING, -1, self._left, 0
        stepped: Stepped = None, 0.0, False, False, {}
        while True:
            self._wait()
            self._gone = gone = len(self._done) - start
            if motion.draft_delay is None and first.done():
                chunk, motion.draft_delay = first.result(), gone
                if chunk.stats.decode == DRAFT_FIRST:
                    ahead = self._whole(env, chunk, start)
                elif chunk.stats.decode == RSD_ASYNC and start:
                    draft = Course.of(self._rest(env, chunk.actions, start), DRAFTED)
                    ahead = draft[: (begun := self._begun(draft.actions))]
            if motion.answer_delay is None and answer.done():
                chunk, motion.answer_delay = answer.result(), gone
                drafted = min(gone - (motion.draft_delay or 0), begun)
                ahead, until = self._answered(env, chunk, start, ahead, draft[drafted:], drafted)
            if motion.answer_delay is not None and gone >= until:
                self._left = ahead.before()
                return stepped
            stepped = self._step(env, self._filled(ahead, 1))
            ahead = ahead[1:]
            if stepped[2] or stepped[3]:
                self._gone = gone + 1
                return stepped

    def _whole(self, env: Environment, chunk: ActionChunk, start: int) -> Course:
        """What to do from now on of a chunk that is the last word."""
        actions = chunk.actions if self.tail else chunk.executed
        if self.corrected and start:
            actions = self._rest(env, chunk.actions, start)
        elif self.tail and start:
            actions = chunk.actions[len(self._done) - start :]
        return Course.of(actions, letter(chunk.stats))

    def _answered(
        self, env: Environment, chunk: ActionChunk, start: int, ahead: Course, rest: Course, drafted: int
    ) -> tuple[Course, int]:
        """The answer being there: what to do from now on, until how many steps after the observation. rest: of the
        draft, after the `drafted` steps executed of it."""
        gone, due, came = len(self._done) - start, len(chunk.executed), self._motion.draft_delay or 0
        if chunk.stats.decode == DRAFT_FIRST:
            return ahead, due if self.tail and start else due + came
        if chunk.answer is None:
            return self._whole(env, chunk, start), due if self.tail and start else due + gone
        if not start:
            self._told = chunk.answer, gone
            return Course.of(chunk.answer, OWN), due + gone
        self._motion.drafted_steps = drafted
        waited = gone - came - drafted if len(rest) else 0  # else nothing was left of the draft
        return self._overruled(env, chunk, start, rest, waited, max(0, due + waited - gone)), due + waited

    def _step(self, env: Environment, course: Course) -> Stepped:
        """One action, from now on; who is less than a period late catches up."""
        now, motion = self._clock(), self._motion
        begun = now if self._due is None or now > self._due + self._period else self._due
        self._poses.append(env.proprio())
        stepped = env.step_chunk(course.actions, None, False)
        self._went(course)
        self._due = begun + self._period
        if (late := self._clock() - self._due) > 0:
            motion.late_steps, motion.late_ms = (motion.late_steps or 0) + 1, max(motion.late_ms or 0.0, 1e3 * late)
        return stepped

    def _wait(self) -> None:
        """Until the next action is due."""
        if self._due is not None and (left := self._due - self._clock()) > 0:
            self._sleep(left)
