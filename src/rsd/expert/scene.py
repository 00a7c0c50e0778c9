"""The privileged view of a scene: object geometry, free heights and the gripper, read from the simulator.

Lengths are metres in the world frame (z up, x away from the robot, y to its left).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd.sim.libero import LiberoEnv
from rsd.sim.physics import mujoco
from rsd.types import RsdError

Vector = NDArray[np.float64]
ROBOT_PARTS = ("robot0", "gripper0", "mount0")
COLLISION_GROUP = 0  # robosuite: group 0 collides, group 1 is drawn
HIDDEN_GROUP = 5
RAY_START = 2.0
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class MovingPart:
    """body: of the model; axis: of its joint in the world, unit vector [3]."""

    body: int
    axis: Vector


class Scene:
    """Reads one episode of a LiberoEnv. Make a new one after every reset."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        self.model = env.model
        self.data = env.data
        robot = env.simulation.robots[0]
        self._eef_site = robot.eef_site_id
        self._finger_joints = np.asarray(robot._ref_gripper_joint_pos_indexes)
        self.bodies: dict[str, int] = dict(env.simulation.obj_body_id)
        self.movable = tuple(env.simulation.objects_dict)
        self.base = self.data.body("robot0_base").xpos.copy()
        names = [self.model.body(i).name or "" for i in range(self.model.nbody)]
        self._robot_geoms = self._geoms_of({i for i, n in enumerate(names) if any(p in n for p in ROBOT_PARTS)})
        roots = self.model.body_rootid[self.model.geom_bodyid]
        self._object_geoms = {name: np.flatnonzero(roots == body) for name, body in self.bodies.items()}
        gripper = robot.gripper.important_geoms
        self._fingers = tuple(
            {self.model.geom(name).id for part in ("finger", "fingerpad") for name in gripper[f"{side}_{part}"]}
            for side in ("left", "right")
        )
        self._vertices = {name: self._local_vertices(geoms) for name, geoms in self._object_geoms.items()}

    # -- gripper --------------------------------------------------------------------------------------------------

    @property
    def eef(self) -> Vector:
        """Grip site, between the fingertips [3]."""
        return self.data.site_xpos[self._eef_site].copy()

    @property
    def eef_rotation(self) -> Vector:
        """[3, 3]; column 0 is the closing axis, column 2 points out of the palm."""
        return self.data.site_xmat[self._eef_site].reshape(3, 3).copy()

    @property
    def grip_width(self) -> float:
        """Distance between the finger pads: 0.08 open, 0 closed on nothing."""
        left, right = self.data.qpos[self._finger_joints]
        return float(abs(left - right))

    def grasped(self, name: str) -> bool:
        """Whether both fingers touch the object."""
        geoms = set(self._object_geoms[name].tolist())
        pairs = [{int(a), int(b)} for a, b in self.data.contact.geom[: self.data.ncon]]
        return all(any(pair & finger and pair & geoms for pair in pairs) for finger in self._fingers)

    def touched(self, name: str) -> bool:
        """Whether any part of the gripper touches the object."""
        simulation = self.env.simulation
        return bool(simulation.check_contact(simulation.robots[0].gripper, simulation.objects_dict[name]))

    # -- objects --------------------------------------------------------------------------------------------------

    def position(self, name: str) -> Vector:
        """Body origin of an object or fixture [3]. Raises RsdError for an unknown name."""
        return self.data.xpos[self._body(name)].copy()

    def site(self, name: str) -> Vector:
        """Middle of a region that an object or a fixture carries [3]."""
        self.owner(name)
        return self.data.site(name).xpos.copy()

    def region_size(self, name: str) -> Vector:
        """Half the region's extent along the world's axes, as LIBERO counts it [3]."""
        size = self.env.simulation.object_sites_dict[name].size
        return np.abs(self.data.site(name).xmat.reshape(3, 3) @ size)

    def owner(self, name: str) -> str | None:
        """The object or fixture that carries a region, None for one of the table. Raises RsdError for an unknown
        name."""
        regions = self.env.simulation.object_sites_dict
        if name not in regions:
            raise RsdError(f"region: found the unknown name {name!r}, known are {', '.join(sorted(regions))}")
        parent = regions[name].parent_name
        return None if parent is None else str(parent)

    def moving_part(self, name: str) -> MovingPart:
        """What moves on the joint of a drawer's region or of a stove."""
        joint = self._joint(name)
        return MovingPart(int(self.model.jnt_bodyid[joint]), self.data.xaxis[joint].copy())

    def hinge(self, name: str) -> Vector:
        """Where the joint of a door or a knob is [3]."""
        return self.data.xanchor[self._joint(name)].copy()

    def _joint(self, name: str) -> int:
        regions = self.env.simulation.object_sites_dict
        joints = regions[name].joints if name in regions else self.env.simulation.get_object(name).joints
        return int(self.model.joint(joints[0]).id)

    def part_shapes(self, part: MovingPart) -> list[Vector]:
        """World vertices of each of its collision shapes [n, 3]."""
        return self._world(self._local_vertices(self._geoms_of({part.body})))

    def outermost(self, part: MovingPart, direction: Vector) -> Vector:
        """Middle of that shape of the part which stands out furthest along `direction` [3]."""
        middles = [(shape.min(axis=0) + shape.max(axis=0)) / 2 for shape in self.part_shapes(part)]
        return max(middles, key=lambda middle: float(middle @ direction))

    def rotation(self, name: str) -> Vector:
        """[3, 3]; the columns are the object's own axes in the world."""
        return self.data.xmat[self._body(name)].reshape(3, 3).copy()

    def vertices(self, name: str) -> Vector:
        """World vertices of the object's collision shapes [n, 3]."""
        self._body(name)
        return np.concatenate(self._world(self._vertices[name]))

    def heights(self, points: Vector, ignore: tuple[str, ...] = (), upward: Vector = UP) -> Vector:
        """Top of the scene [n] under the points [n, 2], -1 where there is nothing; the robot and the `ignore` objects
        are looked through, down along `upward` [3], of height 1, which meets the points at height 0."""
        hidden = np.concatenate([self._robot_geoms, *(self._object_geoms[name] for name in ignore)])
        saved = self.model.geom_group[hidden].copy()
        self.model.geom_group[hidden] = HIDDEN_GROUP
        groups, geom = (np.arange(mujoco.mjNGROUP) == COLLISION_GROUP).astype(np.uint8), np.array([-1], np.int32)
        starts = np.pad(points, ((0, 0), (0, 1))) + RAY_START * upward
        try:
            ways = [mujoco.mj_ray(self.model, self.data, start, -upward, groups, 1, -1, geom) for start in starts]
        finally:
            self.model.geom_group[hidden] = saved
        return np.array([-1.0 if way < 0 else RAY_START - way for way in ways])

    def corridor_top(self, start: Vector, end: Vector, ignore: tuple[str, ...], half_width: float = 0.05) -> float:
        """Highest point of the scene in a corridor between two places (only x and y count).

        Rays miss thin rims, so every movable object near the corridor counts with its highest vertex as well.
        """
        a, b = np.asarray(start)[:2], np.asarray(end)[:2]
        length = float(np.linalg.norm(b - a))
        along = (b - a) / (length + 1e-9)
        across = np.array([-along[1], along[0]])
        rows = [a + (b - a) * t + across * q for t in np.linspace(0, 1, 12) for q in (-half_width, 0, half_width)]
        top = float(self.heights(np.array(rows), ignore).max())
        for name in (name for name in self.movable if name not in ignore):
            points = self.vertices(name)
            low, high = points.min(axis=0), points.max(axis=0)
            centre, radius = (low + high)[:2] / 2, float((high - low)[:2].max()) / 2
            nearest = a + along * np.clip((centre - a) @ along, 0, length)
            if np.linalg.norm(centre - nearest) < radius + half_width - 0.02:
                top = max(top, float(high[2]))
        return top

    # -- inside ---------------------------------------------------------------------------------------------------

    def _body(self, name: str) -> int:
        if name not in self.bodies:
            raise RsdError(f"object: found the unknown name {name!r}, known are {', '.join(sorted(self.bodies))}")
        return self.bodies[name]

    def _world(self, shapes: list[tuple[int, Vector]]) -> list[Vector]:
        positions, rotations = self.data.geom_xpos, self.data.geom_xmat
        return [positions[geom] + local @ rotations[geom].reshape(3, 3).T for geom, local in shapes]

    def _geoms_of(self, bodies: set[int]) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.model.geom_bodyid, list(bodies)))

    def _local_vertices(self, geoms: NDArray[np.int64]) -> list[tuple[int, Vector]]:
        model = self.model
        corners = 2 * np.array(list(np.ndindex(2, 2, 2))) - 1
        found = list[tuple[int, Vector]]()
        for geom in geoms:
            if not (model.geom_contype[geom] or model.geom_conaffinity[geom]):
                continue
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                first = model.mesh_vertadr[mesh]
                found.append((int(geom), model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(float)))
            else:
                centre, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
                found.append((int(geom), centre + half * corners))
        return found
