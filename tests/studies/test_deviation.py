"""What a deviation is measured on."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from refusals import check


def test_images_of_another_size_than_the_policys_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "open_it_demo.hdf5", "w") as file:
        for number in range(2):
            demonstration = file.create_group(f"data/demo_{number}")
            demonstration["actions"] = np.tile([0.1] * 6 + [-1.0], (20, 1))
            demonstration["obs/ee_states"], demonstration["obs/gripper_states"] = np.zeros((20, 6)), np.zeros((20, 2))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                demonstration[f"obs/{camera}"] = np.zeros((20, 64, 64, 3), np.uint8)
    command = ["study", "deviation", "--data", tmp_path / "data", "--policy", checkpoint, "--validation-every", "2"]
    check([*command, "--output", tmp_path / "out.json"], "32 x 32", tmp_path, capsys)
