"""Decoding strategies: prefix tokens in, one action chunk's tokens out. Each is one short function.

All greedy. Inside this file and the models, values of motion scalars are in units of the tokenizer's first
step D_1. A model output that is not finite raises `RsdError`: a NaN would win an argmax as an ordinary token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsd.decoding.acceptance import AcceptanceRule, accepted_prefix
from rsd.models.draft import DraftModel
from rsd.models.main import MainModel
from rsd.models.trunk import KVCache
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError


@dataclass
class Decoded:
    """value: [B, P] chunk coefficients in first steps; gripper: int [B, H], 1 = close; motion: tokens
    [B, L, P] or None where a strategy gives no tokens; the rest is counted per sample (see `ChunkStats`)."""

    value: Tensor
    gripper: Tensor
    motion: Tensor | None = None
    main_passes: int = 0
    num_draft_tokens: list[int] = field(default_factory=list)  # per level
    accepted: Tensor | None = None  # bool [B, c, P]
    accepted_gripper: Tensor | None = None  # bool [B, H]
    accepted_levels: Tensor | None = None  # int [B]


class Stopwatch:
    """Wall time by stage in milliseconds; the device is synchronised at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ms = device, dict[str, float]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Decoder:
    """What a strategy works with. fine: how `rsd` gets the fine levels, `regress` or `sequential`."""

    main: MainModel
    draft: DraftModel
    rule: AcceptanceRule
    fine: str = "regress"

    @property
    def code(self) -> Rfsq:
        """The quantiser in units of D_1."""
        return Rfsq(self.main.code)


def ar(decoder: Decoder, prefix: Tensor, watch: Stopwatch) -> Decoded:
    """The baseline: level by level, one pass of the main a level (the first rides in the prefill)."""
    main, code = decoder.main, decoder.code
    with watch.stage("prefill"):
        features, cache = main.prefill(prefix)
    with watch.stage("decode"):
        gripper = greedy_gripper(main, features)
        motion = greedy(main.logits(features, 1)).unsqueeze(1)
        motion, passes = extend_greedily(decoder, motion, gripper, cache)
        return Decoded(code.dequantise(motion), gripper, motion, passes)


def parallel(decoder: Decoder, prefix: Tensor, watch: Stopwatch) -> Decoded:
    """All levels at once from the prefill (the original RFSQ head)."""
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("decode"):
        motion = greedy(decoder.main.parallel_logits(features))
        return Decoded(decoder.code.dequantise(motion), greedy_gripper(decoder.main, features), motion)


def l1(decoder: Decoder, prefix: Tensor, watch: Stopwatch) -> Decoded:
    """Continuous regression in one pass, the bar that OpenVLA-OFT's L1 head sets (arXiv 2502.19645)."""
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("decode"):
        return Decoded(finite(decoder.main.residual(features, 1)), greedy_gripper(decoder.main, features))


def draft(decoder: Decoder, prefix: Tensor, watch: Stopwatch) -> Decoded:
    """The draft's coarse levels and nothing more: what acceptance without verification would give."""
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("draft"):
        motion, gripper = propose(decoder, features)
        return Decoded(decoder.code.dequantise(motion), gripper, motion)


def rsd(decoder: Decoder, prefix: Tensor, watch: Stopwatch) -> Decoded:
    """The draft proposes the coarse levels 1..c; ONE pass verifies them and yields the fine ones.

    `fine="regress"`: block k+1 has seen just the levels 1..k, so the continuous estimate of what they miss is at
    hand however many are accepted: never more than one pass. k counts a scalar's own accepted levels under a
    rule that judges single tokens, the accepted levels of the chunk under the others.
    `fine="sequential"`: the main corrects the first level that does not stand (if all do, it adds the next),
    the rest takes one pass a level; with the rule `exact` the tokens are those of `ar`.
    """
    main, code = decoder.main, decoder.code
    with watch.stage("prefill"):
        features, cache = main.prefill(prefix)
    with watch.stage("draft"):
        drafted, drafted_gripper = propose(decoder, features)
    with watch.stage("verify"):
        gripper = greedy_gripper(main, features)  # zero tolerance: the main's own, free with the prefill
        start = cache.length
        blocks = [features, *verify(decoder, drafted, gripper, cache)]
        logits = torch.stack([finite(main.logits(block, i + 1)) for i, block in enumerate(blocks[:-1])], dim=1)
        accepted = decoder.rule.accept(drafted, logits)  # logits: [B, c, P, K]
        prefix_levels = accepted_prefix(accepted)
    passes = 1
    with watch.stage("decode"):
        if decoder.fine == "regress":
            kept = prefix_levels[:, None].expand_as(drafted[:, 0])
            if decoder.rule.per_scalar:
                kept = accepted.long().cumprod(dim=1).sum(1)
            value = regress_fine(decoder, drafted, blocks, kept)
            motion = requantise(code, value, drafted, kept)
        else:
            coarse = torch.where(accepted, drafted, logits.argmax(-1))
            following = greedy(main.logits(blocks[-1], len(blocks))).unsqueeze(1)
            motion = torch.cat([coarse, following], dim=1)[:, : single(prefix_levels) + 1]
            cache.truncate(start + (motion.shape[1] - 1) * main.horizon)
            motion, more = extend_greedily(decoder, motion, gripper, cache)
            passes += more
    decoded = Decoded(code.dequantise(motion), gripper, motion, passes)
    decoded.num_draft_tokens = [drafted.shape[2]] * drafted.shape[1]
    decoded.accepted, decoded.accepted_levels = accepted, prefix_levels
    decoded.accepted_gripper = drafted_gripper == gripper
    return decoded


