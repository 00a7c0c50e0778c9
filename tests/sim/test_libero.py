import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray

from rsd.conventions import WAIT_STEPS
from rsd.sim.libero import LiberoEnv, simulator_versions
from rsd.sim.suites import init_states
from rsd.types import CAMERAS, Observation, RsdError

pytestmark = pytest.mark.simulator
SUITE, SIZE, CHUNK = "libero_spatial", 64, 8
DRAWER_TASK = 4


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = LiberoEnv(SUITE, 0, image_size=SIZE)
    yield env
    env.close()


def random_actions(steps: int = 24) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    actions = np.clip(0.4 * rng.standard_normal((steps, 7)), -1, 1)
    actions[:, 2] -= 0.5  # down, towards contact
    actions[:, 6] = np.sign(np.sin(np.arange(steps) / 9))
    return actions


def rollout(env: LiberoEnv, init_state: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """States after every chunk [n, 1 + nq + nv] and the images then [n, 2, S, S, 3]."""
    observation, _ = env.reset(options={"init_state": init_state})
    states, images = [env.sim_state()], [np.stack([observation[name] for name in CAMERAS])]
    for start in range(0, 24, CHUNK):
        observation, *_ = env.step_chunk(random_actions()[start : start + CHUNK])
        states.append(env.sim_state())
        images.append(np.stack([observation[name] for name in CAMERAS]))
    return np.array(states), np.array(images)


def test_fast_path_is_bit_identical_to_the_plain_one_after_other_episodes(env: LiberoEnv) -> None:
    plain = LiberoEnv(SUITE, 0, image_size=SIZE, fast=False)
    expected_states, expected_images = rollout(plain, 5)
    plain.close()
    rollout(env, 2)  # whatever an earlier episode leaves behind must not matter
    env.reset(options={"placement_seed": 3})
    states, images = rollout(env, 5)
    np.testing.assert_array_equal(states, expected_states)
    np.testing.assert_array_equal(images, expected_images)


def test_placements_are_the_same_on_both_paths_with_a_drawer() -> None:
    fast = LiberoEnv(SUITE, DRAWER_TASK, cameras=False)
    plain = LiberoEnv(SUITE, DRAWER_TASK, cameras=False, fast=False)
    for seed in (0, 1):  # the second rebuild is the one that drifts if samplers pile up
        for env in (fast, plain):
            env.reset(options={"placement_seed": seed})
        np.testing.assert_array_equal(fast.sim_state(), plain.sim_state())
        np.testing.assert_array_equal(fast.fixture_poses()[0], plain.fixture_poses()[0])
    fast.close()
    plain.close()


def test_protocol_of_a_fixed_initial_state(env: LiberoEnv) -> None:
    observation, info = env.reset(options={"init_state": 7})
    assert info["init_state"] == 7
    stored = init_states(SUITE, 0)[7]
    state = env.sim_state()
    assert state[0] == pytest.approx(stored[0] + WAIT_STEPS * 0.05)
    np.testing.assert_allclose(state[1:8], stored[1:8], atol=0.02)  # the arm holds its pose while waiting
    # robosuite's hand points down: a rotation by pi about x, minus the axis angle of -q would flip every sign
    np.testing.assert_allclose(observation["state"][3:6], [np.pi, 0.0, -0.09], atol=0.12)
    assert observation["state"][6] == pytest.approx(0.039, abs=0.002)
    assert observation["state"][7] == pytest.approx(-0.039, abs=0.002)


def test_fixtures_of_the_fixed_states_are_always_the_same_ones(env: LiberoEnv) -> None:
    env.reset(options={"init_state": 0})
    first = env.fixture_poses()[0]
    env.reset(options={"placement_seed": 1})
    random = env.fixture_poses()[0]
    env.reset(options={"init_state": 1})
    np.testing.assert_array_equal(env.fixture_poses()[0], first)
    assert np.abs(random - first).max() > 1e-4


def test_placements_repeat_and_differ_by_seed_in_objects_and_arm(env: LiberoEnv) -> None:
    states = []
    for seed in (11, 12, 11):
        _, info = env.reset(options={"placement_seed": seed})
        assert info["placement_seed"] == seed
        states.append(env.sim_state())
    np.testing.assert_array_equal(states[0], states[2])
    difference = np.abs(states[0] - states[1])
    assert difference[1:8].max() > 1e-3  # arm joints
    assert difference[10:].max() > 1e-3  # objects


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_state": 50}, "0 to 49"),
        ({"init": 1}, "init_state or placement_seed"),
        ({"init_state": -1}, "0 to 49"),
        ({"init_state": "0"}, r"reset options\.init_state: expected an integer, found '0'"),
        ({"init_state": True}, "expected an integer, found True"),
        ({"placement_seed": -1}, "placement_seed: expected an integer from 0"),
        ({"placement_seed": 1.5}, "expected an integer, found 1.5"),
        ("x", "reset options: expected an object, found 'x'"),
    ],
)
def test_reset_options_are_checked(env: LiberoEnv, options: Any, message: str) -> None:
    with pytest.raises(RsdError, match=message):
        env.reset(options=options)


@pytest.mark.parametrize(
    ("actions", "message"),
    [(np.zeros((8, 6)), "7"), (np.zeros(7), "7"), (np.zeros((0, 7)), "H > 0"), (np.full((1, 7), np.nan), "NaN")],
)
def test_actions_are_checked(env: LiberoEnv, actions: NDArray[np.float64], message: str) -> None:
    env.reset(options={"init_state": 0})
    with pytest.raises(RsdError, match=message):
        env.step_chunk(actions)


