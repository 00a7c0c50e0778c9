import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsd.expert import expert
from rsd.expert.goals import goals_of
from rsd.sim import permuted, suites
from rsd.sim.libero import LiberoEnv
from rsd.sim.permuted import BOWL, KINDS, OTHER_BOWL, PLATE, RELATIONS, Combination, Layout, base_suite, near
from rsd.sim.suites import fixed_layout, fixed_states, permuted_layout, scene_file, step_limit, suite_names, suite_tasks
from rsd.types import RsdError

SUITES = tuple(permuted.SUITES)
seeds = st.integers(0, 2**32 - 1)
tasks = st.integers(0, 9)


def drawn(suite: str, task: int, seed: int, held_out: bool = False) -> Layout:
    return permuted_layout(suite, task, np.random.default_rng(seed), held_out)


def places(layout: Layout) -> dict[str, str]:
    return {words[1]: words[2] for words in layout.start if len(words) == 3}


def centre(layout: Layout, name: str) -> np.ndarray:
    return np.array(layout.regions[places(layout)[name]].centre)


def test_permuted_suites_are_suites_with_the_limits_and_tasks_of_their_base() -> None:
    assert set(SUITES) <= set(suite_names())
    for suite in SUITES:
        base = base_suite(suite)
        assert suite != base
        assert step_limit(suite) == step_limit(base)
        assert [task.name for task in suite_tasks(suite)] == [task.name for task in suite_tasks(base)]


@pytest.mark.parametrize("suite", SUITES)
@settings(max_examples=15)
@given(task=tasks, seed=seeds)
def test_a_layout_is_a_function_of_its_seed_and_never_held_out_in_training(suite: str, task: int, seed: int) -> None:
    layout = drawn(suite, task, seed)
    assert layout == drawn(suite, task, seed)
    assert not layout.combination.held_out
    assert drawn(suite, task, seed, held_out=True).combination.held_out
    before = {words[1] for words in scene_file(suite, task).start}
    assert {words[1] for words in layout.start} >= before - {"wooden_cabinet_1_top_region"}


@pytest.mark.parametrize("suite", SUITES)
def test_fixed_states_ask_for_held_out_combinations_where_they_are_odd(suite: str) -> None:
    for task in (0, 7):
        assert [fixed_layout(suite, task, k).combination.held_out for k in range(6)] == [False, True] * 3


@given(task=tasks, seed=seeds)
def test_things_of_libero_object_exchange_places_and_any_is_asked_for(task: int, seed: int) -> None:
    layout, stock = drawn("libero_object_permuted", task, seed), scene_file("libero_object", task)
    assert sorted(places(layout).values()) == sorted(words[2] for words in stock.start)
    ((predicate, thing, where),) = layout.goal
    assert (predicate, where) == ("in", "basket_1_contain_region")
    assert thing.rsplit("_", 1)[0].replace("_", " ") in layout.instruction
    assert places(layout)["basket_1"] == "floor_bin_region"


def test_every_thing_is_asked_for_at_every_place_but_its_own_held_out_one() -> None:
    suite, found = "libero_object_permuted", set[tuple[str, int]]()
    for task in range(10):
        found |= {(c.asked, c.place) for s in range(300) if (c := drawn(suite, task, s).combination)}
    things = {asked for asked, _ in found}
    assert len(things) == 10
    expected = {(thing, place) for thing in things for place in range(6) if not Combination(thing, place, 6).held_out}
    assert found == expected


