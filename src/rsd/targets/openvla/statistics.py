"""dataset_statistics.json: which numbers a checkpoint's actions and states were normalised with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import shown
from rsd.targets.openvla.published import CONFIG_FILE, SETTINGS_FILE, STATISTICS_FILE, read_json
from rsd.types import ACTION_DIM, STATE_DIM, RsdError, real_array

NO_NOOPS = "_no_noops"  # LIBERO's data without idle steps, which the published fine-tunes saw


@dataclass(frozen=True)
class Bounds:
    """low, high: the 1 % and 99 % quantiles, mapped to -1 and 1; where mask is False a number stays as it is."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mask: NDArray[np.bool_]

    def normalise(self, value: NDArray[np.floating]) -> NDArray[np.float64]:
        """Clipped to [-1, 1], as published."""
        scaled = 2.0 * (value - self.low) / (self.high - self.low + 1e-8) - 1.0
        return np.clip(np.where(self.mask, scaled, value), -1.0, 1.0)

    def restore(self, value: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.where(self.mask, 0.5 * (value + 1.0) * (self.high - self.low + 1e-8) + self.low, value)


class Statistics:
    """All data sets that a checkpoint has statistics of."""

    def __init__(self, tables: dict[str, Any], source: str) -> None:
        if not (isinstance(tables, dict) and tables and all(isinstance(table, dict) for table in tables.values())):
            raise RsdError(f"{source}: no data set's statistics; expected q01 and q99 of the actions")
        self.tables, self.source = tables, source

    @classmethod
    def load(cls, directory: Path) -> Statistics:
        """The fine-tune's own file; without one, what the base model's config.json has under `norm_stats`."""
        path = directory / STATISTICS_FILE
        if path.is_file():
            return cls(read_json(path), str(path))
        tables = read_json(directory / CONFIG_FILE).get("norm_stats")
        if not tables:
            raise RsdError(f"{path}: not found, and {CONFIG_FILE} has no norm_stats; copy it from the training run")
        return cls(tables, str(directory / CONFIG_FILE))

    def key(self, wanted: str | None) -> str:
        """The name itself, else with `_no_noops`; without a wish, the only one there is."""
        names = sorted(self.tables)
        if wanted is None:
            if len(names) == 1:
                return names[0]
            raise RsdError(f"{self.source}: statistics of several data sets; {self._choose(names)}")
        for name in (wanted, wanted + NO_NOOPS):
            if name in self.tables:
                return name
        raise RsdError(
            f"{self.source}: no statistics of {wanted!r} (nor {wanted + NO_NOOPS!r}); there are {names}. "
            f"If the checkpoint was trained for this, under another name: {self._choose(names)}"
        )

    def _choose(self, names: list[str]) -> str:
        """What to do: variants of a suite, and runs of several, take one data set's statistics by this file."""
        example = json.dumps({"unnorm_key": names[0]})
        return f"choose one of {names} by writing {example}, say, into {Path(self.source).parent / SETTINGS_FILE}"

    def actions(self, key: str) -> Bounds:
        return self._bounds(key, "action", ACTION_DIM)

    def state(self, key: str) -> Bounds:
        return self._bounds(key, "proprio", STATE_DIM)

    def _bounds(self, key: str, kind: str, size: int) -> Bounds:
        table = self.tables[key].get(kind) or {}
        where, expected = f"{self.source}: {key}.{kind}", f"expected q01, q99 of {size} numbers"
        if not isinstance(table, dict):
            raise RsdError(f"{where}: {expected}, found {shown(table)}")
        low, high = (real_array(f"{where}.{name}", table.get(name, ()), "float64") for name in ("q01", "q99"))
        mask = np.asarray(table.get("mask", [True] * size))
        if not low.shape == high.shape == mask.shape == (size,) or mask.dtype != bool:
            found = f"{len(low)}, {len(high)} and the mask {shown(mask.tolist())}"
            raise RsdError(f"{where}: {expected} and a mask of true and false, found {found}")
        return Bounds(low, high, mask)
