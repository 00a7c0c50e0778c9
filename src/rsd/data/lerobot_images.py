"""The pictures of a LeRobot data set: PNG or JPEG in the rows of its parquet files, or frames of its mp4 videos."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsd.checks import told
from rsd.data.lerobot import EPISODE, Rows, read_columns
from rsd.extras import extra
from rsd.types import RsdError

KINDS = ("image", "video")  # a feature's `dtype`
EPISODES = "meta/episodes/*/*.parquet"  # of format 3
VIDEO = "videos/{key}/chunk-{chunk:03d}/file-{file:03d}.mp4"
OLD_VIDEO = "videos/chunk-{chunk:03d}/{key}/episode_{episode:06d}.mp4"  # of format 2


def camera(folder: Path, info: Mapping[str, Any], rows: Rows, key: str) -> StoredCamera | VideoCamera:
    """One camera's pictures, read by episode -> uint8 [T, H, W, 3]; quick where episodes are asked for in order."""
    kind = info["features"][key]["dtype"]
    return StoredCamera(folder, rows, key) if kind == "image" else VideoCamera(folder, info, rows, key)


class StoredCamera:
    """Pictures in the parquet files."""

    def __init__(self, folder: Path, rows: Rows, key: str) -> None:
        self._rows, self._key, self._where = rows, key, f"LeRobot data set {folder}"
        self._file, self._cells = -1, None
        self._pool = ThreadPoolExecutor(os.cpu_count())  # decoding leaves Python's lock to others

    def read(self, part: slice) -> NDArray[np.uint8]:
        cells = []
        for file, place in zip(self._rows.file[part].tolist(), self._rows.place[part].tolist(), strict=True):
            if file != self._file:
                self._file, self._cells = file, read_columns(self._rows.files[file], [self._key])[self._key]
            cells.append(self._cells[place].as_py())  # type: ignore[index]
        pictures = list(self._pool.map(self._decode, cells))
        if odd := {each.shape for each in pictures} - {pictures[0].shape}:
            found = " and ".join(f"{width} x {height}" for height, width, _ in (pictures[0].shape, *odd))
            raise RsdError(f"{self._where}: expected pictures of one size in an episode's {self._key}, found {found}")
        return np.stack(pictures)

    def _decode(self, cell: object) -> NDArray[np.uint8]:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            found = f"the path {cell['path']!r:.80}" if isinstance(cell, dict) and cell.get("path") else f"{cell!r:.80}"
            raise RsdError(f"{self._where}: expected the bytes of a picture in every {self._key}, found {found}")
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                return np.asarray(image.convert("RGB"))
        # what Pillow makes of damaged bytes
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            found = f"{len(data)} bytes that are none ({told(error, 80)}); fetch the data folder again"
            raise RsdError(f"{self._where}: expected PNG or JPEG in every {self._key}, found {found}") from None


class VideoCamera:
    """Pictures in mp4 files: one an episode (format 2), or several episodes one after the other (format 3)."""

    def __init__(self, folder: Path, info: Mapping[str, Any], rows: Rows, key: str) -> None:
        self._rows, self._key, self._where = rows, key, f"LeRobot data set {folder}"
        self._fps = float(info["fps"])  # which `lerobot_libero.check_rate` has seen
        if info["codebase_version"] == "v3.0":
            self._places = self._third_format(folder)
        else:
            size = info.get("chunks_size")
            if not isinstance(size, int | float) or isinstance(size, bool) or not 1 <= size <= 1e6:
                expected = "chunks_size in meta/info.json from 1 to 1000000"
                raise RsdError(f"{self._where}: expected {expected}, found {size!r:.40}")
            episodes = np.unique(rows.columns[EPISODE]).tolist()
            names = {each: OLD_VIDEO.format(key=key, chunk=each // int(size), episode=each) for each in episodes}
            self._places = {each: (folder / name, 0) for each, name in names.items()}
        self._path, self._next = Path(), 0
        self._frames: Iterator[NDArray[np.uint8]] = iter(())

    def read(self, part: slice) -> NDArray[np.uint8]:
        episode = int(self._rows.columns[EPISODE][part.start])
        if episode not in self._places:
            raise RsdError(f"{self._where}: expected episode {episode} in {EPISODES}, found none; fetch meta again")
        path, first = self._places[episode]
        if path != self._path or first < self._next:
            self._path, self._next, self._frames = path, 0, frames_of(path, self._fps)
        count = part.stop - part.start
        found = list(islice(self._frames, first - self._next, first - self._next + count))
        self._next = first + count
        if len(found) != count:
            expected = f"frames {first}..{first + count - 1} for episode {episode}"
            raise RsdError(f"{path}: expected {expected}, found {len(found)} of these {count}; download it again")
        return np.stack(found)

    def _third_format(self, folder: Path) -> dict[int, tuple[Path, int]]:
        """Where each episode's frames are, by `meta/episodes`."""
        names = [f"videos/{self._key}/{each}" for each in ("chunk_index", "file_index", "from_timestamp")]
        found = dict[int, tuple[Path, int]]()
        for path in sorted(folder.glob(EPISODES)):
            table = read_columns(path, [EPISODE, *names])
            for row in zip(*(table[name].to_pylist() for name in (EPISODE, *names)), strict=True):
                episode, chunk, file, start = row
                placed = isinstance(start, float | int) and 0 <= start < 1e9
                if not placed or any(type(each) is not int or each < 0 for each in row[:3]):
                    expected = f"where episode {episode!r:.20} is in the videos"
                    raise RsdError(f"{path}: expected {expected}, found {row!r:.120}")
                name = VIDEO.format(key=self._key, chunk=chunk, file=file)
                found[episode] = folder / name, round(start * self._fps)
        return found


def frames_of(path: Path, fps: float) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video in order, uint8 [H, W, 3]; RsdError where one is missing, by its time."""
    with extra("lerobot-data"):
        import av
    if not path.is_file():
        raise RsdError(f"{path}: expected the video there, found none; download the videos too")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            begin: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                begin = frame.time if begin is None else begin
                if frame.time is not None and abs((frame.time - begin) * fps - number) > 0.5:
                    expected = f"frame {number} at {number / fps:.3f} s, as {fps:g} frames a second have it"
                    raise RsdError(f"{path}: expected {expected}, found it at {frame.time - begin:.3f} s")
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    # PyAV's own errors are of the first two kinds; without a video stream there is no first one
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        expected = "a video that FFmpeg can decode"
        raise RsdError(f"{path}: expected {expected}, found {told(error, 120)}; download it again") from None
