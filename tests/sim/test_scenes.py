"""What a process keeps of a scene for its next task changes nothing that can be seen or measured."""

import numpy as np
import pytest
from numpy.typing import NDArray

from rsd.sim import scenes
from rsd.sim.libero import LiberoEnv
from rsd.sim.physics import mujoco
from rsd.types import CAMERAS

pytestmark = pytest.mark.simulator


def rollout(env: LiberoEnv) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """States [n, 1 + nq + nv] and images [n, 2, S, S, 3] of a short episode."""
    observation, _ = env.reset(options={"init_state": 3})
    states, images = [env.sim_state()], [np.stack([observation[name] for name in CAMERAS])]
    observation, *_ = env.step_chunk([[0.5, -0.5, -1.0, 0.2, 0.1, -0.3, 1.0]] * 4)
    states.append(env.sim_state())
    images.append(np.stack([observation[name] for name in CAMERAS]))
    return np.array(states), np.array(images)


def test_the_next_task_of_a_scene_takes_its_model_and_context_and_changes_nothing() -> None:
    plain = LiberoEnv("libero_spatial", 1, image_size=64, fast=False)
    expected_states, expected_images = rollout(plain)
    plain.close()
    before = LiberoEnv("libero_spatial", 0, image_size=64)
    rollout(before)
    (model,) = scenes._models.values()
    context = before.simulation.sim._render_context_offscreen.con
    before.close()
    after = LiberoEnv("libero_spatial", 1, image_size=64)
    assert after.simulation.sim._render_context_offscreen.con is context
    assert scenes._models[after.simulation.sim.xml] is model
    assert after.model is not model
    # two at once: the second has to bring its textures to a context of its own
    beside = LiberoEnv("libero_spatial", 2, image_size=64)
    rollout(beside)
    states, images = rollout(after)
    beside.close()
    after.close()
    np.testing.assert_array_equal(states, expected_states)
    np.testing.assert_array_equal(images, expected_images)


def test_another_scene_takes_nothing_and_only_the_last_is_kept() -> None:
    for suite in ("libero_goal", "libero_object"):
        env = LiberoEnv(suite, 0, image_size=64)
        env.reset(options={"init_state": 0})
        assert env.observation().images.std() > 5
        xml = env.simulation.sim.xml
        env.close()
        assert list(scenes._models) == list(scenes._contexts) == [xml]
    scenes.forget_contexts()
    assert not scenes._contexts


def test_a_reset_leaves_the_solver_where_a_rebuilt_model_does() -> None:
    """In libero_object the solver is not at rest after a reset: how often it has run shows in the last bits."""
    found = []
    for fast in (True, False):
        env = LiberoEnv("libero_object", 2, image_size=16, fast=fast)
        env.reset(options={"init_state": 3})
        found.append(np.concatenate([env.sim_state(), env.data.qacc_warmstart]))
        env.close()
    np.testing.assert_array_equal(*found)


def test_a_scene_that_is_never_drawn_lacks_its_textures_alone() -> None:
    env = LiberoEnv("libero_goal", 0, cameras=False)
    whole = mujoco.MjModel.from_xml_string(env.simulation.sim.xml)
    env.close()
    (kept,) = scenes._models.values()  # as compiled: robosuite changes its copy
    assert kept.ntex == 0 < whole.ntex
    names = [name for name in dir(whole) if isinstance(getattr(whole, name), np.ndarray)]
    physics = [name for name in names if not name.startswith(("_", "tex_", "name", "mat_texid"))]  # names move
    assert {"body_inertia", "geom_pos", "geom_rgba", "mesh_vert"} <= set(physics)
    for name in physics:
        np.testing.assert_array_equal(getattr(kept, name), getattr(whole, name), name)
