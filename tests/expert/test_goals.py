import pytest

from rsd.expert.goals import Goal, goals_of, kind, solvable_tasks, task_goals
from rsd.sim.suites import scene_file
from rsd.types import RsdError


def test_names_lose_their_numbers() -> None:
    assert kind("wine_bottle_1") == "wine_bottle"
    assert kind("basket_1_contain_region") == "basket_contain_region"
    assert kind("table") == "table"


def test_the_goal_is_the_predicate_of_the_scene_file() -> None:
    assert task_goals("libero_object", 6) == (Goal("in", "butter_1", "basket_1_contain_region"),)
    assert task_goals("libero_goal", 9) == (Goal("on", "wine_bottle_1", "wine_rack_1_top_region"),)
    assert task_goals("libero_goal", 7)[0].words == ("turnon", "flat_stove_1")
    assert scene_file("libero_goal", 8).goal == (("on", "akita_black_bowl_1", "plate_1"),)
    assert task_goals("libero_10", 0) == tuple(
        Goal("in", name, "basket_1_contain_region") for name in ("alphabet_soup_1", "tomato_sauce_1")
    )


def test_what_the_expert_can_do() -> None:
    assert solvable_tasks("libero_spatial") == solvable_tasks("libero_object") == tuple(range(10))
    assert solvable_tasks("libero_goal") == solvable_tasks("libero_10") == tuple(range(10))
    assert set(range(90)) - set(solvable_tasks("libero_90")) == {6, 32, 35}


def test_goals_come_in_an_order_that_leaves_room_for_the_hand() -> None:
    pudding, mug = task_goals("libero_10", 6)  # the scene file has the mug first
    assert (pudding.target, mug.target) == ("chocolate_pudding_1", "porcelain_mug_1")
    assert tuple(goal.words for goal in task_goals("libero_10", 2)) == scene_file("libero_10", 2).goal
    far, near, stove = task_goals("libero_10", 8)
    assert far.ahead - near.ahead > 0.08  # the width of a pot
    assert stove.words == ("turnon", "flat_stove_1")  # it is on from the start


@pytest.mark.parametrize(
    ("suite", "task", "message"),
    [
        ("libero_90", 32, "in ketchup_1 white_cabinet_1_top_region.* 0 .close the top drawer of the cabinet"),
        ("libero_90", 35, "open microwave_1"),
        ("libero_90", 6, "open wooden_cabinet_1_bottom_region"),
    ],
)
def test_other_tasks_are_refused_with_those_it_does(suite: str, task: int, message: str) -> None:
    with pytest.raises(RsdError, match=message):
        task_goals(suite, task)


def test_a_drawer_that_is_shut_is_opened_before_something_goes_into_it() -> None:
    drawer, words = "wooden_cabinet_1_top_region", ("in", "akita_black_bowl_1", "wooden_cabinet_1_top_region")
    opening, putting = Goal("open", drawer), Goal(*words)
    assert scene_file("libero_goal", 3).goal == (words,)
    assert task_goals("libero_goal", 3) == task_goals("libero_90", 8) == (opening, putting)
    assert goals_of([words], [("open", drawer)]) == (putting,)
    assert goals_of([words, ("close", drawer)]) is None  # it would open it again
    assert goals_of([("in", "akita_black_bowl_1", "wooden_cabinet_1_bottom_region")]) is None


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (("libero_10", 3), ("akita_black_bowl_1", "white_cabinet_1_bottom_region")),  # the file has the drawer first
        (("libero_90", 3), ("butter_2", "wooden_cabinet_1_top_region")),  # into the drawer, then it is shut
        (
            ("libero_90", 63),
            ("akita_black_bowl_2", "akita_black_bowl_1"),
        ),  # the lower bowl first
        (
            ("libero_90", 1),
            ("wooden_cabinet_1_top_region", "akita_black_bowl_1"),
        ),  # as the file has it
    ],
)
def test_what_holds_something_is_in_its_place_before_and_shut_after(
    task: tuple[str, int], targets: tuple[str, ...]
) -> None:
    assert tuple(goal.target for goal in task_goals(*task)) == targets
