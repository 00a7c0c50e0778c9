import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd.data.demonstrations import Demonstration, load_demonstrations
from rsd.data.paraphrase import SYNONYMS, paraphrases
from rsd.models.text import word_ids
from rsd.training.dataset import (
    WORDINGS,
    Augmentation,
    FrameDataset,
    chunk_targets,
    random_colour,
    random_shift,
)
from rsd.types import RsdError

STEPS = 24  # of each of conftest's episodes
CPU = torch.device("cpu")
SPATIAL = [
    f"pick up the black bowl {where} and place it on the plate"
    for where in (
        "between the plate and the ramekin",
        "from table center",
        "in the top drawer of the wooden cabinet",
        "next to the cookie box",
        "next to the plate",
        "next to the ramekin",
        "on the cookie box",
        "on the ramekin",
        "on the stove",
        "on the wooden cabinet",
    )
]


@pytest.fixture(scope="module")
def dataset(demonstrations: Path) -> FrameDataset:
    return FrameDataset(load_demonstrations(demonstrations), 8, CPU)


@given(st.integers(1, 30), st.integers(1, 10))
def test_chunk_targets_are_windows_that_repeat_the_last_label(steps: int, horizon: int) -> None:
    labels = np.random.default_rng(0).normal(size=(steps, 7)).astype(np.float32)
    chunks = chunk_targets(labels, horizon)
    assert chunks.shape == (steps, horizon, 7)
    padded = np.concatenate([labels, np.repeat(labels[-1:], horizon, axis=0)])
    for step in range(steps):
        assert np.array_equal(chunks[step], padded[step : step + horizon])


def test_frames_of_all_demonstrations_in_their_order(dataset: FrameDataset, demonstrations: Path) -> None:
    episodes = list(load_demonstrations(demonstrations))
    assert dataset.episodes == len(episodes) == 12
    assert len(dataset) == sum(len(episode) for episode in episodes)
    start = 0
    for episode in episodes:
        frames = torch.arange(start, start + len(episode))
        batch = dataset.batch(frames)
        assert episode.images is not None
        pixels = torch.from_numpy(episode.images).permute(0, 1, 4, 2, 3) / 255.0 - 0.5
        assert torch.equal(batch.images, pixels)
        assert torch.equal(batch.chunk, torch.from_numpy(chunk_targets(episode.labels, 8)))
        assert torch.equal(batch.words, word_ids([episode.instruction]).expand(len(episode), -1))
        assert torch.allclose(batch.state[:, :3], torch.from_numpy(episode.state[:, :3]))
        start += len(episode)


def test_augmentation_varies_words_images_and_state_and_no_target(dataset: FrameDataset) -> None:
    torch.manual_seed(0)
    frame = torch.zeros(400, dtype=torch.long)
    plain, batch = dataset.batch(frame), dataset.batch(frame, augment=Augmentation())
    assert torch.equal(batch.chunk, plain.chunk)
    assert batch.images.abs().max() <= 0.5
    assert (batch.images != batch.images[0]).any()
    noise = (batch.state - plain.state) / dataset.state_std.clamp_min(1e-9)
    moving = dataset.state_std > 1e-6
    assert noise[:, moving].std().item() == pytest.approx(0.02, rel=0.1)

    allowed = {tuple(row) for row in word_ids(paraphrases(dataset.instructions[0], WORDINGS)).tolist()}
    seen = [tuple(row) for row in batch.words.tolist()]
    assert set(seen) <= allowed
    assert len(set(seen)) > 20
    original = sum(row == tuple(plain.words[0].tolist()) for row in seen) / len(seen)
    assert 0.4 < original < 0.65


def test_demonstrations_without_images_or_none_at_all_are_refused(states_only: Path) -> None:
    with pytest.raises(RsdError, match=r"without images; run `rsd demos render`"):
        FrameDataset(load_demonstrations(states_only), 8, CPU)
    with pytest.raises(RsdError, match="found no demonstrations"):
        FrameDataset([], 8, CPU)


@pytest.mark.parametrize("text", ["lift " * 40, "lift the \u7897", "!"])
def test_an_instruction_that_cannot_be_read_is_told_with_its_demonstration(demonstrations: Path, text: str) -> None:
    everything = list(load_demonstrations(demonstrations))
    everything[1] = odd = replace(everything[1], instruction=text)
    where = re.escape(f"{odd.source}, {odd.episode}: instruction: expected ")
    with pytest.raises(RsdError, match=f"{where}.*; reword it, or leave that demonstration out"):
        FrameDataset(everything, 8, CPU)


def coordinates(batch: int, side: int) -> Tensor:
    """Images uint8 [B, 2, S, S, 3] whose pixels know their row, column and camera."""
    row, column = torch.arange(side)[:, None], torch.arange(side)[None]
    image = torch.stack([row.expand(side, side), column.expand(side, side), torch.zeros(side, side)], dim=-1)
    cameras = torch.stack([image, image])
    cameras[1, ..., 2] = 1
    return cameras.expand(batch, -1, -1, -1, -1).to(torch.uint8)


@pytest.mark.parametrize("pixels", [0, 1, 4])
def test_random_shift_moves_whole_images_and_repeats_their_borders(pixels: int) -> None:
    torch.manual_seed(0)
    side = 16
    images = coordinates(64, side)
    shifted = random_shift(images, pixels)
    assert shifted.dtype == torch.uint8
    assert shifted.shape == images.shape
    assert torch.equal(shifted[..., 2], images[..., 2])
    seen = []
    for image in shifted.flatten(0, 1):
        middle = side // 2
        down, right = int(image[middle, middle, 0]) - middle, int(image[middle, middle, 1]) - middle
        rows = (torch.arange(side) + down).clamp(0, side - 1)
        columns = (torch.arange(side) + right).clamp(0, side - 1)
        assert torch.equal(image[..., 0].long(), rows[:, None].expand(side, side))
        assert torch.equal(image[..., 1].long(), columns[None].expand(side, side))
        seen.append((down, right))
    assert {abs(offset) for pair in seen for offset in pair} == set(range(pixels + 1))
    if pixels:
        assert any(down != right for down, right in seen)
        assert any(first != second for first, second in zip(seen[::2], seen[1::2], strict=True))