@given(task=tasks, seed=seeds)
def test_free_layouts_keep_things_apart_on_the_floor_and_nothing_held_out_is_asked(task: int, seed: int) -> None:
    suite = "libero_object_permuted"
    layout = permuted_layout(suite, task, np.random.default_rng(seed), free=1.0)
    things = [name for name in places(layout) if name != "basket_1"]
    spots = {name: centre(layout, name) for name in things}
    assert min(np.linalg.norm(spots[a] - spots[b]) for a in things for b in things if a < b) >= permuted.FLOOR_APART
    low, high = np.array(permuted.FREE_FLOOR)
    assert all((low <= spot).all() and (spot <= high).all() for spot in spots.values())
    stock = scene_file(suite, task)
    regions = sorted(place for name, place in ((w[1], w[2]) for w in stock.start) if name in things)
    for sentence, thing in layout.asks:
        nearest = min(regions, key=lambda place: np.linalg.norm(spots[thing] - stock.regions[place].centre))
        kind = thing.rsplit("_", 1)[0]
        assert not Combination(kind, regions.index(nearest), 6).held_out
        assert kind.replace("_", " ") in sentence
    assert layout.instruction in [sentence for sentence, _ in layout.asks]


@settings(max_examples=60)
@given(task=tasks, seed=seeds)
def test_wide_layouts_exchange_all_fixtures_and_ask_for_what_the_expert_can_do(task: int, seed: int) -> None:
    suite, stock = "libero_goal_permuted", scene_file("libero_goal", task)
    layout = permuted_layout(suite, task, np.random.default_rng(seed), free=1.0)
    assert {words[1] for words in layout.start} == {words[1] for words in stock.start}
    assert sorted(places(layout).values()) == sorted(words[2] for words in stock.start)
    assert not layout.combination.held_out
    assert goals_of(layout.goal, layout.start) is not None
    others = [scene_file(f"libero_goal_{kind}", other) for kind in ("swap", "task") for other in range(10)]
    assert not any(near(layout, stock, other) for other in others)
    if layout.goal == (("on", permuted.PLATE, "main_table_stove_front_region"),):
        assert places(layout)[permuted.STOVE] == "main_table_stove_region"
    if permuted.TOP_DRAWER in layout.goal[0]:
        assert layout.instruction.startswith("open the top drawer and put the ")


def test_wide_layouts_reach_every_arrangement_of_the_fixtures_and_the_stove_on_the_table() -> None:
    fixed = (permuted.CABINET, permuted.STOVE, permuted.RACK)
    layouts = [permuted_layout("libero_goal_permuted", 8, np.random.default_rng(seed), free=1.0) for seed in range(200)]
    stands = {tuple(places(layout)[name].removeprefix("main_table_") for name in fixed) for layout in layouts}
    assert len({where for where in stands if {"stove_region", "cabinet_region", "wine_rack_region"} == set(where)}) == 6
    assert any("cream_cheese_region" in where for where in stands)
    asked = {layout.instruction for layout in layouts}
    assert {"put the cream cheese on the rack", "put the wine bottle on the plate"} <= asked
    stock = scene_file("libero_goal", 8)
    usual = [layout for layout in layouts if set(layout.start) == set(stock.start)]  # there only the words tell
    assert len(usual) > 20
    assert len({layout.instruction for layout in usual}) > 3


@pytest.mark.parametrize("suite", SUITES)
@given(task=tasks, seed=seeds)
def test_what_a_layout_asks_for_has_its_own_sentence_among_the_others(suite: str, task: int, seed: int) -> None:
    layout = drawn(suite, task, seed)
    things = {words[1] for words in layout.start}
    assert {thing for _, thing in layout.asks} <= things
    if suite != "libero_goal_permuted":  # some of whose tasks ask for no thing that is put
        assert (layout.instruction, layout.goal[0][1]) in layout.asks


