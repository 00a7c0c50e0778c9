"""Every convention that moves a LIBERO number, in one place: rotation, camera order, state layout, gripper sign.

Sources: OpenVLA-OFT's LIBERO evaluation (rotation, state, gripper, limits) and robosuite 1.4.0 (quaternions xyzw).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsd.checks import check_shape
from rsd.types import RsdError, real_array

CONTROL_HZ = 20  # actions a second, in LIBERO's demonstrations and its simulator
CHUNK_SIZE = 8  # steps predicted and executed open loop; a policy of longer chunks has a tail (`ActionChunk`)
WAIT_STEPS = 10  # objects settle before the policy starts
WAIT_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # no motion, gripper open
REPLAN_STEPS = 5  # actions that openpi's client executes of each answer
MAX_STEPS = {  # after the wait steps
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0
# an action of 1.0 moves the goal of LIBERO's controller, robosuite's OSC_POSE, by this much in one step
ACTION_METRES, ACTION_RADIANS = 0.05, 0.5


def rotate_180(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., H, W, C] as the simulator renders it -> upright, as every OpenVLA-family policy saw it in training."""
    image = np.asarray(image)
    check_shape("image", image.shape, (..., "H", "W", "C"))
    return np.ascontiguousarray(image[..., ::-1, ::-1, :])


def shrunk(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [n, S, S, 3] -> [n, size, size, 3]: each pixel is the mean of what it covers."""
    if images.shape[1] == size:
        return np.ascontiguousarray(images)
    views = [Image.fromarray(view).resize((size, size), Image.Resampling.BOX) for view in images]
    return np.stack([np.asarray(view) for view in views])


def quat_to_axis_angle(quat: NDArray[np.floating]) -> NDArray[np.float64]:
    """Unit quaternion (x, y, z, w) -> axis times angle, angle in [0, 2 pi).

    robosuite's convention, which the published policies were trained on: w is NOT made positive first, so q and -q
    give different vectors. Making it positive has moved published success rates by 14 to 40 points.
    """
    quat = real_array("quaternion x, y, z, w", quat, "float64", (4,))
    # robosuite takes sqrt(1 - w * w) and arccos(w): the same number, but lost to rounding where w is near +-1
    sine = np.linalg.norm(quat[:3])
    if not 0.9 < np.linalg.norm(quat) < 1.1:
        raise RsdError(f"quaternion x, y, z, w: expected one of length 1, found {np.round(quat, 4).tolist()}")
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return quat[:3] * (2.0 * np.arctan2(sine, quat[3]) / sine)


def state_vector(
    eef_pos: NDArray[np.floating], eef_quat: NDArray[np.floating], gripper_qpos: NDArray[np.floating]
) -> NDArray[np.float32]:
    """robosuite observables -> the 8-d state: position 3 (m), axis-angle 3 (rad), gripper joints 2 (m)."""
    position, gripper = real_array("position", eef_pos, shape=(3,)), real_array("gripper", gripper_qpos, shape=(2,))
    return real_array("state", np.concatenate([position, quat_to_axis_angle(eef_quat), gripper]))


def openvla_gripper_to_env(gripper: NDArray[np.floating]) -> NDArray[np.floating]:
    """OpenVLA checkpoints: [0, 1] with 1 = open -> environment: -1 = open, +1 = close; beyond [0, 1] its end."""
    real_array("gripper", gripper, "float64")
    return -np.sign(2.0 * np.asarray(gripper) - 1.0)
