"""The checkpoints that ship: their promises, in the real simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsd.devices import multiplies_int8
from rsd.policy import RsdPolicy
from rsd.sim.libero import LiberoEnv
from rsd.sim.suites import suite_tasks
from rsd.types import EAGER, ONNX, ONNX_INT8, Observation

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/libero"
FAST_INT8 = pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no fast products of 8-bit integers")
MAX_BYTES = 65e6  # int8, 57 M parameters


def load(**options: str) -> RsdPolicy:
    return RsdPolicy.from_pretrained(CHECKPOINT, **options)


def task_number(words: str) -> int:
    return next(task.task_id for task in suite_tasks("libero_spatial") if words in task.language)


def test_size_and_share_of_the_draft() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MAX_BYTES
    policy = load()
    draft = sum(p.numel() for p in policy.model.feature_drafter.parameters())
    # the trunk alone, which an `ar` level runs once and a drafted level replaces by one run of the draft
    assert sum(p.numel() for p in policy.model.target.trunk.parameters()) >= 8 * draft


def test_provenance_names_data_versions_and_validation() -> None:
    """Of the drafter's own training and of the target's."""
    tuned = load().provenance["average_of"][0]["provenance"]
    for record in (tuned["visual_drafter"], tuned["average_of"][0]["provenance"]):
        assert record["data"]["episodes"] > 1000
        assert {"torch", "mujoco", "robosuite"} <= record["versions"].keys()
        assert {"ar", "l1", "rsd margin"} <= record["validation"].keys()


@pytest.mark.simulator
@pytest.mark.usefixtures("one_model")
def test_it_does_two_things_in_turn() -> None:
    """Both mugs to their plates, in the simulator of libero_10."""
    env, policy = LiberoEnv("libero_10", 4, image_size=128), load(decode="rsd-fused")
    try:
        env.reset(options={"init_state": 0})
        policy.reset()
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step_chunk(policy.predict(env.observation()).actions)
            done = terminated or truncated
    finally:
        env.close()
    assert terminated


@pytest.mark.simulator
@pytest.mark.usefixtures("one_model")
def test_the_words_decide_which_bowl_is_taken() -> None:
    """Two identical bowls, one on the stove and one on the cabinet: the hand goes to the one that is named."""
    scene = task_number("on the stove and")
    places = {"on the stove": "akita_black_bowl_1", "on the wooden cabinet": "akita_black_bowl_2"}
    env, policy = LiberoEnv("libero_spatial", scene, image_size=128), load()
    try:
        distance = {}
        for place in places:
            env.reset(options={"init_state": 0})
            policy.reset()
            for _ in range(4):
                seen = env.observation()
                asked = f"pick up the black bowl {place} and place it on the plate"
                env.step_chunk(policy.predict(Observation(seen.images, seen.state, asked)).actions)
            bodies = env.simulation.obj_body_id
            distance[place] = {
                bowl: float(np.linalg.norm(env.proprio()[:2] - env.data.xpos[bodies[bowl]][:2]))
                for bowl in places.values()
            }
    finally:
        env.close()
    for place, bowl in places.items():
        for other_place in places:
            if other_place != place:
                assert distance[place][bowl] < distance[other_place][bowl] - 0.05


@pytest.mark.simulator
@pytest.mark.usefixtures("one_model")
def test_exact_acceptance_gives_the_tokens_of_ar_along_an_episode() -> None:
    env = LiberoEnv("libero_spatial", task_number("next to the plate"), image_size=128)
    baseline, exact = load(decode="ar"), load(decode="rsd", acceptance="exact")
    try:
        env.reset(options={"init_state": 1})
        for _ in range(5):
            seen = env.observation()
            chunk = baseline.predict(seen).actions
            np.testing.assert_array_equal(exact.predict(seen).actions, chunk)
            env.step_chunk(chunk)
    finally:
        env.close()


@pytest.mark.simulator
@pytest.mark.usefixtures("one_model")
def test_skipping_solves_a_task_with_less_than_a_pass_a_chunk() -> None:
    """The easiest task (50 of 50 where it was measured); one of two states, since renderers differ in the last bits."""
    env, policy = LiberoEnv("libero_spatial", task_number("between the plate"), image_size=128), load(decode="rsd-skip")
    assert (load().decode, load().acceptance) == ("rsd-fused", "blind(0.95,moving)")
    solved, prefills = list[bool](), list[int]()
    try:
        for state in range(2):
            env.reset(options={"init_state": state})
            policy.reset()
            done = success = False
            while not done:
                chunk = policy.predict(env.observation())
                assert chunk.stats.target_passes == 0
                prefills.append(chunk.stats.prefills)
                _, _, success, truncated, _ = env.step_chunk(chunk.actions)
                done = success or truncated
            solved.append(success)
    finally:
        env.close()
    assert any(solved)
    assert sum(prefills) < 0.75 * len(prefills)  # 0.4 over all tasks


@pytest.mark.simulator
@pytest.mark.usefixtures("shared_graphs")
@pytest.mark.parametrize(("engine", "apart"), [(ONNX, 1e-4), pytest.param(ONNX_INT8, 0.05, marks=FAST_INT8)])
def test_the_default_decoder_acts_alike_as_onnx_graphs(engine: str, apart: float) -> None:
    env = LiberoEnv("libero_spatial", task_number("next to the plate"), image_size=128)
    eager, graphs = load(engine=EAGER), load(engine=engine)
    try:
        env.reset(options={"init_state": 1})
        for _ in range(4):
            seen = env.observation()
            expected, found = (policy.predict(seen) for policy in (eager, graphs))
            np.testing.assert_allclose(found.actions, expected.actions, atol=apart)
            assert sum(expected.stats.num_draft_tokens) > 0
            assert found.stats.num_accepted_tokens == expected.stats.num_accepted_tokens
            env.step_chunk(expected.actions)
    finally:
        env.close()
