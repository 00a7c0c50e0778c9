"""Scenes that move: the asked-for thing, or where it is to go, slides along a line at constant speed, as on a belt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rsd.checks import RsdError
from rsd.conventions import CONTROL_HZ

if TYPE_CHECKING:
    from rsd.sim.libero import LiberoEnv

THING = "thing"
REACH = 0.08  # m from where it started, at which it turns round


@dataclass(frozen=True)
class Motion:
    """what: the asked-for `thing`, until the gripper has touched it, or the `destination`, always; speed in m/s; seed:
    of the direction, together with the task and the initial state."""

    what: str
    speed: float
    seed: int = 0


class Slide:
    """One episode's motion, REACH to one side of the start, then to the other, and so on."""

    def __init__(self, env: LiberoEnv, motion: Motion, state: int) -> None:
        """Raises RsdError where that thing is fixed to the scene."""
        simulation, self._env, self._motion, goal = env.simulation, env, motion, env.goal[0]
        where = f"{env.suite} task {env.task.task_id}"
        self._object = simulation.objects_dict[sliding(motion.what, goal, simulation.objects_dict, where)]
        first, _ = simulation.sim.model.get_joint_qpos_addr(self._object.joints[-1])
        self._place = slice(first, first + 2)
        angle = np.random.default_rng([motion.seed, env.task.task_id, state]).uniform(0.0, 2.0 * np.pi)
        self._along = np.array([np.cos(angle), np.sin(angle)])
        self._steps, self._ended = 0, False

    def step(self) -> None:
        """Before each control step: so far, whatever lies in the way."""
        simulation = self._env.simulation
        if self._motion.what == THING and simulation.check_contact(simulation.robots[0].gripper, self._object):
            self._ended = True
        if self._ended:
            return
        before, self._steps = offset(self._motion, self._steps), self._steps + 1
        self._env.data.qpos[self._place] += (offset(self._motion, self._steps) - before) * self._along


def sliding(what: str, goal: Sequence[str], objects: Iterable[str], where: str) -> str:
    """The object that slides; raises RsdError where what a goal names is fixed to the scene."""
    asked = goal[1] if what == THING else goal[-1]
    names = [name for name in objects if asked == name or asked.startswith(f"{name}_")]
    if not names:
        found = f"{asked} of {where}, which is fixed to the scene"
        raise RsdError(f"--motion {what}: expected something that can slide, found {found}; leave the task out")
    return max(names, key=len)


def offset(motion: Motion, steps: int) -> float:
    """Metres along the line after so many control steps: to REACH, back beyond the start to -REACH, and so on."""
    way = motion.speed * steps / CONTROL_HZ
    return REACH - abs((way + REACH) % (4 * REACH) - 2 * REACH)
