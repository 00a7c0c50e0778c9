"""Reading demonstrations, checked before they are believed: files of this package, LIBERO's official ones, and LeRobot
data sets, of any robot the actions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rsd.checks import between, checked
from rsd.conventions import rotate_180
from rsd.data import lerobot, lerobot_libero
from rsd.data.lerobot import located
from rsd.data.schema import (
    FILE_SUFFIX,
    IMAGE_KEYS,
    SPOTS,
    Demonstration,
    asked_things,
    demo_names,
    member,
    numbers,
    open_data,
    read_provenance,
    reading,
    text_attribute,
    whole_attribute,
)
from rsd.types import ACTION_DIM, STATE_DIM, RsdError

MOST_SPOT = 1e6  # pictures away from the picture: what is behind the camera's side
FINGERS = 2  # joint positions of the gripper, at the end of a state


def demonstration_files(path: str | Path) -> list[Path]:
    """The demonstration files under a folder, or the file itself. Raises RsdError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob(f"*{FILE_SUFFIX}") if not p.name.startswith("."))
    if not found:
        remedy = "collect them with `rsd demos collect`"
        raise RsdError(f"demonstrations: expected *{FILE_SUFFIX} in {path}, found none; {remedy}")
    return found


def folder_provenance(path: str | Path) -> dict[str, Any]:
    """What a folder's first file says of its making: settings, versions, and `recorded_by`."""
    folder, is_lerobot = located(path)
    if is_lerobot:
        return lerobot.provenance(folder)
    with open_data(demonstration_files(path)[0]) as data:
        found = read_provenance(data)
    if found is None:
        return {"recorded_by": "another tool (LIBERO's own files, for example)"}
    return {"recorded_by": "the scripted expert of this package, on random placements", **found}


def load_demonstrations(
    path: str | Path, images: bool = True, max_per_task: int | None = None, image_size: int = 0
) -> Iterator[Demonstration]:
    """Yields the demonstrations of a file or folder, one at a time, in a fixed order.

    images=False skips the pixels, which are nearly all of the bytes. Reads the files of this package and LIBERO's own
    (no expert_actions: labels are the actions; their observations are those AFTER the action, as LIBERO stored them),
    and LeRobot data sets in LIBERO's layouts, whose images are reduced to image_size where they are larger (0: are
    not).
    Raises RsdError for a truncated file, another format version, missing datasets, lengths that differ, NaN or
    infinity, and images that are not square or of another size than those before.
    """
    path = checked(str | Path, path, "demonstrations")
    images = checked(bool, images, "demonstrations: images")
    max_per_task = checked(Annotated[int, between(1, 1e9)] | None, max_per_task, "demonstrations: max_per_task")
    image_size = checked(Annotated[int, between(0, 4096)], image_size, "demonstrations: image_size")
    folder, is_lerobot = located(path)
    if is_lerobot:
        yield from lerobot_libero.read_episodes(folder, images, image_size, max_per_task)
        return
    size: tuple[int, Path] | None = None
    for file_path in demonstration_files(path):
        with open_data(file_path) as data:
            read_provenance(data)
            names = demo_names(data)
            if not names:
                raise RsdError(f"demonstrations {file_path}: expected demo_0, ..., found no demonstration")
            for name in names[:max_per_task]:
                demonstration = _read(data, name, file_path, images)
                if demonstration.images is not None:
                    side = demonstration.images.shape[2]
                    size = size or (side, file_path)
                    if side != size[0]:
                        expected = f"images of {size[0]} px as in {size[1]} before, found {side} px"
                        raise RsdError(f"demonstration {name} of {file_path}: expected {expected}; render all alike")
                yield demonstration


@dataclass(frozen=True)
class ActionEpisode:
    """actions float32 [T, A] as a learner takes them: the expert's labels where the file has them, else the executed.

    task: name of the demonstration's task, or of the data set.
    """

    task: str
    actions: NDArray[np.float32]