def test_random_colour_stays_in_range_and_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(8, 2, 3, 4, 4) - 0.5
    changed = random_colour(pixels, Augmentation())
    assert changed.abs().max() <= 0.5
    assert (changed != pixels).float().mean() > 0.9
    none = Augmentation(brightness=0.0, contrast=0.0, colour=0.0)
    assert torch.equal(random_colour(pixels, none), pixels)


@pytest.mark.parametrize("instruction", [*SPATIAL, "open the middle drawer of the cabinet"])
@pytest.mark.parametrize("limit", [1, 7, WORDINGS])
def test_paraphrases_begin_with_the_original_and_differ(instruction: str, limit: int) -> None:
    texts = paraphrases(instruction, limit)
    assert texts[0] == instruction
    assert 1 <= len(texts) <= limit
    assert len(set(texts)) == len(texts)
    assert word_ids(texts).shape[0] == len(texts)


@pytest.mark.parametrize("instruction", SPATIAL)
def test_paraphrases_use_every_wording_of_every_phrase(instruction: str) -> None:
    texts = paraphrases(instruction, WORDINGS)
    assert len(texts) == WORDINGS
    for phrase, options in SYNONYMS:
        if phrase in instruction:
            assert all(any(option in text for text in texts[1:]) for option in options), phrase


def test_an_instruction_without_known_phrases_has_one_wording() -> None:
    assert paraphrases("open the drawer", WORDINGS) == ["open the drawer"]


def every_nth(folder: Path, n: int) -> list[Demonstration]:
    found = []
    for whole in load_demonstrations(folder):
        assert whole.images is not None
        found.append(replace(whole, images=whole.images[::n], image_every=n))
    return found


def test_frames_of_every_fourth_step_keep_every_action(demonstrations: Path, dataset: FrameDataset) -> None:
    sparse = FrameDataset(every_nth(demonstrations, 4), 8, CPU)
    kept = torch.cat([torch.arange(start, start + STEPS, 4) for start in range(0, len(dataset), STEPS)])
    assert len(sparse) == len(kept) == len(dataset) // 4
    for name in ("images", "state", "chunk", "task"):
        assert torch.equal(getattr(sparse, name), getattr(dataset, name)[kept]), name


@pytest.mark.parametrize(("every", "horizon"), [(1, 8), (4, 8), (1, 16), (4, 16)])
def test_pairs_lie_whole_chunks_apart_in_one_episode(demonstrations: Path, every: int, horizon: int) -> None:
    dataset = FrameDataset(every_nth(demonstrations, every), horizon, CPU, execute=8)  # chunks as they are executed
    assert dataset.batch(torch.arange(2)).chunk.shape == (2, horizon, 7)
    torch.manual_seed(0)
    frames, paired = dataset.draw(2000, 2)
    assert paired
    now, earlier = frames.chunk(2)
    rows = STEPS // every
    assert torch.equal(now // rows, earlier // rows)
    apart = (now - earlier) * every
    at_start = earlier % rows == 0
    assert set(apart[~at_start].tolist()) == {8, 16} if every == 1 else {8}
    assert (apart[at_start] <= 16).all()
    assert len(set(now.tolist())) > 0.9 * len(dataset)

    single, paired = dataset.draw(7)
    assert not paired
    assert len(single) == 7


@pytest.mark.parametrize(
    ("batch_size", "most_chunks", "shift", "said"),
    [
        (7, 2, 4, "--loop.batch-size 7: expected an even number"),
        (8, None, 32, "--augment.shift 32: expected 0 to 31 pixels"),
        (10**9, None, 4, r"--loop.batch-size 1000000000: its images alone need 24576.0 GB, the device has"),
    ],
)
def test_batches_that_cannot_be_are_refused_before_any_is_drawn(
    dataset: FrameDataset, batch_size: int, most_chunks: int | None, shift: int, said: str
) -> None:
    with pytest.raises(RsdError, match=said):
        dataset.check(batch_size, most_chunks, Augmentation(shift=shift))
    dataset.check(8, 2, Augmentation())


def test_frames_of_several_spacings_are_refused(demonstrations: Path) -> None:
    with pytest.raises(RsdError, match=r"a divisor of 8, found every 3; render again"):
        FrameDataset(every_nth(demonstrations, 3), 12, CPU, execute=8).check(8, 2, Augmentation())
    mixed = [*every_nth(demonstrations, 1), *every_nth(demonstrations, 2)]
    with pytest.raises(RsdError, match=r"every 2. step, others have every 1"):
        FrameDataset(mixed, 8, CPU)


@pytest.mark.parametrize("asking", [True, False])
def test_sentences_that_could_be_asked_are_kept_only_where_batches_ask(demonstrations: Path, asking: bool) -> None:
    asks = (("pick up the milk", "milk_1"),)
    found = [replace(each, asks=asks) for each in load_demonstrations(demonstrations)]
    dataset = FrameDataset(found, 8, CPU, asking=asking)
    assert ("pick up the milk" in dataset.instructions) is asking
    assert hasattr(dataset, "asks") is asking
    batch = dataset.draw_batch(4, 0, Augmentation(), asking)
    assert (batch.asked is not None) is asking
