"""robosuite's question which things touch, by geom numbers.

robosuite looks up the names of both geoms of every contact, 0.3 ms a question in a scene of 87 contacts, and LIBERO's
goals ask it twice a control step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.sim.physics import mujoco


class Contacts:
    """`check_contact` of a robosuite environment, with its answers, for one MuJoCo model and its data."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._data = model, data
        self._members: dict[Any, NDArray[np.bool_]] = {}

    def __call__(self, geoms_1: Any, geoms_2: Any = None) -> bool:
        """Whether a geom of the first group touches one of the second; None: anything at all.

        A group is a geom's name, some names, or a robosuite model with its `contact_geoms`. Names that the model does
        not have touch nothing.
        """
        one, other = self._data.contact.geom.T  # [contacts] each
        first, second = self._group(geoms_1), self._group(geoms_2)
        return bool(((first[one] & second[other]) | (first[other] & second[one])).any())

    def _group(self, geoms: Any) -> NDArray[np.bool_]:
        """[geoms of the model]: which belong to the group; a robosuite model's are looked up once."""
        if geoms is None:
            return np.ones(self._model.ngeom, dtype=bool)
        if isinstance(geoms, str):
            return self._members_of([geoms])
        if not hasattr(geoms, "contact_geoms"):
            return self._members_of(geoms)
        if geoms not in self._members:
            self._members[geoms] = self._members_of(geoms.contact_geoms)
        return self._members[geoms]

    def _members_of(self, names: Iterable[str]) -> NDArray[np.bool_]:
        members = np.zeros(self._model.ngeom, dtype=bool)
        numbers = [mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in names]
        members[[number for number in numbers if number >= 0]] = True
        return members