def action_episodes(path: str | Path) -> Iterator[ActionEpisode]:
    """The episodes of a folder, one at a time, in a fixed order. Raises RsdError for anything missing or damaged."""
    folder, is_lerobot = located(checked(str | Path, path, "demonstrations"))
    if is_lerobot:
        name = os.path.basename(os.path.realpath(folder))
        yield from (ActionEpisode(name, actions) for actions in lerobot_libero.read_actions(folder))
    else:
        for demonstration in load_demonstrations(folder, images=False):
            yield ActionEpisode(demonstration.task, demonstration.labels)


def _read(data: h5py.Group, name: str, path: Path, images: bool) -> Demonstration:
    where = f"demonstration {name} of {path}"
    group = member(data, name, f"demonstrations {path}")
    needed = ("actions", "obs/ee_states", "obs/gripper_states")
    with reading(where):
        missing = [key for key in needed if key not in group]
        labelled, obs = "expert_actions" in group, group.get("obs")
    if missing:
        raise RsdError(f"{where}: expected the datasets {', '.join(needed)}, found none of {', '.join(missing)}")
    actions = numbers(group, "actions", None, ACTION_DIM, where)
    steps = len(actions)
    labels = numbers(group, "expert_actions", steps, ACTION_DIM, where) if labelled else actions
    arm = numbers(group, "obs/ee_states", steps, STATE_DIM - FINGERS, where)
    gripper = numbers(group, "obs/gripper_states", steps, FINGERS, where)
    every = whole_attribute(group, "image_every", where, 1, least=1)
    pixels = _pixels(obs, -(-steps // every), where) if images else None
    task = path.name.removesuffix(FILE_SUFFIX)
    asks = tuple(asked_things(group, where))
    return Demonstration(
        task=task,
        episode=name,
        instruction=_instruction(group, task, where),
        images=pixels,
        state=np.hstack([arm, gripper]),
        actions=actions,
        labels=labels,
        success_step=whole_attribute(group, "success_step", where, steps - 1, least=0, most=steps - 1),
        target_object=text_attribute(group, "target_object", where),
        placement_seed=whole_attribute(group, "placement_seed", where, -1, least=-1),
        source=path,
        image_every=every,
        asks=asks,
        spots=_spots(group, -(-steps // every), len(asks), where) if images and SPOTS in group else None,
    )


def _spots(group: h5py.Group, frames: int, things: int, where: str) -> NDArray[np.float32]:
    with reading(f"{where}, {SPOTS}"):
        spots = np.asarray(group[SPOTS][()])
    if spots.shape != (frames, things, 2) or spots.dtype != "f4" or not (abs(spots) <= MOST_SPOT).all():
        found = f"{spots.dtype} {list(spots.shape)}, or numbers beyond {MOST_SPOT:g}"
        raise RsdError(f"{where}: expected {SPOTS} float32 [{frames}, {things}, 2], found {found}")
    return spots


def _pixels(obs: h5py.Group, frames: int, where: str) -> NDArray[np.uint8] | None:
    """uint8 [frames, 2, S, S, 3], upright; None in a file without images."""
    with reading(f"{where}, images"):
        present = [key for key in IMAGE_KEYS if key in obs]
        if not present:
            return None
        if len(present) != len(IMAGE_KEYS):
            raise RsdError(f"{where}: expected the images {', '.join(IMAGE_KEYS)}, found only {present[0]}")
        views = [obs[key] for key in IMAGE_KEYS]
        shapes: list[tuple[int, ...]] = [getattr(view, "shape", None) or () for view in views]
        side = shapes[0][1] if len(shapes[0]) == 4 else 0
        if any(shape != (frames, side, side, 3) for shape in shapes) or not side or any(v.dtype != "u1" for v in views):
            kinds = [getattr(view, "dtype", "a group") for view in views]
            found = " and ".join(f"{kind} {list(shape)}" for kind, shape in zip(kinds, shapes, strict=True))
            raise RsdError(f"{where}: expected images uint8 [{frames}, S, S, 3], square and of one size, found {found}")
        return rotate_180(np.stack([view[()] for view in views], axis=1))


def _instruction(group: h5py.Group, task: str, where: str) -> str:
    if (own := text_attribute(group, "language_instruction", where)).strip():
        return own
    # LIBERO's evaluation takes the sentence from the file name; its problem_info words it differently
    words = task.split("SCENE")[-1].lstrip("0123456789_") if task[:1].isupper() else task
    return words.replace("_", " ")
