"""Actions of LeRobot data sets, formats 2.0, 2.1 and 3.0, read with pyarrow (https://github.com/huggingface/lerobot).

`meta/info.json` names the format (`codebase_version`), the features with their shapes and how many frames there are;
`data/chunk-*/` holds the numbers: a parquet file per episode (`episode_000000.parquet`, format 2) or files of many
episodes (`file-000.parquet`, format 3). Both have a row per frame with `episode_index` and `frame_index`, so one reader
does. Videos and images are not touched.

An action is kept as the data set stores it. Data sets of LIBERO differ in the gripper's sign and range (-1/1 or 0/1,
1 = close or 1 = open), which no field of theirs tells: whoever sends decoded actions to a robot must know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import told
from rsd.extras import extra
from rsd.json_files import read_object
from rsd.types import RsdError

if TYPE_CHECKING:
    import pyarrow

INFO = Path("meta/info.json")
ACTION_KEYS = ("action", "actions")  # LeRobot's name; openpi's LIBERO conversion writes the plural
FORMATS = ("v2.0", "v2.1", "v3.0")
LISTS = ("list", "large_list", "fixed_size_list")  # pyarrow's names of their types
EPISODE, FRAME = "episode_index", "frame_index"


def is_dataset(folder: Path) -> bool:
    return (folder / INFO).is_file()


def read_actions(folder: Path) -> list[NDArray[np.float32]]:
    """Actions float32 [T, A] of every episode, in the order of the episodes.

    Raises RsdError for another format, missing or damaged files, frames that are missing or twice there, and NaN.
    """
    info = read_info(folder)
    key, width = action_feature(folder, info)
    tables = [read_columns(path, [key, EPISODE, FRAME]) for path in data_files(folder)]
    actions = np.concatenate([matrix(table[key], width, folder, key) for table in tables])
    columns = [[real(table[name].combine_chunks(), folder, name) for table in tables] for name in (EPISODE, FRAME)]
    episode, frame = map(np.concatenate, columns)
    expected = info.get("total_frames", len(actions))
    if type(expected) is not int or len(actions) != expected or not expected:
        raise RsdError(
            f"LeRobot data set {folder}: expected {expected!r:.40} frames as {INFO} says, found {len(actions)} in its "
            "files; the download is incomplete, fetch the data folder again"
        )
    if not np.isfinite(actions).all():
        raise RsdError(f"LeRobot data set {folder}: expected finite numbers in {key}, found NaN or infinity")
    order = np.lexsort((frame, episode))
    actions, episode, frame = actions[order], episode[order], frame[order]
    starts = np.flatnonzero(np.r_[True, np.diff(episode) != 0])
    if (episodes := info.get("total_episodes", len(starts))) != len(starts):
        raise RsdError(
            f"LeRobot data set {folder}: expected {episodes!r:.40} episodes as {INFO} says, found {len(starts)}; the "
            "download is incomplete, fetch the data folder again"
        )
    for first, found in zip(starts, np.split(frame, starts[1:]), strict=True):
        if not np.array_equal(found, np.arange(len(found))):
            raise RsdError(
                f"LeRobot data set {folder}: expected the frames 0..{len(found) - 1} of episode {episode[first]}, each "
                f"once, found {found[0]}..{found[-1]}"
            )
    return np.split(actions, starts[1:])


def read_info(folder: Path) -> dict[str, Any]:
    """`meta/info.json` of a format that can be read."""
    path = folder / INFO
    info = read_object(path, "a LeRobot data set")
    found = info.get("codebase_version")
    if found not in FORMATS:
        raise RsdError(
            f"{path}: expected a LeRobot data set of format {', '.join(FORMATS)}, found {found!r:.80}; convert it with "
            "LeRobot's own scripts"
        )
    return info


def action_feature(folder: Path, info: dict[str, Any]) -> tuple[str, int]:
    """The name of the action's feature and how many numbers an action has."""
    features = info.get("features")
    features = features if isinstance(features, dict) else {}
    key = next((name for name in ACTION_KEYS if isinstance(features.get(name), dict)), None)
    if key is None:
        found = ", ".join(sorted(features)) or "none"
        raise RsdError(f"LeRobot data set {folder}: expected the feature {ACTION_KEYS[0]}, found {found:.200}")
    shape = features[key].get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        raise RsdError(f"LeRobot data set {folder}: expected {key} to be a vector, found the shape {shape!r:.80}")
    return key, shape[0]


def data_files(folder: Path) -> list[Path]:
    found = sorted((folder / "data").glob("*/*.parquet"))
    if not found:
        raise RsdError(f"LeRobot data set {folder}: expected data/chunk-*/*.parquet, found none; download the data too")
    return found


def read_columns(path: Path, columns: list[str]) -> pyarrow.Table:
    with extra("lerobot"):
        import pyarrow
        from pyarrow import parquet
    try:
        return parquet.read_table(path, columns=columns, partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise RsdError(
            f"{path}: expected a parquet file with {', '.join(columns)}, found {told(error)}. "
            "Download it again (with git, `git lfs pull`)"
        ) from None


def matrix(column: pyarrow.ChunkedArray, width: int, folder: Path, key: str) -> NDArray[np.float32]:
    """A column of lists (or of numbers, which is how LeRobot writes a vector of one) -> [rows, width]."""
    parts = []
    for part in column.chunks:
        values, lengths = part, np.ones(len(part))
        if str(part.type).partition("<")[0] in LISTS:
            values, lengths = part.flatten(), part.value_lengths().to_numpy(zero_copy_only=False)
        # row by row: a short one and a long one have the right sum
        if part.null_count or values.null_count or (lengths != width).any():
            found = "nothing" if part.null_count or values.null_count else f"{lengths[lengths != width][0]:g}"
            raise RsdError(f"LeRobot data set {folder}: expected {width} numbers in every {key}, found {found} in one")
        parts.append(real(values, folder, key).astype(np.float32).reshape(len(part), width))
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


def real(values: pyarrow.Array, folder: Path, key: str) -> NDArray[Any]:
    """A column of integers or floats, without a gap."""
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "iuf" or values.null_count:
        found = f"{values.null_count} of {len(values)} empty" if values.null_count else str(values.type)
        raise RsdError(f"LeRobot data set {folder}: expected real numbers in {key}, found {found}")
    return array
