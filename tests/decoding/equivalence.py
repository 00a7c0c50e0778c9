"""What tests of the decoders' equivalences share: sizes, given drafts and observations, how to decode and compare."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import DecodeResult, Draft, EpisodeState, PolicyInput
from rsd.models.bundle import RsdModel
from rsd.models.text import word_ids
from rsd.tokenizer.rfsq import Rfsq

L, C, H, P = 8, 3, 8, 48  # levels, drafted levels, steps, scalars of a level
LAST_STEP = 2.0 ** -(L - 1)


def as_draft(code: Rfsq, motion: Tensor, gripper: Tensor) -> Draft:
    """A draft of given tokens [B, c, P] and gripper [B, H]."""
    value, prefixes = torch.zeros(motion.shape[::2], device=motion.device), []
    for level in range(1, motion.shape[1] + 1):
        value = value + code.value(motion[:, level - 1], level)
        prefixes.append(value)
    return Draft(motion, gripper, prefixes)


def decoder_of(model: RsdModel, rule: str = "exact", fine: str = "regress") -> Primitives:
    return Primitives(
        model.target, model.feature_drafter, acceptance_rule(rule, model.target.code), fine, model.visual_drafter
    )


def prefixes(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 10, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: DecodeResult, expected: DecodeResult) -> bool:
    assert found.motion is not None
    assert expected.motion is not None
    equal = (torch.equal(a, b) for a, b in zip(outputs(found), outputs(expected), strict=True))
    return all(equal)


def outputs(decoded: DecodeResult) -> Iterator[Tensor]:
    assert decoded.motion is not None
    yield from (decoded.motion, decoded.value, decoded.gripper)


def seen(model: RsdModel, seed: int) -> PolicyInput:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 2, 3, 32, 32, generator=generator, dtype=torch.float64) - 0.5
    state = torch.randn(1, 11, generator=generator, dtype=torch.float64)
    return PolicyInput(images, state, model.target.encode_text(word_ids(["open the drawer"])))


@torch.no_grad()
def run(name: str, ops: Primitives, scene: PolicyInput, state: EpisodeState | None = None) -> DecodeResult:
    return DECODERS[name].decode(ops, scene, state or EpisodeState())