@settings(max_examples=60)
@given(task=tasks, seed=seeds)
def test_words_of_libero_spatial_are_true_of_the_asked_bowl_alone(task: int, seed: int) -> None:
    layout = drawn("libero_spatial_permuted", task, seed)
    (relation,) = (words for words in RELATIONS if words in layout.instruction)

    def distance(bowl: str, name: str) -> float:
        where = places(layout)[bowl]
        return float(np.linalg.norm(centre(layout, bowl) - centre(layout, name))) if where in layout.regions else 9.0

    landmark = {"plate": PLATE, "ramekin": "glazed_rim_porcelain_ramekin_1", "cookie box": "cookies_1"}
    if relation.startswith("next to the "):
        name = landmark[relation.removeprefix("next to the ")]
        assert distance(BOWL, name) < 0.13
        assert distance(OTHER_BOWL, name) > 0.14
        assert min(distance(BOWL, other) for other in landmark.values() if other != name) > 0.14
    elif relation == permuted.BETWEEN:
        middle = (centre(layout, PLATE) + centre(layout, landmark["ramekin"])) / 2
        assert np.linalg.norm(centre(layout, BOWL) - middle) < 1e-6
    elif relation in permuted.ON_THINGS:
        assert places(layout)[BOWL] == permuted.ON_THINGS[relation]
        assert places(layout)[OTHER_BOWL] != permuted.ON_THINGS[relation]
    spots = [centre(layout, name) for name in places(layout) if places(layout)[name] in layout.regions]
    apart = [float(np.linalg.norm(a - b)) for i, a in enumerate(spots) for b in spots[:i]]
    assert min(apart, default=1.0) > 0.10


@pytest.mark.parametrize("suite", SUITES)
def test_scenes_of_libero_pro_are_told_from_other_layouts(suite: str) -> None:
    base = base_suite(suite)
    for task in range(0, 10, 3):
        scene, other = scene_file(suite, task), scene_file(f"{base}_swap", task)
        combination = Combination(KINDS[0], 0, 4)
        assert near(Layout(other.start, other.goal, "", combination), other, other)
        assert not near(Layout(scene.start, scene.goal, "", combination), scene, other) or scene.start == other.start
        assert not any(near(drawn(suite, task, seed), scene, other) for seed in range(40))


@pytest.mark.parametrize("suite", SUITES)
def test_stored_states_are_those_whose_hash_is_known(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [fixed_states(suite, task) for task in (0, 9)]
    assert all(len(found) == 50 and np.isfinite(found).all() for found in states)
    assert len(np.unique(states[0], axis=0)) == 50
    monkeypatch.setitem(suites.STATES_SHA256, suite, hashlib.sha256(b"another").hexdigest())
    with pytest.raises(RsdError, match="install rsd-vla again"):
        fixed_states(suite, 0)


@pytest.mark.simulator
@pytest.mark.parametrize("suite", SUITES)
def test_an_episode_asks_for_what_its_layout_says(suite: str) -> None:
    env = LiberoEnv(suite, 0, cameras=False)
    try:
        for k in (0, 1, 0):
            _, info = env.reset(options={"init_state": k})
            layout = fixed_layout(suite, 0, k)
            assert env.instruction == layout.instruction
            assert not info["success"]
            for words in layout.start:
                if words[0] == "on" and words[2] in layout.regions:
                    stands = env.data.body(env.simulation.obj_body_id[words[1]]).xpos[:2]
                    # it may slide a little in the wait steps
                    assert np.linalg.norm(stands - layout.regions[words[2]].centre) < 0.06
        first = env.sim_state()
        env.reset(options={"init_state": 0})
        assert np.array_equal(first, env.sim_state())  # bit for bit, whatever ran before
        assert expert.run(env).success
        assert env.success()
    finally:
        env.close()


@pytest.mark.simulator
def test_spots_are_where_the_picture_shows_a_thing() -> None:
    env = LiberoEnv("libero_object_permuted", 3, image_size=128)
    try:
        env.reset(options={"placement_seed": 2})
        state, before = env.sim_state(), env.render().astype(int)
        for _, thing in env.asks[:3]:
            (spot,) = env.spots([thing])
            joint = env.simulation.objects_dict[thing].joints[0]
            moved = state.copy()
            moved[1 + env.model.joint(joint).qposadr[0] + 2] -= 5.0  # under the floor
            env.restore(moved)
            rows, columns = np.nonzero(np.abs(env.render() - before).max(axis=-1) > 40)
            found = np.array([np.median(columns), np.median(rows)]) / 128
            assert np.abs(found - spot).max() < 0.06
            env.restore(state)
    finally:
        env.close()
