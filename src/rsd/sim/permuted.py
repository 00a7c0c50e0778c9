"""Permuted suites: the scenes of a LIBERO suite in which nothing is where it usually is.

In the stock suites the asked-for thing always starts in the same region, so a policy need not look. Here a layout is
drawn anew for every episode, from the scene file's own predicates (On, In, Open) and LIBERO's own samplers:

    libero_object_permuted    the six things exchange places, or (of random placements half) stand anywhere on the free
                              floor; any of them can be asked for
    libero_spatial_permuted   plate, ramekin and cookie box stand anywhere on the free table; the words ("next to the
                              ramekin") are true of one bowl only, which the program checks
    libero_goal_permuted      the four things exchange places, cabinet and stove may; any thing that fits can be asked
                              for at any destination that fits; of random placements a quarter let all fixtures
                              exchange places, the stove also with a thing, another quarter nothing, and both ask
                              for whatever the hand can do there

A layout is a function of (suite, task, random generator) alone; no simulator runs here. Held out of training: for
every thing one of its places (where it is the one asked for), and whatever comes near a scene of LIBERO-PRO's `_swap`
and `_task` variants of the suite (arXiv 2510.03827). Of the 50 fixed evaluation states of a task the odd ones ask for
held-out combinations, the even ones for combinations of the kind that training saw.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rsd.types import RsdError

SUFFIX = "_permuted"
TRIES = 20_000  # draws of a layout until one is of the wanted kind; a draw takes microseconds

Predicate = tuple[str, ...]
Point = tuple[float, float]


@dataclass(frozen=True)
class Region:
    """A rectangle on a table or floor. low, high: (x, y) in m; yaw: range in rad; target: what it lies on."""

    target: str
    low: Point
    high: Point
    yaw: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def about(cls, target: str, spot: Point, half: float) -> Region:
        return cls(target, (spot[0] - half, spot[1] - half), (spot[0] + half, spot[1] + half))

    @property
    def centre(self) -> Point:
        return (self.low[0] + self.high[0]) / 2, (self.low[1] + self.high[1]) / 2

    def apart(self, other: Region) -> float:
        """m between the two centres."""
        return float(np.hypot(*np.subtract(self.centre, other.centre)))

    def as_problem(self) -> dict[str, Any]:
        """As LIBERO's parser gives a region."""
        return {"target": self.target, "ranges": [(*self.low, *self.high)], "extra": [], "yaw_rotation": list(self.yaw)}


@dataclass(frozen=True)
class Combination:
    """What is asked for (a kind of thing, or words) at one of so many places."""

    asked: str
    place: int
    places: int

    @property
    def held_out(self) -> bool:
        """Whether training never asks for it: of every thing one place."""
        return (KINDS.index(self.asked) + self.place) % self.places == 0


@dataclass(frozen=True)
class Layout:
    """Where a scene's things start, and what is asked for.

    start: predicates such as ("on", "milk_1", "floor_target_object_region"); regions: those that `start` names and the
    scene file lacks; goal: predicates that make success; combination: what is held out or not; asks: sentences that
    would ask for a thing of this layout, with that thing, none of them held out.
    """

    start: tuple[Predicate, ...]
    goal: tuple[Predicate, ...]
    instruction: str
    combination: Combination
    regions: dict[str, Region] = field(default_factory=dict)
    asks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SceneFile:
    """What a scene file says: predicates at the start and of the goal, regions by LIBERO's name."""

    start: tuple[Predicate, ...]
    goal: tuple[Predicate, ...]
    regions: dict[str, Region]
    objects: tuple[str, ...] = ()  # what is not fixed to the scene

    @classmethod
    def read(cls, path: Path) -> SceneFile:
        """Raises RsdError for a file without the sections of a LIBERO problem."""
        text = path.read_text(encoding="utf-8")
        parts = re.split(r"\(:(regions|fixtures|objects|obj_of_interest|init|goal)\b", text)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        if not {"regions", "init", "goal"} <= sections.keys():
            raise RsdError(f"{path}: expected (:regions, (:init and (:goal, found {sorted(sections)}")
        objects = tuple(re.findall(r"\w+_\d+", sections.get("objects", "")))
        start, goal = _predicates(sections["init"]), _predicates(sections["goal"])
        return cls(start, goal, _regions(sections["regions"]), objects)


