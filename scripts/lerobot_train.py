"""LeRobot's trainer (`lerobot-train`, same options) on a data set that is decoded once and kept in memory.

What a sample holds does not change (tests/foreign_lerobot); reading one takes 0.4 ms in the place of 11, most of which
were copies of the columns' descriptions. Pictures have to be in the parquet files (`rsd demos export`, --images png).
"""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts import lerobot_train
from PIL import Image

ENDS = "dataset_from_index", "dataset_to_index"  # of an episode: what is asked for every sample


class Column:
    """Values of a column, each as LeRobot gives it; pictures are kept as uint8 [N, 3, S, S]."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, which: Any) -> Any:
        found = self.values[which]
        found = found.float() / 255 if found.dtype == torch.uint8 else found
        return list(found) if isinstance(which, list) else found


class Table:
    """A table of the library `datasets`: rows and columns in memory; everything else is asked of the table itself."""

    def __init__(self, table: Any, columns: dict[str, Column]) -> None:
        self.table, self.columns = table, columns

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key] if key in self.columns else self.table[key]
        return {name: column[key] for name, column in self.columns.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "table":  # of an object that is being made again
            raise AttributeError(name)
        return getattr(self.table, name)


class Episodes(Table):
    """The notes of the episodes, of which a row is only where it begins and ends."""

    def __init__(self, table: Any, rows: list[dict[str, int]]) -> None:
        super().__init__(table, {})
        self.rows = rows

    def __getitem__(self, key: Any) -> Any:
        return self.rows[key] if isinstance(key, int) else self.table[key]


def picture(cell: Any) -> torch.Tensor:
    """uint8 [3, S, S] of a cell with a file's bytes."""
    pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def kept(table: Any, pool: ThreadPoolExecutor) -> dict[str, Column]:
    """The columns of the frames."""
    columns = {}
    for name, feature in table.features.items():
        cells = table.data.column(name)
        if type(feature).__name__ == "Image":
            columns[name] = Column(torch.stack(list(pool.map(picture, cells))))
        else:
            columns[name] = Column(torch.tensor(cells.to_pylist()))  # as LeRobot's own reading makes them
    return columns


def keep(data: LeRobotDataset) -> LeRobotDataset:
    """The same data set, from now on in memory."""
    if data.meta.video_keys:
        sys.exit(f"{data.root}: expected pictures in the parquet files, found videos; export with --images png")
    with ThreadPoolExecutor() as pool:
        data.hf_dataset = Table(data.hf_dataset, kept(data.hf_dataset, pool))
    episodes = data.meta.episodes
    rows = [dict(zip(ENDS, ends, strict=True)) for ends in zip(*(list(episodes[name]) for name in ENDS), strict=True)]
    data.meta.episodes = Episodes(episodes, rows)
    return data


if __name__ == "__main__":
    made = lerobot_train.make_dataset
    lerobot_train.make_dataset = lambda *args, **options: keep(made(*args, **options))
    lerobot_train.main()
