"""What a task asks for, from the goal predicates of its scene file, and where they want the objects.

The expert can pick up the kinds of objects in `GRASPS` and put them on the table, on or into something that stands open
at its top or front (a caddy, a shelf, a microwave), drag a plate, open drawers but the lowest, close them and a
microwave, turn a knob, and do several of these one after the other. The rest is beyond it, and `task_goals` says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from rsd.expert.grasps import BELOW_RIM, BOWL, PALM_ABOVE_SITE, SPAN_ABOVE_FLOOR, WHOLE, Rim, Span
from rsd.expert.scene import Scene, Vector
from rsd.sim.suites import scene_file, suite_task, suite_tasks
from rsd.types import RsdError

GRASPS: dict[str, Rim | Span] = {
    "akita_black_bowl": BOWL,
    "porcelain_mug": Rim(0.041, 0.106, 0.012),
    "white_yellow_mug": Rim(0.046, 0.103, -0.015),
    "red_coffee_mug": Rim(0.039, 0.131, -0.016),
    "white_bowl": Rim(0.035, 0.034),
    "chefmate_frypan": Span(0.016, tail=0.14),  # by the handle
    "moka_pot": Span(0.006, 0.010),  # by the knob on its lid
    **dict.fromkeys(("alphabet_soup", "bbq_sauce", "butter", "chocolate_pudding", "cream_cheese", "ketchup"), WHOLE),
    **dict.fromkeys(("milk", "orange_juice", "salad_dressing", "tomato_sauce", "wine_bottle"), WHOLE),
    **dict.fromkeys(("black_book", "new_salad_dressing", "yellow_book"), WHOLE),
}
HOLLOW = ("akita_black_bowl", "basket", "wooden_tray")  # things are let go inside their rim
UNDER_RIM = 0.015  # m; deeper, the fingers would touch the wall
PLATE_SURFACE = 0.004  # m over the plate's origin
ON_STOVE = (0.05, -0.045)  # m before the middle of its region, which is 0.15 long; a moka pot is 0.08 wide
OVER_WALLS, SQUARE = 0.01, 0.8  # m of the palm over a compartment's walls; sides in that ratio are alike
WALL, WALL_DISTANCES = 0.03, np.arange(0.02, 0.09, 0.002)  # m over the floor, m from a point inside
FROM_ABOVE = 0.018  # m before the middle of a low drawer: the handles above are in the palm's way
FOOT = 0.02  # m; what is put down touches the highest point within so much of the middle
ROOM, INSIDE = 0.02, 0.015  # m between a thing and a fixture, of a thing's middle inside the edge of a region
OPEN_PLACE = re.compile(  # what something can be put on or into from above
    r"akita_black_bowl|plate|(basket|wooden_tray)_contain_region|flat_stove_cook_region|wine_rack_top_region"
    r"|(white_cabinet|wooden_cabinet|wooden_two_layer_shelf)_top_side"
)
TABLE_REGION = re.compile(r"(kitchen|living_room|main|study)_table_\w+_region")
DRAWER = re.compile(r"(white|wooden)_cabinet_(top|middle|bottom)_region")
LAYER = re.compile(r"wooden_two_layer_shelf_(top|bottom)_region|microwave_heating_region")  # open at the front
SLOT = re.compile(r"desk_caddy_\w+_contain_region")  # an object has to be turned to fit in


@dataclass(frozen=True)
class Goal:
    """One predicate of LIBERO: "on" or "in" of an object and an object or region, "open" or "turnon" of one alone."""

    predicate: str
    target: str
    destination: str = ""
    _: KW_ONLY
    ahead: float = 0.0  # m, of the place along x before the destination's middle, which another object shares

    @property
    def words(self) -> tuple[str, ...]:
        """As LIBERO has it."""
        return (self.predicate, self.target, *([self.destination] if self.destination else []))

    @property
    def dragged(self) -> bool:
        """A plate, which is not taken up but moved along the table."""
        return kind(self.target) == "plate" and bool(TABLE_REGION.fullmatch(kind(self.destination)))

    @property
    def hold(self) -> Rim | Span:
        """By which the target is taken."""
        return GRASPS[kind(self.target)]


Goals = tuple[Goal, ...]  # of one task, in the order of doing


def kind(name: str) -> str:
    """`wine_bottle_1` -> `wine_bottle`, `basket_1_contain_region` -> `basket_contain_region`."""
    return re.sub(r"_\d+(?=_|$)", "", name)


def goals_of(wanted: Sequence[tuple[str, ...]], start: Sequence[tuple[str, ...]] = ()) -> Goals | None:
    """Goals in the order of doing, of predicates such as ("on", "akita_black_bowl_1", "plate_1"), if the expert can
    reach them all; else None. start: the predicates that hold at the start, for drawers that stand open."""
    stand_open = [words[1] for words in start if words[0] == "open"]
    filled = {words[2] for words in wanted if len(words) > 2 and DRAWER.fullmatch(kind(words[2]))}
    opened = sorted(filled - {*stand_open, *(words[1] for words in wanted)})
    goals = _ordered([Goal(*words) for words in (*wanted, *(("open", name) for name in opened))])
    stand_open += [goal.target for goal in goals if goal.predicate == "open"]
    return _spread(goals) if goals and all(_solvable(goal, stand_open) for goal in goals) else None


def _ordered(goals: list[Goal]) -> Goals:
    """Goals keep the order of the scene file, but what goes onto the table comes first (a mug on the plate beside would
    be in the palm's way), what something goes into is opened or put in its place before, and closed after."""
    left, done = sorted(goals, key=lambda goal: not TABLE_REGION.fullmatch(kind(goal.destination))), list[Goal]()
    while left:
        done.append(next((g for g in left if not any(_comes_before(other, g) for other in left)), left[0]))
        left.remove(done[-1])
    return tuple(done)


def _comes_before(first: Goal, then: Goal) -> bool:
    if then.predicate == "close":
        return first.destination.startswith(then.target)  # a microwave's region has its name
    return first.target == then.destination and first.predicate != "close"


def _spread(goals: Goals) -> Goals:
    """Two objects for the stove stand one behind the other, the far one first."""
    shared = [goal for goal in goals if kind(goal.destination) == "flat_stove_cook_region"]
    if len(shared) != len(ON_STOVE):
        return goals
    return tuple(replace(g, ahead=ON_STOVE[shared.index(g)]) if g in shared else g for g in goals)


def _solvable(goal: Goal, stand_open: Sequence[str]) -> bool:
    place, thing = kind(goal.destination), kind(goal.target)
    if not place:
        drawer, stove = bool(DRAWER.fullmatch(thing)), thing == "flat_stove"
        reached = drawer and "_bottom_" not in thing  # no room for the leaning hand under its handle
        able = {"turnon": stove, "turnoff": stove, "open": reached, "close": drawer or thing == "microwave"}
        return able.get(goal.predicate, False)
    if DRAWER.fullmatch(place):
        fits = goal.destination in stand_open and thing != "ketchup"  # which would stand too high in it
    elif place == "microwave_heating_region":
        fits = isinstance(GRASPS.get(thing), Rim) and goal.destination.replace("_heating_region", "") in stand_open
    elif LAYER.fullmatch(place):
        fits = isinstance(GRASPS.get(thing), Span)
    else:
        fits = any(pattern.fullmatch(place) for pattern in (OPEN_PLACE, TABLE_REGION, SLOT))
    return goal.predicate in ("on", "in") and (goal.dragged or (thing in GRASPS and fits))


def solvable_tasks(suite: str) -> tuple[int, ...]:
    """Ids of the tasks that the expert can do."""
    scenes = {task.task_id: scene_file(suite, task.task_id) for task in suite_tasks(suite)}
    return tuple(task_id for task_id, scene in scenes.items() if goals_of(scene.goal, scene.start))


def task_goals(suite: str, task_id: int) -> Goals:
    """The goals of a task. Raises RsdError, naming the tasks that it can do, for one that the expert cannot."""
    asked = scene_file(suite, task_id).goal
    goals = goals_of(asked, scene_file(suite, task_id).start)
    if goals is None:
        wanted = " and ".join(map(" ".join, asked))
        can = [f"{i} ({suite_task(suite, i).language})" for i in solvable_tasks(suite)]
        raise RsdError(
            f"scripted expert: found {suite} task {task_id} with the goal {wanted!r}; it puts objects on or into "
            f"something open, pulls or shuts a drawer, shuts a door, drags a plate or turns a knob. Of this suite it "
            f"does {', '.join(can) or 'none'}"
        )
    return goals


def destination(scene: Scene, goal: Goal) -> tuple[Vector, float]:
    """Where the target's origin shall come [3], of which z is the destination's own height, and the height at which
    its lowest point is let go."""
    name = goal.destination
    if SLOT.fullmatch(kind(name)):
        return slot(scene, goal)
    if kind(name) == "plate":
        centre = scene.position(name)
        return centre, float(centre[2] + PLATE_SURFACE)
    centre = scene.position(name) if name in scene.bodies else scene.site(name)
    centre[0] += goal.ahead
    if TABLE_REGION.fullmatch(kind(name)):
        centre[:2] += beside_fixtures(scene, goal, centre[:2])
    if DRAWER.fullmatch(kind(name)) and "_top_" not in name:
        centre -= FROM_ABOVE * scene.moving_part(name).axis
    holder = name if name in scene.bodies else scene.owner(name)
    if holder is not None and kind(holder) in HOLLOW:
        surface = float(scene.vertices(holder)[:, 2].max()) - UNDER_RIM
    else:
        around = FOOT * np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        surface = float(scene.heights(centre[:2] + around, ignore=(goal.target,)).max())
        if DRAWER.fullmatch(kind(name)):
            surface = max(surface, _over_drawer(scene, goal))
    return np.array([centre[0], centre[1], surface]), surface


def beside_fixtures(scene: Scene, goal: Goal, middle: Vector) -> Vector:
    """Way [2] from the middle [2] of a region of the table, within the region, to where the target as it is turned now
    has room beside the fixtures."""
    outline = scene.vertices(goal.target)[:, :2] - scene.position(goal.target)[:2]
    low, high = middle + outline.min(axis=0) - ROOM, middle + outline.max(axis=0) + ROOM
    fixtures = (name for name in scene.bodies if name not in scene.movable)
    way = sum((way_beside(low, high, scene.vertices(name)) for name in fixtures), np.zeros(2))
    most = np.maximum(scene.region_size(goal.destination)[:2] - INSIDE, 0.0)
    return np.clip(way, -most, most)


def way_beside(low: Vector, high: Vector, box: Vector) -> Vector:
    """Shortest way [2] along an axis of what reaches from low to high [2] to beside a box of points [n, 3]."""
    up, down = box.max(axis=0)[:2] - low, high - box.min(axis=0)[:2]  # how far to move along each axis, either way
    least, way = int(np.argmin(np.minimum(up, down))), np.zeros(2)
    if min(up[least], down[least]) > 0.0:
        way[least] = up[least] if up[least] < down[least] else -down[least]
    return way


def way_out(scene: Scene, goal: Goal) -> Vector | None:
    """Shortest way [2] of the target from under the drawer that it shall come into; None where it is not below it."""
    if not DRAWER.fullmatch(kind(goal.destination)):
        return None
    drawer, points = drawer_points(scene, goal), scene.vertices(goal.target)
    low, high = points.min(axis=0), points.max(axis=0)
    if low[2] > drawer[:, 2].min():
        return None
    return (high[2] < drawer[:, 2].min()) * way_beside(low[:2] - ROOM, high[:2] + ROOM, drawer)


def drawer_points(scene: Scene, goal: Goal) -> Vector:
    """Vertices [n, 3] of the drawer that is the destination."""
    return np.concatenate(scene.part_shapes(scene.moving_part(goal.destination)))


def _over_drawer(scene: Scene, goal: Goal) -> float:
    """Height of the target's lowest point at which the palm is just over the drawer's walls."""
    walls = float(drawer_points(scene, goal)[:, 2].max())
    tall = float(np.ptp(scene.vertices(goal.target)[:, 2]))
    hold = goal.hold
    above = max(tall - hold.below, SPAN_ABOVE_FLOOR) if isinstance(hold, Span) else tall - BELOW_RIM
    return walls + OVER_WALLS - PALM_ABOVE_SITE - above


def slot(scene: Scene, goal: Goal) -> tuple[Vector, float]:
    """`destination` in a compartment that is too narrow for the hand: its palm stays over the walls around."""
    middle, holder = scene.site(goal.destination), scene.owner(goal.destination)
    assert holder is not None
    middle[:2] = between_walls(scene, middle[:2])
    tall = float(np.ptp(scene.vertices(goal.target)[:, 2]))
    surface = float(scene.vertices(holder)[:, 2].max()) + OVER_WALLS - tall
    outline = scene.vertices(goal.target)[:, :2]
    off = scene.position(goal.target)[:2] - (outline.min(axis=0) + outline.max(axis=0)) / 2
    return np.array([*(middle[:2] + off), surface]), surface


def between_walls(scene: Scene, point: Vector) -> Vector:
    """Middle [2] of the compartment around a point [2]: the region's own is up to 6 mm off."""
    ways = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    rays = point + WALL_DISTANCES[None, :, None] * ways[:, None]
    tops = scene.heights(np.array([point, *rays.reshape(-1, 2)]), ignore=scene.movable)
    inside = np.cumprod(tops[1:].reshape(4, -1) < tops[0] + WALL, axis=1).sum(axis=1)
    free = inside * (WALL_DISTANCES[1] - WALL_DISTANCES[0])
    return point + np.array([free[0] - free[1], free[2] - free[3]]) / 2


def slot_turn(scene: Scene, goal: Goal, closing: float) -> float:
    """Yaw (rad) that an object, held across its narrow side at the angle `closing`, shall have over a compartment:
    its narrow side along the compartment's, or along the nearer wall of a square one."""
    half = scene.region_size(goal.destination)
    narrow = 0.0 if half[0] < half[1] else np.pi / 2
    if min(half[:2]) > SQUARE * max(half[:2]):
        narrow = float(np.round(closing / (np.pi / 2)) * np.pi / 2)
    return (narrow - closing + np.pi / 2) % np.pi - np.pi / 2
