"""Which things touch: robosuite's answers, without its names."""

from itertools import product

import numpy as np
import pytest

from rsd.sim.fast_path import Contacts
from rsd.sim.libero import LiberoEnv

pytestmark = pytest.mark.simulator


def test_contacts_are_robosuites() -> None:
    env = LiberoEnv("libero_spatial", 4, cameras=False)
    simulation = env.simulation
    robosuites = type(simulation).check_contact
    assert isinstance(simulation.check_contact, Contacts)
    named = [*simulation.objects_dict.values(), *simulation.fixtures_dict.values(), simulation.robots[0].gripper]
    bowl = simulation.get_object("akita_black_bowl_1").contact_geoms
    groups = [*named, bowl, bowl[0], "gripper0_finger1_pad_collision", ["no such geom", bowl[0]], "no such geom", []]
    answers = []
    rng = np.random.default_rng(0)
    env.reset(options={"init_state": 0})
    for steps in (0, 8, 8):
        if steps:
            env.step_chunk(np.clip([[0, 0, -1, 0, 0, 0, -1.0]] + rng.standard_normal((steps, 7)) / 4, -1, 1))
        for one, other in product(groups, [None, *groups]):
            expected = robosuites(simulation, one, other)
            assert simulation.check_contact(one, other) == expected, (one, other)
            answers.append(expected)
    env.restore(np.concatenate([[0.0], np.full(env.model.nq, 5.0), np.zeros(env.model.nv)]))
    assert simulation.check_contact(named[0]) == robosuites(simulation, named[0])
    assert 0.02 < np.mean(answers) < 0.5
    env.close()
