"""The scripted expert: the feedback laws of a task's goals, one after the other, from privileged state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsd.expert.articulated import MovePart
from rsd.expert.goals import LAYER, Goals, goals_of, kind, task_goals
from rsd.expert.grasps import TIP_BELOW_SITE, GraspMode
from rsd.expert.inserting import Insert
from rsd.expert.noise import Disturbance
from rsd.expert.pick_and_place import PickAndPlace
from rsd.expert.pushing import DragPlate, PushPart
from rsd.expert.scene import Scene, Vector
from rsd.sim.libero import LiberoEnv
from rsd.sim.permuted import is_permuted
from rsd.types import RsdError

CRAMPED_NOISE = 0.4  # strength of the noise in the drawer
CLEAR = 0.02  # m of the open fingertips over whatever is under the hand; then it may turn to the next goal
TAIL_STEPS = 6  # steps recorded after success: opening the fingers and rising
# told of every step before it is executed: actions [7] at the present state, as it is executed and clean
Record = Callable[[LiberoEnv, Vector, Vector], Any]


@dataclass(frozen=True)
class ExpertResult:
    """success: within the step limit; steps: until success (or until it gave up); attempts: grasps tried."""

    success: bool
    steps: int
    attempts: int


class Chain:
    """The law for all goals of a task, in their order.

    Which one is on follows from the scene: the first that does not hold. A hand that has closed on something finishes
    that first, and between two goals the open hand leaves upward until it is clear, so that a camera can tell the
    change too. A goal that is undone later is taken up again.
    """

    def __init__(
        self, scene: Scene, goals: Goals, mode: GraspMode = "canonical", rng: np.random.Generator | None = None
    ) -> None:
        self.scene, self.goals = scene, goals
        self._mode: GraspMode = mode
        self._rng = rng
        self._attempts_before = 0
        self._take_up(self._next() or 0)

    @property
    def attempts(self) -> int:
        """Grasps tried."""
        return self._attempts_before + self._law.attempts

    @property
    def cramped(self) -> bool:
        """The hand works where there is little room."""
        return self._law.cramped

    @property
    def gave_up(self) -> bool:
        """The goal at hand is out of reach."""
        return self._law.gave_up and self._next() == self.on

    def action(self) -> Vector:
        """The clean action [7] at the present state."""
        following = self._next()
        if following in (None, self.on) or self._law.closed:
            return self._law.action()
        if not self._clear():
            return self._law.leave()
        self._attempts_before = self.attempts
        self._take_up(following)
        return self._law.action()

    def _next(self) -> int | None:
        """The first goal that does not hold."""
        return next((i for i, goal in enumerate(self.goals) if not self.scene.env.holds(*goal.words)), None)

    def _take_up(self, number: int) -> None:
        self.on, goal = number, self.goals[number]
        self._law: PickAndPlace | PushPart | MovePart | DragPlate
        if goal.destination and not goal.dragged:
            put = Insert if LAYER.fullmatch(kind(goal.destination)) else PickAndPlace
            self._law = put(self.scene, goal, self._mode, self._rng)
        elif goal.dragged:
            self._law = DragPlate(self.scene, goal)
        else:
            self._law = (PushPart if goal.predicate == "close" else MovePart)(self.scene, goal)

    def _clear(self) -> bool:
        """The hand is above everything that stands around it."""
        eef = self.scene.eef
        return bool(eef[2] > self.scene.corridor_top(eef, eef, ignore=()) + TIP_BELOW_SITE + CLEAR)


def asked_goals(env: LiberoEnv) -> Goals:
    """What the present episode asks for. Raises RsdError where the expert cannot do it."""
    if not is_permuted(env.suite):
        return task_goals(env.suite, env.task.task_id)
    goals = goals_of(env.goal)
    if goals is None:
        wanted = " and ".join(" ".join(words) for words in env.goal)
        raise RsdError(f"scripted expert: {env.instruction!r} asks for {wanted}, which it cannot do; take another task")
    return goals


def run(
    env: LiberoEnv,
    goals: Goals | None = None,
    record: Record | None = None,
    rng: np.random.Generator | None = None,
    noise: Disturbance | None = None,
    mode: GraspMode = "canonical",
    tail_steps: int = TAIL_STEPS,
    draw: bool = False,
) -> ExpertResult:
    """Runs the expert from the present state of a freshly reset environment.

    goals: the task's own by default; success is that LIBERO's predicates of all hold. After it, `tail_steps` more
    steps are executed and recorded (the fingers open and rise). `draw`: cameras draw every step, for a record that
    keeps images. Raises RsdError for a task that the expert cannot do.
    """
    goals = goals or asked_goals(env)
    law = Chain(Scene(env), goals, mode, rng)
    success_at: int | None = None
    step = 0
    while step < env.max_steps + tail_steps:
        if step - success_at >= tail_steps if success_at is not None else step >= env.max_steps or law.gave_up:
            break
        clean = law.action()
        executed = clean
        if noise is not None and success_at is None:
            executed = noise.disturb(clean, CRAMPED_NOISE if law.cramped else 1.0)
        if record is not None:
            record(env, executed, clean)
        env.advance(executed, draw)
        step += 1
        if success_at is None and all(env.holds(*goal.words) for goal in goals):
            success_at = step
    return ExpertResult(success_at is not None, step if success_at is None else success_at, law.attempts)
