"""The image pipeline against what the published one, in TensorFlow, made of the same images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rsd.targets.openvla.images import jpeg_round_trip, prepare_images, resize

FIXTURES = dict(np.load(Path(__file__).parent.parent.parent / "fixtures" / "openvla" / "images.npz"))


def differing(found: torch.Tensor, published: np.ndarray) -> tuple[float, float]:
    """Largest difference in grey levels, share of numbers that differ at all."""
    difference = (found.permute(1, 2, 0).numpy() - published.astype(np.float32)).__abs__()
    return float(difference.max()), float((difference > 0).mean())


def test_the_jpeg_round_trip_is_bit_for_bit_tensorflows() -> None:
    np.testing.assert_array_equal(jpeg_round_trip(FIXTURES["input_256"])[::4, ::4], FIXTURES["jpeg_256"])


@pytest.mark.parametrize("size", [256, 128])
def test_the_whole_pipeline_is_off_by_one_level_in_a_few_numbers(size: int) -> None:
    (found,) = prepare_images(FIXTURES[f"input_{size}"][None])
    largest, share = differing(found, FIXTURES[f"output_{size}"])
    assert largest <= 1.0
    assert share < 2e-4  # of 150,528: two float32 products in another order, then rounded
    assert found.shape == (3, 224, 224)


def test_resizing_alone_and_without_a_crop() -> None:
    decoded = torch.from_numpy(jpeg_round_trip(FIXTURES["input_256"])).permute(2, 0, 1)[None].float()
    largest, share = differing(resize(decoded)[0][:, ::2, ::2], FIXTURES["resized_256"])
    assert (largest, share < 2e-4) <= (1.0, True)
    assert torch.equal(prepare_images(FIXTURES["input_256"][None], center_crop=False), resize(decoded))
