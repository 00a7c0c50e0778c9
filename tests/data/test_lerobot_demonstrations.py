"""LeRobot data sets as demonstrations: every layout, turn and gripper gives what was seen; and there and back."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from lerobot_data import Kind, Seen, episode, film, write
from refusals import check
from rsd.data import lerobot_export
from rsd.data.demonstrations import action_episodes, folder_provenance, load_demonstrations
from rsd.data.lerobot_export import ExportConfig, export
from rsd.data.lerobot_libero import CAMERA_KEYS, TURNS, WORDS
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.dataset import FrameDataset
from rsd.words import word_flags

HALF, FLIPPED, MIRRORED = (TURNS[name] for name in ("turned by 180 degrees", "upside down", "mirrored"))
ONE, MP4 = Kind(), Kind(images="video")
KINDS = {
    "huggingface": (
        Kind(),
        "pictures 64 px upright; state: position, axis-angle, two fingers; gripper -1 opens, 1 closes",
    ),
    "openpi": (
        Kind("v2.0", cameras=CAMERA_KEYS[3], state="state", action="actions", gripper=(1.0, 0.0)),
        "64 px upright; state: position, axis-angle, two fingers; gripper 1 opens, 0 closes: converted to -1 and 1",
    ),
    "as-libero-stores-it": (Kind("v2.1", "video", CAMERA_KEYS[1], turn=HALF), "pictures 64 px turned by 180 degrees"),
    "as-robosuite-draws": (Kind("v2.1", turn=FLIPPED, gripper=(0.0, 1.0)), "pictures 64 px upside down"),
    "as-the-world-is": (Kind("v3.0", "video", CAMERA_KEYS[2], turn=MIRRORED), "pictures 64 px mirrored"),
    "av1": (Kind("v3.0", "video", turn=HALF, codec="libsvtav1", gripper=(1.0, -1.0)), "gripper 1 opens, -1 closes"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_layout_gives_what_was_seen(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, said = KINDS[name]
    episodes = write(tmp_path, kind)
    found = list(load_demonstrations(f"lerobot:{tmp_path}"))
    assert [demo.instruction for demo in found] == [each.task for each in episodes]
    for demo, each in zip(found, episodes, strict=True):
        np.testing.assert_array_equal(demo.state, each.state)
        np.testing.assert_array_equal(demo.labels, each.actions)
        assert demo.images is not None
        assert demo.images.shape == each.images.shape
        off = abs(demo.images.astype(int) - each.images)
        assert off.mean() < (4 if kind.images == "video" else 1e-9)  # of a wrong turn it is 20 and more
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line
    plain = list(load_demonstrations(tmp_path, images=False))
    assert all(demo.images is None for demo in plain)
    for demo, actions in zip(plain, action_episodes(tmp_path), strict=True):
        np.testing.assert_array_equal(actions.actions, demo.labels)


def test_larger_pictures_are_reduced_and_tasks_cut_short(tmp_path: Path) -> None:
    episodes = write(tmp_path, Kind())
    whole, small = (list(load_demonstrations(tmp_path, image_size=size, max_per_task=1)) for size in (64, 16))
    assert [demo.episode for demo in small] == ["episode_0", "episode_1"]
    for demo, reduced in zip(whole, small, strict=True):
        assert demo.images is not None
        assert reduced.images is not None
        means = demo.images.reshape(-1, 2, 16, 4, 16, 4, 3).mean((3, 5))
        assert abs(reduced.images - means).max() <= 1  # Pillow rounds twice
    assert folder_provenance(tmp_path)["format"] == "v3.0"
    assert len(episodes) == 3


@pytest.mark.parametrize("command", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("width", [0.04, 0.001])
def test_a_gripper_that_never_moves_is_open_or_closed(command: float, width: float, tmp_path: Path) -> None:
    seen = [episode(number) for number in range(3)]
    for each in seen:
        each.state[:, 6], each.state[:, 7] = width, -width
    write(tmp_path, Kind(gripper=(command, command)), seen)
    gripper = np.concatenate([demo.labels[:, 6] for demo in load_demonstrations(tmp_path, images=False)])
    assert set(gripper.tolist()) == {-1.0 if width > 0.01 else 1.0}


def hdf5(folder: Path, noise: float = 0.0, every: int = 1, side: int = 64, images: bool = True) -> Path:
    """The same episodes in LIBERO's HDF5, a file a task."""
    folder.mkdir(exist_ok=True)
    for number in range(3):
        seen = episode(number, side)
        with h5py.File(folder / f"{seen.task.replace(' ', '_')}_demo.hdf5", "a") as file:
            demo = file.create_group(f"data/demo_{number}")
            demo["expert_actions"], demo["actions"] = seen.actions, seen.actions * np.float32(1 - noise)
            demo["obs/ee_states"], demo["obs/gripper_states"] = seen.state[:, :6], seen.state[:, 6:]
            demo.attrs["image_every"] = every
            for index, key in enumerate(("agentview_rgb", "eye_in_hand_rgb") if images else ()):
                demo[f"obs/{key}"] = HALF(seen.images[::every, index])
    return folder


