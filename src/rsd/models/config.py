"""Sizes of the models, without the models: a command line and a checkpoint name them before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rsd.types import CAMERAS, RsdError


@dataclass(frozen=True)
class MainConfig:
    """Sizes of the main model. image_size in pixels, a multiple of 32; merge: of each camera, n x n image tokens become
    one position of the trunk; whole_block: it is trained to judge a whole draft by one block in the place of block 1 as
    well."""

    image_size: int = 128
    channels: tuple[int, ...] = (32, 64, 128, 256)
    dim: int = 320
    layers: int = 8
    heads: int = 5
    text_dim: int = 128
    text_tokens: int = 4
    dropout: float = 0.1
    whole_block: bool = False
    merge: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        # one channel a group crashes PyTorch's CPU backward of GroupNorm on channels-last input (with 2.13)
        if self.image_size % 32 or len(self.channels) != 4 or any(c % 16 for c in self.channels):
            expected = "image_size a multiple of 32, four channels that are multiples of 16"
            raise RsdError(f"main model: expected {expected}, found {self}")
        side = self.image_size // 16
        if len(self.merge) != len(CAMERAS) or any(n < 1 or side % n for n in self.merge):
            expected = f"merge with {len(CAMERAS)} divisors of {side}, the image tokens of a side"
            raise RsdError(f"main model: expected {expected}, found {self.merge}")


@dataclass(frozen=True)
class DraftConfig:
    """levels: how many coarse levels are drafted; the rest are sizes."""

    levels: int = 3
    dim: int = 128
    layers: int = 2
    heads: int = 4


@dataclass(frozen=True)
class LightDraftConfig:
    """shrink: the main's images are averaged over shrink x shrink pixels; depth: residual blocks at each resolution;
    levels: how its coarse tokens are drafted; the rest are sizes."""

    shrink: int = 2
    channels: tuple[int, ...] = (16, 32, 64, 96)
    dim: int = 160
    layers: int = 3
    heads: int = 5
    levels: DraftConfig = field(default_factory=lambda: DraftConfig(levels=3, dim=128, layers=1, heads=4))
    depth: int = 2

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LightDraftConfig:
        levels, channels = DraftConfig(**content["levels"]), tuple(content["channels"])
        return cls(**{**content, "channels": channels, "levels": levels})


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes and decoding defaults. fine: `regress` or `sequential` (see `decoding.strategies.rsd`); without a light
    draft the decoders that need one are refused."""

    main: MainConfig = field(default_factory=MainConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    light: LightDraftConfig | None = field(default_factory=LightDraftConfig)
    acceptance: str = "margin"
    fine: str = "regress"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PolicyConfig:
        main: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["main"].items()
        }
        found = content.get("light")  # absent in checkpoints of before there was one
        light = LightDraftConfig.from_json(found) if found else None
        rest = {k: v for k, v in content.items() if k not in ("main", "draft", "light")}
        return cls(MainConfig(**main), DraftConfig(**content["draft"]), light, **rest)


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
