"""`rsd demos export`: demonstrations as a LeRobot data set of format 3.0, as LeRobot's own loader and trainer take it.

Names and turn of the pictures are those of HuggingFaceVLA/libero. A row's action is the label that a learner takes;
where what was executed differs from it (noise of the collection), that is a feature of its own, which LeRobot leaves
alone. `meta/rsd.json` keeps where the demonstrations come from.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsd.checks import Checked, Rules, each_once
from rsd.conventions import CONTROL_HZ, GRIPPER_CLOSE, GRIPPER_OPEN
from rsd.data.demonstrations import Demonstration, folder_provenance, load_demonstrations
from rsd.data.lerobot import EPISODE, FRAME, INFO, OWN, TASK, TASKS, located
from rsd.data.lerobot_images import VIDEO
from rsd.data.lerobot_libero import CAMERA_KEYS, EXECUTED, STATE_KEYS, UPRIGHT, WORDS, check_state
from rsd.data.lerobot_stats import Statistics
from rsd.data.schema import check_actions
from rsd.extras import extra
from rsd.json_files import write_atomically
from rsd.output import plural, shown, writing
from rsd.types import ACTION_DIM, STATE_DIM, RsdError
from rsd.versions import versions
from rsd.words import FLAGS, word_flags

if TYPE_CHECKING:
    import pyarrow

CAMERAS, STATE, ACTION = CAMERA_KEYS[0], STATE_KEYS[0], "action"
POSE = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3"]
DATA, EPISODES = "data/chunk-{chunk:03d}/file-{file:03d}.parquet", "meta/episodes/chunk-000/file-000.parquet"
FILES_A_CHUNK, DATA_MB, VIDEO_MB = 1000, 100, 200  # LeRobot's own defaults
MEGABYTE = 2**20
# Of 220 frames of LIBERO, 128 px: 2.3 grey levels off in the mean, 1.9 kB a frame; LeRobot's own AV1 2.7 and 1.7, PNG
# 0 and 19. Every second frame is a key frame, so that a frame drawn at random is quick to decode.
CODEC, PIXELS, CODEC_OPTIONS = "libx264", "yuv420p", {"crf": "18", "g": "2"}


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Write rendered demonstrations in another tool's format."""

    data: tuple[Path, ...]
    """Folders of demonstrations with images of every step (`rsd demos render --every 1`), or LeRobot data sets."""
    output: Path
    """Folder of the new data set, which must not be there yet."""
    format: Literal["lerobot"] = "lerobot"
    """LeRobotDataset v3.0."""
    images: Literal["png", "mp4"] = "png"
    """png: lossless, in the parquet files; mp4: a tenth of the size, 2 grey levels off in the mean."""
    words: bool = False
    """Also, as observation.environment_state, which words the instruction has, for LeRobot's ACT and diffusion."""

    def rules(self) -> Rules:
        yield self.data, "at least one folder of --data", "none"
        yield ":" not in str(self.output), "--output of a folder whose path has no colon", self.output


def export(config: ExportConfig) -> Path:
    """Write the data set: complete, or not there at all."""
    output = config.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RsdError(f"{output}: exists already; choose another --output")
    each_once("--data", [located(folder)[0] for folder in config.data])
    executed = survey(config.data)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(output):
            writer = Writer(temporary, config.images == "mp4", executed, config.words)
            everything = (each for folder in config.data for each in load_demonstrations(folder))
            for demonstration in shown(everything, "demonstrations written"):
                writer.add(demonstration)
            writer.finish([folder_provenance(folder) for folder in config.data])
            os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = (writer.episodes, "demonstration"), (writer.frames, "frame"), (len(writer.tasks), "task")
    print(f"{', '.join(plural(*each) for each in counts)}: {output}")
    print(f"next: rsd train policy --data lerobot:{output}, or LeRobotDataset('local', root='{output}')")
    return output


def survey(folders: Iterable[Path]) -> bool:
    """Whether anything executed differs from its label, read without images; RsdError for what has no image of every
    step."""
    differs = False
    for folder in folders:
        for each in load_demonstrations(folder, images=False):
            if each.image_every != 1:
                found = f"images of every {each.image_every}. step; render again with --every 1"
                raise RsdError(f"{each.source}, {each.episode}: a LeRobot data set has an image a step, found {found}")
            check_state(f"{each.source}, {each.episode}: expected the state", each.state)
            gripper = {ACTION_DIM - 1: (each.labels[:, -1], (-1.0, 1.0))}
            check_actions(f"{each.source}, {each.episode}", each.labels[:, :-1], 1.0, "+-1", gripper, "convert them")
            differs |= not np.array_equal(each.actions, each.labels)
    return differs


