"""Acceptance rules: which drafted tokens may stand, given the target's logits. Pure functions.

A rule sees drafted symbols int [B, c, P] and the target's logits [B, c, P, K] of the same levels (each
conditioned on the drafted levels above it) and returns bool [B, c, P]. Whatever the setting, a token that is the
target's own greedy choice is never the reason for a rejection (but under `residual`, which sees no logits). Under a
`per_scalar` rule every scalar keeps its own longest accepted prefix of levels; the others keep the longest one whose
every token is accepted.
The gripper is compared apart, with zero tolerance. Logits must be finite: the caller sees to it, since a NaN
would win an argmax as an ordinary token. Nothing here waits for the device, so a CUDA graph can hold a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rsd.checks import shown
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError


@dataclass(frozen=True)
class AcceptanceRule:
    """accept(drafted, logits) -> bool [B, c, P]; see the module's docstring. None: the draft is judged as a whole, by
    what the target finds that it misses (`verification.accept_as_a_whole`), or, with a `share`, by what the target
    means without having been told of it (`within_reach`)."""

    name: str
    accept: Callable[[Tensor, Tensor], Tensor] | None
    per_scalar: bool = False
    share: float | None = None
    moving: bool = False

    @property
    def as_a_whole(self) -> bool:
        return self.accept is None

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
    for delta < 1; naming it here keeps that true at delta = 1 and against rounding.
    """
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


ACCEPTANCE_RULES = (
    *("exact", "margin", "residual", "blind(SHARE)", "distance(D)", "typical(EPSILON)", "agreement(SHARE)"),
)
NUMBER = r"([0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})"


def acceptance_rule(name: str, code: RfsqConfig) -> AcceptanceRule:
    """The rule of that name for a code; a setting left out takes the default named here.

    `exact`; `margin`; `residual`; `blind(SHARE)`, 0 < SHARE <= 1 (0.95) of the chunk's scalars within the code's reach
    of block 1's own estimate, or `blind(SHARE,moving)` of those that carry motion; `distance(D)`, D >= 0 bins (1);
    `typical(EPSILON)` or `typical(EPSILON,DELTA)`, both in (0, 1] (Medusa's 0.09, and the root of EPSILON as its
    authors advise); `agreement(SHARE)`, 0 < SHARE <= 1 (0.7).
    """
    if name == "exact":
        return AcceptanceRule(name, exact)
    if name == "margin":
        return AcceptanceRule(name, lambda d, logits: margin(d, logits, code), per_scalar=True)
    if name == "residual":
        return AcceptanceRule(name, None, per_scalar=True)
    if match := re.fullmatch(rf"blind(?:\({NUMBER}(, ?moving)?\))?", name):
        share = float(match[1] or 0.95)
        if 0.0 < share <= 1.0:
            name = f"blind({share:g}{',moving' if match[2] else ''})"
            return AcceptanceRule(name, None, share=share, moving=bool(match[2]))
    if match := re.fullmatch(r"distance(?:\(([0-9]{1,4})\))?", name):
        bins = int(match[1] or 1)
        return AcceptanceRule(f"distance({bins})", lambda d, logits: distance(d, logits, bins), per_scalar=True)
    if match := re.fullmatch(rf"typical(?:\({NUMBER}(?:, ?{NUMBER})?\))?", name):
        epsilon = float(match[1] or 0.09)
        delta = float(match[2] or epsilon**0.5)
        if 0.0 < epsilon <= 1.0 and 0.0 < delta <= 1.0:
            name = f"typical({epsilon:g},{delta:g})" if match[2] else f"typical({epsilon:g})"
            return AcceptanceRule(name, lambda d, logits: typical(d, logits, epsilon, delta), per_scalar=True)
    if match := re.fullmatch(rf"agreement(?:\({NUMBER}\))?", name):
        share = float(match[1] or 0.7)
        if 0.0 < share <= 1.0:
            return AcceptanceRule(f"agreement({share:g})", lambda d, logits: agreement(d, logits, share))
    allowed = "D a whole number of at most 4 digits, 0 < EPSILON <= 1, 0 < SHARE <= 1"
    raise RsdError(f"acceptance {shown(name)}: expected {', '.join(ACCEPTANCE_RULES)} with {allowed}")


def accepted_prefix(accepted: Tensor) -> Tensor:
    """bool [B, c, P] -> int [B], length of the prefix of levels whose every token is accepted."""
    return leading(accepted.all(-1))


def leading(accepted: Tensor) -> Tensor:
    """bool [B, c, ...] -> int [B, ...], how many of the first of the c are True before one is not.

    By a sum that counts what is not: ONNX has no cumulative product."""
    return ((~accepted).long().cumsum(dim=1) == 0).sum(1)
