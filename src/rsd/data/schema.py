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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rsd.checks import Said, checked
from rsd.json_files import parse_object
from rsd.output import writing
from rsd.types import RsdError

FORMAT_VERSION = 1
FILE_SUFFIX = "_demo.hdf5"
ANEW = "Copy it anew, or move it away and run the collection again (finished parts are kept)."
SPOTS = "obs/spots"  # float32 [frames, n, 2]: where the third-person camera sees the things of the attribute `asks`
LARGEST = 1e6  # of an action or a state, whatever its unit
ROUNDED = 1.001  # LeRobot data sets of LIBERO hold 1.0002
Binary = tuple[NDArray[np.float32], tuple[float, float]]  # what an action holds in a dimension [T], and may hold
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


@dataclass(frozen=True)
class Demonstration:
    """One episode of T steps as a learner takes it; row t is what was seen before action t.

    images: uint8 [T, 2, S, S, 3], cameras in the order of rsd.types.CAMERAS, upright; None in a states-only file. With
    image_every = n they show the steps 0, n, 2n, ... only.
    state: float32 [T, 8], position, axis-angle, gripper. actions: float32 [T, 7] executed; labels: float32 [T, 7] what
    the expert would have done at the visited state (equal to actions in files without noise).
    asks: sentences that would ask for a thing of this scene, with that thing; spots: float32 [frames, n, 2], where the
    first camera sees those things (x to the right, y down, shares of the picture), None where that is not stored.
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
    asks: tuple[tuple[str, str], ...] = ()
    spots: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.actions)


def check_actions(
    where: str, motion: NDArray[np.float32], limit: float, whose: str, binary: Mapping[int, Binary], remedy: str
) -> None:
    """`RsdError` unless a motion [T, M] is within +-limit, which `whose` words, and every binary dimension holds one of
    its two values in each step."""
    if (beyond := np.abs(motion) > limit * ROUNDED).any():
        raise RsdError(f"{where}: expected actions within {whose}, found {motion[beyond][0]:g}; {remedy}")
    for dimension, (found, (low, high)) in binary.items():
        if (odd := ~np.isin(found, (low, high))).any():
            expected = f"dimension {dimension} to be {low:g} or {high:g}"
            raise RsdError(f"{where}: expected {expected}, found {found[odd][0]:g}; {remedy}")


def write_episode(group: h5py.Group, episode: Episode) -> None:
    steps = len(episode.actions)
    done = (np.arange(steps) >= episode.success_step).astype(np.uint8)
    datasets = {
        "actions": episode.actions,
        "expert_actions": episode.expert_actions,
        "states": episode.states,
        "robot_states": np.hstack([episode.gripper, episode.eef_pos, episode.eef_quat]),
        "rewards": done,
        "dones": done,
        "body_pos": episode.body_pos,
        "body_quat": episode.body_quat,
        "obs/ee_pos": episode.eef_pos,
        "obs/ee_ori": episode.eef_axis_angle,
        "obs/ee_states": np.hstack([episode.eef_pos, episode.eef_axis_angle]),
        "obs/gripper_states": episode.gripper,
        "obs/joint_states": episode.joints,
    }
    for name, values in datasets.items():
        packed = {"compression": "gzip", "shuffle": True} if name in ("states", "body_pos", "body_quat") else {}
        group.create_dataset(name, data=values, **packed)
    if episode.images is not None:
        write_images(group["obs"], episode.images)
    own = {"num_samples": steps, "init_state": episode.states[0], "success_step": episode.success_step}
    group.attrs.update({**own, **episode.attributes})


def write_images(obs: h5py.Group, images: NDArray[np.uint8]) -> None:
    """images: uint8 [T, 2, S, S, 3], not rotated -> LIBERO's two datasets, uncompressed as there (it reads faster); in
    the place of those that are there."""
    for camera, key in enumerate(IMAGE_KEYS):
        obs.pop(key, None)
        obs.create_dataset(key, data=images[:, camera])


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[h5py.File]:
    """Writes an HDF5 file so that `path` is either complete or untouched, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.tmp")  # the next attempt writes over what a killed one left
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
    where = f"demonstrations {path}"
    if path.is_dir():
        raise RsdError(f"{where}: expected a file, found a folder")
    if not path.is_file():
        raise RsdError(f"demonstrations: expected the file {path}, found none; collect it with `rsd demos collect`")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or "unable to lock file" in str(error):
            found = "in use by another program (locked for writing); wait for that, or close the file there"
            raise RsdError(f"{where}: {found}") from error
        if error.errno:
            found = f"cannot be read ({os.strerror(error.errno)}); see to its permissions and its disk"
            raise RsdError(f"{where}: {found}") from error
        with path.open("rb") as raw:
            begin = raw.read(8)
        found = "an empty one" if not begin else "a pointer of Git LFS; run `git lfs pull`"
        if begin and begin != b"version ":
            found = f"one that is cut off or damaged, or of another kind ({error})"
        raise DamagedFile(f"{where}: expected a complete HDF5 file, found {found}. {ANEW}") from error
    with file:
        yield file


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """What h5py raises inside for damaged bytes, dangling links and odd types becomes an RsdError of one line."""
    try:
        yield
    # KeyError for a link that leads nowhere; of overwritten bytes h5py makes every one of these
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, UnicodeError) as error:
        found = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise RsdError(f"{where}: not readable ({found:.200}): damaged or incomplete, copy the file again") from error


