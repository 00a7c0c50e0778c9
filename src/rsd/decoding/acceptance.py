"""Which drafted tokens may stand, given the target's logits, and the chunk that comes of it. Pure functions.

A rule sees drafted symbols int [B, c, P] and the target's logits [B, c, P, K] of the same levels (each
conditioned on the drafted levels above it) and returns bool [B, c, P]. Whatever the setting, a token that is the
target's own greedy choice is never the reason for a rejection (but under `residual`, which sees no logits). Under a
rule of single scalars each keeps its own longest accepted prefix of levels; the others keep the longest one whose every
token is accepted.
The gripper is compared apart, with zero tolerance. Logits must be finite: the caller sees to it, since a NaN
would win an argmax as an ordinary token. Nothing here waits for the device, so a CUDA graph can hold a rule.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsd.checks import checked, shown
from rsd.decoding.sampling import Verified, verify_block
from rsd.decoding.state import Draft, Verification
from rsd.models.fusing import fusible
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.types import RsdError, unit_of

if TYPE_CHECKING:
    from rsd.decoding.primitives import Primitives


@dataclass(frozen=True)
class Synthetic:
    """Each drafted level, and the gripper, stands at this rate, in [0, 1], drawn from the seed."""

    rate: float
    seed: int


@dataclass(frozen=True)
class AcceptanceRule:
    """accept(drafted, logits) -> bool [B, c, P]; see the module's docstring. None: the draft is judged as a whole, by
    what the target finds that it misses (`accept_as_a_whole`), or, with a `share`, by what the target
    means without having been told of it (`within_reach`). untold: it is never told of a draft, its own estimate is
    executed, and the verdict is only counted. synthetic: what the target says is made up (`made_up`)."""

    name: str
    accept: Callable[[Tensor, Tensor], Tensor] | None
    share: float | None = None
    moving: bool = False
    untold: bool = False
    synthetic: Synthetic | None = None

    @property
    def unit(self) -> str:
        return unit_of(self.name)

    @property
    def blind(self) -> bool:
        """Whether the judge must not have been told of the draft."""
        return self.share is not None


def exact(drafted: Tensor, logits: Tensor) -> Tensor:
    """Token equals the target's own greedy choice: the decoded tokens are those of `ar`."""
    return drafted == logits.argmax(-1)


def margin(drafted: Tensor, logits: Tensor, code: RfsqConfig) -> Tensor:
    """Digit within the distance that the finer levels of a redundant code take out (`RfsqConfig.margin`)."""
    apart = (drafted - logits.argmax(-1)).abs()
    levels = range(1, drafted.shape[1] + 1)
    return torch.stack([apart[:, level - 1] <= code.margin(level) for level in levels], dim=1)


def distance(drafted: Tensor, logits: Tensor, bins: int) -> Tensor:
    """Token at most `bins` from the target's choice at every level alike (Spec-VLA, arXiv 2507.22424)."""
    return (drafted - logits.argmax(-1)).abs() <= bins


def typical(drafted: Tensor, logits: Tensor, epsilon: float, delta: float) -> Tensor:
    """Token the target finds likely enough for how sure it is: p > min(epsilon, delta * exp(-H)), H in nats.

    Medusa's typical acceptance (arXiv 2401.10774). The likeliest token has p >= exp(-H) and so always passes
    for delta < 1; naming it here keeps that true at delta = 1 and against rounding."""
    log_p = logits.log_softmax(-1)
    threshold = (delta * (log_p.exp() * log_p).sum(-1).exp()).clamp(max=epsilon)
    likely = log_p.gather(-1, drafted.unsqueeze(-1)).squeeze(-1).exp() > threshold
    return likely | exact(drafted, logits)


def agreement(drafted: Tensor, logits: Tensor, share: float) -> Tensor:
    """A whole level stands if at least `share` of its tokens equal the target's (original experiment: 0.7)."""
    equal = drafted == logits.argmax(-1)
    return (equal.float().mean(-1, keepdim=True) >= share).expand_as(equal)


