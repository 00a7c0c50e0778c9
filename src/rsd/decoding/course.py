"""A course of actions, and whose each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Where
from rsd.conventions import GRIPPER_OPEN
from rsd.decoding.correction import led
from rsd.types import DRAFT_FIRST, ChunkStats

Actions = NDArray[np.float32]
# whose an executed action is: of a draft; the target's answer where a draft had been made; the target's own where none
# had, or its answer before; nobody's, the robot stood still
DRAFTED, REPLACED, OWN, HELD = WHOSE = "d", "r", "t", "h"
Whose = Annotated[str, Where(lambda text: set(text) <= set(WHOSE), f"of the letters {', '.join(WHOSE)}")]
OF_DRAFTS = (DRAFT_FIRST, "coarse-only", "drafter-only")  # decoders that execute nothing else


@dataclass(frozen=True)
class Course:
    """actions: float32 [n, 7]; whose: a letter of each."""

    actions: Actions
    whose: str

    @classmethod
    def of(cls, actions: Actions, letter: str) -> Course:
        return cls(actions, letter * len(actions))

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, part: slice) -> Course:
        return Course(self.actions[part], self.whose[part])

    def __add__(self, other: Course) -> Course:
        return Course(np.concatenate([self.actions, other.actions]), self.whose + other.whose)

    def before(self) -> Course:
        """The same once another observation is looked at: what replaced a draft is the target's answer before."""
        return Course(self.actions, self.whose.replace(REPLACED, OWN))

    def filled(self, steps: int, done: list[Actions]) -> Course:
        """So many of the actions; where there are too few, the robot stands still, its gripper as it was told last.
        done: the actions [7] executed before."""
        lacking = steps - len(self)
        if lacking <= 0:
            return self[:steps]
        last = [*done[-1:], *self.actions[-1:]]
        still = np.zeros((lacking, 7), np.float32)
        still[:, 6] = last[-1][6] if last else GRIPPER_OPEN
        return self + Course.of(still, HELD)


NOTHING = Course(np.empty((0, 7), np.float32), "")


def letter(stats: ChunkStats) -> str:
    """Whose the actions of a chunk are that nothing corrects."""
    return DRAFTED if stats.skipped or stats.decode in OF_DRAFTS else OWN


def begun(draft: Actions, told: Actions, gripper: float) -> int:
    """How many of a draft's actions [n, 7] may be executed before the target's answer is there: those before one that
    opens or closes the gripper, or all if its last answer does so by then or a step later. told: what is left of that,
    from the same step on; gripper: as it was told last."""
    switched, switches = (np.sign(actions[:, 6]) != np.sign(gripper) for actions in (draft, told))
    first = int(switched.argmax()) if switched.any() else len(draft)
    return len(draft) if switches[: first + 2].any() else first


def apart_mm(one: Actions, other: Actions) -> float:
    """How far two courses of as many actions [n, 7] lead from each other, mm."""
    return 1e3 * float(np.linalg.norm((led(one) - led(other))[:3]))
