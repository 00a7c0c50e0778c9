"""The on-disk schema of demonstrations: LIBERO's HDF5 layout, with what LIBERO leaves out.

One file per task, `<task name>_demo.hdf5`, group `data`, one group `demo_<i>` per episode. LIBERO's own datasets and
attributes have LIBERO's names, so the field's tools read these files. Ours beside them: `expert_actions` (the clean
label at the visited state; `actions` are what was executed), the fixtures' poses (`body_pos`, `body_quat`: a state
does not hold them), the instruction per demonstration, and `rsd_provenance` (JSON) on `data`.

An observation is the one seen before its action. LIBERO's own files hold the one after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rsd.output import writing
from rsd.types import RsdError

FORMAT_VERSION = 1
FILE_SUFFIX = "_demo.hdf5"
IMAGE_KEYS = ("agentview_rgb", "eye_in_hand_rgb")  # in the order of rsd.types.CAMERAS


@dataclass(frozen=True)
class Episode:
    """One recorded episode of T steps, as it is stored.

    Row t of every array belongs to the state before action t. images: uint8 [T, 2, S, S, 3] NOT rotated, or None.
    """

    index: int
    actions: NDArray[np.float64]  # [T, 7] executed
    expert_actions: NDArray[np.float64]  # [T, 7] clean
    states: NDArray[np.float64]  # [T, 1 + nq + nv]
    eef_pos: NDArray[np.float64]  # [T, 3] m
    eef_quat: NDArray[np.float64]  # [T, 4] x, y, z, w
    eef_axis_angle: NDArray[np.float64]  # [T, 3] rad
    gripper: NDArray[np.float64]  # [T, 2] m
    joints: NDArray[np.float64]  # [T, 7] rad
    success_step: int  # first step after which the goal held, counted from 0
    attributes: Mapping[str, Any]  # placement_seed, language_instruction, target_object, noise_level, ...
    body_pos: NDArray[np.float64]  # [nbody, 3]
    body_quat: NDArray[np.float64]  # [nbody, 4] w, x, y, z
    images: NDArray[np.uint8] | None = None


def write_episode(group: h5py.Group, episode: Episode) -> None:
    """Fills the group of one demonstration."""
    steps = len(episode.actions)
    packed = {"compression": "gzip", "shuffle": True}
    done = (np.arange(steps) >= episode.success_step).astype(np.uint8)
    group.create_dataset("actions", data=episode.actions)
    group.create_dataset("expert_actions", data=episode.expert_actions)
    group.create_dataset("states", data=episode.states, **packed)
    group.create_dataset("robot_states", data=np.hstack([episode.gripper, episode.eef_pos, episode.eef_quat]))
    group.create_dataset("rewards", data=done)
    group.create_dataset("dones", data=done)
    group.create_dataset("body_pos", data=episode.body_pos, **packed)
    group.create_dataset("body_quat", data=episode.body_quat, **packed)
    obs = group.create_group("obs")
    obs.create_dataset("ee_pos", data=episode.eef_pos)
    obs.create_dataset("ee_ori", data=episode.eef_axis_angle)
    obs.create_dataset("ee_states", data=np.hstack([episode.eef_pos, episode.eef_axis_angle]))
    obs.create_dataset("gripper_states", data=episode.gripper)
    obs.create_dataset("joint_states", data=episode.joints)
    if episode.images is not None:
        write_images(obs, episode.images)
    group.attrs["num_samples"] = steps
    group.attrs["init_state"] = episode.states[0]
    group.attrs["success_step"] = episode.success_step
    for key, value in episode.attributes.items():
        group.attrs[key] = value


def write_images(obs: h5py.Group, images: NDArray[np.uint8]) -> None:
    """images: uint8 [T, 2, S, S, 3], not rotated -> LIBERO's two datasets, uncompressed as there (it reads faster)."""
    for camera, key in enumerate(IMAGE_KEYS):
        frames = images[:, camera]
        obs.create_dataset(key, data=frames)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[h5py.File]:
    """Writes an HDF5 file so that `path` is either complete or untouched, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path):
            with h5py.File(temporary, "w") as file:
                yield file
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class DamagedFile(RsdError):
    """An HDF5 file that is cut off or overwritten, as opposed to one that cannot be read just now."""


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file for reading. Raises RsdError if it is missing, in use or not readable, DamagedFile if it is
    no whole HDF5 file."""
    if not path.is_file():
        raise RsdError(f"demonstrations: expected the file {path}, found none; collect it with `rsd demos collect`")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or "unable to lock file" in str(error):
            found = "in use by another program (locked for writing); wait for that, or close the file there"
            raise RsdError(f"demonstrations {path}: {found}") from error
        if error.errno:
            found = f"cannot be read ({os.strerror(error.errno)}); see to its permissions and its disk"
            raise RsdError(f"demonstrations {path}: {found}") from error
        raise DamagedFile(
            f"demonstrations {path}: expected a complete HDF5 file, found one that is cut off or damaged ({error}). "
            "Copy it anew, or move it away and run the collection again (finished parts are kept)."
        ) from error
    with file:
        yield file


def read_provenance(data: h5py.Group, path: Path) -> dict[str, Any] | None:
    """`rsd_provenance`, or None for a file that this package did not write.

    Raises RsdError for a version of the format that this version does not read.
    """
    text = data.attrs.get("rsd_provenance")
    if text is None:
        return None
    provenance = dict(json.loads(text))
    if provenance.get("format_version") != FORMAT_VERSION:
        raise RsdError(
            f"demonstrations {path}: expected format version {FORMAT_VERSION}, found "
            f"{provenance.get('format_version')!r}; read them with the version of rsd-vla that wrote them "
            f"({provenance.get('versions', {}).get('rsd', 'unknown')}), or collect them again"
        )
    return provenance


def demo_names(data: h5py.Group) -> list[str]:
    """`demo_<i>` groups in the order of i."""
    return sorted((name for name in data if name.startswith("demo_")), key=lambda name: int(name[5:]))


def merge(path: Path, parts: list[Path], attributes: Mapping[str, Any], provenance: Mapping[str, Any]) -> int:
    """Adds part files (each one `demo_<i>` group at its root) to the file of a task; returns its number of demos.

    The present file is copied, not edited, so an interruption leaves it as it was. Compressed chunks are copied as
    they are. A demonstration that is present already is replaced by its part (rendering adds images this way).
    """
    fresh: dict[str, Path] = {}
    for part in parts:
        with open_file(part) as file:
            fresh.update(dict.fromkeys(file, part))
    with atomic_file(path) as out:
        data = out.create_group("data")
        if path.exists():
            with open_file(path) as old:
                for name in demo_names(old["data"]):
                    if name not in fresh:
                        old.copy(old["data"][name], data, name=name)
        for name, part in fresh.items():
            with open_file(part) as file:
                file.copy(file[name], data, name=name)
        names = demo_names(data)
        for key, value in attributes.items():
            data.attrs[key] = value
        data.attrs["num_demos"] = len(names)
        data.attrs["total"] = int(sum(data[name].attrs["num_samples"] for name in names))
        tries = int(sum(data[name].attrs.get("failed_tries", 0) for name in names))
        data.attrs["rsd_provenance"] = json.dumps(
            {"format_version": FORMAT_VERSION, **provenance, "failed_tries": tries}
        )
    return len(names)
