import pytest

from rsd.sim.suites import bddl_file, init_states, start_regions, suite_task, suite_tasks, swapped_instruction
from rsd.types import RsdError

BOWLS = ("akita_black_bowl_1", "akita_black_bowl_2")


def test_tasks_of_libero_spatial_come_in_benchmark_order() -> None:
    tasks = suite_tasks("libero_spatial")
    assert [task.task_id for task in tasks] == list(range(10))
    assert tasks[0].language == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert tasks[4].name.replace("_", " ") == tasks[4].language


@pytest.mark.parametrize("suite", ["libero_object", "libero_goal", "libero_10", "libero_90"])
def test_every_task_of_the_published_suites_has_its_files(suite: str) -> None:
    for task in suite_tasks(suite):
        assert bddl_file(suite, task.task_id).is_file()
    assert init_states(suite, 0).shape[0] == 50


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(RsdError, match="libero_spatial"):
        suite_tasks("libero_spatail")


def test_unknown_task_names_the_range() -> None:
    with pytest.raises(RsdError, match="0 to 9"):
        suite_task("libero_spatial", 10)


def test_init_states_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        init_states("libero_spatial", 0)[0, 0] = 1.0


def test_the_other_bowl_has_the_instruction_of_the_task_it_would_belong_to() -> None:
    tasks = suite_tasks("libero_spatial")
    for task in tasks:
        swapped = swapped_instruction("libero_spatial", task.task_id, *BOWLS)
        (other,) = [t for t in tasks if t.language == swapped]
        assert other.task_id != task.task_id
        here, there = (start_regions("libero_spatial", t.task_id) for t in (task, other))
        assert here[BOWLS[1]] == there[BOWLS[0]]


def test_a_suite_without_a_matching_task_has_no_swapped_instruction() -> None:
    assert swapped_instruction("libero_goal", 0, "akita_black_bowl_1", "wine_bottle_1") is None
    assert swapped_instruction("libero_goal", 0, "akita_black_bowl_1", "no_such_object_1") is None