Strategy = Callable[[Decoder, Tensor, Stopwatch], Decoded]
STRATEGIES: dict[str, Strategy] = {"ar": ar, "parallel": parallel, "l1": l1, "rsd": rsd, "draft": draft}


# the steps the strategies are made of


def finite(output: Tensor) -> Tensor:
    """A model's output as it is; NaN or infinity in it must never become an action and raises `RsdError`."""
    if not torch.isfinite(output).all():
        raise RsdError("the model gave non-finite output: damaged weights or an observation far out of range")
    return output


def greedy(logits: Tensor) -> Tensor:
    """Logits [..., K] -> symbols int64 [...]."""
    return finite(logits).argmax(-1)


def greedy_gripper(main: MainModel, features: Tensor) -> Tensor:
    """Block-1 features -> int64 [B, H], 1 = close."""
    return (finite(main.gripper_logits(features)) > 0).long()


def propose(decoder: Decoder, features: Tensor) -> tuple[Tensor, Tensor]:
    """The draft's greedy symbols [B, c, P] and its gripper [B, H] from the main's block-1 features."""
    model, code = decoder.draft, decoder.code
    read, gripper_logits = model.read(features)
    gripper = (finite(gripper_logits) > 0).long()
    motion = torch.empty(len(read), 0, model_scalars(decoder), dtype=torch.long, device=read.device)
    for level in range(1, model.config.levels + 1):
        symbols = greedy(model.logits(read, code.dequantise(motion), gripper, level))
        motion = torch.cat([motion, symbols.unsqueeze(1)], dim=1)
    return motion, gripper


def verify(decoder: Decoder, drafted: Tensor, gripper: Tensor, cache: KVCache) -> list[Tensor]:
    """One pass over the blocks 2..c+1 given the drafted levels 1..c -> their features."""
    code = decoder.code
    prefixes = [code.dequantise(drafted[:, :level]) for level in range(1, drafted.shape[1] + 1)]
    return decoder.main.extend(prefixes, gripper, 2, cache)


def extend_greedily(decoder: Decoder, motion: Tensor, gripper: Tensor, cache: KVCache) -> tuple[Tensor, int]:
    """Decode the levels that `motion` [B, k, P] lacks, one pass each -> all levels [B, L, P], passes."""
    main, code, passes = decoder.main, decoder.code, 0
    for level in range(motion.shape[1] + 1, main.code.levels + 1):
        (features,) = main.extend([code.dequantise(motion)], gripper, level, cache)
        motion = torch.cat([motion, greedy(main.logits(features, level)).unsqueeze(1)], dim=1)
        passes += 1
    return motion, passes


def regress_fine(decoder: Decoder, drafted: Tensor, blocks: list[Tensor], kept: Tensor) -> Tensor:
    """A scalar's first kept[b, p] drafted levels plus what the block after them says they miss -> [B, P].

    blocks[k] is the main's block that has seen the levels 1..k.
    """
    estimates = torch.stack(
        [
            decoder.code.dequantise(drafted[:, :level]) + finite(decoder.main.residual(block, level + 1))
            for level, block in enumerate(blocks)
        ],
        dim=1,
    )  # [B, c+1, P]
    return estimates.gather(1, kept.unsqueeze(1)).squeeze(1)


def requantise(code: Rfsq, value: Tensor, drafted: Tensor, kept: Tensor) -> Tensor:
    """Tokens [B, L, P] of `value` [B, P] that begin, scalar by scalar, with kept[b, p] of the drafted symbols.

    A drafted digit after which the finer levels could no longer reach the value gives way to the value's own (the
    margins of a redundant code hold one level at a time, not all together), so inside the code's span the tokens
    are within half the last step of `value` whatever was drafted.
    """
    config, residual, symbols = code.config, value, []
    stands = torch.ones_like(value, dtype=torch.bool)
    for level in range(1, config.levels + 1):
        digit = code.digit(residual, level)
        if level <= drafted.shape[1]:
            proposed = (drafted[:, level - 1] - config.half).to(value.dtype)
            reach = (config.tail_reach(level) + 0.5 * config.weight(config.levels)) * code.first_step
            left = residual - proposed * code.step(level)
            stands = stands & (kept >= level) & (left.abs() <= reach)
            digit = torch.where(stands, proposed, digit)
        residual = residual - digit * code.step(level)
        symbols.append(digit.long() + config.half)
    return torch.stack(symbols, dim=1)


def single(kept: Tensor) -> int:
    """The one accepted length; sequential decoding goes sample by sample."""
    if len(kept) != 1:
        raise RsdError(f"fine='sequential' decodes one observation at a time, found a batch of {len(kept)}")
    return int(kept)


def model_scalars(decoder: Decoder) -> int:
    return decoder.main.horizon * decoder.main.motion_dim
