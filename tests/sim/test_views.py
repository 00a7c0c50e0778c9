"""Another look: what it changes, what it leaves alone, that it repeats and ends."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from rsd.conventions import WAIT_ACTION
from rsd.evaluation.config import EvalConfig
from rsd.sim.libero import LiberoEnv
from rsd.sim.views import GREY, SHIFTED, TURNED, View
from rsd.types import CAMERAS, VIEWS, RsdError

SIDE = 64


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = LiberoEnv("libero_spatial", 0, SIDE)
    yield env
    env.close()


def seen(env: LiberoEnv, *what: str, seed: int = 0, state: int = 3) -> dict[str, NDArray[np.float64]]:
    env.view = View(what, seed) if what else None
    images, _ = env.reset(options={"init_state": state})
    return {name: images[name].astype(float) for name in CAMERAS}


@pytest.mark.parametrize("what", VIEWS)
def test_a_look_changes_pictures_repeats_and_leaves_physics_alone(env: LiberoEnv, what: str) -> None:
    plain, before = seen(env), env.sim_state()
    images = seen(env, what)
    assert np.array_equal(env.sim_state(), before)
    changed = ["agentview"] if what == "camera" else CAMERAS
    # drawn after the wait steps, not 2 ms before their end: a grey level here and there
    assert [name for name in CAMERAS if np.abs(images[name] - plain[name]).mean() > 0.5] == list(changed)
    other = seen(env, what, seed=1)
    assert not np.array_equal(images["agentview"], other["agentview"])
    again = seen(env, what)
    assert all(np.array_equal(images[name], again[name]) for name in CAMERAS)
    env.step_chunk([WAIT_ACTION] * 3)
    moved = env.sim_state()
    assert all(np.array_equal(plain[name], image) for name, image in seen(env).items())
    env.step_chunk([WAIT_ACTION] * 3)
    assert np.array_equal(env.sim_state(), moved)


def test_the_third_person_camera_turns_about_what_it_sees(env: LiberoEnv) -> None:
    things = list(env.simulation.obj_body_id)
    seen(env)
    before, camera = env.spots(things), env.data.camera("agentview").xmat.copy().reshape(3, 3)
    seen(env, "camera")
    turned = env.data.camera("agentview").xmat.reshape(3, 3) @ camera.T
    assert TURNED[0] <= np.degrees(np.arccos((np.trace(turned) - 1) / 2)) <= TURNED[1]
    assert 0.002 < np.linalg.norm(env.spots(things) - before, axis=1).max() < 0.2


def test_a_look_takes_the_place_of_the_one_before(env: LiberoEnv) -> None:
    seen(env)
    plain, drawn = env.draw(), []
    for _ in range(3):
        env.look_as(("light", "camera", "zoom"), np.random.default_rng(5))
        drawn.append(env.draw())
    env.look_as((), np.random.default_rng(0))
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(plain, drawn[0])
    assert np.array_equal(env.draw(), plain)


def test_pictures_are_shifted_whole_and_noisy_anew_at_every_step(env: LiberoEnv) -> None:
    plain, shifted = seen(env)["wrist"], seen(env, "shift")["wrist"]
    most = round(SHIFTED * SIDE)
    steps = range(-most, most + 1)
    inner = slice(most, SIDE - most)
    assert any(
        np.abs(np.roll(plain, (down, right), (0, 1)) - shifted)[inner, inner].mean() < 0.1
        for down in steps
        for right in steps
    )
    noisy = seen(env, "noise")
    grey = (plain > 50) & (plain < 200)
    assert (noisy["wrist"] - plain)[grey].std() == pytest.approx(GREY, rel=0.1)
    assert np.array_equal(env.render(), noisy["agentview"])  # as the policy sees it
    env.advance(np.asarray(WAIT_ACTION))
    assert (env.render() - noisy["agentview"]).std() > GREY / 2  # another step, other noise


def test_unknown_looks_are_refused(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    for view in ("light,dark", "camera,light", "light,light", "light, camera"):
        with pytest.raises(RsdError, match=f"--view with some of light,camera,.*, in this order, .*, found {view}$"):
            EvalConfig(view=view)
    env.view = View(("light",))
    monkeypatch.setattr(env, "fast", False)
    with pytest.raises(RsdError, match="expected the fast path"):
        env.reset(options={"init_state": 0})
