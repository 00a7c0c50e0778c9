"""A folder of small demonstrations in LIBERO's HDF5 layout, with a task that is easy to learn."""

from pathlib import Path

import h5py
import numpy as np
import pytest

SIZE, EPISODES, STEPS = 32, 6, 24
INSTRUCTIONS = ("pick up the black bowl next to the ramekin", "open the drawer")


def write_demonstrations(path: Path, instruction: str, episodes: int, size: int, seed: int) -> None:
    """Actions follow from the state, the cameras show the episode's place as brightness."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for episode in range(episodes):
            place = rng.uniform(-0.5, 0.5)
            time = np.linspace(0.0, 1.0, STEPS)[:, None]
            motion = np.hstack([place * np.cos((k + 1) * time) for k in range(6)])
            gripper = np.where(time < 0.5, -1.0, 1.0)
            group = data.create_group(f"demo_{episode}")
            group.attrs["language_instruction"] = instruction
            group.create_dataset("actions", data=np.hstack([motion, gripper]))
            group.create_dataset("obs/ee_states", data=np.hstack([motion, time])[:, :6])
            group.create_dataset("obs/gripper_states", data=np.hstack([time, -time]))
            if size:
                images = np.full((STEPS, size, size, 3), 128 + 200 * place).astype(np.uint8)
                images[:, 0, 0] = np.arange(STEPS)[:, None]
                group.create_dataset("obs/agentview_rgb", data=images)
                group.create_dataset("obs/eye_in_hand_rgb", data=255 - images)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    for index, instruction in enumerate(INSTRUCTIONS):
        write_demonstrations(folder / f"task{index}_demo.hdf5", instruction, EPISODES, SIZE, index)
    return folder


@pytest.fixture(scope="session")
def states_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states_only")
    write_demonstrations(folder / "task_demo.hdf5", INSTRUCTIONS[0], EPISODES, 0, 0)
    return folder


@pytest.fixture(scope="session")
def openvla_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenVLA's pipeline wants them: 256 px."""
    folder = tmp_path_factory.mktemp("openvla_demonstrations")
    for index, instruction in enumerate(INSTRUCTIONS):
        write_demonstrations(folder / f"task{index}_demo.hdf5", instruction, 2, 256, index)
    return folder