@pytest.mark.parametrize("images", ["png", "mp4"])
@pytest.mark.parametrize("noise", [0.0, 0.125])
def test_there_and_back(images: str, noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_export, "MEGABYTE", 20)  # several files
    source, output = hdf5(tmp_path / "hdf5", noise), tmp_path / "lerobot"
    export(ExportConfig((source,), output, images=images, words=noise > 0))  # type: ignore[arg-type]
    assert len(list(output.glob("data/*/*"))) == 3
    assert (len(list(output.glob("videos/*/*/*"))) > 2) == (images == "mp4")
    before, after = (list(load_demonstrations(folder)) for folder in (source, output))
    for demo, again in zip(before, after, strict=True):
        for name in ("state", "actions", "labels"):
            np.testing.assert_array_equal(getattr(again, name), getattr(demo, name))
        assert again.instruction == demo.instruction
    if noise:
        said = parquet.read_table(output / "data")[WORDS].to_pylist()
        expected = [word_flags(demo.instruction) for demo in before for _ in range(len(demo))]
        np.testing.assert_array_equal(said, expected)
    frames, back = (FrameDataset(demos, 8, torch.device("cpu")) for demos in (before, after))
    assert torch.equal(frames.state, back.state)
    assert torch.equal(frames.chunk, back.chunk)
    assert torch.equal(frames.words[frames.task], back.words[back.task])
    off = abs(frames.images.int() - back.images.int()).float().mean()
    assert off == 0 if images == "png" else off < 4
    assert folder_provenance(output)["sources"][0]["recorded_by"].startswith("another tool")
    assert not list(tmp_path.glob(".lerobot*"))


def test_the_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    export(ExportConfig((hdf5(tmp_path / "hdf5"),), tmp_path / "lerobot"))
    stats = json.loads((tmp_path / "lerobot/meta/stats.json").read_text())
    demos = list(load_demonstrations(tmp_path / "lerobot"))
    states = np.concatenate([demo.state for demo in demos]).astype(np.float64)
    pictures = np.concatenate([demo.images[:, 0] for demo in demos]) / 255  # type: ignore[index]
    for name, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(stats["observation.state"][name], function(states, axis=0), atol=1e-9)
        expected = function(pictures, axis=(0, 1, 2))
        np.testing.assert_allclose(np.ravel(stats["observation.images.image"][name]), expected, atol=1e-9)
    np.testing.assert_allclose(stats["observation.state"]["q90"], np.quantile(states, 0.9, axis=0))
    lower = np.quantile(pictures, 0.9, axis=(0, 1, 2), method="inverted_cdf")
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["q90"]), lower)


def test_another_rate_than_liberos_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", replace(ONE, info={"fps": 10}))
    assert list(load_demonstrations(tmp_path / "data"))
    assert "10 frames a second, LIBERO's control rate is 20; every frame is taken for a step" in capsys.readouterr().err


# what cannot be exported


EXPORTS: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "every-second-step": (lambda folder: hdf5(folder, every=2), [], "images of every 2. step; render again with"),
    "states-only": (lambda folder: hdf5(folder, images=False), [], "run `rsd demos render` on it first"),
    "nothing": (lambda folder: folder.mkdir(), [], "found none; collect them with `rsd demos collect`"),
    "there-already": (lambda folder: hdf5(folder.parent / "out") and hdf5(folder), [], "out: exists already"),
    "twice": (hdf5, ["lerobot:DATA"], "expected each once"),
    "odd-size": (lambda folder: hdf5(folder, side=65), ["--images", "mp4"], "with an even number of pixels, found 65"),
    "lerobot:": (lambda folder: hdf5(folder), ["lerobot:"], "lerobot:: expected the folder of a LeRobot data set"),
    "open-wide": (lambda folder: opened(hdf5(folder)), [], ": expected the state to be position 3 (m)"),
    "radians": (lambda folder: spoilt(hdf5(folder), 0, 3.14), [], "expected actions within +-1, found 3.14; convert"),
    "gripper": (lambda folder: spoilt(hdf5(folder), 6, 0.0), [], "expected dimension 6 to be -1 or 1, found 0"),
    "another-size": (lambda folder: hdf5(folder) and hdf5(folder.parent / "b", side=16), ["B"], "64 px as before"),
}


