"""Data sets in both directions: LeRobot's loader opens our export, and we read what LeRobot's own code has written."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features

from lerobot_data import FPS, SIDE, episode
from lerobot_policy_rsd.hosted import HostedPolicy
from rsd.data.demonstrations import load_demonstrations
from rsd.data.lerobot_export import ExportConfig, export
from rsd.data.lerobot_libero import WORDS
from rsd.types import Observation
from rsd.words import word_flags

TRAINER = Path(__file__).parents[2] / "scripts/lerobot_train.py"
KEYS = ("observation.images.image", "observation.images.image2")
EPISODES = [episode(number) for number in range(3)]
MOST_OFF = {"image": 1e-9, "png": 1e-9, "video": 4, "mp4": 4}  # grey levels in the mean


def pixels(image: torch.Tensor) -> np.ndarray:
    """LeRobot's float [3, S, S] -> uint8 [S, S, 3]."""
    return (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def hdf5(folder: Path) -> Path:
    folder.mkdir()
    for number, seen in enumerate(EPISODES):
        with h5py.File(folder / f"task_{number}_demo.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo.attrs["language_instruction"] = seen.task
            demo["actions"], demo["expert_actions"] = seen.actions * np.float32(0.5), seen.actions
            demo["obs/ee_states"], demo["obs/gripper_states"] = seen.state[:, :6], seen.state[:, 6:]
            for index, key in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                demo[f"obs/{key}"] = seen.images[:, index, ::-1, ::-1]
    return folder


@pytest.mark.parametrize("images", ["png", "mp4"])
def test_lerobots_loader_opens_an_export(images: Literal["png", "mp4"], tmp_path: Path) -> None:
    output = export(ExportConfig((hdf5(tmp_path / "hdf5"),), tmp_path / "lerobot", images=images, words=True))
    # torchcodec, the loader's default, wants the system's FFmpeg
    found = LeRobotDataset("local", root=output, video_backend="pyav")
    assert (found.num_episodes, found.num_frames, found.fps) == (3, sum(len(each.state) for each in EPISODES), FPS)
    frame = 0
    for seen in EPISODES:
        for step in range(len(seen.state)):
            item = found[frame]
            frame += 1
            if step % 5 == 0:
                np.testing.assert_array_equal(item["observation.state"].numpy(), seen.state[step])
                np.testing.assert_array_equal(item["action"].numpy(), seen.actions[step])
                np.testing.assert_array_equal(item["executed_action"].numpy(), seen.actions[step] / 2)
                np.testing.assert_array_equal(item[WORDS].numpy(), word_flags(seen.task))
                assert item["task"] == seen.task
                off = [abs(pixels(item[key]).astype(int) - seen.images[step, i]).mean() for i, key in enumerate(KEYS)]
                assert max(off) < MOST_OFF[images]
    features = dataset_to_policy_features(found.features)
    assert set(features) == {*KEYS, "observation.state", WORDS, "action"}  # what was executed is no input
    assert features[WORDS].type is FeatureType.ENV  # ACT and diffusion take it
    assert features[KEYS[0]].shape == (3, SIDE, SIDE)
    states = np.concatenate([seen.state for seen in EPISODES])
    np.testing.assert_allclose(found.meta.stats["observation.state"]["mean"], states.mean(0), atol=1e-5)
    assert found.meta.stats[KEYS[0]]["q99"].shape == (3, 1, 1)
    chunks = LeRobotDataset(
        "local", root=output, video_backend="pyav", delta_timestamps={"action": [step / FPS for step in range(8)]}
    )
    assert chunks[3]["action"].shape == (8, 7)


def written_by_lerobot(root: Path, kind: str, turn: Any) -> None:
    picture = {"dtype": kind, "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "names": None}
    features = {**dict.fromkeys(KEYS, picture), "observation.state": {**vector, "shape": (8,)}}
    made = LeRobotDataset.create(
        "local", FPS, {**features, "action": {**vector, "shape": (7,)}}, root=root, use_videos=kind == "video"
    )
    for seen in EPISODES:
        for step in range(len(seen.state)):
            views = {key: turn(seen.images[step, index]) for index, key in enumerate(KEYS)}
            numbers = {"observation.state": seen.state[step], "action": seen.actions[step]}
            made.add_frame({**views, **numbers, "task": seen.task})
        made.save_episode()
    made.finalize()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("turned", [False, True])
def test_what_lerobot_has_written_is_read(kind: str, turned: bool, tmp_path: Path) -> None:
    written_by_lerobot(tmp_path / "set", kind, lambda image: image[::-1, ::-1].copy() if turned else image)
    found = list(load_demonstrations(f"lerobot:{tmp_path / 'set'}"))
    for demo, seen in zip(found, EPISODES, strict=True):
        np.testing.assert_array_equal(demo.state, seen.state)
        np.testing.assert_array_equal(demo.labels, seen.actions)
        assert demo.instruction == seen.task
        assert demo.images is not None
        assert abs(demo.images.astype(int) - seen.images).mean() < MOST_OFF[kind]


def test_a_sample_in_memory_is_lerobots_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TRAINER.parent)
    keep: Callable[[LeRobotDataset], LeRobotDataset] = importlib.import_module(TRAINER.stem).keep
    data = export(ExportConfig((hdf5(tmp_path / "hdf5"),), tmp_path / "lerobot", words=True))
    ahead = {"action": [step / FPS for step in range(16)]}
    own, kept = (LeRobotDataset("local", root=data, delta_timestamps=ahead) for _ in range(2))
    kept = keep(kept)
    assert len(kept) == len(own)
    for index in range(len(own)):
        before, after = own[index], kept[index]
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(after[key], value, rtol=0, atol=0)
            else:
                assert after[key] == value


@pytest.mark.parametrize("trainer", [["-m", "lerobot.scripts.lerobot_train"], [str(TRAINER)]], ids=["own", "memory"])
def test_lerobots_trainer_takes_an_export_and_rsd_its_policy(trainer: list[str], tmp_path: Path) -> None:
    data = export(ExportConfig((hdf5(tmp_path / "hdf5"),), tmp_path / "lerobot", words=True))
    small = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "use_vae": "false"}
    options = {"chunk_size": 12, "n_action_steps": 6, "pretrained_backbone_weights": "null", **small}
    policy = {"type": "act", "device": "cpu", "push_to_hub": "false", **options}
    run = {"dataset.repo_id": "local", "dataset.root": data, "output_dir": tmp_path / "run", "steps": 1}
    run |= {"batch_size": 2, "num_workers": 0, **{f"policy.{key}": value for key, value in policy.items()}}
    line = [sys.executable, *trainer, *(f"--{key}={value}" for key, value in run.items())]
    subprocess.run(line, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    trained = HostedPolicy(str(tmp_path / "run/checkpoints/last/pretrained_model"), "cpu")
    seen = EPISODES[0]
    (chunk,), _, _ = trained.predict([Observation(seen.images[0], seen.state[0], seen.task)], [None])
    assert (chunk.actions.shape, chunk.execute, trained.image_size) == ((12, 7), 6, SIDE)
