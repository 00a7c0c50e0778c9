"""From what was drafted and what the target makes of it to the chunk. Pure, but for what it notes to be checked.

Values of motion scalars are in units of the tokenizer's first step D_1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsd.decoding.acceptance import accepted_prefix, leading, within_reach
from rsd.decoding.sampling import Verified, verify_block
from rsd.decoding.state import Draft, Verification
from rsd.models.fusing import fusible
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError

if TYPE_CHECKING:
    from rsd.decoding.primitives import Primitives


@fusible
def accept(ops: Primitives, draft: Draft, blocks: list[Tensor]) -> Verification:
    """The target's features of block 1 and of those that were told the draft -> the chunk, fine levels regressed.

    Block k+1 has seen just the levels 1..k, so the continuous estimate of what they miss is at hand however many are
    accepted. k counts a scalar's own accepted levels under a rule that judges single tokens, the accepted levels of
    the chunk under the others."""
    if ops.rule.as_a_whole:
        return accept_as_a_whole(ops, draft, blocks)
    features = torch.stack(blocks, dim=1)  # [B, c+1, H, D]
    verified = judge(ops, draft, features)
    kept = verified.levels[:, None].expand_as(draft.motion[:, 0])
    if ops.rule.per_scalar:
        kept = leading(verified.accepted)
    missing = ops.finite(ops.target.residuals(features))
    prefix = torch.stack([torch.zeros_like(draft.prefixes[0]), *draft.prefixes], dim=1)  # [B, c+1, P]
    wanted = (prefix + missing).gather(1, kept.unsqueeze(1)).squeeze(1)
    tokens, value = requantise(ops.code, wanted, draft.motion, kept)
    return Verification(value, tokens, verified.accepted, verified.levels)


def accept_as_a_whole(ops: Primitives, draft: Draft, blocks: list[Tensor]) -> Verification:
    """The last block was told all that was drafted and says what is missing, which is added where the draft stands;
    elsewhere block 1's own estimate is executed, or, if there is no block 1, the tokens follow the correction alone.

    A scalar's draft stands if what is missing is within what the finer levels take out. Under `blind` block 1, which
    was told nothing, has the first word, on the chunk as a whole."""
    count, rule, told = draft.motion.shape[1], ops.rule, draft.prefixes[-1]
    reach = ops.target.code.reach(count)
    missing = ops.finite(ops.target.residual(blocks[-1], count + 1))
    own = ops.finite(ops.target.residual(blocks[0], 1)) if len(blocks) > 1 else told + missing
    stands = near = missing.abs() <= reach  # [B, P]
    if rule.share is not None:
        stands = within_reach(told, own, reach, rule.share, rule.moving)[:, None].expand_as(near)
    wanted = torch.where(stands & near, told + missing, own)
    tokens, value = requantise(ops.code, wanted, draft.motion, count * stands.long())
    accepted = stands[:, None].expand(-1, count, -1)
    return Verification(value, tokens, accepted, accepted_prefix(accepted))


def judge(ops: Primitives, draft: Draft, features: Tensor) -> Verified:
    """Features [B, c+1, H, D] of the blocks 1..c+1 -> what stands, and the level after that corrected.

    Tokens are compared by the rule, drawn ones kept so often that the target's distribution comes out."""
    logits = ops.finite(ops.target.level_head.first_levels(features[:, :-1]))  # [B, c, P, K]
    if ops.sampler is not None:
        assert draft.probs is not None
        ops.check()  # now: a NaN makes no probabilities
        return verify_block(draft.motion, draft.probs, ops.sampler.probs(logits), ops.sampler.generator)
    assert ops.rule.accept is not None  # else it is judged as a whole
    accepted = ops.rule.accept(draft.motion, logits)
    return Verified(torch.where(accepted, draft.motion, logits.argmax(-1)), accepted, accepted_prefix(accepted))


def requantise(code: Rfsq, value: Tensor, drafted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, P] of `value` [B, P] that begin, scalar by scalar, with kept[b, p] of the drafted symbols, and
    what they decode to [B, P].

    A drafted digit after which the finer levels could no longer reach the value gives way to the value's own (the
    margins of a redundant code hold one level at a time, not all together), so inside the code's span the tokens
    are within half the last step of `value` whatever was drafted.
    """
    config, residual, decoded, symbols = code.config, value, torch.zeros_like(value, dtype=torch.float32), []
    stands = torch.ones_like(value, dtype=torch.bool)
    for level in range(1, config.levels + 1):
        digit = code.digit(residual, level)
        if level <= drafted.shape[1]:
            proposed = (drafted[:, level - 1] - config.half).to(value.dtype)
            left = residual - proposed * code.step(level)
            stands = stands & (kept >= level) & (left.abs() <= config.reach(level) * code.first_step)
            digit = torch.where(stands, proposed, digit)
        part = digit * code.step(level)
        residual, decoded = residual - part, decoded + part
        symbols.append(digit)
    return torch.stack(symbols, dim=1).long() + config.half, decoded


def single(kept: Tensor) -> int:
    """The one accepted length; sequential decoding goes sample by sample."""
    if len(kept) != 1:
        raise RsdError(f"fine='sequential' decodes one observation at a time, found a batch of {len(kept)}")
    return int(kept)
