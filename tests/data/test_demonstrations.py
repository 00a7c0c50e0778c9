import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import h5py
import numpy as np
import pytest

from rsd.collection.workers import part_files
from rsd.conventions import rotate_180
from rsd.data.demonstrations import load_demonstrations
from rsd.data.schema import (
    FILE_SUFFIX,
    FORMAT_VERSION,
    DamagedFile,
    Episode,
    atomic_file,
    merge,
    open_file,
    write_episode,
)
from rsd.locks import exclusive
from rsd.types import RsdError

TASK = "pick_up_the_black_bowl_and_place_it_on_the_plate"
SENTENCE = "pick up the black bowl and place it on the plate"


def official_file(folder: Path, task: str = TASK, demos: int = 2, steps: int = 5) -> Path:
    """A file as LIBERO publishes them: no expert_actions, no rsd attributes, images unrotated."""
    rng = np.random.default_rng(0)
    path = folder / f"{task}{FILE_SUFFIX}"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "Pick the akita black bowl"})
        for index in range(demos):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = steps
            demo["actions"] = rng.uniform(-1, 1, (steps, 7))
            demo["states"] = rng.normal(size=(steps, 92))
            demo["rewards"] = demo["dones"] = np.eye(steps, dtype=np.uint8)[-1]
            obs = demo.create_group("obs")
            for key, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
                obs[key] = rng.normal(size=(steps, width))
            obs["ee_states"] = np.hstack([obs["ee_pos"][()], obs["ee_ori"][()]])
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                obs[key] = rng.integers(0, 256, (steps, 8, 8, 3), dtype=np.uint8)
    return path


def episode(index: int, steps: int = 6, images: bool = False) -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        index=index,
        actions=rng.uniform(-1, 1, (steps, 7)),
        expert_actions=rng.uniform(-1, 1, (steps, 7)),
        states=rng.normal(size=(steps, 92)),
        eef_pos=rng.normal(size=(steps, 3)),
        eef_quat=rng.normal(size=(steps, 4)),
        eef_axis_angle=rng.normal(size=(steps, 3)),
        gripper=rng.normal(size=(steps, 2)),
        joints=rng.normal(size=(steps, 7)),
        success_step=steps - 2,
        attributes={
            "placement_seed": 100 + index,
            "language_instruction": f"sentence {index}",
            "target_object": "bowl",
            "failed_tries": index,
        },
        body_pos=rng.normal(size=(38, 3)),
        body_quat=rng.normal(size=(38, 4)),
        images=rng.integers(0, 256, (steps, 2, 8, 8, 3), dtype=np.uint8) if images else None,
    )


def part(folder: Path, made: Episode) -> Path:
    path = folder / f"demo_{made.index}.hdf5"
    with atomic_file(path) as file:
        write_episode(file.create_group(f"demo_{made.index}"), made)
    return path


def own_file(folder: Path, indices: tuple[int, ...] = (0, 2, 10), images: bool = False) -> Path:
    path = folder / f"{TASK}{FILE_SUFFIX}"
    merge(path, [part(folder, episode(i, images=images)) for i in indices], {}, {"versions": {"rsd": "0.1.0"}})
    return path


def test_official_files_are_read_with_upright_images(tmp_path: Path) -> None:
    path = official_file(tmp_path)
    demos = list(load_demonstrations(tmp_path))
    assert [demo.episode for demo in demos] == ["demo_0", "demo_1"]
    demo = demos[1]
    with h5py.File(path) as file:
        stored = file["data/demo_1"]
        np.testing.assert_array_equal(demo.images[:, 0], rotate_180(stored["obs/agentview_rgb"][()]))
        np.testing.assert_array_equal(demo.images[:, 1], rotate_180(stored["obs/eye_in_hand_rgb"][()]))
        np.testing.assert_array_equal(demo.actions, stored["actions"][()].astype(np.float32))
        np.testing.assert_allclose(demo.state[:, :3], stored["obs/ee_pos"][()], rtol=1e-6)
        np.testing.assert_allclose(demo.state[:, 3:6], stored["obs/ee_ori"][()], rtol=1e-6)
        np.testing.assert_allclose(demo.state[:, 6:], stored["obs/gripper_states"][()], rtol=1e-6)
    np.testing.assert_array_equal(demo.labels, demo.actions)
    assert (demo.task, demo.instruction, demo.placement_seed) == (TASK, SENTENCE, -1)
    assert demo.images.shape == (5, 2, 8, 8, 3)
    assert demo.state.dtype == demo.actions.dtype == np.float32


