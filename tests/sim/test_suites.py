import pytest

from rsd.sim.suites import (
    bddl_file,
    init_states,
    step_limit,
    suite_names,
    suite_task,
    suite_tasks,
)
from rsd.types import RsdError


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


def test_every_named_suite_has_its_files_and_the_others_say_what_is_missing() -> None:
    names = suite_names()
    assert {"libero_spatial", "libero_10", "libero_90", "libero_spatial_swap", "libero_goal_lan"} <= set(names)
    for suite in names:
        if suite.endswith(("_swap", "_lan", "_task", "_object")):
            assert len(init_states(suite, 0)) == 50
    assert "libero_spatial_env" not in names
    with pytest.raises(RsdError, match=r"lists without its scene files; the nearest .* libero_spatial"):
        suite_tasks("libero_spatial_env")
    with pytest.raises(RsdError, match=r"unknown name 'libero_spatial_swp'; the nearest .* libero_spatial_swap,"):
        suite_tasks("libero_spatial_swp")


def test_variants_that_ask_otherwise_take_the_instruction_of_the_scene_file() -> None:
    plain, worded, other = (suite_tasks(f"libero_spatial{suffix}") for suffix in ("", "_lan", "_task"))
    assert worded[0].language == "lift the black bowl between the plate and ramekin and set it on the plate"
    assert other[0].name == worded[0].name == plain[0].name
    assert "not between" in other[0].language
    assert {t.language for t in suite_tasks("libero_spatial_swap")} == {t.language for t in plain}


def test_a_variant_has_the_step_limit_of_its_suite() -> None:
    assert step_limit("libero_10_swap") == step_limit("libero_10") == 520
    assert step_limit("libero_goal_with_mug") == 300
    assert step_limit("libero_study_table") == 400


def test_unknown_task_names_the_range() -> None:
    with pytest.raises(RsdError, match="0 to 9"):
        suite_task("libero_spatial", 10)


def test_init_states_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        init_states("libero_spatial", 0)[0, 0] = 1.0