def within_reach(draft: Tensor, own: Tensor, reach: float, share: float, moving: bool = False) -> Tensor:
    """Whether the draft as a whole means what the target means that was not told of it: at least `share` of its scalars
    lie within `reach` of the target's own. draft, own: what they decode to [B, P] -> bool [B].

    One scalar for itself could be near by chance, and a mixture of two intentions is neither. moving: only scalars that
    carry motion count, those beyond reach of nothing in one of the two: most cosine coefficients are near zero whatever
    is meant, and vote for any draft."""
    counts = torch.maximum(draft.abs(), own.abs()) > reach if moving else torch.ones_like(draft, dtype=torch.bool)
    agrees = ((draft - own).abs() <= reach) & counts
    return agrees.sum(-1) >= share * counts.sum(-1)


def made_up(draft: Draft, of: Synthetic, turn: int) -> Tensor:
    """Whether the gripper and each level of a draft stand, bool [B, 1 + c]: drawn from the seed, the turn and the
    drafted tokens, so that the same chunk has the same answer in the same turn. It waits for the device."""
    rows = []
    for tokens in draft.motion.to("cpu", torch.uint8).numpy():
        drawn = np.random.default_rng([of.seed, turn, zlib.crc32(tokens.tobytes())])
        rows.append(drawn.random(1 + len(tokens)) < of.rate)
    return torch.from_numpy(np.stack(rows)).to(draft.motion.device)


ACCEPTANCE_RULES = (
    "exact", "margin", "residual", "blind(SHARE)", "own(SHARE)", "distance(D)", "typical(EPSILON)", "agreement(SHARE)"
)  # fmt: skip
BLIND = "blind(0.95)"  # in the place of a checkpoint's `residual`
NUMBER = r"([0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})"


def acceptance_rule(name: str, code: RfsqConfig, timed_only: bool = False) -> AcceptanceRule:
    """The rule of that name for a code; a setting left out takes the default named here.

    `exact`; `margin`; `residual`; `blind(SHARE)`, 0 < SHARE <= 1 (0.95) of the chunk's scalars within the code's reach
    of block 1's own estimate, or `blind(SHARE,moving)` of those that carry motion; `own(SHARE)`, `own(SHARE,moving)`,
    which judge alike and execute that estimate in any case; `distance(D)`, D >= 0 bins (1); `typical(EPSILON)` or
    `typical(EPSILON,DELTA)`, both in (0, 1] (Medusa's 0.09, and the root of EPSILON as its authors advise);
    `agreement(SHARE)`, 0 < SHARE <= 1 (0.7). timed_only: nobody will execute the chunks, so that also `synthetic(RATE)`
    or `synthetic(RATE,SEED)` may be asked for, 0 <= RATE <= 1, SEED a whole number (0)."""
    text = name if isinstance(name, str) else ""
    code = checked(RfsqConfig, code, "acceptance: code")
    if text == "exact":
        return AcceptanceRule(name, exact)
    if text == "margin":
        return AcceptanceRule(name, lambda d, logits: margin(d, logits, code))
    if text == "residual":
        return AcceptanceRule(name, None)
    if match := re.fullmatch(rf"(blind|own)(?:\({NUMBER}(, ?moving)?\))?", text):
        share = float(match[2] or 0.95)
        if 0.0 < share <= 1.0:
            name = f"{match[1]}({share:g}{',moving' if match[3] else ''})"
            return AcceptanceRule(name, None, share=share, moving=bool(match[3]), untold=match[1] == "own")
    if match := re.fullmatch(r"distance(?:\(([0-9]{1,4})\))?", text):
        bins = int(match[1] or 1)
        return AcceptanceRule(f"distance({bins})", lambda d, logits: distance(d, logits, bins))
    if match := re.fullmatch(rf"typical(?:\({NUMBER}(?:, ?{NUMBER})?\))?", text):
        epsilon = float(match[1] or 0.09)
        delta = float(match[2] or epsilon**0.5)
        if 0.0 < epsilon <= 1.0 and 0.0 < delta <= 1.0:
            name = f"typical({epsilon:g},{delta:g})" if match[2] else f"typical({epsilon:g})"
            return AcceptanceRule(name, lambda d, logits: typical(d, logits, epsilon, delta))
    if match := re.fullmatch(rf"agreement(?:\({NUMBER}\))?", text):
        share = float(match[1] or 0.7)
        if 0.0 < share <= 1.0:
            return AcceptanceRule(f"agreement({share:g})", lambda d, logits: agreement(d, logits, share))
    if match := re.fullmatch(rf"synthetic\({NUMBER}(?:, ?([0-9]{{1,9}}))?\)", text):
        of = Synthetic(float(match[1]), int(match[2] or 0))
        if not timed_only:
            raise RsdError(f"acceptance {name!r}: makes up what the target says, expected in rsd bench latency alone")
        if of.rate <= 1.0:
            return AcceptanceRule(f"synthetic({of.rate:g},{of.seed})", exact, synthetic=of)
        raise RsdError(f"acceptance {name!r}: expected synthetic(RATE) or synthetic(RATE,SEED), RATE from 0 to 1")
    allowed = "D a whole number of at most 4 digits, 0 < EPSILON <= 1, 0 < SHARE <= 1"
    raise RsdError(f"acceptance {shown(name)}: expected {', '.join(ACCEPTANCE_RULES)} with {allowed}")