def is_permuted(suite: str) -> bool:
    return suite in SUITES


def base_suite(suite: str) -> str:
    """The stock suite whose scene files a suite uses; other names are returned as they are."""
    return suite.removesuffix(SUFFIX) if is_permuted(suite) else suite


def layout_of(
    suite: str,
    scene: SceneFile,
    language: str,
    rng: np.random.Generator,
    wanted: bool,
    others: tuple[SceneFile, ...],
    free: float = 0.0,
) -> Layout:
    """A layout of one task. wanted: whether its combination is to be a held-out one (evaluation) or not (training);
    others: scenes that no layout may come near (LIBERO-PRO's); free: share of freer layouts: `FREER`.

    Raises RsdError if TRIES draws gave none, which a scene of another kind would.
    """
    draw = SUITES[suite]
    if draw in FREER and free and rng.random() < free:
        draw = FREER[draw]
    for _ in range(TRIES):
        layout = draw(scene, language, rng)
        if layout is None or layout.combination.held_out != wanted:
            continue
        if not any(near(layout, scene, other) for other in others):
            return layout
    raise RsdError(f"{suite}: found no layout of {language!r} in {TRIES} draws, though the scene file should allow one")


def near(layout: Layout, scene: SceneFile, other: SceneFile, distance: float = 0.05) -> bool:
    """Whether every thing starts as in another scene: in the same relation, or within `distance` m of the place there;
    and the same is asked for."""
    regions = {**scene.regions, **layout.regions}
    mine = {words[1]: words for words in layout.start if len(words) == 3}
    theirs = {words[1]: words for words in other.start if len(words) == 3}
    if set(layout.goal) != set(other.goal) or mine.keys() != theirs.keys():
        return False

    def same(here: str, there: str) -> bool:
        if here in regions and there in other.regions:
            return regions[here].apart(other.regions[there]) < distance
        return here == there

    return all(same(words[2], theirs[thing][2]) for thing, words in mine.items())


# -- libero_object ----------------------------------------------------------------------------------------------------

LOOK_ALIKES = (
    ("alphabet_soup", "tomato_sauce"),
    ("butter", "cream_cheese", "chocolate_pudding"),
    ("ketchup", "bbq_sauce", "salad_dressing"),
    ("milk", "orange_juice"),
)
FREE_FLOOR = ((-0.22, -0.26), (0.17, 0.08))  # m, (x, y) low and high: what the places of the scene files lie in
FLOOR_APART = 0.115  # m between the middles of two things, the least of the scene files
BESIDE = 0.5  # share of layouts in which a look-alike, if the scene has one, takes the place nearest to what is asked


def object_layout(scene: SceneFile, language: str, rng: np.random.Generator) -> Layout:
    """All things but the basket exchange places; any of them is asked for."""
    fixed = tuple(words for words in scene.start if _kind(words[1]) == "basket")
    things, places = zip(*((words[1], words[2]) for words in scene.start if words not in fixed), strict=True)
    asked = things[rng.integers(len(things))]
    order = [places[i] for i in rng.permutation(len(places))]
    at = dict(zip(things, order, strict=True))
    alike = [thing for thing in things if thing != asked and _alike(thing, asked)]
    if alike and rng.random() < BESIDE:
        beside, here = alike[rng.integers(len(alike))], scene.regions[at[asked]]
        nearest = min((p for p in places if p != at[asked]), key=lambda p: scene.regions[p].apart(here))
        other = next(thing for thing in things if at[thing] == nearest)
        at[beside], at[other] = at[other], at[beside]
    return _object_layout(scene, asked, at, {}, sorted(places))


