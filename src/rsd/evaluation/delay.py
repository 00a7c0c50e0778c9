"""Virtual delay: answers take a number of control steps, exactly, whatever the machine's load or clock.

The answer to an observation taken at step k can be used from step k + d on, and the world moves on meanwhile. A policy
looks at one observation at a time: the next one is taken once `execute` steps of the chunk are due and the answer to
the last is there. What the robot does meanwhile is the mode's matter:

- `hold`: it stands still (no motion, the gripper as it was told last), then executes the chunk from its first action.
- `tail`: it goes on with the chunk before, and the answer begins with its action d, those before it being late. Where
  nothing is left it stands still.
- `corrected`: a tail, but what was missed of an answer is made up for (`decoding.correction`).
- `a2c2`: a tail, of which every action is corrected from the newest observation (`models.corrector`).
- `rtc`: a tail, and the target is told what it will have been when the answer is there (`Observation.committed`).
- a decoder with answers (`rsd-async`): the draft begins at once, and the answer overrules what is left of one that does
  not stand. Where the draft would switch the gripper before the answer is there and the target's last answer would not,
  the robot stands still until it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from rsd.chunks import checked_chunk
from rsd.decoding.correction import rest_of_chunk
from rsd.decoding.course import DRAFTED, NOTHING, OWN, REPLACED, Actions, Course, apart_mm, begun, letter
from rsd.evaluation.realtime import Meanwhile, Pace, Stepped, completed
from rsd.types import DRAFT_FIRST, ActionChunk, Corrects, Observation, Policy, RsdError, WrongOption

if TYPE_CHECKING:
    from rsd.evaluation.rollout import Environment


class VirtualDelay(Pace):
    """One episode in which the target's answers take `delay` steps and the drafter's `drafter_delay`, at most as many.

    An episode's first chunk is waited for at a standstill in every mode, and so it misses nothing."""

    def __init__(self, delay: int, drafter_delay: int = 0, meanwhile: str | None = None) -> None:
        """meanwhile: of `--meanwhile`, but a2c2."""
        super().__init__()
        self.delay, self.drafter_delay, self.tells = delay, drafter_delay, meanwhile == "rtc"
        self.tail, self.corrected = meanwhile in ("tail", "corrected", "rtc"), meanwhile == "corrected"
        self._done: list[Actions] = []  # every action so far, [7]
        self._whose = ""  # a letter of each
        self._poses: list[NDArray[np.float32]] = []  # the states [8] before them, of decoders with answers
        self._told = NOTHING.actions, 0  # the target's last answer, and the step of its first action
        self._left = NOTHING  # of what the target said last, from now on

    def predict(self, policy: Policy, observation: Observation) -> ActionChunk:
        """The chunk with all that the target finds of it: when it may be used is a matter of steps, not of time."""
        if self.tells and self._done and self.delay:
            observation = replace(observation, committed=self._filled(self._left, self.delay).actions)
        chunk = completed(policy, checked_chunk(policy.predict(observation)))
        self.stats.append(chunk.stats)
        return chunk

    def execute(self, policy: Policy, env: Environment, chunk: ActionChunk) -> Stepped:
        self.motions.append(Meanwhile())
        start, stepped = len(self._done), None
        for course, last in self._parts(env, chunk):
            if len(course) == 0:
                continue
            stepped = env.step_chunk(course.actions, lambda: self._poses.append(env.proprio()), last)
            self._went(course[: stepped[4]["steps"]])
            if stepped[2] or stepped[3]:
                break
        assert stepped is not None  # at least one step is due
        self._ended_turn(start)
        return stepped

    def _went(self, course: Course) -> None:
        self._done.extend(course.actions)
        self._whose += course.whose

    def _ended_turn(self, start: int) -> None:
        """What was executed since that step belongs to one observation."""
        self.executed.append(np.stack(self._done[start:]))
        self.sources.append(self._whose[start:])
        self._motion.held_steps = int((self.executed[-1][:, :6] == 0).all(1).sum())

    @property
    def _motion(self) -> Meanwhile:
        motion = self.motions[-1]
        assert isinstance(motion, Meanwhile)
        return motion

    def _parts(self, env: Environment, chunk: ActionChunk) -> Iterator[tuple[Course, bool]]:
        """What to execute until the next observation, part by part, and whether that is the last one."""
        if chunk.answer is not None and self._done:
            return self._corrected(env, chunk)
        if chunk.answer is not None:  # the target decides what an episode begins with
            chunk = replace(chunk, actions=chunk.answer)
            self._told = chunk.actions, len(self._done) + self.delay
        return self._waited_for(env, chunk)

    def _begun(self, draft: Actions) -> int:
        """How many of a draft's actions [n, 7] from now on may be executed before the answer is there."""
        answer, since = self._told
        return begun(draft, answer[len(self._done) - since :], float(self._done[-1][6]))

    def _waited_for(self, env: Environment, chunk: ActionChunk) -> Iterator[tuple[Course, bool]]:
        """Where a chunk is the last word on what it was predicted from."""
        given = Course.of(chunk.actions, whose := letter(chunk.stats))
        skipped, due, tail = bool(chunk.stats.skipped), len(chunk.executed), self.tail or chunk.answer is not None
        busy = self.drafter_delay if skipped else self.delay  # until then no other observation is looked at
        wait = self.drafter_delay if chunk.stats.decode == DRAFT_FIRST else busy
        if tail and wait >= len(chunk.actions):
            found = f"{wait}, after which nothing of an answer of {len(chunk.actions)} steps could be used"
            raise WrongOption(f"--delay: expected fewer steps than the policy's chunk has, found {found}")
        if self.tail and self._done:
            start, steps, self._motion.tail_steps = len(self._done), max(due, busy), min(wait, len(self._left))
            yield self._filled(self._left, wait), steps == wait
            rest = Course.of(self._rest(env, chunk.actions, start), whose) if self.corrected else given[wait:]
        else:
            steps = max(wait + due, busy)
            yield self._filled(NOTHING, wait), False
            rest = given if tail else given[:due]
        self._left = rest[steps - wait :]
        yield self._filled(rest, steps - wait), True

    def _corrected(self, env: Environment, chunk: ActionChunk) -> Iterator[tuple[Course, bool]]:
        """What the target said before until `drafter_delay`, then what the draft may begin with; from `delay` on the
        rest of the draft, or of the answer."""
        start, early, late, due = len(self._done), self.drafter_delay, self.delay, len(chunk.executed)
        self._motion.tail_steps = min(early, len(self._left))
        yield self._filled(self._left, early), early == max(due, late)
        draft = Course.of(self._rest(env, chunk.actions, start), DRAFTED)
        drafted = self._motion.drafted_steps = self._begun(draft[: late - early].actions)
        waited = late - early - drafted
        steps = late + max(1, due - early - drafted) if waited else max(due, late)
        yield self._filled(draft[:drafted], late - early), late == steps
        rest = self._overruled(env, chunk, start, draft[drafted:], waited, steps - late)
        self._left = rest[steps - late :].before()
        yield self._filled(rest, steps - late), True

    def _overruled(
        self, env: Environment, chunk: ActionChunk, start: int, rest: Course, waited: int, due: int
    ) -> Course:
        """What to do from now on, the answer being there: the rest of the draft, or of the answer. waited: steps that
        the robot stood still before a switch, by which either is later; due: steps until the next observation."""
        assert chunk.answer is not None
        self._told, motion = (chunk.answer, start + waited), self._motion
        motion.replaced, drafted = 0.0, motion.drafted_steps or 0
        if chunk.stats.stood:
            return rest
        told = Course.of(self._rest(env, chunk.answer, start, waited), REPLACED)
        motion.replaced = 1.0 - drafted / max(1, drafted + due)
        if due:
            motion.replaced_mm = apart_mm(*(self._filled(course, due).actions for course in (rest, told)))
        return told

    def _rest(self, env: Environment, chunk: Actions, start: int, waited: int = 0) -> Actions:
        return rest_of_chunk(chunk, [*self._poses, env.proprio()], self._done, start, waited)

    def _filled(self, course: Course, steps: int) -> Course:
        return course.filled(steps, self._done)


class StepByStep(VirtualDelay):
    """`tail`, but a policy that `Corrects` says each action anew from what is seen at its step."""

    def __init__(self, delay: int) -> None:
        super().__init__(delay, meanwhile="tail")
        self._next = 0  # action of the chunk before that is due

    def execute(self, policy: Policy, env: Environment, chunk: ActionChunk) -> Stepped:
        self.motions.append(Meanwhile())
        start, begins, length = len(self._done), not self._done, len(chunk.actions)
        if self.delay >= length:
            raise RsdError(f"--delay: expected fewer steps than the policy's chunk has, found {self.delay} of {length}")
        late = self.delay if begins else 0  # an episode's first chunk is waited for
        for step in range(max(late + len(chunk.executed), self.delay)):
            before = step < self.delay
            index = length if before and begins else self._next + step if before else step - late
            course = NOTHING.filled(1, self._done)
            if index < length:
                course = Course.of(cast(Corrects, policy).correct(env.observation(), index, before)[None], OWN)
                self._motion.tail_steps += before
            stepped = env.step_chunk(course.actions, lambda: self._poses.append(env.proprio()))
            self._went(course)
            if stepped[2] or stepped[3]:
                break
        self._next = step + 1 - late
        self._ended_turn(start)
        return stepped
