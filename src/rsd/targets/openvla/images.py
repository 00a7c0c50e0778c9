"""Camera images as OpenVLA's training saw them: JPEG round trip, Lanczos-3 to 224 px, centre crop of 0.9 of the area.

The published pipeline is written in TensorFlow. Here the two resamplings are matrix products, and the JPEG round trip
uses the same fast integer inverse transform as TensorFlow, which Pillow's and OpenCV's decoders do not: they are off
by 1.1 grey levels on average. Fixtures made by the published pipeline hold the two together (docs/openvla.md).
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rsd.extras import extra

with extra("openvla"):
    import simplejpeg

SIZE = 224  # pixels a side, what the vision towers read
CROP_AREA = 0.9
JPEG_QUALITY = 95  # TensorFlow's default
LANCZOS_RADIUS = 3


def tower_pixels(images: NDArray[np.uint8], mean: Tensor, std: Tensor, *, center_crop: bool = True) -> Tensor:
    """uint8 [n, S, S, 3] as rendered -> [n, 6, 224, 224], the same three channels normalised for either tower.

    mean, std: [6, 1, 1], on the device that the result is to be on."""
    return ((prepare_images(images, mean.device, center_crop=center_crop) / 255.0).repeat(1, 2, 1, 1) - mean) / std


def prepare_images(
    images: NDArray[np.uint8], device: torch.device | str = "cpu", *, center_crop: bool = True
) -> Tensor:
    """uint8 [n, S, S, 3] as rendered (upright) -> float32 [n, 3, 224, 224], whole numbers of 0..255, on `device`."""
    decoded = torch.from_numpy(np.stack([jpeg_round_trip(image) for image in images])).to(device)
    resized = resize(decoded.permute(0, 3, 1, 2).float())
    return crop(resized) if center_crop else resized


def jpeg_round_trip(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode [S, S, 3] as JPEG and decode: the demonstrations were stored so."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return simplejpeg.decode_jpeg(buffer.getvalue(), fastdct=True, fastupsample=False)


def resize(images: Tensor) -> Tensor:
    """[n, 3, H, W] of 0..255 -> [n, 3, 224, 224], Lanczos-3 with antialiasing, rounded."""
    rows, columns = (torch.from_numpy(lanczos_weights(side, SIZE)).to(images.device) for side in images.shape[2:])
    return (rows @ images @ columns.T).round().clamp(0, 255)


def crop(images: Tensor) -> Tensor:
    """The central 0.9 of the area, bilinearly back to the same size; truncated to integers as TensorFlow does."""
    rows, columns = (torch.from_numpy(crop_weights(side)).to(images.device) for side in images.shape[2:])
    fraction = (rows @ (images / 255.0) @ columns.T).clamp(0.0, 1.0)
    return (fraction * 255.5).floor().clamp(max=255.0)


@cache
def lanczos_weights(source: int, target: int) -> NDArray[np.float32]:
    """[target, source], each row summing to 1; pixel centres at halves, the kernel widened when shrinking."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * (source / target)
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / scale
    kernel = np.where(distance < LANCZOS_RADIUS, np.sinc(distance) * np.sinc(distance / LANCZOS_RADIUS), 0.0)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


@cache
def crop_weights(size: int) -> NDArray[np.float32]:
    """[size, size]: bilinear samples of the central sqrt(0.9) of an axis, first and last on the crop's edges."""
    side = np.sqrt(np.float32(CROP_AREA))
    first = np.float32((1 - side) / 2)
    positions = (first + np.linspace(0.0, 1.0, size) * side) * (size - 1)
    return np.maximum(1.0 - np.abs(np.arange(size) - positions[:, None]), 0.0).astype(np.float32)
