"""What the visual drafter sees, remembers, and leaves alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsd import former
from rsd.models.bundle import RsdModel
from rsd.models.target import TargetConfig
from rsd.models.visual_drafter import VisualDrafter, VisualDrafterConfig
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError

LENGTH = 10  # of the target's prefix


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], RsdModel]) -> RsdModel:
    return make_model(5)


def inputs(model: RsdModel, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.rand(3, 2, 3, 32, 32) - 0.5, torch.randn(3, 11), torch.randn(3, 32)


def visual_of(model: RsdModel) -> VisualDrafter:
    assert model.visual_drafter is not None
    return model.visual_drafter


@torch.no_grad()
def test_every_input_and_the_memory_count(model: RsdModel) -> None:
    visual_drafter, (images, state, condition) = visual_of(model), inputs(model)
    _, cache = model.target.prefill(torch.randn(3, LENGTH, 64))
    memory = visual_drafter.remember(visual_drafter.reads(cache, LENGTH + 8))
    base = visual_drafter.perceive(images, state, condition, memory)
    assert base.shape == (3, 8, 32)
    _, other = model.target.prefill(torch.randn(3, LENGTH, 64))
    changed = [
        visual_drafter.perceive(images.flip(-1), state, condition, memory),
        visual_drafter.perceive(images, state + 1.0, condition, memory),
        visual_drafter.perceive(images, state, condition + 1.0, memory),
        visual_drafter.perceive(
            images, state, condition, visual_drafter.remember(visual_drafter.reads(other, LENGTH + 8))
        ),
        visual_drafter.perceive(images, state, condition, None),
    ]
    assert all(not torch.allclose(base, features, atol=1e-4) for features in changed)


@torch.no_grad()
def test_an_unknown_memory_is_none(model: RsdModel) -> None:
    """As at an episode's start, which training knows as a mask and decoding as an empty cache."""
    visual_drafter, (images, state, condition) = visual_of(model), inputs(model)
    _, cache = model.target.prefill(torch.randn(3, LENGTH, 64))
    memory = visual_drafter.remember(visual_drafter.reads(cache, LENGTH + 8))
    known = torch.tensor([True, False, True])
    mixed = visual_drafter.perceive(images, state, condition, memory, known)
    without, with_ = (
        visual_drafter.perceive(images, state, condition, None),
        visual_drafter.perceive(images, state, condition, memory),
    )
    assert torch.allclose(mixed[1], without[1], atol=1e-5)
    assert torch.allclose(mixed[[0, 2]], with_[[0, 2]], atol=1e-5)


@torch.no_grad()
def test_perceiving_leaves_the_memory_as_it_was(model: RsdModel) -> None:
    visual_drafter, seen = visual_of(model), inputs(model)
    _, cache = model.target.prefill(torch.randn(3, LENGTH, 64))
    memory = visual_drafter.remember(visual_drafter.reads(cache, LENGTH + 8))
    first = visual_drafter.perceive(*seen, memory)
    assert memory.keys[0].shape[2] == LENGTH + 8
    assert torch.equal(visual_drafter.perceive(*seen, memory), first)


@torch.no_grad()
def test_blocks_after_the_first_are_not_remembered(model: RsdModel) -> None:
    """The memory after a fused pass is that of a plain prefill: the drafted blocks lie behind it."""
    visual_drafter, prefix = visual_of(model), torch.randn(2, LENGTH, 64)
    gripper = torch.zeros(2, 8, dtype=torch.long)
    _, plain = model.target.prefill(prefix)
    _, fused = model.target.prefill_blocks(prefix, [torch.randn(2, 48), torch.randn(2, 48)], gripper)
    memories = [visual_drafter.remember(visual_drafter.reads(cache, LENGTH + 8)) for cache in (plain, fused)]
    pairs = zip(*(memory.values for memory in memories), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_images_have_to_shrink_to_whole_patches() -> None:
    with pytest.raises(RsdError, match="expected an image size that is a multiple of 16 x 3, found 32"):
        VisualDrafter(VisualDrafterConfig(shrink=3), RfsqConfig(), 8, 6, TargetConfig(image_size=32))


@pytest.mark.parametrize("shrink", [1, 2, 3])
def test_a_first_convolution_of_averaged_pixels_is_spread_over_the_pixels(shrink: int) -> None:
    drafter = VisualDrafter(VisualDrafterConfig(shrink=shrink), RfsqConfig(), 8, 6, TargetConfig(image_size=96))
    images, of_averages, stem = torch.rand(2, 3, 96, 96), torch.randn(16, 3, 5, 5), drafter.cameras[0].stem
    spread = former.stem(of_averages, stem.weight)
    assert spread.shape == stem.weight.shape
    seen = F.conv2d(F.avg_pool2d(images, shrink), of_averages, stride=2, padding=2)
    torch.testing.assert_close(F.conv2d(images, spread, stride=stem.stride, padding=stem.padding), seen)
    assert former.stem(of_averages, torch.empty(16, 4, 5, 5)) is of_averages