def test_instruction_of_a_libero_100_scene_drops_the_scene(tmp_path: Path) -> None:
    official_file(tmp_path, task="KITCHEN_SCENE10_close_the_top_drawer", demos=1)
    (demo,) = load_demonstrations(tmp_path)
    assert demo.instruction == "close the top drawer"


@pytest.mark.parametrize("stored", [b"pick up the cup", np.bytes_(b"pick up the cup"), np.array([b"pick up the cup"])])
def test_an_instruction_stored_as_bytes_is_text(tmp_path: Path, stored: Any) -> None:
    path = official_file(tmp_path, demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["language_instruction"] = stored
        file["data/demo_0"].attrs["target_object"] = np.bytes_(b"cup")
    (demo,) = load_demonstrations(path)
    assert (demo.instruction, demo.target_object) == ("pick up the cup", "cup")


@pytest.mark.parametrize("stored", [np.bytes_(b"\xff\xfe"), 3, [1, 2]])
def test_an_instruction_that_is_no_text_is_refused(tmp_path: Path, stored: Any) -> None:
    path = official_file(tmp_path, demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["language_instruction"] = stored
    with pytest.raises(RsdError, match=r"demo_0 .*attribute language_instruction(: not readable| to be text)"):
        list(load_demonstrations(path))


def test_own_files_round_trip_in_numeric_order(tmp_path: Path) -> None:
    path = own_file(tmp_path, images=True)
    demos = list(load_demonstrations(path))
    assert [demo.episode for demo in demos] == ["demo_0", "demo_2", "demo_10"]
    for demo, index in zip(demos, (0, 2, 10), strict=True):
        made = episode(index, images=True)
        np.testing.assert_array_equal(demo.labels, made.expert_actions.astype(np.float32))
        np.testing.assert_array_equal(demo.actions, made.actions.astype(np.float32))
        np.testing.assert_array_equal(demo.images, rotate_180(made.images))
        assert (demo.instruction, demo.placement_seed, demo.success_step) == (f"sentence {index}", 100 + index, 4)
    with h5py.File(path) as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (3, 18)
        assert json.loads(data.attrs["rsd_provenance"])["failed_tries"] == 12
        np.testing.assert_array_equal(data["demo_2/states"][()], episode(2).states)
        np.testing.assert_array_equal(data["demo_2/rewards"][()], [0, 0, 0, 0, 1, 1])


def test_states_only_files_have_no_images_and_pixels_can_be_skipped(tmp_path: Path) -> None:
    own_file(tmp_path)
    assert all(demo.images is None for demo in load_demonstrations(tmp_path))
    own_file(tmp_path, images=True)
    assert all(demo.images is None for demo in load_demonstrations(tmp_path, images=False))
    assert len(list(load_demonstrations(tmp_path, max_per_task=2))) == 2


def test_merging_adds_replaces_and_keeps(tmp_path: Path) -> None:
    path = own_file(tmp_path, (0, 1))
    changed = part(tmp_path, episode(1, steps=9, images=True))
    assert merge(path, [changed, part(tmp_path, episode(5))], {}, {}) == 3
    demos = {demo.episode: demo for demo in load_demonstrations(path)}
    assert list(demos) == ["demo_0", "demo_1", "demo_5"]
    assert len(demos["demo_1"]) == 9
    assert demos["demo_1"].images is not None
    np.testing.assert_array_equal(demos["demo_0"].actions, episode(0).actions.astype(np.float32))


def test_a_damaged_part_is_named_and_the_file_stays_as_it_was(tmp_path: Path) -> None:
    path, good, bad = own_file(tmp_path, (0,)), part(tmp_path, episode(1)), part(tmp_path, episode(2))
    before, content = path.read_bytes(), bytearray(bad.read_bytes())
    with h5py.File(bad) as file:
        place = file["demo_2/actions"].id.get_offset()
    content[800:place] = b"\xa5" * (place - 800)
    bad.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"demo_2.hdf5, demo_2: not readable .* move it away"):
        merge(path, [good, bad], {}, {})
    assert path.read_bytes() == before
    assert good.exists()


def test_a_write_that_was_killed_leaves_nothing_once_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "demo_3.hdf5"
    code = f"""
import os
from pathlib import Path
from rsd.data.schema import atomic_file
with atomic_file(Path({str(path)!r})) as file:
    file.create_group("half")
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert part(tmp_path, episode(3)) == path
    assert list(tmp_path.iterdir()) == [path]


def delete(key: str) -> Callable[[h5py.Group], None]:
    def apply(demo: h5py.Group) -> None:
        del demo[key]

    return apply


def replace(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.Group], None]:
    def apply(demo: h5py.Group) -> None:
        value = change(demo[key][()])
        del demo[key]
        demo[key] = value

    return apply


def with_nan(array: np.ndarray) -> np.ndarray:
    array[-1, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete("actions"), "none of actions"),
        (delete("obs/ee_states"), "obs/ee_states"),
        (delete("obs/agentview_rgb"), "only eye_in_hand_rgb"),
        (replace("actions", lambda a: a[:-1]), r"expert_actions \[5, 7\] of real numbers, found float64 \[6, 7\]"),
        (replace("expert_actions", lambda a: a[:, :6]), r"expert_actions \[6, 7\]"),
        (replace("obs/ee_states", lambda a: a[:, :5]), r"ee_states \[6, 6\]"),
        (replace("actions", with_nan), "NaN"),
        (replace("expert_actions", with_nan), "NaN"),
        (replace("obs/agentview_rgb", lambda a: a[:-1]), r"uint8 \[6, S, S, 3\]"),
    ],
)
def test_damaged_demonstrations_are_refused(tmp_path: Path, damage: Callable[[h5py.Group], None], message: str) -> None:
    path = own_file(tmp_path, (0,), images=True)
    with h5py.File(path, "r+") as file:
        damage(file["data/demo_0"])
    with pytest.raises(RsdError, match=message):
        list(load_demonstrations(path))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = own_file(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RsdError, match="cut off or damaged"):
        list(load_demonstrations(path))


def test_a_file_in_use_or_without_permission_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = own_file(tmp_path), part(tmp_path, episode(5))
    faults = {
        "in use by another program": BlockingIOError(errno.EAGAIN, "unable to lock file, errno = 11"),
        "cannot be read .Permission denied.; see to its permissions": PermissionError(errno.EACCES, "unable to open"),
        "cannot be read .Input/output error.": OSError(errno.EIO, "read failed"),
    }
    for message, fault in faults.items():
        monkeypatch.setattr(h5py, "File", Mock(side_effect=fault))
        for read in (lambda: list(load_demonstrations(path)), lambda: part_files(tmp_path)):
            with pytest.raises(RsdError, match=message) as raised:
                read()
            assert "elete" not in str(raised.value)
    assert whole.exists()


def test_a_file_that_another_process_writes_is_in_use(tmp_path: Path) -> None:
    path = own_file(tmp_path)
    code = f"import h5py\nwith h5py.File({str(path)!r}, 'a'):\n    print(flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(RsdError, match="in use by another program"):
            list(load_demonstrations(path))
        writer.communicate(b"\n")
    assert len(list(load_demonstrations(path))) == 3


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = own_file(tmp_path)
    with h5py.File(path, "r+") as file:
        file["data"].attrs["rsd_provenance"] = json.dumps({"format_version": FORMAT_VERSION + 1})
    with pytest.raises(RsdError, match="format version"):
        list(load_demonstrations(path))


def test_an_empty_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="demos collect"):
        list(load_demonstrations(tmp_path))
    with h5py.File(tmp_path / f"empty{FILE_SUFFIX}", "w") as file:
        file.create_group("data")
    with pytest.raises(RsdError, match="no demonstration"):
        list(load_demonstrations(tmp_path))


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = own_file(tmp_path, (0,))
    before = path.read_bytes()

    def interrupted() -> None:
        with atomic_file(path) as file:
            file["half"] = np.zeros(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_damaged_parts_are_put_aside_to_be_made_again(tmp_path: Path) -> None:
    good, bad = part(tmp_path, episode(3)), part(tmp_path, episode(4))
    bad.write_bytes(bad.read_bytes()[:100])
    assert part_files(tmp_path) == [good]
    assert not bad.exists()
    assert bad.with_suffix(".damaged").stat().st_size == 100
    with open_file(good) as file:
        assert list(file) == ["demo_3"]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(RsdError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