def test_actions_are_clipped(env: LiberoEnv) -> None:
    ends = []
    for size in (1.0, 7.0):
        env.reset(options={"init_state": 0})
        env.step_chunk(size * np.array([[1, -1, 1, 1, -1, 1, -1.0]] * 2))
        ends.append(env.sim_state())
    np.testing.assert_array_equal(ends[0], ends[1])


def test_an_episode_is_truncated_at_its_limit_within_a_chunk(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.max_steps == 220
    monkeypatch.setattr(env, "max_steps", 3)
    env.reset(options={"init_state": 0})
    _, _, terminated, truncated, info = env.step_chunk(np.zeros((2, 7)))
    assert (terminated, truncated, info["steps"]) == (False, False, 2)
    _, reward, terminated, truncated, info = env.step_chunk(np.zeros((8, 7)))
    assert (reward, terminated, truncated, info["steps"]) == (0.0, False, True, 1)


def test_success_ends_a_chunk_early_with_fresh_images(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(options={"init_state": 0})
    verdicts = iter([False, False, True])
    monkeypatch.setattr(env, "success", lambda: next(verdicts))
    observation, reward, terminated, truncated, info = env.step_chunk(random_actions()[:8])
    assert (reward, terminated, truncated, info["steps"]) == (1.0, True, False, 3)
    np.testing.assert_array_equal(observation["agentview"], env.draw()[0, ::-1, ::-1])
    monkeypatch.setattr(env, "draws_end", False)
    verdicts = iter([True])
    ended, *_ = env.step_chunk(random_actions()[:8])
    np.testing.assert_array_equal(ended["agentview"], observation["agentview"])


def test_observation_is_upright_and_carries_the_instruction(env: LiberoEnv) -> None:
    env.reset(options={"init_state": 0})
    observation = env.observation()
    assert isinstance(observation, Observation)
    assert observation.images.shape == (2, SIZE, SIZE, 3)
    assert observation.instruction == env.instruction
    drawn = env.draw()[:, ::-1, ::-1].astype(int)  # one substep later than the sampled images
    assert np.abs(drawn - observation.images).mean() < 2.0
    assert np.abs(drawn[:, ::-1] - observation.images).mean() > 10.0


def test_without_cameras_there_are_no_images() -> None:
    with pytest.raises(RsdError, match="cameras: expected true or false, found 'no'"):
        LiberoEnv(SUITE, 0, cameras="no")  # type: ignore[arg-type]
    env = LiberoEnv(SUITE, 0, cameras=False)
    for early in (env.proprio, env.render, env.latest):
        with pytest.raises(RsdError, match="expected a reset before the first observation"):
            early()
    observation, _ = env.reset(options={"init_state": 0})
    assert set(observation) == {"state"}
    with pytest.raises(RsdError, match="cameras=False"):
        env.observation()
    with pytest.raises(RsdError, match="cameras=False"):
        env.draw()
    with pytest.raises(RsdError, match="plate_9"):
        env.holds("on", "akita_black_bowl_1", "plate_9")
    with pytest.raises(RsdError, match="unknown name 'nothing'"):
        env.holds("on")
    env.close()
    with pytest.raises(RsdError, match="not closed"):
        env.proprio()
    with pytest.raises(RsdError, match="closed"):
        env.sim_state()


def test_it_is_a_gymnasium_environment(env: LiberoEnv) -> None:
    check_env(env, skip_render_check=True)


def test_restoring_a_state_restores_it_exactly(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 5})
    state, poses = env.sim_state(), env.fixture_poses()
    env.restore(state, *poses)
    before = env.draw()
    env.reset(options={"placement_seed": 6})
    assert np.abs(env.draw().astype(int) - before).mean() > 0.1
    env.restore(state, *poses)
    np.testing.assert_array_equal(env.sim_state(), state)
    np.testing.assert_array_equal(env.draw(), before)
    with pytest.raises(RsdError, match="expected"):
        env.restore(state[:-1])
    state[3] = 1e300  # of a damaged file; MuJoCo would draw another scene, without a word
    with pytest.raises(RsdError, match=r"expected numbers within 1e\+10, found 1e\+300"):
        env.restore(state)


def test_versions_name_everything_that_moves_a_number() -> None:
    versions = simulator_versions()
    assert {"mujoco", "robosuite", "libero", "gl_backend", "python", "numpy"} <= set(versions)
    assert versions["mujoco"] == "3.2.3"
    assert versions["gl_backend"] == os.environ["MUJOCO_GL"]


def test_nothing_is_printed_or_written_into_the_home_directory_but_a_cache(tmp_path: Path) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    code = (
        "from rsd.sim.libero import LiberoEnv\n"
        f"env = LiberoEnv({SUITE!r}, 0, image_size=32)\n"
        "env.reset(options={'init_state': 0})\n"
    )
    unset = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
    variables = {key: value for key, value in os.environ.items() if key not in unset}
    variables.update(HOME=str(home), TMPDIR=str(scratch), PYTHONWARNINGS="error")  # of the libraries nothing is said
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=home, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    cache = home / ".cache" / "rsd-vla"
    assert {path for path in home.rglob("*") if cache not in (path, *path.parents)} == {cache.parent}
    assert list(scratch.iterdir()) == []