def free_object_layout(scene: SceneFile, language: str, rng: np.random.Generator) -> Layout | None:
    """The things stand anywhere on the free floor, a look-alike often beside what is asked for; None where two are too
    close to each other. A thing's place is the nearest of the scene file's, for what is held out."""
    things = [words[1] for words in scene.start if _kind(words[1]) != "basket"]
    asked = things[rng.integers(len(things))]
    spots = {thing: _point(rng, FREE_FLOOR) for thing in things}
    alike = [thing for thing in things if thing != asked and _alike(thing, asked)]
    if alike and rng.random() < BESIDE:
        angle, apart = rng.uniform(0, 2 * np.pi), rng.uniform(FLOOR_APART, 1.3 * FLOOR_APART)
        x, y = spots[asked]
        beside = x + apart * float(np.cos(angle)), y + apart * float(np.sin(angle))
        if not all(low < c < high for low, c, high in zip(FREE_FLOOR[0], beside, FREE_FLOOR[1], strict=True)):
            return None
        spots[alike[rng.integers(len(alike))]] = beside
    if not _all_apart(list(spots.values()), FLOOR_APART):
        return None
    regions = {f"floor_{thing}_place": Region.about("floor", spot, 0.005) for thing, spot in spots.items()}
    places = sorted(words[2] for words in scene.start if words[1] in things)
    return _object_layout(scene, asked, {thing: f"floor_{thing}_place" for thing in things}, regions, places)


def _object_layout(
    scene: SceneFile, asked: str, at: dict[str, str], regions: dict[str, Region], places: list[str]
) -> Layout:
    """at: thing -> its region, one of `places` (the scene file's) or of `regions`."""
    combination = partial(_combination, at=at, places=places, regions={**scene.regions, **regions})

    def words(thing: str) -> str:
        return f"pick up the {_kind(thing).replace('_', ' ')} and place it in the basket"

    start = (*(("on", thing, place) for thing, place in at.items()), *(w for w in scene.start if w[1] not in at))
    goal = (("in", asked, "basket_1_contain_region"),)
    asks = tuple((words(thing), thing) for thing in at if not combination(thing).held_out)
    return Layout(start, goal, words(asked), combination(asked), regions, asks)


def _alike(one: str, other: str) -> bool:
    return any(_kind(one) in family and _kind(other) in family for family in LOOK_ALIKES)


# -- libero_spatial ---------------------------------------------------------------------------------------------------

BOWL, OTHER_BOWL = "akita_black_bowl_1", "akita_black_bowl_2"
PLATE, RAMEKIN, COOKIES = "plate_1", "glazed_rim_porcelain_ramekin_1", "cookies_1"
LANDMARKS = (PLATE, RAMEKIN, COOKIES)
FREE_TABLE = ((-0.22, -0.05), (0.13, 0.28))  # m, (x, y) low and high, for what the words refer to
BOWLS_TABLE = ((-0.25, -0.10), (0.17, 0.33))
TABLE_CENTRE = (-0.075, 0.0)
APART = 0.165  # m between the middles of two landmarks
NEXT = (0.117, 0.123)  # m between the middles of a bowl and what it stands next to
NEAR = 0.145  # m; a bowl that is not next to something keeps so far away
CLEAR = 0.145  # m between two bowls
DRAWER_CLEAR = 0.08  # m; y of whatever stands on the table while the drawer is open
# the ten places of the suite, by the words of its tasks
ON_THINGS = {
    "on the cookie box": COOKIES,
    "on the ramekin": RAMEKIN,
    "on the stove": "flat_stove_1_cook_region",
    "on the wooden cabinet": "wooden_cabinet_1_top_side",
}
NEXT_TO = {"next to the plate": PLATE, "next to the ramekin": RAMEKIN, "next to the cookie box": COOKIES}
DRAWER = "in the top drawer of the wooden cabinet"
CENTRE, BETWEEN = "from table center", "between the plate and the ramekin"
RELATIONS = (*ON_THINGS, *NEXT_TO, DRAWER, CENTRE, BETWEEN)


