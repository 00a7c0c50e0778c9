"""Draws the fixed evaluation states of the permuted suites: python scripts/make_permuted_states.py SUITE [--workers N].

State k of a task is the first draw of `fixed_layout(suite, task, k)` in which nothing slides while the robot waits and
which the scripted expert solves within the step limit (of a task beyond the expert: in which nothing slides). Writes
src/rsd/sim/states/SUITE.npz (float32, one array a task) and prints its SHA-256, which belongs into
`rsd.sim.suites.STATES_SHA256`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from rsd.checks import Checked, Some, one_of
from rsd.cli import Command, dispatch
from rsd.expert import expert
from rsd.expert.goals import goals_of
from rsd.sim import permuted
from rsd.sim.libero import BENCHMARK_SEED, UNSTABLE_DISTANCE, LiberoEnv
from rsd.sim.suites import fixed_layout, suite_tasks
from rsd.types import RsdError

STATES = 50
ATTEMPTS = 30
FOLDER = Path(__file__).resolve().parent.parent / "src" / "rsd" / "sim" / "states"


@dataclass(frozen=True)
class StatesConfig(Checked):
    suite: tyro.conf.Positional[Annotated[str, one_of(permuted.SUITES)]]
    workers: Some = 2
    states: Some = STATES


class FixedLayouts(LiberoEnv):
    def draw_fixed_state(self, k: int, attempt: int) -> NDArray[np.float64] | None:
        """A state for the fixed layout k of a permuted suite, [1 + nq + nv], in which nothing slides; else None. The
        episode has begun there when it returns."""
        self._arrange(fixed_layout(self.suite, self.task.task_id, k))
        state = self._draw_state(np.random.default_rng([self.task.task_id, k, attempt]), BENCHMARK_SEED)
        if state is None or self._settle(state.copy()) > UNSTABLE_DISTANCE:
            return None
        return state


@functools.lru_cache(maxsize=1)
def environment(suite: str, task: int) -> FixedLayouts:
    return FixedLayouts(suite, task, cameras=False)


def draw(suite: str, task: int, k: int) -> tuple[NDArray[np.float32], int]:
    """State k of a task, and how many draws were left behind."""
    env = environment(suite, task)
    for attempt in range(ATTEMPTS):
        state = env.draw_fixed_state(k, attempt)
        goals = goals_of(env.goal)
        if state is None or env.success():
            continue
        try:
            if goals is None or expert.run(env, goals).success:
                return state.astype(np.float32), attempt
        except RsdError:  # no grasp fits a thing that lies so
            continue
    raise RsdError(f"{suite} task {task} state {k}: no draw of {ATTEMPTS} that the expert solves")


def main(args: StatesConfig) -> None:
    tasks = [task.task_id for task in suite_tasks(args.suite)]
    jobs = [(args.suite, task, k) for task in tasks for k in range(args.states)]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(draw, *zip(*jobs, strict=True), chunksize=5))
    of_task = {t: [each for (_, task, _), each in zip(jobs, found, strict=True) if task == t] for t in tasks}
    arrays = {f"task_{t}": np.stack([state for state, _ in each]) for t, each in of_task.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{args.suite}.npz").write_bytes(content.getvalue())
    left = {t: sum(behind for _, behind in each) for t, each in of_task.items()}
    print(f"{args.suite}: {len(found)} states, {len(content.getvalue()) / 1e3:.0f} kB, left behind by task {left}")
    print(f'"{args.suite}": "{hashlib.sha256(content.getvalue()).hexdigest()}",')


if __name__ == "__main__":
    command = Command("", "make_permuted_states:main", "StatesConfig")
    sys.exit(dispatch(sys.argv[1:], command, "make_permuted_states.py"))
