"""Demonstrations as OpenVLA reads them: its image pipeline up to the crop, its prompts, its state, in host memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd.data.demonstrations import Demonstration
from rsd.targets.openvla.images import crop, prepare_images
from rsd.targets.openvla.policy import RENDER_SIZE
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.statistics import Bounds
from rsd.training.dataset import Augmentation, Batch, FrameDataset, random_colour, random_shift
from rsd.training.policy import load_folders
from rsd.types import STATE_DIM, RsdError

IMAGES_A_JOB = 16


@dataclass(frozen=True)
class Survey:
    """What all folders hold together, read without images. frames: with images, by episode; states: theirs, float32
    [sum of frames, 8]."""

    frames: list[int]
    instructions: list[str]
    states: NDArray[np.float32]


def survey(folders: Iterable[Path]) -> Survey:
    everything = list(load_folders(folders, images=False))
    states = [demonstration.state[:: demonstration.image_every] for demonstration in everything]
    instructions = list(dict.fromkeys(demonstration.instruction for demonstration in everything))
    together = np.concatenate([np.zeros((0, STATE_DIM), np.float32), *states])
    return Survey(list(map(len, states)), instructions, together)


def pick(folders: Iterable[Path], numbers: Iterable[int]) -> Iterator[Demonstration]:
    """These demonstrations of all folders, one at a time: the images of a real data set fill a host's memory."""
    wanted = set(numbers)
    return (demonstration for number, demonstration in enumerate(load_folders(folders)) if number in wanted)


class OpenVlaFrames(FrameDataset):
    """`FrameDataset` with images uint8 [N, views, 224, 224, 3] on the host; batches go to `device`.

    A batch's state is [B, 19] and its words are [B, 32 + T], see `targets.openvla.target`. All prompts of a batch are
    of one length T: then no position is padded, in training as in decoding. Views: cameras that any reader needs.
    """

    def __init__(
        self,
        demonstrations: Iterable[Demonstration],
        horizon: int,
        device: torch.device,
        *,
        prompt: Prompt,
        bounds: Bounds,
        normalisation: tuple[Tensor, Tensor],
        center_crop: bool,
        views: int,
    ) -> None:
        raw: list[NDArray[np.float32]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            super().__init__(prepared(demonstrations, views, pool, raw), horizon, torch.device("cpu"))
        self.device, self.center_crop = device, center_crop
        self.mean, self.std = (value.to(device) for value in normalisation)
        given = torch.from_numpy(bounds.normalise(np.concatenate(raw))).float()
        self.state = torch.cat([given, self.state], dim=1)
        self.state_std = self.state.std(0)
        self.prompts = [torch.tensor(prompt.ids(text)) for text in self.instructions]
        self.length = torch.tensor([len(ids) for ids in self.prompts])[self.task]  # of each frame's prompt

    def _random(self, count: int) -> Tensor:
        """Frames of one prompt length, which is drawn as often as frames have it."""
        length = self.length[torch.randint(0, len(self), ())]
        alike = torch.nonzero(self.length == length).squeeze(1)
        return alike[torch.randint(0, len(alike), (count,))]

    def spread(self, most: int, size: int) -> list[Tensor]:
        (frames,) = super().spread(most, len(self))
        lengths = self.length[frames]
        return [part for length in lengths.unique() for part in frames[lengths == length].split(size)]

    def batch(self, frames: Tensor, paired: bool = False, augment: Augmentation | None = None) -> Batch:
        """As `FrameDataset.batch`; the crop takes the place of a shift's border: with `center_crop` it moves by up to
        augment.shift pixels (5 stay inside the image), without it the image itself is shifted."""
        images, state, task = self.images[frames].to(self.device), self.state[frames], self.task[frames]
        wording = torch.zeros_like(frames)
        if augment is not None:
            images = random_shift(images, augment.shift)
            wording = torch.randint(0, self.words.shape[1], frames.shape) * torch.randint(0, 2, frames.shape)
            state = state + augment.state_noise * self.state_std * torch.randn_like(state)
        pixels = images.permute(0, 1, 4, 2, 3).float()
        if self.center_crop:
            pixels = crop(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        pixels = pixels / 255.0
        if augment is not None:
            pixels = random_colour(pixels - 0.5, augment) + 0.5
        pixels = (pixels.repeat(1, 1, 2, 1, 1) - self.mean) / self.std
        prompts = torch.stack([self.prompts[index] for index in task.tolist()])
        words = torch.cat([self.words[task, wording], prompts], dim=1)
        state, words, chunk = (value.to(self.device) for value in (state, words, self.chunk[frames]))
        return Batch(pixels, state, words, chunk, paired)


def prepared(
    demonstrations: Iterable[Demonstration], views: int, pool: ThreadPoolExecutor, raw: list[NDArray[np.float32]]
) -> Iterator[Demonstration]:
    """Demonstrations with images of 224 px as the pipeline leaves them before the crop; their states go to `raw`."""
    for demonstration in demonstrations:
        images = demonstration.images
        if images is not None:
            if images.shape[2:4] != (RENDER_SIZE, RENDER_SIZE):
                raise RsdError(
                    f"{demonstration.source}: images of {images.shape[2]} x {images.shape[3]} px, OpenVLA's pipeline "
                    f"starts from {RENDER_SIZE}; render again with --image-size {RENDER_SIZE}"
                )
            flat = images[:, :views].reshape(-1, *images.shape[2:])
            parts = pool.map(resized, [flat[i : i + IMAGES_A_JOB] for i in range(0, len(flat), IMAGES_A_JOB)])
            small = np.concatenate(list(parts))
            demonstration = replace(demonstration, images=small.reshape(len(images), -1, *small.shape[1:]))
        raw.append(demonstration.state[:: demonstration.image_every])
        yield demonstration


def resized(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n, 256, 256, 3] -> [n, 224, 224, 3]: JPEG round trip and Lanczos-3."""
    return prepare_images(images, center_crop=False).permute(0, 2, 3, 1).byte().numpy()