def spatial_layout(scene: SceneFile, language: str, rng: np.random.Generator) -> Layout | None:
    """Landmarks anywhere on the free table; the asked-for bowl where the words say, the other in another relation. None
    where this draw does not fit together."""
    relation = next((words for words in RELATIONS if words in language), None)
    if relation is None:
        raise RsdError(f"libero_spatial: expected one of {', '.join(RELATIONS)} in the instruction, found {language!r}")
    other = [words for words in RELATIONS if words != relation][rng.integers(len(RELATIONS) - 1)]
    at: dict[str, Point] = {name: _point(rng, FREE_TABLE) for name in LANDMARKS}
    if not _all_apart([at[name] for name in LANDMARKS], APART):
        return None
    for bowl, words in ((BOWL, relation), (OTHER_BOWL, other)):
        spot = _bowl_spot(words, at, rng)
        if spot is not None:
            at[bowl] = spot
    drawer = DRAWER in (relation, other)
    for bowl, words in ((BOWL, relation), (OTHER_BOWL, other)):
        if bowl in at and relations_of(bowl, at) != {words}:  # of this bowl the words are true, and no others
            return None
    if BETWEEN in (relation, other) and {relation, other} & {"next to the plate", "next to the ramekin"}:
        return None  # what stands between two things is nearly next to both
    on_table = [at[bowl] for bowl in (BOWL, OTHER_BOWL) if bowl in at]
    if not _all_apart(on_table, CLEAR) or (drawer and min(y for _, y in at.values()) < DRAWER_CLEAR):
        return None
    regions = {f"main_table_{name}_place": Region.about("main_table", spot, 0.01) for name, spot in at.items()}
    start: list[Predicate] = [("open", "wooden_cabinet_1_top_region")] if drawer else []
    for bowl, words in ((BOWL, relation), (OTHER_BOWL, other)):
        if bowl in at:
            start.append(("on", bowl, f"main_table_{bowl}_place"))
        elif words == DRAWER:
            start.append(("in", bowl, "wooden_cabinet_1_top_region"))
        else:
            start.append(("on", bowl, ON_THINGS[words]))
    start += [("on", name, f"main_table_{name}_place") for name in LANDMARKS]
    start += [words for words in scene.start if words[1] in ("wooden_cabinet_1", "flat_stove_1")]
    far, left = (bool(c > middle) for c, middle in zip(at[PLATE], np.mean(FREE_TABLE, axis=0), strict=True))
    quarter = 2 * far + left  # of the table, that the plate is in
    asks = tuple(
        (language.replace(relation, words), bowl)
        for bowl, words in ((BOWL, relation), (OTHER_BOWL, other))
        if not Combination(words, quarter, 4).held_out
    )
    return Layout(tuple(start), (("on", BOWL, PLATE),), language, Combination(relation, quarter, 4), regions, asks)


def _bowl_spot(words: str, at: dict[str, Point], rng: np.random.Generator) -> Point | None:
    """Where on the table a bowl stands of which the words are to be true, None where it stands on or in something."""
    if words == CENTRE:
        return TABLE_CENTRE
    if words == BETWEEN:
        return (at[PLATE][0] + at[RAMEKIN][0]) / 2, (at[PLATE][1] + at[RAMEKIN][1]) / 2
    if words not in NEXT_TO:
        return None
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*NEXT)
    x, y = at[NEXT_TO[words]]
    return x + distance * float(np.cos(angle)), y + distance * float(np.sin(angle))


def relations_of(bowl: str, at: dict[str, Point]) -> set[str]:
    """Which of the suite's words are true of a bowl on the table, by the places of everything on it; empty also where
    it stands outside the table's free part."""
    spot = np.array(at[bowl])
    low, high = np.array(BOWLS_TABLE)
    if not ((low <= spot) & (spot <= high)).all():
        return set()
    distances = {name: float(np.hypot(*(spot - at[name]))) for name in LANDMARKS}
    if min(distances.values()) < NEXT[0] - 0.005:
        return set()  # too close to stand
    middle = (np.array(at[PLATE]) + at[RAMEKIN]) / 2
    gap = float(np.hypot(*np.subtract(at[PLATE], at[RAMEKIN])))
    if np.hypot(*(spot - middle)) < 0.04 and gap < 0.32:
        return {BETWEEN}
    true = {words for words, name in NEXT_TO.items() if distances[name] < NEAR}
    if np.hypot(*(spot - TABLE_CENTRE)) < 0.04:
        true.add(CENTRE)
    return true


# -- libero_goal ------------------------------------------------------------------------------------------------------

