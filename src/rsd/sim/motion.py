"""Scenes that move: the asked-for thing, or where it is to go, slides along a line at constant speed, as on a belt; one
of them jumps aside once; or the thing is taken out of the gripper once and stands beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd.checks import RsdError
from rsd.conventions import CONTROL_HZ
from rsd.sim.suites import scene_file

if TYPE_CHECKING:
    from rsd.sim.libero import LiberoEnv

THING, DESTINATION, JUMP, PUSH_OUT = "thing", "destination", "jump", "push-out"
REACH = 0.08  # m from where it started, at which it turns round
JUMP_STEPS = (5, 50)  # control steps of an episode, in one of which something jumps
ASIDE, PUSHED = (0.06, 0.12), (0.06, 0.20)  # m from where it was to where it jumps, or from the hand
FREE = np.array([0.03, 0.03, 0.0])  # m to the sides of what is put down: the fingers need some
BEYOND = 0.05  # m outside the places where things stand
LIFTED, HELD_STEPS = 0.02, (1, 6)  # m; so high, for so many steps, before the thing is out of the gripper
TRIES = 200
CORNERS = 2.0 * np.array(list(np.ndindex(2, 2, 2))) - 1.0  # of a box
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Motion:
    """what: the asked-for `thing`, until the gripper has touched it, or the `destination`, always, at a speed in m/s;
    `jump`: one of the two, the thing as long as it is untouched; `push-out`: the thing. seed: of what is drawn,
    together with the task and the initial state."""

    what: str
    speed: float
    seed: int = 0


class Thing:
    """A thing of an episode's scene that can be put elsewhere. pose, velocity: MuJoCo's own, of its free joint."""

    def __init__(self, env: LiberoEnv, name: str, extents: dict[int, Vector]) -> None:
        """extents: `boxes` now."""
        self.object = env.simulation.objects_dict[name]
        joint = env.model.joint(self.object.joints[-1])
        self.pose: Vector = env.data.qpos[joint.qposadr[0] :][:7]
        self.velocity: Vector = env.data.qvel[joint.dofadr[0] :][:6]
        self.start, self.root = self.pose.copy(), int(env.model.body_rootid[joint.bodyid[0]])
        self.box = extents[self.root] - self.start[:3]  # where it stands upright

    def put(self, place: Vector) -> None:
        """Upright at rest there, x, y and z."""
        self.pose[:3], self.pose[3:], self.velocity[:] = place, self.start[3:], 0.0


class Mover(ABC):
    """What moves in one episode."""

    def __init__(self, env: LiberoEnv, motion: Motion, rng: np.random.Generator) -> None:
        """Raises RsdError where what is to move is fixed to the scene."""
        self._env, self._motion, self._rng = env, motion, rng
        objects, extents = env.simulation.objects_dict, boxes(env)
        found = moving(motion.what, env.goal[0], objects, f"{env.suite} task {env.task.task_id}")
        self.thing, self.destination = (None if name is None else Thing(env, name, extents) for name in found)
        roots = [int(env.model.body_rootid[env.simulation.obj_body_id[name]]) for name in objects]
        self.floor = min((float(extents[root][0, 2]) for root in roots), default=0.0)  # on which something stands

    @abstractmethod
    def step(self) -> None:
        """Before each control step."""

    def touched(self, thing: Thing) -> bool:
        simulation = self._env.simulation
        return bool(simulation.check_contact(simulation.robots[0].gripper, thing.object))

    def put_aside(self, thing: Thing, far: tuple[float, float]) -> bool:
        """Put it upright onto the floor or table, so far aside and FREE of everything else, among the places where
        things stand; whether there is such a place."""
        env = self._env
        others = np.stack([box for root, box in boxes(env).items() if root != thing.root])
        things = np.stack([env.data.xpos[env.simulation.obj_body_id[name], :2] for name in env.simulation.objects_dict])
        around, height = thing.pose[:2].copy(), self.floor - thing.box[0, 2] + 0.001
        for _ in range(TRIES):
            angle, apart = self._rng.uniform(0.0, 2.0 * np.pi), self._rng.uniform(*far)
            place = np.array([*(around + apart * np.array([np.cos(angle), np.sin(angle)])), height])
            low, high = thing.box + place
            clear = ((others[:, 0] > high + FREE) | (others[:, 1] < low - FREE)).any(axis=1)
            within = (things.min(axis=0) - BEYOND <= place[:2]) & (place[:2] <= things.max(axis=0) + BEYOND)
            if within.all() and clear.all():
                thing.put(place)
                return True
        return False


class Slide(Mover):
    """REACH to one side of the start, then to the other, and so on, whatever lies in the way."""

    def __init__(self, env: LiberoEnv, motion: Motion, rng: np.random.Generator) -> None:
        super().__init__(env, motion, rng)
        moved = self.thing if motion.what == THING else self.destination
        assert moved is not None  # `moving` has seen to it
        self.moved = moved
        angle = rng.uniform(0.0, 2.0 * np.pi)
        self._along = np.array([np.cos(angle), np.sin(angle)])
        self._steps, self._ended = 0, False

    def step(self) -> None:
        self._ended |= self._motion.what == THING and self.touched(self.moved)
        if not self._ended:
            before, self._steps = offset(self._motion, self._steps), self._steps + 1
            self.moved.pose[:2] += (offset(self._motion, self._steps) - before) * self._along


class Jump(Mover):
    """The thing, while the gripper has not touched it, or its destination is put aside in one of JUMP_STEPS."""

    def __init__(self, env: LiberoEnv, motion: Motion, rng: np.random.Generator) -> None:
        super().__init__(env, motion, rng)
        self.moment, self._steps, self._ours, self.happened = int(rng.integers(*JUMP_STEPS)), 0, False, False

    def step(self) -> None:
        self._ours |= self.thing is not None and self.touched(self.thing)
        if self._steps == self.moment:
            able = [each for each in (None if self._ours else self.thing, self.destination) if each is not None]
            order = [able[i] for i in self._rng.permutation(len(able))]
            self.happened = any(self.put_aside(each, ASIDE) for each in order)
        self._steps += 1


class PushOut(Mover):
    """Some steps after the gripper has lifted it, the thing is out of it and stands aside, once."""

    def __init__(self, env: LiberoEnv, motion: Motion, rng: np.random.Generator) -> None:
        super().__init__(env, motion, rng)
        assert self.thing is not None  # `moving` has seen to it
        self.moved = self.thing
        self._after, self._held, self.happened = int(rng.integers(*HELD_STEPS)), 0, False

    def step(self) -> None:
        if self.happened:
            return
        held = self.moved.pose[2] > self.moved.start[2] + LIFTED and self.touched(self.moved)
        self._held = self._held + 1 if held else 0
        self.happened = self._held > self._after and self.put_aside(self.moved, PUSHED)


def mover(env: LiberoEnv, motion: Motion, state: int) -> Mover:
    """What moves in the episode that has just begun at that initial state."""
    kinds: dict[str, type[Mover]] = {JUMP: Jump, PUSH_OUT: PushOut}
    return kinds.get(motion.what, Slide)(env, motion, np.random.default_rng([motion.seed, env.task.task_id, state]))


def moving(what: str, goal: Sequence[str], objects: Collection[str], where: str) -> tuple[str | None, str | None]:
    """A goal's thing and destination, each if it is an object that can be put elsewhere; raises RsdError where what a
    motion is to move is fixed to the scene."""
    names = [
        max((name for name in objects if asked == name or asked.startswith(f"{name}_")), key=len, default=None)
        for asked in (goal[1], goal[-1])
    ]
    thing, destination = names[0], names[1] if goal[1] != goal[-1] else None
    able = {THING: thing, JUMP: thing or destination, PUSH_OUT: thing}.get(what, destination)
    if able is None:
        asked = goal[-1] if what == DESTINATION else goal[1]
        found = f"{asked} of {where}, which is fixed to the scene"
        raise RsdError(f"--motion {what}: expected something that can slide, found {found}; leave the task out")
    return thing, destination


def check_task(what: str, suite: str, task_id: int) -> None:
    """Raises RsdError where what a motion is to move is fixed to the scene of a task, as its scene file asks; layouts
    of a permuted suite may ask for something else, too."""
    scene = scene_file(suite, task_id)
    moving(what, scene.goal[0], scene.objects, f"{suite} task {task_id}")


def offset(motion: Motion, steps: int) -> float:
    """Metres along the line after so many control steps: to REACH, back beyond the start to -REACH, and so on."""
    way = motion.speed * steps / CONTROL_HZ
    return REACH - abs((way + REACH) % (4 * REACH) - 2 * REACH)


def boxes(env: LiberoEnv) -> dict[int, Vector]:
    """Of everything that can be touched: root body -> lowest and highest corner [2, 3], m; of the robot the hand."""
    model, data = env.model, env.data
    hand = np.array([(model.body(body).name or "").startswith("gripper0") for body in range(model.nbody)])
    roots, robot = model.body_rootid[model.geom_bodyid], model.body("robot0_base").rootid[0]
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & (roots > 0)
    geoms = np.flatnonzero(solid & ((roots != robot) | hand[model.geom_bodyid]))
    middles, halves = model.geom_aabb[geoms, None, :3], model.geom_aabb[geoms, None, 3:]
    turned = np.einsum("gij,gcj->gci", data.geom_xmat[geoms].reshape(-1, 3, 3), middles + halves * CORNERS)
    corners = turned + data.geom_xpos[geoms, None]  # [geoms, 8, 3]
    found = {int(root): corners[roots[geoms] == root].reshape(-1, 3) for root in np.unique(roots[geoms])}
    return {root: np.stack([points.min(axis=0), points.max(axis=0)]) for root, points in found.items()}
