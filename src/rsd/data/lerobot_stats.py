"""The statistics of a LeRobot data set, by episode and of all of it: exact, from all frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
GREYS = np.arange(256) / 255  # pictures count from 0 to 1


class Statistics:
    """Takes the columns of episodes: uint8 [T, S, S, 3] of pictures, [T] or [T, n] of numbers."""

    def __init__(self) -> None:
        self._counts, self._frames = dict[str, NDArray[np.int64]](), 0
        self._rows = dict[str, list[NDArray[Any]]]()

    def add(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """-> this episode's, as `meta/episodes` has them."""
        found = dict[str, Any]()
        for key, values in columns.items():
            if values.dtype == np.uint8:
                counts = np.stack([np.bincount(values[..., c].ravel(), minlength=256) for c in range(3)])
                self._counts[key] = self._counts.get(key, 0) + counts
                own = of_pictures(counts, len(values))
            else:
                self._rows.setdefault(key, []).append(values)
                own = of_numbers(values)
            found |= {f"stats/{key}/{name}": value for name, value in own.items()}
        self._frames += len(next(iter(columns.values())))
        return found

    def total(self) -> dict[str, dict[str, Any]]:
        """Of all episodes, as `stats.json` has them."""
        pictures = {key: of_pictures(counts, self._frames) for key, counts in self._counts.items()}
        return {**pictures, **{key: of_numbers(np.concatenate(rows)) for key, rows in self._rows.items()}}


def of_numbers(values: NDArray[Any]) -> dict[str, list[Any]]:
    """[T] or [T, n] -> lists of n numbers, one where there is a column."""
    table = values.reshape(len(values), -1).astype(np.float64)
    found = {"min": table.min(0), "max": table.max(0), "mean": table.mean(0), "std": table.std(0)}
    found |= {name: np.quantile(table, share, axis=0) for name, share in QUANTILES.items()}
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(values)]}


def of_pictures(counts: NDArray[np.int64], frames: int) -> dict[str, list[Any]]:
    """How often each of 256 values is there, by channel [3, 256] -> lists [3, 1, 1]."""
    total = counts.sum(1, keepdims=True)
    mean = counts @ GREYS / total[:, 0]
    spread = np.sqrt(np.maximum(counts @ GREYS**2 / total[:, 0] - mean**2, 0))
    there, reached = counts > 0, counts.cumsum(1)
    found = {"min": GREYS[there.argmax(1)], "max": GREYS[255 - there[:, ::-1].argmax(1)], "mean": mean, "std": spread}
    found |= {name: GREYS[(reached >= share * total).argmax(1)] for name, share in QUANTILES.items()}
    return {**{name: value.reshape(3, 1, 1).tolist() for name, value in found.items()}, "count": [frames]}
