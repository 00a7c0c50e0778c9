"""Adding camera images to demonstrations that were recorded without them, on a machine that draws fast.

A frame is drawn from the recorded state and fixture poses. The simulator's own images are sampled one physics substep
(2 ms) before the state that is recorded, so a rendered image differs from a live one by about one grey level.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Checked, ImageSize, Share, Some
from rsd.collection.workers import Made, Workers, check_place, make_all, part_files, worker_environment
from rsd.data import h5py
from rsd.data.demonstrations import demonstration_files
from rsd.data.schema import (
    FILE_SUFFIX,
    IMAGE_KEYS,
    SPOTS,
    asked_things,
    atomic_file,
    member,
    merge,
    open_data,
    open_file,
    read_provenance,
    reading,
    stored_names,
    whole_attribute,
    write_images,
)
from rsd.locks import exclusive
from rsd.output import Faults, attempt, plural, writing
from rsd.sim.libero import LiberoEnv, simulator_versions
from rsd.sim.rendering import check_gl
from rsd.sim.suites import suite_tasks
from rsd.sim.views import SCENE
from rsd.types import CAMERAS, RsdError

PARTS = ".rendered"
BATCH = 4  # demonstrations per job


class OtherImages(RsdError):
    """Of another size or of other steps: a folder holds those of one kind."""


@dataclass(frozen=True)
class RenderConfig(Checked):
    """Which demonstrations get images. A run that was interrupted continues; demonstrations with images are skipped."""

    source: Path
    """Folder of demonstrations recorded with `--states-only`."""
    out: Path | None = None
    """Folder for the files with images; default: in place."""
    image_size: ImageSize = 256
    """Side of the square images in pixels."""
    num_workers: Workers = 2
    """Processes; one per CPU core is right with a GPU as well."""
    max_per_task: Some | None = None
    """Render only the first so many demonstrations of each task."""
    every: Some = 1
    """Render the steps 0, n, 2n, ...: neighbouring frames teach a policy little, and drawing is most of the work."""
    views: Share = 0.0
    """Share of the demonstrations that are drawn in another light, from a turned camera and zoomed, as `--view` of
    `rsd eval` does; drawn anew for each."""


def render_frames(
    env: LiberoEnv,
    states: NDArray[np.float64],
    body_pos: NDArray[np.float64],
    body_quat: NDArray[np.float64],
    things: Sequence[str] = (),
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draws recorded states [T, 1 + nq + nv] -> uint8 [T, 2, S, S, 3], NOT rotated, cameras in the order of CAMERAS,
    and where the things are seen, [T, n, 2] (`LiberoEnv.spots`).

    `env` has been reset once (that hides LIBERO's marker sites); its own episode is lost.
    """
    frames = np.empty((len(states), len(CAMERAS), env.image_size, env.image_size, 3), np.uint8)
    spots = np.empty((len(states), len(things), 2), np.float32)
    for t, state in enumerate(states):
        env.restore(state, body_pos, body_quat)
        frames[t], spots[t] = env.draw(), env.spots(things)
    return frames, spots


def render(config: RenderConfig) -> dict[str, int]:
    """Draws what has no images yet; returns the number of demonstrations with images per task.

    Raises RsdError if a file holds images of another size; and Unfinished, once the others are done, if demonstrations
    or files could not be rendered: damaged ones, those of others (LIBERO's own files lack the fixtures' poses).
    """
    out = config.out or config.source
    demonstration_files(config.source)  # an error before a folder is made
    if out != config.source:
        check_place(out)
    check_gl()
    faults = Faults(f"what is rendered is kept in {out}; the same command tries the others again")
    with exclusive(out):
        have: dict[Path, set[str]] = {}
        batches: list[tuple[Path, list[str]]] = []
        for path in demonstration_files(config.source):
            try:
                _task_of(path, config)
                if not (wanted := stored_names(path)[: config.max_per_task]):
                    raise RsdError(f"{path}: expected demonstrations, found none; collect them again")
                have[path] = _rendered(config, out, path).intersection(wanted)
            except OtherImages:
                raise
            except RsdError as error:
                faults.failed(path.name, str(error))
                continue
            missing = [name for name in wanted if name not in have[path]]
            batches += [(path, missing[i : i + BATCH]) for i in range(0, len(missing), BATCH)]
        names = {path: path.name.removesuffix(FILE_SUFFIX) for path in have}
        make, merge_of = functools.partial(_render_batch, config, out), functools.partial(_merge, config, out)
        counts = make_all("rendered demonstrations", names, have, batches, make, merge_of, faults, config.num_workers)
    faults.raise_any(f"of the demonstrations or files in {config.source}", sum(counts.values()))
    told = f"{plural(sum(counts.values()), 'demonstration')} with images in {out}"
    print(f"{told}; next: rsd train policy --data {out}", file=sys.stderr)
    return counts


def _folder(out: Path, path: Path) -> Path:
    return out / PARTS / path.name.removesuffix(FILE_SUFFIX)