def features_of(side: int, videos: bool, executed: bool, words: bool) -> dict[str, dict[str, Any]]:
    """`features` of info.json, in the order of the columns."""
    names = ["height", "width", "channel"]
    picture: dict[str, Any] = {"dtype": "video" if videos else "image", "shape": [side, side, 3], "names": names}
    if videos:
        kind = {"codec": "h264", "pix_fmt": PIXELS, "is_depth_map": False, "fps": CONTROL_HZ, "channels": 3}
        size = {"video.height": side, "video.width": side}
        picture["info"] = {**size, **{f"video.{key}": value for key, value in kind.items()}, "has_audio": False}
    action = {"dtype": "float32", "shape": [ACTION_DIM], "names": [*POSE, "gripper"]}
    state = {"dtype": "float32", "shape": [STATE_DIM], "names": [*POSE, "finger1", "finger2"]}
    return {
        **dict.fromkeys(CAMERAS, picture),
        STATE: state,
        **({WORDS: {"dtype": "float32", "shape": [FLAGS], "names": None}} if words else {}),
        ACTION: action,
        **({EXECUTED: action} if executed else {}),
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in (FRAME, EPISODE, "index", TASK)},
    }


@dataclass
class Writer:
    """Files of a data set, episode by episode. executed, words: with the features of these names."""

    folder: Path
    videos: bool
    executed: bool
    words: bool
    episodes: int = 0
    frames: int = 0
    side: int = 0
    tasks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with extra("lerobot-data"):
            import pyarrow
            from pyarrow import parquet
        self._arrow, self._parquet = pyarrow, parquet
        self._rows, self._notes = RowFile(self.folder, parquet), list[dict[str, Any]]()
        self._films = {key: Film(self.folder, key) for key in CAMERAS} if self.videos else {}
        self._statistics, self._pool = Statistics(), ThreadPoolExecutor(os.cpu_count())

    def add(self, demonstration: Demonstration) -> None:
        images, steps = demonstration.images, len(demonstration)
        if images is None:
            raise RsdError(f"{demonstration.source}: states only, without images; run `rsd demos render` on it first")
        self.side = self.side or images.shape[2]
        if images.shape[2] != self.side:
            expected = f"images of {self.side} px as before"
            raise RsdError(f"{demonstration.source}: expected {expected}, found {images.shape[2]} px; render all alike")
        if self.videos and self.side % 2:
            found = f"{self.side}; take --images png"
            raise RsdError(f"{demonstration.source}: mp4 expects images with an even number of pixels, found {found}")
        task = self.tasks.setdefault(demonstration.instruction, len(self.tasks))
        values: dict[str, NDArray[Any]] = {
            STATE: demonstration.state,
            **({WORDS: np.tile(word_flags(demonstration.instruction), (steps, 1))} if self.words else {}),
            ACTION: demonstration.labels,
            **({EXECUTED: demonstration.actions} if self.executed else {}),
            "timestamp": (np.arange(steps) / CONTROL_HZ).astype(np.float32),
            FRAME: np.arange(steps),
            EPISODE: np.full(steps, self.episodes),
            "index": np.arange(self.frames, self.frames + steps),
            TASK: np.full(steps, task),
        }
        views = {key: images[:, index] for index, key in enumerate(CAMERAS)}
        note: dict[str, Any] = {EPISODE: self.episodes, "tasks": [demonstration.instruction], "length": steps}
        columns = {} if self.videos else {key: self._pictures(view) for key, view in views.items()}
        columns |= {key: self._column(array) for key, array in values.items()}
        chunk, file = self._rows.write(self._arrow.table(columns))
        note |= {"data/chunk_index": chunk, "data/file_index": file}
        note |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + steps}
        for key, film in self._films.items():
            note |= film.write(views[key])
        note |= self._statistics.add({**views, **values})
        self._notes.append({**note, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.episodes, self.frames = self.episodes + 1, self.frames + steps

    def finish(self, sources: list[dict[str, Any]]) -> None:
        """Everything in `meta`. sources: where the demonstrations come from."""
        self._rows.close()
        for film in self._films.values():
            film.close()
        for path, table in ((EPISODES, self._arrow.Table.from_pylist(self._notes)), (TASKS, self._tasks())):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            self._parquet.write_table(table, self.folder / path)
        place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        info = {
            "codebase_version": "v3.0",
            "robot_type": "panda",
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_A_CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": CONTROL_HZ,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": f"data/{place}.parquet",
            "video_path": f"videos/{{video_key}}/{place}.mp4" if self.videos else None,
            "features": features_of(self.side, self.videos, self.executed, self.words),
        }
        own: dict[str, Any] = {"recorded_by": "`rsd demos export`", "versions": versions(), "sources": sources}
        own |= {"pictures": UPRIGHT, "gripper": [GRIPPER_OPEN, GRIPPER_CLOSE]}  # no reader has to find them out
        for path, content in ((INFO, info), (Path("meta/stats.json"), self._statistics.total()), (OWN, own)):
            write_atomically(self.folder / path, json.dumps(content, indent=4, ensure_ascii=False))

    def _column(self, values: NDArray[Any]) -> pyarrow.Array:
        if values.ndim == 1:
            return self._arrow.array(values)
        return self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(values.ravel()), values.shape[1])

    def _pictures(self, view: NDArray[np.uint8]) -> pyarrow.Array:
        cells = [{"bytes": data, "path": f"frame-{i:06d}.png"} for i, data in enumerate(self._pool.map(png, view))]
        text, binary = self._arrow.string(), self._arrow.binary()
        return self._arrow.array(cells, self._arrow.struct([("bytes", binary), ("path", text)]))

    def _tasks(self) -> pyarrow.Table:
        """With pandas' note that the texts are the index: LeRobot looks them up by it."""
        numbers, texts = list(self.tasks.values()), list(self.tasks)
        kinds = {TASK: ("int64", "int64"), "task": ("unicode", "object")}
        columns = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}
            for name, (kind, stored) in kinds.items()
        ]
        note = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        return self._arrow.table({TASK: numbers, "task": texts}).replace_schema_metadata({"pandas": json.dumps(note)})


