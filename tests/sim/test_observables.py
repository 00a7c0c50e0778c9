"""What robosuite observes is sampled at the same substeps, with the same clocks, as robosuite itself samples it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rsd.sim.fast_path import Sampling
from rsd.sim.libero import LiberoEnv
from rsd.sim.suites import load_libero

pytestmark = pytest.mark.simulator
SUBSTEPS = 25


def clocks(env: LiberoEnv) -> dict[str, tuple[float, bool, float]]:
    observables = env.simulation._observables
    return {n: (o._time_since_last_sample, o._sampled, o._current_delay) for n, o in observables.items()}


def observing(rates: list[float], delays: list[float], offset: float = 0.0) -> Any:
    """A robosuite environment as far as Sampling sees it: observables whose sensors say when they were asked."""
    load_libero()
    from robosuite.environments.base import MujocoEnv
    from robosuite.utils.observables import Observable, sensor

    simulation = SimpleNamespace(model_timestep=0.002, _observables={}, _obs_cache={}, substep=np.zeros(1), updates=0)
    for i, (rate, delay) in enumerate(zip(rates, delays, strict=True)):
        read = sensor(modality="test")(lambda cache, i=i: np.array([i, simulation.substep[0], len(cache)]))
        made = Observable(str(i), read, delayer=lambda delay=delay: delay, sampling_rate=rate)
        made._time_since_last_sample = offset
        simulation._observables[str(i)] = made

    def update() -> None:
        simulation.updates += 1
        MujocoEnv._update_observables(simulation)

    simulation._update_observables = update
    return simulation


def control_step(plain: Any, fast: Any, sampling: Sampling) -> None:
    """All substeps of one: by robosuite's own updates, and by the sampling of `fast`."""
    for _ in range(SUBSTEPS):
        plain._update_observables()
        sampling.substep()
        plain.substep += 1
        fast.substep += 1
    sampling.finish()


@pytest.mark.parametrize(
    ("rates", "delays", "offset", "updates"),
    [
        ([20.0] * 3, [0.0] * 3, 0.004, 60),  # as LIBERO: a sample in each control step
        ([20.0] * 3, [0.011] * 3, 0.0, 60),
        ([19.0, 19.0], [0.0] * 2, 0.0, 58),  # the sample's substep wanders through the control step
        ([20.0, 19.0], [0.0] * 2, 0.0, SUBSTEPS * 60),  # clocks of their own: each substep is robosuite's
        ([20.0, 20.0], [0.0, 0.011], 0.0, SUBSTEPS * 60),
    ],
)
def test_samples_and_clocks_are_robosuites(
    rates: list[float], delays: list[float], offset: float, updates: int
) -> None:
    plain, fast = observing(rates, delays, offset), observing(rates, delays, offset)
    for _ in range(60):
        sampling = Sampling(fast)
        control_step(plain, fast, sampling)
        for name, expected in plain._observables.items():
            found = fast._observables[name]
            np.testing.assert_array_equal(found.obs, expected.obs)
            assert found._time_since_last_sample == expected._time_since_last_sample
            assert found._sampled == expected._sampled
    assert plain.updates == SUBSTEPS * 60
    assert abs(fast.updates - updates) <= 2


@pytest.mark.parametrize("offset", [0.004, 0.002, 0.0])  # the sample comes in the last substep but one, in the last
def test_a_sample_that_is_made_up_for_is_the_same(offset: float) -> None:
    plain, fast = observing([20.0] * 3, [0.0] * 3, offset), observing([20.0] * 3, [0.0] * 3, offset)
    for each in (plain, fast):
        each._obs_cache.update(dict.fromkeys(each._observables))  # as after a reset
    for step in range(60):
        sampling = Sampling(fast, [fast.substep])
        control_step(plain, fast, sampling)
        if looked_at := step % 3 == 2:
            sampling.sample_owed()
        assert fast.substep == plain.substep
        for name, expected in plain._observables.items():
            found = fast._observables[name]
            assert found._time_since_last_sample == expected._time_since_last_sample
            assert found._sampled == expected._sampled
            assert np.array_equal(found.obs, expected.obs) == looked_at
    assert fast.updates == 0


@pytest.mark.parametrize(("suite", "task"), [("libero_object", 2), ("libero_goal", 7)])
def test_all_that_is_observed_is_as_on_the_plain_path(
    suite: str, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reset, during chunks, after one that success ends early, and after a state was restored."""
    plain, fast = LiberoEnv(suite, task, cameras=False, fast=False), LiberoEnv(suite, task, cameras=False)
    actions = np.clip(np.random.default_rng(1).standard_normal((8, 7)), -1, 1)
    fast.reset(options={"init_state": 8})
    fast.step_chunk(actions[:3])  # whatever an earlier episode leaves behind must not matter
    for state in (4, 5):
        for env in (plain, fast):
            env.reset(options={"init_state": state})
        assert_observed_alike(fast, plain)
        for env in (plain, fast):
            env.step_chunk(actions)
            env.restore(env.sim_state())
            env.step_chunk(actions)
        assert_observed_alike(fast, plain)
        for env in (plain, fast):
            verdicts = iter([False, False, True])
            monkeypatch.setattr(env, "success", lambda verdicts=verdicts: next(verdicts))
            assert env.step_chunk(actions)[4]["steps"] == 3
            monkeypatch.undo()
        assert_observed_alike(fast, plain)
    plain.close()
    fast.close()


def assert_observed_alike(fast: LiberoEnv, plain: LiberoEnv) -> None:
    assert clocks(fast) == clocks(plain)
    assert fast.latest().keys() == plain.latest().keys()
    for name, value in plain.latest().items():
        np.testing.assert_array_equal(fast.latest()[name], value, err_msg=name)
    np.testing.assert_array_equal(fast.proprio(), plain.proprio())
    np.testing.assert_array_equal(fast.sim_state(), plain.sim_state())
    np.testing.assert_array_equal(fast.model.site_rgba, plain.model.site_rgba)
