import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rsd.decoding.state import PolicyInput
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.models.target import STATE_FEATURES, TargetConfig, TargetModel, merged, state_features
from rsd.models.text import word_ids
from rsd.models.trunk import KVCache
from rsd.models.vision import Subsample, unit_images
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError

LEVELS, HORIZON, SCALARS = 8, 8, 48


@pytest.fixture(scope="module")
def target(make_model: Callable[[int], RsdModel]) -> TargetModel:
    return make_model(0).target


def blocks_of(seed: int, batch: int = 2) -> tuple[Tensor, list[Tensor], Tensor]:
    """Prefix tokens [B, 11, 64], prefixes of the blocks 2..L [B, P], gripper [B, H]."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randn(batch, 11, 64, generator=generator)
    prefixes = [torch.randn(batch, SCALARS, generator=generator) for _ in range(LEVELS - 1)]
    return prefix, prefixes, torch.randint(0, 2, (batch, HORIZON), generator=generator)


def full_pass(target: TargetModel, prefix: Tensor, prefixes: list[Tensor], gripper: Tensor) -> list[Tensor]:
    """Features of all blocks from one pass without a cache: causal across the groups, full within them."""
    nothing = torch.zeros(len(prefix), SCALARS)
    blocks = [target.block(nothing.unsqueeze(1), None, 1)]
    blocks += [target.block(p.unsqueeze(1), gripper, level) for level, p in enumerate(prefixes, start=2)]
    group = torch.cat([torch.zeros(prefix.shape[1]), torch.arange(1, LEVELS + 1).repeat_interleave(HORIZON)])
    mask = group[:, None] >= group[None, :]
    hidden = target.trunk(torch.cat([prefix, *blocks], dim=1), KVCache(), mask)
    return list(hidden[:, prefix.shape[1] :].split(HORIZON, dim=1))


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_level_by_level_equals_one_extend_equals_the_full_pass(target: TargetModel, seed: int) -> None:
    prefix, prefixes, gripper = blocks_of(seed)
    expected = full_pass(target, prefix, prefixes, gripper)

    first, cache = target.prefill(prefix)
    assert cache.length == prefix.shape[1] + HORIZON
    one_by_one = [first]
    for level, p in enumerate(prefixes, start=2):
        one_by_one += target.extend([p], gripper, level, cache)
    assert cache.length == prefix.shape[1] + LEVELS * HORIZON

    first, cache = target.prefill(prefix)
    at_once = [first, *target.extend(prefixes, gripper, 2, cache)]

    first, cache = target.prefill(prefix)
    in_two = [first, *target.extend(prefixes[:3], gripper, 2, cache)]
    in_two += target.extend(prefixes[3:], gripper, 5, cache)

    for way in (one_by_one, at_once, in_two):
        assert len(way) == LEVELS
        assert all(close(found, wanted) for found, wanted in zip(way, expected, strict=True))


@torch.no_grad()
def test_the_prefix_does_not_see_the_queries(target: TargetModel) -> None:
    prefix, _, _ = blocks_of(0)
    _, cache = target.prefill(prefix)
    alone = KVCache()
    target.trunk(prefix, alone)
    for found, expected in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
        assert close(found[:, :, : prefix.shape[1]], expected)


@torch.no_grad()
def test_a_block_depends_on_the_blocks_above_and_not_on_those_below(target: TargetModel) -> None:
    prefix, prefixes, gripper = blocks_of(0)
    changed = [*prefixes[:3], prefixes[3] + 1.0, *prefixes[4:]]  # block 5
    before = target.extend(prefixes, gripper, 2, target.prefill(prefix)[1])
    after = target.extend(changed, gripper, 2, target.prefill(prefix)[1])
    same = [close(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True] * 3 + [False] * 4


@torch.no_grad()
def test_truncated_and_extended_again_gives_the_same(target: TargetModel) -> None:
    prefix, prefixes, gripper = blocks_of(1)
    _, cache = target.prefill(prefix)
    start = cache.length
    expected = target.extend(prefixes, gripper, 2, cache)
    cache.truncate(start + 2 * HORIZON)
    again = target.extend(prefixes[2:], gripper, 4, cache)
    assert cache.length == start + 7 * HORIZON
    assert all(close(found, wanted) for found, wanted in zip(again, expected[2:], strict=True))
    cache.truncate(start)
    wrong = target.extend([p + 1.0 for p in prefixes[:2]], gripper, 2, cache)
    assert not close(wrong[1], expected[1])


@torch.no_grad()
def test_heads_give_one_distribution_a_scalar(target: TargetModel) -> None:
    features, _ = target.prefill(blocks_of(0)[0])
    for level in range(1, LEVELS + 1):
        assert target.logits(features, level).shape == (2, SCALARS, 7)
    at_once = target.parallel_logits(features)
    assert at_once.shape == (2, LEVELS, SCALARS, 7)
    # the scalars of one query position stay together: only step 3 changes when its features do
    features[:, 3] += 1.0
    moved = (target.parallel_logits(features) != at_once).any(-1).any(1)[0].unflatten(0, (HORIZON, 6)).any(1)
    assert moved.tolist() == [step == 3 for step in range(HORIZON)]
    assert target.gripper_logits(features).shape == (2, HORIZON)
    coarse = target.residual(features, 1)
    assert coarse.shape == (2, SCALARS)
    assert torch.allclose(target.residual(features, 3), coarse / 4)  # in units of the level's own step


@torch.no_grad()
def test_prefix_hears_images_words_and_state(target: TargetModel) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 2, 3, 32, 32, generator=generator) - 0.5
    state = torch.randn(1, 11, generator=generator)
    ids = torch.zeros(1, 32, dtype=torch.long)
    ids[0, :3] = torch.tensor([5, 6, 7])
    base = target.embed_prefix(images, state, target.encode_text(ids))
    assert base.shape == (1, 4 + 1 + 4 + 1, 64)  # agent view, wrist merged 2 x 2, words, state
    other_words = target.embed_prefix(images, state, target.encode_text(ids.roll(1, 1)))
    other_state = target.embed_prefix(images, state + 1.0, target.encode_text(ids))
    images[:, 1] += 0.1
    other_wrist = target.embed_prefix(images, state, target.encode_text(ids))
    changed = [(base != other).any(-1)[0].tolist() for other in (other_words, other_state, other_wrist)]
    assert changed[0] == [True] * 9 + [False]  # the images too are read with the instruction in mind
    assert changed[1] == [False] * 9 + [True]
    assert changed[2] == [False] * 4 + [True] + [False] * 5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_merging_keeps_every_value_and_puts_neighbours_together(n: int) -> None:
    side, channels = 6, 3
    row, column = torch.arange(side)[:, None], torch.arange(side)[None]
    grid = torch.stack([row.expand(side, side), column.expand(side, side), 100 + row * side + column], dim=-1)
    found = merged(grid.reshape(1, side * side, channels), n)
    across = side // n
    assert found.shape == (1, across**2, n**2 * channels)
    assert sorted(found.flatten().tolist()) == sorted(grid.flatten().tolist())
    for index, token in enumerate(found[0].unflatten(1, (n**2, channels))):
        top, left = n * (index // across), n * (index % across)
        corners = {(int(r), int(c)) for r, c, _ in token}
        assert corners == {(top + i, left + j) for i in range(n) for j in range(n)}
        assert all(int(number) == 100 + int(r) * side + int(c) for r, c, number in token)


def test_merged_cameras_shorten_the_prefix(tiny_config: PolicyConfig, tokenizer: ActionTokenizer) -> None:
    lengths = []
    for merge in ((1, 1), (1, 2), (2, 2)):
        target = RsdModel.of(replace(tiny_config, target=replace(tiny_config.target, merge=merge)), tokenizer).target
        images, state = torch.rand(1, 2, 3, 32, 32) - 0.5, torch.zeros(1, STATE_FEATURES)
        lengths.append(target.embed_prefix(images, state, target.encode_text(word_ids(["pick it up"]))).shape[1])
    assert lengths[0] - lengths[1] == lengths[1] - lengths[2] == 3  # 2 x 2 tokens a camera become one


def states_of(rotations: Tensor) -> Tensor:
    count = len(rotations)
    return torch.cat([torch.arange(3.0).expand(count, 3), rotations, torch.full((count, 2), 0.04)], dim=1)


def test_state_features_are_the_columns_of_scipys_rotation_matrix() -> None:
    rotations = Rotation.random(200, random_state=0).as_rotvec()
    rotations[0] = 0.0
    rotations[1] = [1e-9, 0.0, 0.0]
    rotations[2] = [torch.pi, 0.0, 0.0]
    features = state_features(states_of(torch.tensor(rotations).float()))
    matrices = torch.tensor(Rotation.from_rotvec(rotations).as_matrix()).float()
    assert torch.allclose(features[:, 3:6], matrices[:, :, 0], atol=1e-5)
    assert torch.allclose(features[:, 6:9], matrices[:, :, 1], atol=1e-5)
    assert torch.equal(features[:, :3], torch.arange(3.0).expand(200, 3))
    assert torch.equal(features[:, 9:], torch.full((200, 2), 0.04))


def test_state_features_are_continuous_where_the_axis_angle_jumps() -> None:
    axes = torch.tensor(Rotation.random(50, random_state=1).as_rotvec()).float()
    axes /= axes.norm(dim=1, keepdim=True)
    eps = 1e-3
    before, after = states_of(axes * (torch.pi - eps)), states_of(-axes * (torch.pi - eps))
    assert (before - after).norm(dim=1).min() > 6.0
    assert (state_features(before) - state_features(after)).abs().max() < 3 * eps
    # the same rotation written with an angle beyond pi, as robosuite's quaternion gives it
    beyond = states_of(axes * (torch.pi + eps))
    assert torch.allclose(state_features(beyond), state_features(after), atol=1e-5)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_main_is_at_least_eight_times_the_draft() -> None:
    code = RfsqConfig()
    target = TargetModel(TargetConfig(), code, HORIZON, 6).eval()
    draft = FeatureDrafter(DrafterConfig(), code, HORIZON, 6, TargetConfig().dim).eval()
    assert count(target.trunk) >= 8 * count(draft)
    prefix, nothing = torch.randn(1, 93, TargetConfig().dim), torch.zeros(1, SCALARS)
    gripper = torch.zeros(1, HORIZON, dtype=torch.long)
    with torch.no_grad():
        features, cache = target.prefill(prefix)
        read, _ = draft.read(features)
        with FlopCounterMode(display=False) as one_pass:
            (block,) = target.extend([nothing], gripper, 2, cache)
            target.logits(block, 2)
        with FlopCounterMode(display=False) as one_level:
            draft.logits(read, nothing, gripper, 2)
    assert one_pass.get_total_flops() >= 8 * one_level.get_total_flops() > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": 100}, "image_size: expected an integer from 32 to 1024 that is a multiple of 32, found 100"),
        ({"channels": (16, 16, 32, 40)}, "channels[3]: expected an integer from 16 to 4096 that is a multiple of 16"),
        ({"channels": (16, 16, 32)}, "channels: expected 4 values"),
        ({"merge": (1,)}, "expected merge with 2 divisors of 8, the image tokens of a side, found (1,)"),
        ({"merge": (3, 1)}, "expected merge with 2 divisors of 8, the image tokens of a side, found (3, 1)"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RsdError, match=re.escape(said)):
        TargetConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [0, LEVELS])
def test_a_draft_leaves_the_main_at_least_one_level(
    tiny_config: PolicyConfig, tokenizer: ActionTokenizer, levels: int
) -> None:
    def make() -> RsdModel:
        drafter = replace(tiny_config.feature_drafter, levels=levels)
        return RsdModel.of(replace(tiny_config, feature_drafter=drafter), tokenizer)

    with pytest.raises(RsdError, match=r"draft: expected 1 to 7 levels|levels: expected an integer from 1 to"):
        make()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_subsample_is_the_strided_convolution(layout: torch.memory_format) -> None:
    layer = Subsample(16, 32, 2)
    x = torch.randn(3, 16, 10, 10).contiguous(memory_format=layout)
    assert torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight, stride=2), atol=1e-5)


def test_pixels_become_images_of_unit_range_with_their_channels_first() -> None:
    pixels = torch.randint(0, 256, (2, 2, 4, 4, 3), dtype=torch.uint8)
    pixels[1, 0, 2, 3] = torch.tensor([0, 255, 51], dtype=torch.uint8)
    images = unit_images(pixels)
    assert images.shape == (2, 2, 3, 4, 4)
    assert images[1, 0, :, 2, 3].tolist() == pytest.approx([-0.5, 0.5, -0.3])
    text = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    assert torch.equal(PolicyInput(pixels, torch.zeros(2, 11), text).images, images)
    assert PolicyInput(images, torch.zeros(2, 11), text).images is images  # what is an image already stays one
