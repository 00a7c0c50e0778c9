"""Demonstration frames resident on the training device: batches are gathered, shifted and coloured there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsd.data.demonstrations import Demonstration
from rsd.data.paraphrase import paraphrases
from rsd.data.schema import check_actions
from rsd.models.target import state_features
from rsd.models.text import word_ids
from rsd.models.vision import unit_images
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import Augmentation
from rsd.types import RsdError

MOST_BEYOND = 10  # times a tokenizer's range: actions without a limit that lie further out are in other units
MOST_ASKED = 12  # sentences that a frame is kept with
WORDINGS = 32  # per instruction, sampled anew for every frame


@dataclass(frozen=True)
class Batch:
    """images [B, 2, 3, S, S] in [-0.5, 0.5]; state features [B, 11]; words int [B, 32]; chunk [B, H, 7].

    paired: row i + B/2 is an earlier moment of row i's episode, for i < B/2.
    asked: words int [B/2, 32] of another sentence for the frames of the even rows, with where what it asks for is seen,
    spot [B/2, 2], NaN where that is not known.
    execute: how many of the H steps are executed.
    episode: int [B], which episode each row is of; None where nobody asks.
    done: what was executed of the H steps, float32 [B, H, 7]: the expert's own, or a driver's; None likewise.
    told: bool [B], rows whose state says what is committed of their chunk (`losses.with_committed`).
    """

    images: Tensor
    state: Tensor
    words: Tensor
    chunk: Tensor
    paired: bool = False
    asked: tuple[Tensor, Tensor] | None = None
    execute: int | None = None
    episode: Tensor | None = None
    done: Tensor | None = None
    told: Tensor | None = None


class FrameDataset:
    """All frames of some demonstrations: images uint8 [N, 2, S, S, 3], states, chunks, instructions.

    Where only every n-th step was rendered, these are the frames; a chunk has every step's action all the same."""

    def __init__(
        self,
        demonstrations: Iterable[Demonstration],
        horizon: int,
        device: torch.device,
        image_size: int = 0,
        execute: int | None = None,
        asking: bool = True,
        paired: bool = True,
    ) -> None:
        """image_size: side in pixels that every image must have; 0: that of the first ones. execute: steps from one
        chunk of a rollout to the next; None: the horizon. asking: whether batches will be `asking`. paired: frames a
        chunk apart may be asked for, so all must be rendered with one spacing.

        Raises RsdError for a demonstration without images, or with others than that, or of other steps."""
        images, states, chunks, dones, tasks, asks, spots = [], [], [], [], [], [], []
        instructions, spacing, self.device = dict[str, int](), 0, device
        for demonstration in demonstrations:
            if demonstration.images is None:
                raise RsdError(
                    f"{demonstration.source}: states only, without images; run `rsd demos render` on it first"
                )
            every, count = demonstration.image_every, len(demonstration.images)
            if paired and spacing not in (0, every):
                raise RsdError(
                    f"{demonstration.source}: images of every {every}. step, others have every {spacing}.; "
                    "train on folders rendered with one --every"
                )
            spacing = every
            height, width = demonstration.images.shape[2:4]
            image_size = image_size or height
            if (height, width) != (image_size, image_size):
                raise RsdError(
                    f"{demonstration.source}, {demonstration.episode}: images of {height} x {width} px, expected "
                    f"{image_size} x {image_size} as the model or the demonstrations before have them; "
                    f"render again with --image-size {image_size}"
                )
            images.append(torch.from_numpy(demonstration.images).to(device))
            states.append(demonstration.state[::every])
            chunks.append(chunk_targets(demonstration.labels, horizon)[::every])
            dones.append(chunk_targets(demonstration.actions, horizon)[::every])
            index = numbered(demonstration.instruction, demonstration, instructions)
            tasks.append(index)
            if asking:
                numbers = [numbered(sentence, demonstration, instructions) for sentence, _ in demonstration.asks]
                asks.append(np.tile(np.resize(numbers or [index], MOST_ASKED), (count, 1)))
                seen, spot = demonstration.spots, np.full((count, MOST_ASKED, 2), np.nan, np.float32)
                if seen is not None and seen.shape[1]:
                    spot = seen[:, np.resize(np.arange(seen.shape[1]), MOST_ASKED)]
                spots.append(spot)
        if not images:
            raise RsdError("training data: found no demonstrations; collect some with `rsd demos collect`")
        self.episodes = len(images)
        self.images = torch.cat(images)
        self.state = state_features(torch.from_numpy(np.concatenate(states)).to(device))
        self.state_std = self.state.std(0)
        self.chunk, self.done = (torch.from_numpy(np.concatenate(rows)).to(device) for rows in (chunks, dones))
        counts = torch.tensor([len(each) for each in images], device=device)
        self.task = torch.tensor(tasks, device=device).repeat_interleave(counts)
        self.first = (counts.cumsum(0) - counts).repeat_interleave(counts)  # of the frame's own episode
        self.episode = torch.arange(len(counts), device=device).repeat_interleave(counts)  # its number
        if asking:
            self.asks = torch.from_numpy(np.concatenate(asks)).to(device)  # instructions [N, MOST_ASKED], some repeated
            self.spots = torch.from_numpy(np.concatenate(spots)).to(device)  # of the things that they ask for
        self.execute, self.spacing = execute or horizon, spacing
        self.instructions = list(instructions)
        wordings = [paraphrases(text, WORDINGS) for text in self.instructions]
        rows = [(texts * WORDINGS)[:WORDINGS] for texts in wordings]
        self.words = torch.stack([word_ids(row) for row in rows]).to(device)  # [instructions, WORDINGS, 32]

    def __len__(self) -> int:
        return len(self.state)

    def check(self, batch_size: int, most_chunks: int | None, augment: Augmentation) -> None:
        """`RsdError` for what `draw` and `batch` cannot do, before anything is trained. most_chunks: None where no
        pairs of frames are to be drawn."""
        side = self.images.shape[2]
        if augment.shift >= side:
            raise RsdError(f"--augment.shift {augment.shift}: expected 0 to {side - 1} pixels of images of {side}")
        if most_chunks is not None:
            if batch_size % 2:
                raise RsdError(f"--loop.batch-size {batch_size}: expected an even number, half of it is remembered")
            self.earlier(torch.zeros(1, dtype=torch.long, device=self.first.device), most_chunks)
        needed, there = 4 * batch_size * self.images[0].numel(), memory_bytes(self.device)
        if needed > there:
            found = f"its images alone need {needed / 1e9:.1f} GB, the device has {there / 1e9:.1f} GB"
            raise RsdError(f"--loop.batch-size {batch_size}: {found}; take a smaller one with --loop.accumulate")

    def draw(self, count: int, most_chunks: int = 0) -> tuple[Tensor, bool]:
        """`count` random frames; with most_chunks > 0 the second half of them lie 1 to most_chunks chunks before the
        first half's (or at their episode's start): what a draft may remember. -> frames int [count], paired."""
        if most_chunks == 0:
            return self._random(count), False
        now = self._random(count // 2)
        chunks = torch.randint(1, most_chunks + 1, now.shape, device=now.device)
        return torch.cat([now, self.earlier(now, chunks)]), True

    def draw_batch(self, count: int, most_chunks: int, augment: Augmentation, asking: bool = False) -> Batch:
        """A batch of frames drawn at random, see `draw`."""
        return self.batch(*self.draw(count, most_chunks), augment=augment, asking=asking)

    def _random(self, count: int) -> Tensor:
        return torch.randint(0, len(self), (count,), device=self.first.device)

    def spread(self, most: int, size: int) -> list[Tensor]:
        """At most `most` frames, evenly over all, in batches of at most `size`: what a validation looks at."""
        count = min(most, len(self))
        return list(torch.linspace(0, len(self) - 1, count, device=self.first.device).long().split(size))

    def earlier(self, frames: Tensor, chunks: Tensor | int) -> Tensor:
        """The frames so many chunks before, or the first of their episodes."""
        if self.execute % self.spacing:
            raise RsdError(
                f"frames a chunk apart: expected images of every n-th step with n a divisor of {self.execute}, "
                f"found every {self.spacing}; render again with another --every"
            )
        return torch.maximum(frames - chunks * (self.execute // self.spacing), self.first[frames])

    def batch(
        self, frames: Tensor, paired: bool = False, augment: Augmentation | None = None, asking: bool = False
    ) -> Batch:
        """frames int [B] (see `draw`) -> a batch; without `augment` the images as they are and the original wording;
        asking: with `asked`."""
        images, state, wording = self.images[frames].to(self.device), self.state[frames], torch.zeros_like(frames)
        if augment is not None:
            images = random_shift(images, augment.shift)
            # half the time the original sentence, which is what the benchmark says
            wording = torch.randint(0, WORDINGS, frames.shape, device=frames.device)
            wording *= torch.randint(0, 2, frames.shape, device=frames.device)
        pixels = self._pixels(images, augment)
        if augment is not None:
            state = state + augment.state_noise * self.state_std * torch.randn_like(state)
        asked = None
        if asking:
            even = frames[::2]
            which = torch.randint(0, MOST_ASKED, even.shape, device=frames.device)
            asked = self.words[self.asks[even, which], wording[::2]], self.spots[even, which]
        known = state, self._words(self.task[frames], wording), self.chunk[frames], self.episode[frames]
        state, words, chunk, episode, done = (value.to(self.device) for value in (*known, self.done[frames]))
        return Batch(pixels, state, words, chunk, paired, asked, self.execute, episode, done)

    def _pixels(self, images: Tensor, augment: Augmentation | None) -> Tensor:
        """uint8 [B, 2, S, S, 3], shifted, -> as a batch has them."""
        pixels = unit_images(images)
        return pixels if augment is None else random_colour(pixels, augment)

    def _words(self, task: Tensor, wording: Tensor) -> Tensor:
        """Instructions and wordings of them, int [B] each -> as a batch has them."""
        return self.words[task, wording]


def held_against(tokenizer: ActionTokenizer, demonstrations: Iterable[Demonstration]) -> Iterator[Demonstration]:
    """The demonstrations; `RsdError` for labels that the code could only clip, and gripper symbols it would guess."""
    tokenizer, limit = tokenizer.to("cpu"), tokenizer.config.limit
    motion, centre, scale = (value.numpy() for value in (tokenizer.motion_index, tokenizer.centre, tokenizer.scale))
    whose = f"+-{limit:g}, the tokenizer's limit" if limit else f"{MOST_BEYOND} times the tokenizer's range"
    binary = tokenizer.binary_index.tolist()
    pairs = list(zip(tokenizer.binary_low.tolist(), tokenizer.binary_high.tolist(), strict=True))
    remedy = "they are in other units, or need a tokenizer of their own (rsd tokenizer fit)"
    for demonstration in demonstrations:
        labels, where = demonstration.labels, f"{demonstration.source}, {demonstration.episode}"
        if labels.shape[1] != tokenizer.action_dim:
            found = f"{tokenizer.action_dim} numbers an action, found {labels.shape[1]}"
            raise RsdError(f"{where}: expected {found}; {remedy}")
        size = labels[:, motion] if limit else (labels[:, motion] - centre) / scale
        held = {dimension: (labels[:, dimension], pair) for dimension, pair in zip(binary, pairs, strict=True)}
        check_actions(where, size, limit or MOST_BEYOND, whose, held, remedy)
        yield demonstration


def numbered(text: str, demonstration: Demonstration, known: dict[str, int]) -> int:
    """An instruction's number among those that are known, which it joins; `RsdError` where it cannot be read."""
    if text not in known:
        try:
            word_ids([text])
        except RsdError as error:
            where = f"{demonstration.source}, {demonstration.episode}"
            raise RsdError(f"{where}: {error}; reword it, or leave that demonstration out") from None
    return known.setdefault(text, len(known))


def memory_bytes(device: torch.device) -> int:
    """All the memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def chunk_targets(labels: np.ndarray, horizon: int) -> np.ndarray:
    """labels [T, A] -> [T, H, A]: the next H labels of every step, the last one repeated past the end."""
    steps = np.minimum(np.arange(len(labels))[:, None] + np.arange(horizon), len(labels) - 1)
    return labels[steps].astype(np.float32)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """uint8 [B, 2, S, S, 3] shifted by up to `pixels` each way, every image on its own, borders repeated."""
    batch, cameras, side = images.shape[:3]
    device = images.device
    offset = torch.randint(-pixels, pixels + 1, (2, batch, cameras, 1), device=device)
    rows, columns = (torch.arange(side, device=device) + offset).clamp(0, side - 1)  # each [B, 2, S]
    b = torch.arange(batch, device=device)[:, None, None, None]
    c = torch.arange(cameras, device=device)[None, :, None, None]
    return images[b, c, rows[..., :, None], columns[..., None, :]]


def random_colour(pixels: Tensor, augment: Augmentation) -> Tensor:
    """[B, 2, 3, S, S] in [-0.5, 0.5]: brightness and contrast by image, a tint by channel."""

    def uniform(channels: int) -> Tensor:
        return torch.rand(*pixels.shape[:2], channels, 1, 1, device=pixels.device) * 2 - 1

    gain = (1 + augment.contrast * uniform(1)) * (1 + augment.colour * uniform(3))
    return (pixels * gain + augment.brightness * uniform(1)).clamp(-0.5, 0.5)
