"""Acceptance rules: which drafted tokens may stand, given the main model's logits. Pure functions.

A rule sees drafted symbols int [B, c, P] and the main's logits [B, c, P, K] of the same levels (each
conditioned on the drafted levels above it) and returns bool [B, c, P]. Under a `per_scalar` rule every scalar
keeps its own longest accepted prefix of levels; the others keep the longest one whose every token is accepted.
The gripper is compared apart, with zero tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError


@dataclass(frozen=True)
class AcceptanceRule:
    """accept(drafted, logits) -> bool [B, c, P]; see the module's docstring."""

    name: str
    accept: Callable[[Tensor, Tensor], Tensor]
    per_scalar: bool = False


def exact(drafted: Tensor, logits: Tensor) -> Tensor:
    """Token equals the main's own greedy choice: the decoded tokens are those of `ar`."""
    return drafted == logits.argmax(-1)


def margin(drafted: Tensor, logits: Tensor, code: RfsqConfig) -> Tensor:
    """Digit within the distance that the finer levels of a redundant code take out (`RfsqConfig.margin`)."""
    apart = (drafted - logits.argmax(-1)).abs()
    levels = range(drafted.shape[1])
    return torch.stack([apart[:, level] <= code.margin(level + 1) for level in levels], dim=1)


def agreement(drafted: Tensor, logits: Tensor, share: float) -> Tensor:
    """A whole level stands if at least `share` of its tokens equal the main's (original experiment: 0.7)."""
    equal = drafted == logits.argmax(-1)
    return (equal.float().mean(-1, keepdim=True) >= share).expand_as(equal)


def acceptance_rule(name: str, code: RfsqConfig) -> AcceptanceRule:
    """`exact`, `margin` or `agreement(SHARE)` (default share 0.7) -> the rule for a code."""
    if name == "exact":
        return AcceptanceRule(name, exact)
    if name == "margin":
        return AcceptanceRule(name, lambda drafted, logits: margin(drafted, logits, code), per_scalar=True)
    if match := re.fullmatch(r"agreement(?:\((\d*\.?\d+)\))?", name):
        share = float(match[1] or 0.7)
        if 0.0 < share <= 1.0:
            return AcceptanceRule(f"agreement({share:g})", lambda d, logits: agreement(d, logits, share))
    raise RsdError(f"acceptance {name!r}: expected {', '.join(ACCEPTANCE_RULES)} with 0 < SHARE <= 1")


ACCEPTANCE_RULES = ("exact", "margin", "agreement(SHARE)")


def accepted_prefix(accepted: Tensor) -> Tensor:
    """bool [B, c, P] -> int [B], length of the prefix of levels whose every token is accepted."""
    return accepted.all(-1).long().cumprod(dim=1).sum(1)