CABINET, STOVE, RACK = "wooden_cabinet_1", "flat_stove_1", "wine_rack_1"
TOP_DRAWER = CABINET + "_top_region"
PLACED = ("akita_black_bowl_1", "cream_cheese_1", "wine_bottle_1")
DESTINATIONS = {  # LIBERO's name -> how the suite's sentences call it
    "plate_1": "on the plate",
    "flat_stove_1_cook_region": "on the stove",
    "wooden_cabinet_1_top_side": "on top of the cabinet",
    "wine_rack_1_top_region": "on the rack",
    "akita_black_bowl_1": "in the bowl",
}
Fits = dict[str, tuple[str, ...]]
FITS: Fits = {  # what can be put where
    "akita_black_bowl_1": ("plate_1", "flat_stove_1_cook_region", "wooden_cabinet_1_top_side"),
    "cream_cheese_1": ("flat_stove_1_cook_region", "akita_black_bowl_1"),
    "wine_bottle_1": ("wooden_cabinet_1_top_side", "wine_rack_1_top_region"),
}
FIXTURES_EXCHANGED = 0.5  # share of layouts with cabinet and stove exchanged, unless middle drawer or stove is asked
ASKED_OTHERWISE = 0.5  # share of layouts that ask for something else than the task does
WIDE_FITS: Fits = {  # what can be put where, in layouts with all fixtures exchanged
    "akita_black_bowl_1": (*FITS["akita_black_bowl_1"], TOP_DRAWER),
    "cream_cheese_1": (*DESTINATIONS, TOP_DRAWER),
    "wine_bottle_1": tuple(DESTINATIONS),
}
STOVE_ON_TABLE = 0.2  # share of those layouts in which stove and a thing exchange places
ALL_AS_USUAL = 0.5  # share of those layouts in which nothing is exchanged but the words


def goal_layout(scene: SceneFile, language: str, rng: np.random.Generator) -> Layout:
    """The four things exchange places, and things to put can be asked for at other destinations than the task's."""
    at, rest = _things_exchanged(scene, rng)
    goal, words = scene.goal, language
    if len(scene.goal) == 1 and scene.goal[0][1] in PLACED and rng.random() < ASKED_OTHERWISE:
        thing = PLACED[rng.integers(len(PLACED))]
        destination = FITS[thing][rng.integers(len(FITS[thing]))]
        goal, words = (("on", thing, destination),), _putting(thing, destination)
    if rng.random() < FIXTURES_EXCHANGED and not {CABINET + "_middle_region", STOVE + "_cook_region"} & set(goal[0]):
        there = {each[1]: each[2] for each in rest if each[1] in (CABINET, STOVE)}
        exchanged = {CABINET: there[STOVE], STOVE: there[CABINET]}
        rest = [(*each[:2], exchanged.get(each[1], each[2])) for each in rest]
    return _goal_layout(scene, at, rest, goal, words, FITS)


def wide_goal_layout(scene: SceneFile, language: str, rng: np.random.Generator) -> Layout | None:
    """All fixtures exchange places, too, the stove sometimes with a thing, or nothing does; anything is asked for that
    the scene's words have and the hand can do. None where the plate would be pushed before a stove that is not there.
    """
    at, rest = _things_exchanged(scene, rng)
    fixed = [words for words in rest if words[1] in (CABINET, STOVE, RACK)]
    stands = dict(zip((words[1] for words in fixed), (fixed[i][2] for i in rng.permutation(len(fixed))), strict=True))
    as_usual = rng.random() < ALL_AS_USUAL
    if as_usual:
        at, stands = {words[1]: words[2] for words in scene.start if words[1] in at}, {}
    elif rng.random() < STOVE_ON_TABLE:
        thing = PLACED[rng.integers(len(PLACED))]
        stands[STOVE], at[thing] = at[thing], stands[STOVE]
    goal, words = scene.goal, language
    if as_usual or rng.random() < ASKED_OTHERWISE:
        thing = PLACED[rng.integers(len(PLACED))]
        destination = WIDE_FITS[thing][rng.integers(len(WIDE_FITS[thing]))]
        predicate = "in" if destination == TOP_DRAWER else "on"
        goal, words = ((predicate, thing, destination),), _putting(thing, destination)
    if "stove_front" in goal[0][-1] and stands[STOVE] != "main_table_stove_region":
        return None
    rest = [(*each[:2], stands.get(each[1], each[2])) for each in rest]
    return _goal_layout(scene, at, rest, goal, words, WIDE_FITS)


