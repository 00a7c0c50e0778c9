"""Why an episode failed, as far as the simulator can tell: what happened to the object that was to be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsd.sim.libero import LiberoEnv

MOVED = 0.02  # m: less is settling and brushing past
LIFTED = 0.03  # m above where it stood after the wait steps


class WatchedLibero(LiberoEnv):
    """LiberoEnv that follows its objects at the end of each chunk. States and images are those of LiberoEnv, but for an
    episode's end, which no policy sees."""

    draws_end = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        self._start = self._positions()
        self._moved = np.zeros(len(self._start))
        self._lifted = np.zeros(len(self._start))
        return result

    def step_chunk(
        self, actions: ArrayLike, before_step: Callable[[], None] | None = None, draw: bool = True
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        result = super().step_chunk(actions, before_step, draw)
        travel = self._positions() - self._start
        self._moved = np.maximum(self._moved, np.linalg.norm(travel, axis=1))
        self._lifted = np.maximum(self._lifted, travel[:, 2])
        return result

    def failure_detail(self) -> str:
        """The first goal that is not met, in words; "" if all are."""
        names = list(self.simulation.objects_dict)
        for goal in self.simulation.parsed_problem["goal_state"]:
            if self.simulation._eval_predicate(goal):
                continue
            if goal[1] not in names:
                return f"goal not met: {' '.join(goal).lower()}"
            target = names.index(goal[1])
            if self._lifted[target] >= LIFTED:
                height = self._positions()[target, 2] - self._start[target, 2]
                return "lifted, still in the air" if height >= LIFTED else "lifted, put down off the goal"
            others = [i for i in np.argsort(-self._lifted) if i != target and self._lifted[i] >= LIFTED]
            if others:
                return f"another object lifted: {names[others[0]]}"
            return "pushed, never lifted" if self._moved[target] >= MOVED else "never moved"
        return ""

    def _positions(self) -> NDArray[np.float64]:
        """[objects, 3] in metres."""
        bodies = [self.simulation.obj_body_id[name] for name in self.simulation.objects_dict]
        return np.asarray(self.data.xpos[bodies], dtype=np.float64).copy()
