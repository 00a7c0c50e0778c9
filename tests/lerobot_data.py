"""Small LeRobot data sets that look like LIBERO: an arm that reaches, closes its gripper and moves on."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from rsd.data.lerobot_libero import CAMERA_KEYS

SIDE, FPS = 64, 20
TASKS = ("pick up the bowl", "open the drawer")
LENGTHS = (24, 30, 26)


@dataclass(frozen=True)
class Seen:
    """images: uint8 [T, 2, S, S, 3] upright; state [T, 8]; actions [T, 7] with a gripper of -1 = open."""

    images: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    task: str


def episode(number: int, side: int = SIDE) -> Seen:
    rng = np.random.default_rng(number)
    steps = LENGTHS[number % len(LENGTHS)]
    time = np.linspace(0, 1, steps)
    reach = np.minimum(time / 0.6, 1)
    sideways = (-1) ** number * 0.25 * reach
    hand = np.stack([-0.2 + 0.1 * reach, sideways, 1.2 - 0.25 * reach], 1)
    closed = time > 0.6
    width = np.where(closed, 0.012, 0.04)
    angle = np.tile([3.14, 0.01, -0.09], (steps, 1))
    state = np.hstack([hand, angle, width[:, None], -width[:, None]]).astype(np.float32)
    command = np.where(np.roll(closed, -2), 1.0, -1.0)
    actions = np.hstack([rng.uniform(-0.9, 0.9, (steps, 6)), command[:, None]]).astype(np.float32)
    images = np.empty((steps, 2, side, side, 3), np.uint8)
    for camera, (low, high) in enumerate(((60, 90), (90, 250))):
        patches = np.kron(rng.integers(low, high, (8, 8, 3)), np.ones((-(-side // 8), -(-side // 8), 1)))
        images[:, camera] = patches[:side, :side]
    images[:, 1, -max(1, round(side / 8)) :] = 55  # the gripper's body
    size = side // 8
    for step, (x, y, z) in enumerate(hand):
        column = int((0.5 - 1.1 * y) * (side - size))
        row = int((0.25 + 0.3 * (x + 0.2) + 1.5 * (1.2 - z)) * (side - size))
        images[step, 0, row : row + size, column : column + size] = 220
    return Seen(images, state, actions, TASKS[number % len(TASKS)])


def stored(array: np.ndarray) -> np.ndarray:
    return array


@dataclass
class Kind:
    """How a data set is written. turn: upright pictures [T, S, S, 3] -> as they are stored; gripper: what opens, what
    closes; info: changes of info.json."""

    version: str = "v3.0"
    images: str = "image"
    cameras: tuple[str, str] = CAMERA_KEYS[0]
    state: str = "observation.state"
    action: str = "action"
    turn: Callable[[np.ndarray], np.ndarray] = stored
    gripper: tuple[float, float] = (-1.0, 1.0)
    codec: str = "libx264"
    info: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, kind: Kind, episodes: list[Seen] | None = None) -> list[Seen]:
    """A data set as LeRobot lays it out -> its episodes; in format 3 two of them to a file."""
    episodes = [episode(number) for number in range(3)] if episodes is None else episodes
    tasks = list(dict.fromkeys(each.task for each in episodes))
    old, videos = kind.version != "v3.0", kind.images == "video"
    groups = [[number] for number in range(len(episodes))] if old else [[0, 1], [2]]
    notes = []
    for file, numbers in enumerate(groups):
        tables, start = [], 0
        for number in numbers:
            tables.append(rows(episodes[number], number, tasks, kind))
            steps = len(tables[-1])
            place = {"chunk_index": 0, "file_index": file, "from_timestamp": start / FPS}
            notes.append({f"videos/{key}/{name}": value for key in kind.cameras for name, value in place.items()})
            notes[-1] |= {"episode_index": number, "length": steps}
            start += steps
        path = folder / "data/chunk-000" / (f"episode_{file:06d}.parquet" if old else f"file-{file:03d}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.concat_tables(tables), path)
        for index, key in enumerate(kind.cameras if videos else ()):
            pictures = np.concatenate([kind.turn(episodes[number].images[:, index]) for number in numbers])
            name = f"chunk-000/{key}/episode_{file:06d}.mp4" if old else f"{key}/chunk-000/file-{file:03d}.mp4"
            film(folder / "videos" / name, pictures, kind.codec)
    side = episodes[0].images.shape[2]
    picture = {"dtype": kind.images, "shape": [side, side, 3], "names": ["height", "width", "channel"]}
    vectors = {kind.state: {"dtype": "float32", "shape": [8]}, kind.action: {"dtype": "float32", "shape": [7]}}
    info = {
        "codebase_version": kind.version,
        "fps": FPS,
        "chunks_size": 1000,
        "total_episodes": len(episodes),
        "total_frames": sum(len(each.state) for each in episodes),
        "features": {**dict.fromkeys(kind.cameras, picture), **vectors},
        **kind.info,
    }
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    if old:
        lines = [json.dumps({"task_index": index, "task": task}) for index, task in enumerate(tasks)]
        (folder / "meta/tasks.jsonl").write_text("\n".join(lines) + "\n")
    else:
        names = {"task_index": list(range(len(tasks))), "__index_level_0__": tasks}
        parquet.write_table(pyarrow.table(names), folder / "meta/tasks.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(notes), folder / "meta/episodes/chunk-000/file-000.parquet")
    return episodes


def rows(seen: Seen, number: int, tasks: list[str], kind: Kind) -> pyarrow.Table:
    steps = len(seen.state)
    actions = seen.actions.copy()
    actions[:, 6] = np.where(actions[:, 6] < 0, *kind.gripper)
    columns: dict[str, Any] = {
        kind.state: seen.state.tolist(),
        kind.action: actions.tolist(),
        "frame_index": np.arange(steps),
        "episode_index": np.full(steps, number),
        "task_index": np.full(steps, tasks.index(seen.task)),
    }
    for index, key in enumerate(kind.cameras if kind.images == "image" else ()):
        columns[key] = [{"bytes": png(each), "path": None} for each in kind.turn(seen.images[:, index])]
    return pyarrow.table(columns)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return file.getvalue()


def film(path: Path, pictures: np.ndarray, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"crf": "10", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
