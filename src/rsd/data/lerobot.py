"""LeRobot data sets, formats 2.0, 2.1 and 3.0, read with pyarrow (https://github.com/huggingface/lerobot).

`meta/info.json` names the format (`codebase_version`), the features with their shapes and how many frames there are;
`data/chunk-*/` holds the numbers: a parquet file per episode (`episode_000000.parquet`, format 2) or files of many
episodes (`file-000.parquet`, format 3). Both have a row per frame with `episode_index` and `frame_index`, so one reader
does. Pictures are in the same rows or in videos: `lerobot_images`.

An action is kept as the data set stores it. Those of LIBERO differ in the gripper's sign and range (-1/1 or 0/1, 1 =
close or 1 = open), which no field of theirs tells: `lerobot_libero` finds it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import told
from rsd.extras import extra
from rsd.json_files import parse_object, read_object
from rsd.types import LEROBOT, RsdError

if TYPE_CHECKING:
    import pyarrow

INFO = Path("meta/info.json")
ACTION_KEYS = ("action", "actions")  # LeRobot's name; openpi's LIBERO conversion writes the plural
FORMATS = ("v2.0", "v2.1", "v3.0")
LISTS = ("list", "large_list", "fixed_size_list")  # pyarrow's names of their types
OWN = Path("meta/rsd.json")  # what `rsd demos export` says of the demonstrations it was given
EPISODE, FRAME, TASK = "episode_index", "frame_index", "task_index"
TASKS, OLD_TASKS = Path("meta/tasks.parquet"), Path("meta/tasks.jsonl")


@dataclass(frozen=True)
class Rows:
    """A data set's rows in the order of episodes and frames. columns: [rows, width], or [rows] of a plain number;
    starts: the first row of every episode; file, place: where a row's other columns are, the place in `files`."""

    columns: dict[str, NDArray[Any]]
    starts: NDArray[np.int64]
    files: list[Path]
    file: NDArray[np.int64]
    place: NDArray[np.int64]

    def episodes(self) -> list[slice]:
        ends = [*self.starts[1:].tolist(), len(self.file)]
        return [slice(first, end) for first, end in zip(self.starts.tolist(), ends, strict=True)]


def located(path: str | Path) -> tuple[Path, bool]:
    """The folder that an option names, and whether it is to be read as a LeRobot data set."""
    text = str(path)
    if text == LEROBOT:
        raise RsdError(f"{LEROBOT}: expected the folder of a LeRobot data set behind it, found nothing")
    folder = Path(text.removeprefix(LEROBOT)).expanduser()
    return folder, text.startswith(LEROBOT) or (folder / INFO).is_file()


def provenance(folder: Path) -> dict[str, Any]:
    """What is known of a data set's making: more where `rsd demos export` has written it."""
    return {"recorded_by": "a LeRobot data set", "format": read_info(folder)["codebase_version"], **own_words(folder)}


def own_words(folder: Path) -> dict[str, Any]:
    """What `rsd demos export` says of a data set that it has written; nothing of others."""
    return read_object(folder / OWN, "an export") if (folder / OWN).is_file() else {}


