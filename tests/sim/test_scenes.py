"""What a process keeps of a scene for its next task changes nothing that can be seen or measured."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

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


def as_bytes(model: mujoco.MjModel) -> NDArray[np.uint8]:
    buffer = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer


def test_a_scene_read_from_disk_is_the_compiled_one_and_of_these_very_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # of MuJoCo's log
    picture = tmp_path / "wood.png"
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(picture)
    assets = f'<texture name="wood" type="2d" file="{picture}"/><material name="wooden" texture="wood"/>'
    body = '<body><freejoint/><geom size="0.1 0.2 0.3" type="ellipsoid" material="wooden"/></body>'
    xml = f"<mujoco><asset>{assets}</asset><worldbody>{body}</worldbody></mujoco>"
    expected = as_bytes(mujoco.MjModel.from_xml_string(xml))

    def found() -> list[Path]:
        return sorted((tmp_path / "cache").rglob("scene.*"))

    for _ in range(2):  # compiled, read
        np.testing.assert_array_equal(as_bytes(scenes.read_or_compiled(xml)), expected)
        (file,) = found()
        assert file.name == "scene.mjb"
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):  # compiled once more
        np.testing.assert_array_equal(as_bytes(scenes.read_or_compiled(xml)), expected)
        assert file.read_bytes() == expected.tobytes()
    Image.fromarray(np.full((8, 8, 3), 91, np.uint8)).save(picture)
    os.utime(picture, (0.0, 0.0))  # MuJoCo keeps what it read of a file from the same second
    assert (as_bytes(scenes.read_or_compiled(xml)) != expected).any()
    assert len(found()) == 2
    monkeypatch.setattr(mujoco, "mj_saveModel", lambda model, name, _: Path(name).touch())  # a full disk
    assert scenes.read_or_compiled(xml.replace("0.3", "0.4")).ngeom == 1
    assert len(found()) == 2
    monkeypatch.undo()
    capfd.readouterr()  # MuJoCo's warning of the damaged one
