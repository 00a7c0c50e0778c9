"""Virtual delay: answers take a number of control steps, exactly, whatever the machine's load or clock.

The answer to an observation taken at step k can be used from step k + d on, and the world moves on meanwhile. A policy
looks at one observation at a time: the next one is taken once `execute` steps of the chunk are due and the answer to
the last is there. What the robot does meanwhile is the mode's matter:

- `hold`: it stands still (no motion, the gripper as it was told last), then executes the chunk from its first action.
- `tail`: it goes on with the chunk before, and the answer begins with its action d, those before it being late. Where
  nothing is left it stands still.
- `corrected`: a tail, but what was missed of an answer is made up for (`decoding.correction`).
- a decoder with answers (`rsd-async`): the draft begins at once if the target let the one before stand; its answer
  overrules what is left of a draft that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd.chunks import checked_chunk
from rsd.conventions import GRIPPER_OPEN
from rsd.decoding.correction import led, rest_of_chunk
from rsd.evaluation.realtime import Meanwhile, Pace, Stepped
from rsd.types import DRAFT_FIRST, ActionChunk, Completes, Observation, Policy, RsdError

if TYPE_CHECKING:
    from rsd.evaluation.rollout import Environment

Actions = NDArray[np.float32]
NOTHING: Actions = np.empty((0, 7), np.float32)


class VirtualDelay(Pace):
    """One episode in which the target's answers take `delay` steps and the drafter's `drafter_delay`, at most as many.

    An episode's first chunk is waited for at a standstill in every mode, and so it misses nothing."""

    def __init__(
        self,
        delay: int,
        drafter_delay: int = 0,
        *,
        tail: bool = False,
        corrected: bool = False,
        always: bool = False,
    ) -> None:
        """always: a draft begins whatever the target made of the one before."""
        super().__init__()
        self.always = always
        self.delay, self.drafter_delay, self.tail, self.corrected = delay, drafter_delay, tail or corrected, corrected
        self._done: list[Actions] = []  # every action so far, [7]
        self._poses: list[NDArray[np.float32]] = []  # the states [8] before them, of decoders with answers
        self._trusted = False  # the target let the last draft stand
        self._left = NOTHING  # of what the target said last, from now on

    def predict(self, policy: Policy, observation: Observation) -> ActionChunk:
        """The chunk with all that the target finds of it: when it may be used is a matter of steps, not of time."""
        chunk = checked_chunk(policy.predict(observation))
        if isinstance(policy, Completes):
            chunk = checked_chunk(policy.complete() or chunk)
        self.stats.append(chunk.stats)
        return chunk

    def execute(self, policy: Policy, env: Environment, chunk: ActionChunk) -> Stepped:
        self.motions.append(Meanwhile())
        start, stepped = len(self._done), None
        for actions, last in self._parts(env, chunk):
            if len(actions) == 0:
                continue
            stepped = env.step_chunk(actions, lambda: self._poses.append(env.proprio()), last)
            self._done.extend(actions[: stepped[4]["steps"]])
            if stepped[2] or stepped[3]:
                break
        assert stepped is not None  # at least one step is due
        self.executed.append(np.stack(self._done[start:]))
        self._motion.held_steps = int((self.executed[-1][:, :6] == 0).all(1).sum())
        return stepped

    @property
    def _motion(self) -> Meanwhile:
        motion = self.motions[-1]
        assert isinstance(motion, Meanwhile)
        return motion

    def _parts(self, env: Environment, chunk: ActionChunk) -> Iterator[tuple[Actions, bool]]:
        """What to execute until the next observation, part by part, and whether that is the last one."""
        if chunk.answer is not None and self._done:
            return self._corrected(env, chunk, chunk.answer)
        if chunk.answer is not None:  # the target decides what an episode begins with
            self._trusted = bool(chunk.stats.stood)
            chunk = replace(chunk, actions=chunk.answer)
        return self._waited_for(env, chunk)

    def _waited_for(self, env: Environment, chunk: ActionChunk) -> Iterator[tuple[Actions, bool]]:
        """Where a chunk is the last word on what it was predicted from."""
        skipped, due, tail = bool(chunk.stats.skipped), len(chunk.executed), self.tail or chunk.answer is not None
        busy = self.drafter_delay if skipped else self.delay  # until then no other observation is looked at
        wait = self.drafter_delay if chunk.stats.decode == DRAFT_FIRST else busy
        if tail and wait >= len(chunk.actions):
            found = f"{wait}, after which nothing of an answer of {len(chunk.actions)} steps could be used"
            raise RsdError(f"--delay: expected fewer steps than the policy's chunk has, found {found}")
        if tail and self._done:
            start, steps, self._motion.tail_steps = len(self._done), max(due, busy), min(wait, len(self._left))
            yield self._filled(self._left, wait), steps == wait
            rest = self._rest(env, chunk.actions, start) if self.corrected else chunk.actions[wait:]
        else:
            steps = max(wait + due, busy)
            yield self._filled(NOTHING, wait), False
            rest = chunk.actions if tail else chunk.executed
        self._left = rest[steps - wait :]
        yield self._filled(rest, steps - wait), True

    def _corrected(self, env: Environment, chunk: ActionChunk, answer: Actions) -> Iterator[tuple[Actions, bool]]:
        """The draft from `drafter_delay` on, the target's answer from `delay` on. Before that, instead of a draft that
        would switch the gripper, and where the draft before did not stand, what the target said before."""
        start, early, late, motion = len(self._done), self.drafter_delay, self.delay, self._motion
        steps, told = max(len(chunk.executed), late), self._filled(self._left, late)
        yield told[:early], early == steps
        draft = self._rest(env, chunk.actions, start)
        drafted = agreed(draft[: late - early], told[early:]) if self._trusted or self.always else 0
        motion.drafted_steps, self._trusted = drafted, bool(chunk.stats.stood)
        motion.tail_steps = min(early, len(self._left)) + max(0, min(late, len(self._left)) - early - drafted)
        meanwhile = np.concatenate([draft[:drafted], told[early + drafted :]])
        yield meanwhile, late == steps
        stands = bool(chunk.stats.stood) and drafted == late - early
        rest = draft[drafted:] if stands else self._rest(env, answer, start)
        after = self._filled(rest, steps - late)
        motion.replaced = 1.0 - (drafted + (len(after) if stands else 0)) / max(1, steps - early)
        if motion.replaced:
            motion.replaced_mm = apart_mm(self._filled(draft, steps - early), np.concatenate([meanwhile, after]))
        self._left = rest[len(after) :]
        yield after, True

    def _rest(self, env: Environment, chunk: Actions, start: int) -> Actions:
        return rest_of_chunk(chunk, [*self._poses, env.proprio()], self._done, start)

    def _filled(self, actions: Actions, steps: int) -> Actions:
        """So many of the actions; where there are too few, the robot stands still, its gripper as it was told last."""
        lacking = steps - len(actions)
        if lacking <= 0:
            return actions[:steps]
        last = [*self._done[-1:], *actions[-1:]]
        still = np.zeros((lacking, 7), np.float32)
        still[:, 6] = last[-1][6] if last else GRIPPER_OPEN
        return np.concatenate([actions, still])


def agreed(draft: Actions, told: Actions) -> int:
    """How many of a draft's actions [n, 7] come before one with another gripper than the target has told of its step;
    told: at least as many."""
    differs = np.sign(draft[:, 6]) != np.sign(told[: len(draft), 6])
    return int(differs.argmax()) if differs.any() else len(draft)


def apart_mm(one: Actions, other: Actions) -> float:
    """How far two courses of as many actions [n, 7] lead from each other, mm."""
    return 1e3 * float(np.linalg.norm((led(one) - led(other))[:3]))
