"""Why an episode of the expert failed, as far as its last state tells."""

from __future__ import annotations

from rsd.expert.expert import asked_goals
from rsd.expert.grasps import WHOLE
from rsd.expert.scene import Scene
from rsd.sim.libero import LiberoEnv

FALLEN_UP = 0.7  # z of an object's own z axis


def failure_class(env: LiberoEnv, steps: int) -> str:
    """The first goal that does not hold, what became of its object, and whether time ran out or the expert gave up.
    Raises RsdError for a task that it cannot do."""
    scene = Scene(env)
    goal = next((each for each in asked_goals(env) if not env.holds(*each.words)), None)
    if goal is None:
        return "undone after success"
    ended = "time ran out" if steps >= env.max_steps else "gave up"
    if goal.target not in scene.movable:
        return f"{' '.join(goal.words)}: not moved far enough, {ended}"
    if scene.grasped(goal.target):
        return f"{' '.join(goal.words)}: still held, {ended}"
    fallen = not goal.dragged and goal.hold is not WHOLE and scene.rotation(goal.target)[2, 2] < FALLEN_UP
    return f"{' '.join(goal.words)}: {'fallen over' if fallen else 'not in its place'}, {ended}"
