"""Reading demonstrations: files of this package and LIBERO's official ones, checked before they are believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rsd.conventions import rotate_180
from rsd.data.schema import FILE_SUFFIX, IMAGE_KEYS, demo_names, open_file, read_provenance
from rsd.types import ACTION_DIM, STATE_DIM, RsdError


@dataclass(frozen=True)
class Demonstration:
    """One episode of T steps as a learner takes it; row t is what was seen before action t.

    images: uint8 [T, 2, S, S, 3], cameras in the order of rsd.types.CAMERAS, upright; None in a states-only file. With
    image_every = n they show the steps 0, n, 2n, ... only.
    state: float32 [T, 8], position, axis-angle, gripper. actions: float32 [T, 7] executed; labels: float32 [T, 7] what
    the expert would have done at the visited state (equal to actions in files without noise).
    placement_seed is -1 where the file does not know it. success_step is the first step after which the goal held.
    """

    task: str
    episode: str
    instruction: str
    images: NDArray[np.uint8] | None
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    labels: NDArray[np.float32]
    success_step: int
    target_object: str
    placement_seed: int
    source: Path
    image_every: int = 1

    def __len__(self) -> int:
        return len(self.actions)


def demonstration_files(path: str | Path) -> list[Path]:
    """The demonstration files under a folder, or the file itself. Raises RsdError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob(f"*{FILE_SUFFIX}") if not p.name.startswith("."))
    if not found:
        raise RsdError(
            f"demonstrations: expected *{FILE_SUFFIX} in {path}, found none; collect them with `rsd demos collect`"
        )
    return found


def folder_provenance(path: str | Path) -> dict[str, Any]:
    """What a folder's first file says of its making: settings, versions, and `recorded_by`."""
    first = demonstration_files(path)[0]
    with open_file(first) as file:
        found = read_provenance(file["data"], first) if "data" in file else None
    if found is None:
        return {"recorded_by": "another tool (LIBERO's own files, for example)"}
    return {"recorded_by": "the scripted expert of this package, on random placements", **found}


def load_demonstrations(
    path: str | Path, images: bool = True, max_per_task: int | None = None
) -> Iterator[Demonstration]:
    """Yields the demonstrations of a file or folder, one at a time, in a fixed order.

    images=False skips the pixels, which are nearly all of the bytes. Reads the files of this package and LIBERO's own
    (no expert_actions: labels are the actions; their observations are those AFTER the action, as LIBERO stored them).
    Raises RsdError for a truncated file, another format version, missing datasets, lengths that differ, NaN or
    infinity.
    """
    for file_path in demonstration_files(path):
        with open_file(file_path) as file:
            if "data" not in file:
                raise RsdError(f"demonstrations {file_path}: expected the group data, found {sorted(file)}")
            data = file["data"]
            read_provenance(data, file_path)
            names = demo_names(data)
            if not names:
                raise RsdError(f"demonstrations {file_path}: expected demo_0, ..., found no demonstration")
            for name in names[:max_per_task]:
                yield _read(data, name, file_path, images)


def _read(data: h5py.Group, name: str, path: Path, images: bool) -> Demonstration:
    group = data[name]
    where = f"demonstration {name} of {path}"
    needed = ("actions", "obs/ee_states", "obs/gripper_states")
    missing = [key for key in needed if key not in group]
    if missing:
        raise RsdError(f"{where}: expected the datasets {', '.join(needed)}, found none of {', '.join(missing)}")
    actions = np.asarray(group["actions"], dtype=np.float32)
    labels = np.asarray(group["expert_actions"], dtype=np.float32) if "expert_actions" in group else actions
    state = np.hstack([group["obs/ee_states"][()], group["obs/gripper_states"][()]]).astype(np.float32)
    pixels = _pixels(group["obs"], where) if images else None
    expected = {"actions": (actions, ACTION_DIM), "expert_actions": (labels, ACTION_DIM), "state": (state, STATE_DIM)}
    for key, (array, width) in expected.items():
        if array.shape != (len(actions), width) or len(actions) == 0:
            raise RsdError(f"{where}: expected {key} [{len(actions)}, {width}], found {list(array.shape)}")
        if not np.isfinite(array).all():
            raise RsdError(f"{where}: expected finite numbers in {key}, found NaN or infinity")
    every = int(group.attrs.get("image_every", 1))
    frames = -(-len(actions) // every)
    if pixels is not None and len(pixels) != frames:
        raise RsdError(f"{where}: expected {frames} images, found {len(pixels)}")
    task = path.name.removesuffix(FILE_SUFFIX)
    success = group.attrs.get("success_step", len(actions) - 1)
    return Demonstration(
        task=task,
        episode=name,
        instruction=_instruction(data, group, task),
        images=pixels,
        state=state,
        actions=actions,
        labels=labels,
        success_step=int(success),
        target_object=text_attribute(group, "target_object"),
        placement_seed=int(group.attrs.get("placement_seed", -1)),
        source=path,
        image_every=every,
    )


def _pixels(obs: h5py.Group, where: str) -> NDArray[np.uint8] | None:
    present = [key for key in IMAGE_KEYS if key in obs]
    if not present:
        return None
    if len(present) != len(IMAGE_KEYS):
        raise RsdError(f"{where}: expected the images {', '.join(IMAGE_KEYS)}, found only {present[0]}")
    views = [obs[key][()] for key in IMAGE_KEYS]
    first = views[0].shape
    if any(v.shape != first or v.ndim != 4 or v.shape[3] != 3 or v.dtype != np.uint8 for v in views):
        raise RsdError(
            f"{where}: expected images uint8 [T, S, S, 3] of one size, found "
            + ", ".join(f"{v.dtype} {list(v.shape)}" for v in views)
        )
    return rotate_180(np.stack(views, axis=1))


def text_attribute(group: h5py.Group, name: str) -> str:
    """An attribute as text, "" without it; bytes, as other writers store text, are decoded. `RsdError` for the rest."""
    found: Any = group.attrs.get(name, "")
    if isinstance(found, np.ndarray) and found.size == 1:
        found = found.item()
    if isinstance(found, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            found = found.decode()
    if not isinstance(found, str):
        where = f"{group.file.filename} {group.name}"
        raise RsdError(f"{where}: attribute {name}: expected text in UTF-8, found {found!r:.80}; write it as a string")
    return found


def _instruction(data: h5py.Group, group: h5py.Group, task: str) -> str:
    if own := text_attribute(group, "language_instruction"):
        return own
    # LIBERO's evaluation takes the sentence from the file name; its problem_info words it differently
    words = task.split("SCENE")[-1].lstrip("0123456789_") if task[:1].isupper() else task
    return words.replace("_", " ")