def member(group: h5py.Group, name: str, where: str) -> h5py.Group:
    """A group in a group."""
    found = None
    with reading(f"{where}, group {name}"):
        if name in group:  # `get` would take damage for absence
            found = group[name]
    if isinstance(found, h5py.Group):
        return found
    kind = "none" if found is None else f"a {type(found).__name__.lower()}"
    raise RsdError(f"{where}: expected the group {name}, found {kind}; is it a file of demonstrations?")


def numbers(group: h5py.Group, name: str, steps: int | None, width: int, where: str) -> NDArray[np.float32]:
    """The dataset [steps, width] of real numbers; steps None: of any number but zero."""
    with reading(f"{where}, {name}"):
        dataset = group[name]
        shape, kind = getattr(dataset, "shape", None), getattr(getattr(dataset, "dtype", None), "kind", "")
        fits = shape is not None and len(shape) == 2 and shape[0] and shape == (steps or shape[0], width)
        if not fits or kind not in "iuf":
            found = "a group" if shape is None and not kind else f"{dataset.dtype} {list(shape or ())}"
            raise RsdError(f"{where}: expected {name} [{steps or 'T'}, {width}] of real numbers, found {found}")
        with np.errstate(over="ignore"):  # found out below
            array: NDArray[np.float32] = dataset[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise RsdError(f"{where}: expected finite numbers in {name}, found NaN or infinity")
    if (largest := float(np.abs(array).max())) > LARGEST:
        raise RsdError(f"{where}: expected numbers up to {LARGEST:g} in {name}, found {largest:g}")
    return array


def text_attribute(node: h5py.Group, name: str, where: str, default: str = "") -> str:
    """An attribute of text, which other writers of HDF5 store as bytes."""
    with reading(f"{where}, attribute {name}"):
        value = node.attrs.get(name, default)
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        if isinstance(value, bytes):
            value = value.decode("utf-8")
    if not isinstance(value, str):
        raise RsdError(f"{where}: expected the attribute {name} to be text, found {value!r:.80}")
    return value


def whole_attribute(node: h5py.Group, name: str, where: str, default: int, least: int, most: float = 2**63 - 1) -> int:
    """An attribute that is an integer from `least` to `most`."""
    with reading(f"{where}, attribute {name}"):
        value = node.attrs.get(name, default)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        range_ = f">= {least}" if most >= 2**63 - 1 else f"from {least} to {most}"
        raise RsdError(f"{where}: expected the attribute {name} to be an integer {range_}, found {value!r:.80}")
    return int(value)


def asked_things(node: h5py.Group, where: str) -> list[tuple[str, str]]:
    """Sentences that would ask for a thing of the scene, with that thing: the attribute `asks`, none where it lacks."""
    text = text_attribute(node, "asks", where, "[]")
    try:
        return checked(list[tuple[Said, Said]], json.loads(text), "asks")
    except (ValueError, RecursionError, RsdError):
        expected = "the attribute asks to be pairs of a sentence and a thing"
        raise RsdError(f"{where}: expected {expected}, found {text:.80}") from None


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[h5py.Group]:
    """Opens a file as `open_file` does -> the group that holds its demonstrations."""
    with open_file(path) as file:
        yield member(file, "data", f"demonstrations {path}")


def read_provenance(data: h5py.Group) -> dict[str, Any] | None:
    """`rsd_provenance`, or None for a file that this package did not write.

    Raises RsdError for a version of the format that this version does not read.
    """
    where = f"demonstrations {data.file.filename}"
    text = text_attribute(data, "rsd_provenance", where)
    if not text:
        return None
    provenance = parse_object(text, f"{where}, rsd_provenance")
    version, versions = provenance.get("format_version"), provenance.get("versions", {})
    if type(version) is not int or version != FORMAT_VERSION:
        writer = versions.get("rsd", "unknown") if isinstance(versions, dict) else "unknown"
        raise RsdError(
            f"{where}: expected format version {FORMAT_VERSION}, found {version!r:.40}; read them with the version of "
            f"rsd-vla that wrote them ({writer!s:.40}), or collect them again"
        )
    return provenance


def demo_names(data: h5py.Group) -> list[str]:
    """`demo_<i>` groups in the order of i; RsdError for a name that only resembles one."""
    where = f"demonstrations {data.file.filename}"
    with reading(where):
        names = [name for name in data if name.startswith("demo")]
    if odd := [name for name in names if not re.fullmatch(r"demo_(0|[1-9][0-9]{0,8})", name)]:
        found = f"{odd[0]!r:.80}; rename or remove it, it would be left out"
        raise RsdError(f"{where}: expected groups demo_0, demo_1, ..., found {found}")
    return sorted(names, key=lambda name: int(name[5:]))


def stored_names(path: Path) -> list[str]:
    """`demo_names` of a file; none where it is not there."""
    if not path.exists():
        return []
    with open_data(path) as data:
        return demo_names(data)


def merge(path: Path, parts: list[Path], attributes: Mapping[str, Any], provenance: Mapping[str, Any]) -> int:
    """Moves part files (`demo_<i>.hdf5`, each one such group) into the file of a task; returns its number of demos.

    The present file is copied, not edited, so an interruption leaves it as it was. Compressed chunks are copied as
    they are. A demonstration that is present already is replaced by its part (rendering adds images this way).
    """
    fresh = {part.stem: part for part in parts}
    with atomic_file(path) as out:
        data = out.create_group("data")
        if path.exists():
            with open_data(path) as present:
                for name in demo_names(present):
                    if name not in fresh:
                        _copy(present, name, data)
        for name, part in fresh.items():
            with open_file(part) as file:
                _copy(file, name, data)
        names = demo_names(data)
        total, tries = (
            int(sum(data[name].attrs.get(key, 0) for name in names)) for key in ("num_samples", "failed_tries")
        )
        made = json.dumps({"format_version": FORMAT_VERSION, **provenance, "failed_tries": tries})
        data.attrs.update({**attributes, "num_demos": len(names), "total": total, "rsd_provenance": made})
    for part in parts:
        part.unlink()
    return len(names)


def _copy(present: h5py.Group, name: str, data: h5py.Group) -> None:
    """Raises DamagedFile where it cannot be read; the rest is for who writes."""
    try:
        present.copy(name, data)
    except (OSError, KeyError, RuntimeError) as error:
        if "errno" in str(error):
            raise
        where = f"demonstrations {present.file.filename}, {name}"
        raise DamagedFile(f"{where}: not readable ({error!s:.200}): {ANEW}") from error