def read_rows(folder: Path, info: Mapping[str, Any], columns: Mapping[str, int]) -> Rows:
    """Columns by name, with their widths; 0: a plain number.

    Raises RsdError for missing or damaged files, frames that are missing or twice there, and NaN."""
    where, again = f"LeRobot data set {folder}", "the download is incomplete, fetch the data folder again"
    files = sorted((folder / "data").glob("*/*.parquet"))
    if not files:
        raise RsdError(f"{where}: expected data/chunk-*/*.parquet, found none; download the data too")
    names = [*columns, EPISODE, FRAME]
    tables = [read_columns(path, names) for path in files]
    found = {
        name: np.concatenate([column(table[name], columns.get(name, 0), folder, name) for table in tables])
        for name in names
    }
    count, expected = len(found[FRAME]), info.get("total_frames", len(found[FRAME]))
    if type(expected) is not int or count != expected or not expected:
        raise RsdError(f"{where}: expected {expected!r:.40} frames as {INFO} says, found {count} in its files; {again}")
    for name in columns:
        if not np.isfinite(found[name]).all():
            raise RsdError(f"{where}: expected finite numbers in {name}, found NaN or infinity")
    order = np.lexsort((found[FRAME], found[EPISODE]))
    found = {name: values[order] for name, values in found.items()}
    episode, frame = found[EPISODE], found[FRAME]
    starts = np.flatnonzero(np.r_[True, np.diff(episode) != 0])
    if (episodes := info.get("total_episodes", len(starts))) != len(starts):
        raise RsdError(f"{where}: expected {episodes!r:.40} episodes as {INFO} says, found {len(starts)}; {again}")
    for first, seen in zip(starts, np.split(frame, starts[1:]), strict=True):
        if not np.array_equal(seen, np.arange(len(seen))):
            frames = f"the frames 0..{len(seen) - 1} of episode {episode[first]}, each once"
            raise RsdError(f"{where}: expected {frames}, found {seen[0]}..{seen[-1]}")
    lengths = [len(table) for table in tables]
    file = np.repeat(np.arange(len(files)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    return Rows(found, starts, files, file[order], place[order])


def read_info(folder: Path) -> dict[str, Any]:
    """`meta/info.json` of a format that can be read."""
    path = folder / INFO
    if not folder.is_dir():
        remedy = "`hf download ID --repo-type dataset --local-dir DIR` gets one from the hub"
        raise RsdError(f"{LEROBOT}{folder}: expected the folder of a LeRobot data set, found none; {remedy}")
    info = read_object(path, "a LeRobot data set")
    if (found := info.get("codebase_version")) not in FORMATS:
        raise RsdError(
            f"{path}: expected a LeRobot data set of format {', '.join(FORMATS)}, found {found!r:.80}; convert it with "
            "LeRobot's own scripts"
        )
    return info


def features_of(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The features by name, those that are described."""
    features = info.get("features")
    named = features if isinstance(features, dict) else {}
    return {name: each for name, each in named.items() if isinstance(each, dict)}


def action_feature(folder: Path, info: Mapping[str, Any]) -> tuple[str, int]:
    """The name of the action's feature and how many numbers an action has."""
    features = features_of(info)
    key = next((name for name in ACTION_KEYS if name in features), None)
    if key is None:
        named = info.get("features")
        found = ", ".join(sorted(named)) if isinstance(named, dict) and named else "none"
        raise RsdError(f"LeRobot data set {folder}: expected the feature {ACTION_KEYS[0]}, found {found:.200}")
    shape, kind = features[key].get("shape"), features[key].get("dtype", "float32")
    if not str(kind).startswith(("float", "int")):
        raise RsdError(f"LeRobot data set {folder}: expected {key} to be of numbers, found the dtype {kind!r:.80}")
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        raise RsdError(f"LeRobot data set {folder}: expected {key} to be a vector, found the shape {shape!r:.80}")
    return key, shape[0]


def read_tasks(folder: Path) -> dict[int, str]:
    """The instructions by their number, of either format."""
    if (folder / TASKS).is_file():
        table = read_columns(folder / TASKS, None)
        texts = [field.name for field in table.schema if str(field.type) in ("string", "large_string")]
        if TASK not in table.column_names or len(texts) != 1:
            found = ", ".join(table.column_names) or "none"
            raise RsdError(f"{folder / TASKS}: expected the column {TASK} and one of texts, found {found:.200}")
        pairs = list(zip(table[TASK].to_pylist(), table[texts[0]].to_pylist(), strict=True))
    elif (folder / OLD_TASKS).is_file():
        try:
            lines = (folder / OLD_TASKS).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RsdError(f"{folder / OLD_TASKS}: not readable ({told(error)}); fetch it again") from None
        told_of = [parse_object(line, f"{folder / OLD_TASKS}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        pairs = [(each.get(TASK), each.get("task")) for each in told_of]
    else:
        raise RsdError(f"LeRobot data set {folder}: expected {TASKS} or {OLD_TASKS}, found neither; fetch meta again")
    for number, text in pairs:
        if type(number) is not int or not isinstance(text, str) or not text.strip():
            expected = "a number and an instruction in every task"
            raise RsdError(f"LeRobot data set {folder}: expected {expected}, found {number!r:.40} and {text!r:.80}")
    return dict(pairs)


def read_columns(path: Path, columns: list[str] | None) -> pyarrow.Table:
    """Columns of a parquet file; None: all."""
    with extra("lerobot-data"):
        import pyarrow
        from pyarrow import parquet
    try:
        return parquet.read_table(path, columns=columns, partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        what = f"a parquet file with {', '.join(columns)}" if columns else "a parquet file"
        raise RsdError(
            f"{path}: expected {what}, found {told(error)}. Download it again (with git, `git lfs pull`)"
        ) from None


def column(values: pyarrow.ChunkedArray, width: int, folder: Path, key: str) -> NDArray[Any]:
    """A column of plain numbers -> [rows]; with a width, of lists (or of numbers, which is how LeRobot writes a vector
    of one) -> float32 [rows, width]."""
    if not width:
        return real(values.combine_chunks(), folder, key)
    parts = []
    for part in values.chunks:
        flat, lengths = part, np.ones(len(part))
        if str(part.type).partition("<")[0] in LISTS:
            flat, lengths = part.flatten(), part.value_lengths().to_numpy(zero_copy_only=False)
        # row by row: a short one and a long one have the right sum
        if part.null_count or flat.null_count or (lengths != width).any():
            found = "nothing" if part.null_count or flat.null_count else f"{lengths[lengths != width][0]:g}"
            raise RsdError(f"LeRobot data set {folder}: expected {width} numbers in every {key}, found {found} in one")
        parts.append(real(flat, folder, key).astype(np.float32).reshape(len(part), width))
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


def real(values: pyarrow.Array, folder: Path, key: str) -> NDArray[Any]:
    """A column of integers or floats, without a gap."""
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "iuf" or values.null_count:
        found = f"{values.null_count} of {len(values)} empty" if values.null_count else str(values.type)
        raise RsdError(f"LeRobot data set {folder}: expected real numbers in {key}, found {found}")
    return array
