"""Sizes of the models, without the models: a command line and a checkpoint name them before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsd.types import CAMERAS, RsdError

MAX_DIM, MAX_LAYERS = 2**15, 256  # beyond is a slip, found before memory is taken for it
GROUPS = 8  # of GroupNorm in the cameras' encoders
TEXT_HEADS = 4


def check_sizes(kind: str, dim: int, layers: int, heads: int) -> None:
    """`RsdError` for sizes that make no trunk; kind: names the model in its message."""
    if not (1 <= layers <= MAX_LAYERS and 1 <= heads <= dim <= MAX_DIM) or dim % heads:
        expected = f"1 to {MAX_LAYERS} layers, a dim of 1 to {MAX_DIM} and heads that divide it"
        raise RsdError(f"{kind}: expected {expected}, found layers {layers}, dim {dim}, heads {heads}")


def check_channels(kind: str, channels: tuple[int, ...]) -> None:
    """`RsdError` unless a `CameraEncoder` can have these; kind: names the model in its message."""
    # one channel a group crashes PyTorch's CPU backward of GroupNorm on channels-last input (with 2.13)
    if len(channels) != 4 or any(c % (2 * GROUPS) or not 0 < c <= 4096 for c in channels):
        raise RsdError(f"{kind}: expected four channels that are multiples of 16, at most 4096, found {channels}")


@dataclass(frozen=True)
class TargetConfig:
    """Sizes of the target. image_size in pixels, a multiple of 32; merge: of each camera, n x n image tokens become
    one position of the trunk; whole_block: it is trained to judge a whole draft by one block in the place of block 1 as
    well; grounded: it is trained to say which image token shows what is asked for."""

    image_size: int = 128
    channels: tuple[int, ...] = (32, 64, 128, 256)
    dim: int = 320
    layers: int = 8
    heads: int = 5
    text_dim: int = 128
    text_tokens: int = 4
    dropout: float = 0.1
    whole_block: bool = False
    grounded: bool = False
    merge: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.image_size % 32 or not 32 <= self.image_size <= 1024:
            raise RsdError(f"target: expected image_size a multiple of 32, at most 1024, found {self.image_size}")
        check_channels("target", self.channels)
        check_sizes("target", self.dim, self.layers, self.heads)
        check_sizes("target's words", self.text_dim, 1, TEXT_HEADS)
        if not (0.0 <= self.dropout < 1.0 and 1 <= self.text_tokens <= 64):
            expected = "dropout in [0, 1) and 1 to 64 text_tokens"
            raise RsdError(f"target: expected {expected}, found {self.dropout} and {self.text_tokens}")
        side = self.image_size // 16
        if len(self.merge) != len(CAMERAS) or any(n < 1 or side % n for n in self.merge):
            expected = f"merge with {len(CAMERAS)} divisors of {side}, the image tokens of a side"
            raise RsdError(f"target: expected {expected}, found {self.merge}")


@dataclass(frozen=True)
class DrafterConfig:
    """levels: how many coarse levels are drafted; the rest are sizes."""

    levels: int = 3
    dim: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        check_sizes("draft", self.dim, self.layers, self.heads)


@dataclass(frozen=True)
class VisualDrafterConfig:
    """shrink: the target's images are averaged over shrink x shrink pixels; depth: residual blocks at each resolution;
    levels: how its coarse tokens are drafted; the rest are sizes."""

    shrink: int = 2
    channels: tuple[int, ...] = (16, 32, 64, 96)
    dim: int = 160
    layers: int = 3
    heads: int = 5
    levels: DrafterConfig = field(default_factory=lambda: DrafterConfig(levels=3, dim=128, layers=1, heads=4))
    depth: int = 2

    def __post_init__(self) -> None:
        check_sizes("visual drafter", self.dim, self.layers, self.heads)
        if not (1 <= self.shrink <= 64 and 1 <= self.depth <= MAX_LAYERS):
            raise RsdError(
                f"visual drafter: expected shrink and depth of at least 1, found {self.shrink}, {self.depth}"
            )
        check_channels("visual drafter", self.channels)


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes and decoding defaults. fine: `regress` or `sequential` (see `decoding.decoders.rsd`); without a visual
    drafter the decoders that need one are refused."""

    target: TargetConfig = field(default_factory=TargetConfig)
    feature_drafter: DrafterConfig = field(default_factory=DrafterConfig)
    visual_drafter: VisualDrafterConfig | None = field(default_factory=VisualDrafterConfig)
    acceptance: str = "margin"
    fine: str = "regress"


@dataclass(frozen=True)
class LoraConfig:
    """rank: of every update; alpha: their scale is alpha / rank; vision: also the vision towers and the projector,
    which then take part in the backward pass (more time and memory)."""

    rank: int = 32
    alpha: float = 16.0
    vision: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise RsdError(f"lora: expected rank >= 1 and alpha > 0, found {self}")
