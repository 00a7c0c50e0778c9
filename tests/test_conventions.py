import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from rsd.conventions import openvla_gripper_to_env, quat_to_axis_angle, rotate_180, state_vector
from rsd.types import RsdError

quaternions = hnp.arrays(np.float64, 4, elements=st.floats(-1.0, 1.0)).filter(lambda q: np.linalg.norm(q) > 0.1)


@given(hnp.arrays(np.uint8, st.tuples(st.just(2), st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_rotation_by_180_degrees_twice_is_none(images: np.ndarray) -> None:
    turned = rotate_180(images)
    assert turned.flags.c_contiguous
    assert np.array_equal(turned, np.rot90(images, 2, axes=(1, 2)))
    assert np.array_equal(rotate_180(turned), images)


@given(quaternions)
def test_axis_angle_is_the_rotation_of_the_quaternion(quat: np.ndarray) -> None:
    quat = quat / np.linalg.norm(quat)
    axis_angle = quat_to_axis_angle(quat)
    assert 0.0 <= np.linalg.norm(axis_angle) < 2 * np.pi + 1e-9
    found = Rotation.from_rotvec(axis_angle).as_matrix()
    assert np.allclose(found, Rotation.from_quat(quat).as_matrix(), atol=1e-3)


@pytest.mark.parametrize(
    ("quat", "expected"),
    [
        ((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0, 0.0), (np.pi, 0.0, 0.0)),
        ((0.0, 0.0, np.sin(0.2), np.cos(0.2)), (0.0, 0.0, 0.4)),
        # the antipode: w stays negative, the angle passes pi
        ((0.0, 0.0, -np.sin(0.2), -np.cos(0.2)), (0.0, 0.0, 0.4 - 2 * np.pi)),
        # a gripper that points down, from robosuite's own quat2axisangle
        ((0.9995, 0.0211, 0.0231, -0.0042), (3.14883, 0.06647, 0.07277)),
    ],
)
def test_known_axis_angles(quat: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert quat_to_axis_angle(np.array(quat)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("quat", [(0.0, 0.0, 1.0), (np.nan, 0.0, 0.0, 1.0), (0.0,) * 4, (2.0, 0.0, 0.0, 0.0)])
def test_odd_quaternions_are_refused(quat: tuple[float, ...]) -> None:
    with pytest.raises(RsdError, match="quaternion x, y, z, w: expected"):
        quat_to_axis_angle(np.array(quat))


def test_layout_of_the_state() -> None:
    state = state_vector(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0, 0.0]), np.array([0.04, -0.04]))
    assert state.dtype == np.float32
    assert state == pytest.approx([1.0, 2.0, 3.0, 0.0, np.pi, 0.0, 0.04, -0.04])


def test_sign_of_the_gripper() -> None:
    assert openvla_gripper_to_env(np.array([-5.0, 0.0, 0.4, 0.6, 1.0, 5.0])).tolist() == [1.0] * 3 + [-1.0] * 3