def _things_exchanged(scene: SceneFile, rng: np.random.Generator) -> tuple[dict[str, str], list[Predicate]]:
    """A place of each of the four things, and the other predicates of the start."""
    movable = [words for words in scene.start if words[1] in (*PLACED, "plate_1")]
    places = [words[2] for words in movable]
    at = {words[1]: places[i] for words, i in zip(movable, rng.permutation(len(places)), strict=True)}
    return at, [each for each in scene.start if each not in movable]


def _goal_layout(
    scene: SceneFile, at: dict[str, str], rest: list[Predicate], goal: tuple[Predicate, ...], words: str, fits: Fits
) -> Layout:
    places = sorted(words[2] for words in scene.start if words[1] in at)
    combination = partial(_combination, at=at, places=places, regions=scene.regions)
    allowed = {thing: destinations for thing, destinations in fits.items() if not combination(thing).held_out}
    asks = tuple((_putting(thing, each), thing) for thing, destinations in allowed.items() for each in destinations)
    moved = goal[0][1] if goal[0][1] in at else "plate_1"
    start = (*(("on", thing, place) for thing, place in at.items()), *rest)
    return Layout(start, goal, words, combination(moved), asks=asks)


def _putting(thing: str, destination: str) -> str:
    said = SPOKEN.get(_kind(thing), _kind(thing).replace("_", " "))
    if destination == TOP_DRAWER:
        return f"open the top drawer and put the {said} inside"
    return f"put the {said} {DESTINATIONS[destination]}"


SPOKEN = {"akita_black_bowl": "bowl"}
KINDS = (*sorted(itertools.chain(*LOOK_ALIKES)), *RELATIONS, "akita_black_bowl", "plate", "wine_bottle")
SUITES: dict[str, Callable[[SceneFile, str, np.random.Generator], Layout | None]] = {
    "libero_object" + SUFFIX: object_layout,
    "libero_spatial" + SUFFIX: spatial_layout,
    "libero_goal" + SUFFIX: goal_layout,
}
FREER = {object_layout: free_object_layout, goal_layout: wide_goal_layout}


def _combination(thing: str, at: dict[str, str], places: list[str], regions: dict[str, Region]) -> Combination:
    """A thing's place is the nearest of those, for what is held out. at: thing -> its region."""
    nearest = min(places, key=lambda place: regions[place].apart(regions[at[thing]]))
    return Combination(_kind(thing), places.index(nearest), len(places))


def _kind(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _point(rng: np.random.Generator, area: tuple[Point, Point]) -> Point:
    (x0, y0), (x1, y1) = area
    return float(rng.uniform(x0, x1)), float(rng.uniform(y0, y1))


def _all_apart(points: list[Point], distance: float) -> bool:
    return all(np.hypot(*np.subtract(a, b)) >= distance for a, b in itertools.combinations(points, 2))


def _predicates(section: str) -> tuple[Predicate, ...]:
    found = re.findall(r"\(\s*([A-Za-z]+)((?:\s+\w+)+)\s*\)", section)
    return tuple((name.lower(), *names.split()) for name, names in found if name.lower() != "and")


def _regions(section: str) -> dict[str, Region]:
    found: dict[str, Region] = {}
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    entry = re.compile(r"\((\w+)\s+(\(:target.*?)(?=\n\s*\(\w+\s+\(:target|\Z)", re.DOTALL)
    for name, body in entry.findall(section):
        target = re.search(r"\(:target\s+(\w+)\)", body)
        ranges = re.search(rf"\(:ranges\s+\(\s*\({number}\s+{number}\s+{number}\s+{number}", body)
        yaw = re.search(rf"\(:yaw_rotation\s+\(\s*\({number}\s+{number}", body)
        if target is None or ranges is None:
            continue
        x0, y0, x1, y1 = map(float, ranges.groups())
        turn = (float(yaw[1]), float(yaw[2])) if yaw else (0.0, 0.0)
        found[f"{target[1]}_{name}"] = Region(target[1], (x0, y0), (x1, y1), turn)
    return found