def _task_of(path: Path, config: RenderConfig) -> tuple[str, int]:
    with open_data(path) as data:
        provenance = read_provenance(data)
        if provenance is not None:
            _attributes(data, path, config)  # now, not when its images are drawn
    if provenance is None:
        raise RsdError(
            f"render: expected demonstrations written by `rsd demos collect`, found {path} without rsd_provenance; "
            "LIBERO's own files do not hold the fixtures' poses and have images already"
        )
    with reading(f"demonstrations {path}, rsd_provenance"):
        suite = str(provenance["settings"]["suite"])
    name = path.name.removesuffix(FILE_SUFFIX)
    for task in suite_tasks(suite):
        if task.name == name:
            return suite, task.task_id
    raise RsdError(f"render: expected the name of a {suite} task, found {name} ({path})")


def _rendered(config: RenderConfig, out: Path, path: Path) -> set[str]:
    """Demonstrations that have images, merged or as parts."""
    found: set[str] = set()
    for part in part_files(_folder(out, path)):
        with open_file(part) as file:
            found |= _with_images(config, part, file, [part.stem])
    if names := stored_names(out / path.name):
        with open_data(out / path.name) as data:
            found |= _with_images(config, out / path.name, data, names)
    return found


def _with_images(config: RenderConfig, path: Path, data: h5py.Group, names: list[str]) -> set[str]:
    """Those that have images. Raises OtherImages if these are of another size or of other steps."""
    found, where = set(), f"demonstrations {path}"
    for name in names:
        group = member(data, name, where)
        if IMAGE_KEYS[0] not in member(group, "obs", where):
            continue
        with reading(f"{where}, {name}, images"):
            size, views = int(group["obs"][IMAGE_KEYS[0]].shape[1]), float(group.attrs.get("image_views", 0.0))
        every = whole_attribute(group, "image_every", where, 1, least=1)
        if (size, every, views) != (config.image_size, config.every, config.views):
            asked = f"{config.image_size} px of every {config.every}. step, --views {config.views:g}"
            there = f"{size} px of every {every}. step, --views {views:g}"
            raise OtherImages(f"render: {path} holds images of {there}, asked for were {asked}; choose another --out")
        found.add(name)
    return found


def _render_batch(config: RenderConfig, out: Path, path: Path, names: list[str]) -> Made:
    suite, task_id = _task_of(path, config)
    env = worker_environment(suite, task_id, config.image_size, cameras=True)
    folder = _folder(out, path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def read(_: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            item[()]

    def draw(name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        demo, where = member(data, name, f"demonstrations {path}"), f"demonstration {name} of {path}"
        with reading(f"{where}, its states or fixtures"):
            demo.visititems(read)  # else what is damaged would be found as it is copied, and taken for a full disk
            if (there := len(demo["states"])) != (steps := len(demo["actions"])):
                raise RsdError(f"{where}: expected {steps} states, one an action, found {there}; collect it again")
            states, things = demo["states"][:: config.every], [thing for _, thing in asked_things(demo, where)]
            drawn = f"{suite} {path.name} {name} {demo.attrs.get('placement_seed')}"  # not alike in folders of one task
            rng = np.random.default_rng(zlib.crc32(drawn.encode()))
            env.look_as(SCENE if rng.random() < config.views else (), rng)
            return render_frames(env, states, demo["body_pos"][()], demo["body_quat"][()], things)

    def keep(name: str, drawn: tuple[NDArray[np.uint8], NDArray[np.float32]]) -> None:
        with atomic_file(folder / f"{name}.hdf5") as part:
            data.copy(name, part)
            frames, spots = drawn
            write_images(part[name]["obs"], frames)
            if spots.size:
                part[name].require_dataset(SPOTS, spots.shape, spots.dtype, data=spots)
            part[name].attrs["image_every"] = config.every
            part[name].attrs["image_views"] = config.views

    with open_data(path) as data:
        return attempt(names, draw, keep)


def _merge(config: RenderConfig, out: Path, path: Path) -> int:
    if parts := part_files(_folder(out, path)):
        with open_data(path) as data:
            attributes, provenance = _attributes(data, path, config)
        merge(out / path.name, parts, attributes, provenance)
    return len(_rendered(config, out, path))


def _attributes(data: h5py.Group, path: Path, config: RenderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = {key: value for key, value in data.attrs.items() if key != "rsd_provenance"}
    with reading(f"demonstrations {path}, env_args"):
        env_args = json.loads(attributes["env_args"])
        env_args["env_kwargs"].update(camera_heights=config.image_size, camera_widths=config.image_size)
    attributes["env_args"] = json.dumps(env_args)
    rendering: dict[str, Any] = {name: getattr(config, name) for name in ("image_size", "every", "views")}
    rendering["versions"] = simulator_versions()
    return attributes, {**(read_provenance(data) or {}), "rendering": rendering}
