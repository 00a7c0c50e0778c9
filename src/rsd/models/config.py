"""Sizes of the models, without the models: a command line and a checkpoint name them before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rsd.checks import Checked, Count, Rules, above, between, multiple
from rsd.types import CAMERAS, Chunks, Steps

GROUPS = 8  # of GroupNorm in the cameras' encoders
TEXT_HEADS = 4
# beyond the largest is a slip, found before memory is taken for it
Width = Annotated[int, between(1, 2**15)]
Layers = Annotated[int, between(1, 256)]
# one channel a group crashes PyTorch's CPU backward of GroupNorm on channels-last input (with 2.13)
Channel = Annotated[int, between(2 * GROUPS, 4096), multiple(2 * GROUPS)]
Channels = tuple[Channel, Channel, Channel, Channel]


@dataclass(frozen=True)
class TargetConfig(Checked):
    """Sizes of the target. image_size in pixels, a multiple of 32; merge: of each camera, n x n image tokens become
    one position of the trunk; whole_block: it is trained to judge a whole draft by one block in the place of block 1 as
    well; grounded: it is trained to say which image token shows what is asked for; committed: it can be told the first
    actions of its chunk, which will be executed before it is there."""

    image_size: Annotated[int, between(32, 1024), multiple(32)] = 128
    channels: Channels = (32, 64, 128, 256)
    dim: Width = 320
    layers: Layers = 8
    heads: Width = 5
    text_dim: Annotated[int, between(1, 2**15), multiple(TEXT_HEADS)] = 128
    text_tokens: Annotated[int, between(1, 64)] = 4
    dropout: Annotated[float, between(0, 0.99)] = 0.1
    whole_block: bool = False
    grounded: bool = False
    committed: bool = False
    merge: tuple[Layers, ...] = (1, 2)

    def rules(self) -> Rules:
        yield self.dim % self.heads == 0, f"heads that divide dim {self.dim}", self.heads
        side = self.image_size // 16
        fits = len(self.merge) == len(CAMERAS) and not any(side % n for n in self.merge)
        yield fits, f"merge with {len(CAMERAS)} divisors of {side}, the image tokens of a side", self.merge


@dataclass(frozen=True)
class DrafterConfig(Checked):
    """levels: how many coarse levels are drafted; the rest are sizes."""

    levels: Layers = 3
    dim: Width = 128
    layers: Layers = 2
    heads: Width = 4

    def rules(self) -> Rules:
        yield self.dim % self.heads == 0, f"heads that divide dim {self.dim}", self.heads


@dataclass(frozen=True)
class VisualDrafterConfig(Checked):
    """shrink: how many times fewer image tokens it has each way than the target, by a wider first convolution; depth:
    residual blocks at each resolution; levels: how its coarse tokens are drafted; the rest are sizes."""

    shrink: Annotated[int, between(1, 64)] = 2
    channels: Channels = (16, 32, 64, 96)
    dim: Width = 160
    layers: Layers = 3
    heads: Width = 5
    levels: DrafterConfig = field(default_factory=lambda: DrafterConfig(levels=3, dim=128, layers=1, heads=4))
    depth: Layers = 2

    def rules(self) -> Rules:
        yield self.dim % self.heads == 0, f"heads that divide dim {self.dim}", self.heads


@dataclass(frozen=True)
class StandaloneDrafterConfig(Checked):
    """image_size: pixels a side that observations are resized to; visual: the drafter's sizes."""

    image_size: Annotated[int, between(32, 1024), multiple(32)] = 64
    text_dim: Annotated[int, between(1, 2**15), multiple(TEXT_HEADS)] = 128
    visual: VisualDrafterConfig = field(default_factory=lambda: VisualDrafterConfig(shrink=1))


def held_rule(held: int | None, most: int | None) -> tuple[bool, str, int | None]:
    """What `max_skips_held` has to be beside `max_skips`, as `Checked.rules` has it."""
    fits = held is None or (most is not None and held <= most)
    return fits, f"max_skips_held of at most max_skips, {most}", held


@dataclass(frozen=True, kw_only=True)
class OwnDecoding(Checked):
    """How a checkpoint decodes by its own config.json."""

    acceptance: str = "margin"
    fine: Literal["regress", "sequential"] = "regress"
    """See `decoding.decoders.rsd`."""
    execute: Steps | None = None
    """Steps of a chunk that are executed before the next; None: all."""
    max_skips: Chunks | None = None
    """Chunks in a row that rsd-skip does without the target where nothing is calibrated; None: it needs that."""
    max_skips_held: Count | None = None
    """The same while the gripper is closed; None: as many."""

    def rules(self) -> Rules:
        yield held_rule(self.max_skips_held, self.max_skips)


@dataclass(frozen=True)
class PolicyConfig(OwnDecoding):
    """Sizes and decoding defaults; without a visual drafter the decoders that need one are refused."""

    target: TargetConfig = field(default_factory=TargetConfig)
    feature_drafter: DrafterConfig = field(default_factory=DrafterConfig)
    visual_drafter: VisualDrafterConfig | None = field(default_factory=VisualDrafterConfig)


@dataclass(frozen=True)
class LoraConfig(Checked):
    """rank: of every update; alpha: their scale is alpha / rank; vision: also the vision towers and the projector,
    which then take part in the backward pass (more time and memory)."""

    rank: Annotated[int, between(1, 4096)] = 32
    alpha: Annotated[float, above(0, 1e6)] = 16.0
    vision: bool = False