def accepted_prefix(accepted: Tensor) -> Tensor:
    """bool [B, c, P] -> int [B], length of the prefix of levels whose every token is accepted."""
    return leading(accepted.all(-1))


def leading(accepted: Tensor) -> Tensor:
    """bool [B, c, ...] -> int [B, ...], how many of the first of the c are True before one is not.

    By a sum that counts what is not: ONNX has no cumulative product."""
    return ((~accepted).long().cumsum(dim=1) == 0).sum(1)


@fusible
def accept(ops: Primitives, draft: Draft, blocks: list[Tensor]) -> Verification:
    """The target's features of block 1 and of those that were told the draft -> the chunk, fine levels regressed.

    Block k+1 has seen just the levels 1..k, so the continuous estimate of what they miss is at hand however many are
    accepted. k counts a scalar's own accepted levels under a rule that judges single tokens, the accepted levels of
    the chunk under the others."""
    if ops.rule.unit == "chunk":
        return accept_as_a_whole(ops, draft, blocks)
    features = torch.stack(blocks, dim=1)  # [B, c+1, H, D]
    verified = judge(ops, draft, features)
    whole = verified.levels[:, None].expand_as(draft.motion[:, 0])
    kept = leading(verified.accepted) if ops.rule.unit == "scalar" else whole
    missing = ops.finite(ops.target.residuals(features))
    prefix = torch.stack([torch.zeros_like(draft.prefixes[0]), *draft.prefixes], dim=1)  # [B, c+1, P]
    wanted = (prefix + missing).gather(1, kept.unsqueeze(1)).squeeze(1)
    tokens, value = requantise(ops.code, wanted, draft.motion, kept)
    return Verification(value, tokens, verified.accepted, verified.levels)


def accept_as_a_whole(ops: Primitives, draft: Draft, blocks: list[Tensor]) -> Verification:
    """The last block was told all that was drafted and says what is missing, which is added where the draft stands;
    elsewhere block 1's own estimate is executed, or, if there is no block 1, the tokens follow the correction alone.

    A scalar's draft stands if what is missing is within what the finer levels take out. Under `blind` block 1, which
    was told nothing, has the first word, on the chunk as a whole; under `own` there is no other and it has the last."""
    count, rule, told = draft.motion.shape[1], ops.rule, draft.prefixes[-1]
    reach = ops.target.code.reach(count)
    if rule.untold:
        own = ops.finite(ops.target.residual(blocks[0], 1))
        missing = own - told
    else:
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
    if ops.rule.synthetic is not None:
        accepted = made_up(draft, ops.rule.synthetic, ops.turn)[:, 1:, None].expand_as(accepted)
    return Verified(torch.where(accepted, draft.motion, logits.argmax(-1)), accepted, accepted_prefix(accepted))


def requantise(code: Rfsq, value: Tensor, drafted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, P] of `value` [B, P] that begin, scalar by scalar, with kept[b, p] of the drafted symbols, and
    what they decode to [B, P].

    A drafted digit after which the finer levels could no longer reach the value gives way to the value's own (the
    margins of a redundant code hold one level at a time, not all together), so inside the code's span the tokens
    are within half the last step of `value` whatever was drafted."""
    config, residual, decoded, symbols = code.config, value, torch.zeros_like(value, dtype=torch.float32), []
    stands = torch.ones_like(value, dtype=torch.bool)
    for level in range(1, config.levels + 1):
        digit = code.digit(residual, level, finite=False)
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