def png(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)  # a quarter of the time, 4 % more bytes
    return file.getvalue()


class Numbered:
    """The files of one kind, a new one as soon as one is full."""

    def __init__(self, folder: Path, name: str, most_mb: int) -> None:
        """name: of a file in the folder, by {chunk} and {file}."""
        self._folder, self._name, self._most = folder, name, most_mb * MEGABYTE
        self._number, self._used = 0, 0
        self._writer: Any = None  # of the present file, once there is something to write

    def place(self) -> tuple[int, int]:
        """(chunk, file in the chunk) of the next piece, for which a full file is closed."""
        if self._used >= self._most:
            self._number, self._used = self._number + 1, 0
            self.close()
        return divmod(self._number, FILES_A_CHUNK)

    def path(self) -> Path:
        """Of the present file, in a folder that is there."""
        chunk, file = divmod(self._number, FILES_A_CHUNK)
        path = self._folder / self._name.format(chunk=chunk, file=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class RowFile(Numbered):
    """The parquet files, a group of rows an episode."""

    def __init__(self, folder: Path, parquet: Any) -> None:
        super().__init__(folder, DATA, DATA_MB)
        self._parquet = parquet

    def write(self, table: pyarrow.Table) -> tuple[int, int]:
        """-> its place."""
        place = self.place()
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self.path(), table.schema)
        self._writer.write_table(table)
        self._used += table.nbytes
        return place


class Film(Numbered):
    """The mp4 files of one camera, several episodes in each."""

    def __init__(self, folder: Path, key: str) -> None:
        super().__init__(folder, VIDEO.replace("{key}", key), VIDEO_MB)
        with extra("lerobot-data"):
            import av
        self._av, self._key, self._frames = av, key, 0

    def write(self, view: NDArray[np.uint8]) -> dict[str, Any]:
        """uint8 [T, S, S, 3] -> what `meta/episodes` says of where they are."""
        chunk, file = self.place()
        if self._writer is None:
            self._writer = self._av.open(str(self.path()), "w")
            self._stream = self._writer.add_stream(CODEC, rate=CONTROL_HZ, options=CODEC_OPTIONS)
            self._stream.height, self._stream.width, self._stream.pix_fmt = *view.shape[1:3], PIXELS
        start = self._frames
        for picture in view:
            self._mux(self._stream.encode(self._av.VideoFrame.from_ndarray(picture, format="rgb24")))
        self._frames += len(view)
        seconds = {"from_timestamp": start / CONTROL_HZ, "to_timestamp": self._frames / CONTROL_HZ}
        place = {"chunk_index": chunk, "file_index": file, **seconds}
        return {f"videos/{self._key}/{name}": value for name, value in place.items()}

    def close(self) -> None:
        if self._writer is not None:
            self._mux(self._stream.encode())
        super().close()
        self._frames = 0

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            self._used += packet.size
            self._writer.mux(packet)