def opened(folder: Path) -> None:
    """Fingers further apart than LIBERO's reach."""
    with h5py.File(min(folder.iterdir()), "a") as file:
        next(iter(file["data"].values()))["obs/gripper_states"][:] = 0.3


def spoilt(folder: Path, dimension: int, value: float) -> None:
    with h5py.File(min(folder.iterdir()), "a") as file:
        next(iter(file["data"].values()))["expert_actions"][2, dimension] = value


def test_an_output_has_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hdf5(tmp_path / "data")
    command = ["demos", "export", "--data", str(source), "--output", f"lerobot:{tmp_path}/out"]
    check(command, "expected --output of a folder whose path has no colon, found 'lerobot:", tmp_path, capsys)


@pytest.mark.parametrize("case", EXPORTS)
def test_what_cannot_be_exported(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, more, expected = EXPORTS[case]
    make(tmp_path / "data")
    more = [word.replace("DATA", str(tmp_path / "data")).replace("B", str(tmp_path / "b")) for word in more]
    command = ["demos", "export", "--data", str(tmp_path / "data"), *more, "--output", str(tmp_path / "out")]
    check(command, expected, tmp_path, capsys)


# what cannot be trained on

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
PARQUET, VIDEO = "data/chunk-000/file-000.parquet", "videos/observation.images.image/chunk-000/file-000.mp4"


def features(**changes: Any) -> Callable[[Path], Any]:
    """Features described otherwise; None: not at all."""

    def make(folder: Path) -> None:
        vector, picture = {"dtype": "float32"}, {"dtype": "image", "shape": [64, 64, 3]}
        own = {**dict.fromkeys(CAMERA_KEYS[0], picture), "observation.state": {**vector, "shape": [8]}}
        own = {**own, "action": {**vector, "shape": [7]}, **{key.replace("_", "."): at for key, at in changes.items()}}
        write(folder, Kind(info={"features": {key: value for key, value in own.items() if value}}))

    return make


def written(kind: Kind, **changes: Any) -> Callable[[Path], Any]:
    """The numbers of all episodes otherwise: functions of them."""

    def changed(seen: Seen) -> Seen:
        return replace(seen, **{name: change(getattr(seen, name)) for name, change in changes.items()})

    return lambda folder: write(folder, kind, [changed(episode(number)) for number in range(3)])


def columns(set_to: dict[str, Any]) -> Callable[[Path], Any]:
    """Columns of the first file otherwise; None: left out."""

    def make(folder: Path) -> None:
        write(folder, ONE)
        table = parquet.read_table(folder / PARQUET)
        kept = {name: table[name] for name in table.column_names if name not in set_to}
        made = {name: [value] * len(table) for name, value in set_to.items() if value is not None}
        parquet.write_table(pyarrow.table({**kept, **made}), folder / PARQUET)

    return make


def file(name: str, change: Callable[[bytes], bytes] | None, kind: Kind = ONE) -> Callable[[Path], Any]:
    """A file's bytes otherwise; None: it is missing."""

    def make(folder: Path) -> None:
        write(folder, kind)
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if change is not None:
            (folder / name).write_bytes(change(data))

    return make


def no_time(folder: Path) -> None:
    write(folder, MP4)
    path = folder / EPISODES
    notes = parquet.read_table(path).to_pylist()
    notes[1][f"videos/{CAMERA_KEYS[0][0]}/from_timestamp"] = float("nan")
    parquet.write_table(pyarrow.Table.from_pylist(notes), path)


def shorter_film(folder: Path) -> None:
    seen = write(folder, MP4, [episode(number, 128) for number in range(3)])
    film(folder / VIDEO, seen[0].images[:, 0], "libx264")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def quaternion(state: np.ndarray) -> np.ndarray:
    return np.hstack([state[:, :3], np.tile([1, 0, 0, 0], (len(state), 1)), state[:, 6:7]]).astype(np.float32)


def gripper(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda actions: np.hstack([actions[:, :6], np.full((len(actions), 1), value, np.float32)])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-such-folder": (lambda folder: None, "expected the folder of a LeRobot data set, found none; `hf download"),
    "hdf5": (hdf5, "info.json: not found; a LeRobot data set holds info.json"),
    "version-1": (lambda folder: write(folder, Kind(info={"codebase_version": "v1.6"})), "v3.0, found 'v1.6'"),
    "no-images": (features(observation_images_image=None), "expected LIBERO's layout: images of two cameras named"),
    "other-cameras": (lambda folder: write(folder, Kind(cameras=("cam_high", "cam_low"))), "Found cam_high image"),
    "joints": (features(observation_state={"dtype": "float32", "shape": [14]}), "state of 8 numbers. Found"),
    "no-state": (features(observation_state=None), "observation.state of 8 numbers. Found"),
    "two-arms": (features(action={"dtype": "float32", "shape": [14]}), "action of 7 numbers. Found"),
    "no-column": (columns({"observation.state": None}), "expected a parquet file with action, observation.state"),
    "no-picture-column": (columns({"observation.images.image": None}), "a parquet file with observation.images.image"),
    "pictures-empty": (
        columns({"observation.images.image": {"bytes": None, "path": "a.png"}}),
        "found the path 'a.png'",
    ),
    "pictures-broken": (
        columns({"observation.images.image": {"bytes": b"\x89PNG" * 9}}),
        "found 36 bytes that are none",
    ),
    "pictures-numbers": (
        columns({"observation.images.image": 3}),
        "the bytes of a picture in every observation.images",
    ),
    "task-unknown": (columns({"task_index": 7}), "expected one task of the 2 in its meta folder in episode 0, found"),
    "tasks-missing": (
        file("meta/tasks.parquet", None),
        "expected meta/tasks.parquet or meta/tasks.jsonl, found neither",
    ),
    "tasks-cut-off": (file("meta/tasks.parquet", half), "tasks.parquet: expected a parquet file, found"),
    "tasks-odd": (file("meta/tasks.jsonl", lambda _: b'{"task": 3}\n', Kind("v2.1")), "expected a number and an instr"),
    "parquet-cut-off": (file(PARQUET, half), "file-000.parquet: expected a parquet file with action"),
    "parquet-empty": (file(PARQUET, lambda _: b""), "file-000.parquet: expected a parquet file with action"),
    "video-missing": (file(VIDEO, None, MP4), "expected the video there, found none; download the videos too"),
    "video-cut-off": (file(VIDEO, half, MP4), "file-000.mp4: expected a video that FFmpeg can decode, found"),
    "video-empty": (file(VIDEO, lambda _: b"", MP4), "file-000.mp4: expected a video that FFmpeg can decode, found"),
    "video-pointer": (file(VIDEO, lambda _: b"version https://git-lfs", MP4), "a video that FFmpeg can decode, found"),
    "video-short": (shorter_film, "expected frames 24..53 for episode 1, found 0 of these 30; download it again"),
    "video-fps": (lambda folder: write(folder, replace(MP4, info={"fps": 0})), "expected fps from 1 to 1000000, found"),
    "video-other-fps": (lambda folder: write(folder, replace(MP4, info={"fps": 30})), "as 30 frames a second have it"),
    "episodes-missing": (file(EPISODES, None, MP4), "expected episode 0 in meta/epi"),
    "episodes-odd": (no_time, "file-000.parquet: expected where episode 1 is in the videos, found (1, 0, 0, nan)"),
    "quaternion": (written(ONE, state=quaternion), "found a quaternion in numbers 3 to 6; convert it"),
    "state-of-joints": (written(ONE, state=lambda state: state * 9), "axis-angle 3 (rad) and the gripper's two joint"),
    "degrees": (written(ONE, actions=lambda actions: actions * 90), "action: expected actions within +-1, LIBERO's"),
    "gripper-still": (written(ONE, actions=gripper(1.0)), "commands for the gripper in action"),
    "not-square": (
        written(ONE, images=lambda images: images[:, :, :, :48]),
        "expected square pictures in observation.im",
    ),
    "too-small": (
        lambda folder: write(folder, ONE),
        "expected pictures of at least 128 px in observation.images.image, found",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_on(
    case: str, tmp_path: Path, tokenizer: ActionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = BAD[case]
    make(tmp_path / "data")
    tokenizer.save(tmp_path)
    command = ["train", "policy", "--data", f"lerobot:{tmp_path / 'data'}", "--tokenizer", tmp_path]
    check([*command, "--output", tmp_path / "out", "--device", "cpu"], expected, tmp_path, capsys)


def test_turns_that_cannot_be_told_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [
        replace(episode(number), images=np.full((30, 2, 64, 64, 3), 90, np.uint8)[: len(episode(number).state)])
        for number in range(3)
    ]
    write(tmp_path, ONE, episodes)
    assert len(list(load_demonstrations(tmp_path))) == 3
    said = capsys.readouterr().err
    export(ExportConfig((tmp_path,), tmp_path / "own"))
    capsys.readouterr()
    back = list(load_demonstrations(tmp_path / "own"))  # an export says it itself
    assert np.array_equal(back[0].images, episodes[0].images)
    assert capsys.readouterr().err == ""
    assert re.search(
        r"^warning: .*observation.images.image and .*image2 stand could not be told; taken as upright", said
    )
