"""Actions of demonstrations, whatever the folder holds: HDF5 files (this package's, LIBERO's) or a LeRobot data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd.data import lerobot
from rsd.data.demonstrations import folder_provenance, load_demonstrations


@dataclass(frozen=True)
class ActionEpisode:
    """actions float32 [T, A] as a learner takes them: the expert's labels where the file has them, else the executed.

    task: name of the demonstration's task, or of the data set.
    """

    task: str
    actions: NDArray[np.float32]


def recorded_by(folder: str | Path) -> str:
    """Who made the demonstrations of a folder, as far as it says."""
    folder = Path(folder)
    return "a LeRobot data set" if lerobot.is_dataset(folder) else str(folder_provenance(folder)["recorded_by"])


def action_episodes(folder: str | Path) -> Iterator[ActionEpisode]:
    """The episodes of a folder, one at a time, in a fixed order. Raises RsdError for anything missing or damaged."""
    folder = Path(folder)
    if lerobot.is_dataset(folder):
        name = folder.resolve().name
        yield from (ActionEpisode(name, actions) for actions in lerobot.read_actions(folder))
    else:
        for demonstration in load_demonstrations(folder, images=False):
            yield ActionEpisode(demonstration.task, demonstration.labels)
