"""The substitution test: how much of a wrong draft gets through a verifier.

The target is given the draft of another instruction for the same scene and moment. A verifier executes what it would
have executed anyway; one that has learnt that drafts are right copies. Acceptance rates show none of it: the rule
`residual` of the policy of 57 M lets 96 % of such drafts stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsd.decoding.decoders import DECODERS, look
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import EpisodeState, PolicyInput
from rsd.policy import RsdPolicy
from rsd.types import EAGER, Observation, RsdError


@dataclass(frozen=True)
class Substitution:
    """What a rule makes of right and wrong drafts, over all observations.

    draft_pull: |executed - the target's own chunk| / |draft - the target's own chunk|, both means of absolute
    normalised actions: 0 for a verifier that is not led astray, 1 for one that copies. own_stand, wrong_stand: shares
    of the drafted tokens that stand. apart: |draft - own chunk| of the wrong drafts; observations: how many.
    """

    draft_pull: float
    own_stand: float
    wrong_stand: float
    apart: float
    observations: int


@torch.inference_mode()
def substitution(
    policy: RsdPolicy, observations: Sequence[Observation], other_instructions: Sequence[str]
) -> Substitution:
    """Give the target of a policy (decoder `rsd-fused`, engine eager) the draft of its visual drafter under another
    instruction, one for each observation.

    The target's own chunk is that of `l1`, the same pass with the draft withheld. Raises RsdError for another decoder
    or engine, and where an instruction is the observation's own."""
    if policy.decode != "rsd-fused" or policy.engine != EAGER:
        raise RsdError(f"substitution: expected rsd-fused on engine eager, found {policy.decode} on {policy.engine}")
    wrong = [replace(o, instruction=other) for o, other in zip(observations, other_instructions, strict=True)]
    if same := [o.instruction for o, other in zip(observations, wrong, strict=True) if o == other]:
        raise RsdError(f"substitution: expected another instruction than the observation's own, found {same[0]!r}")
    ops, seen, misled = policy.core.ops, policy.core.body(observations), policy.core.body(wrong)

    def normalised(value: Tensor) -> Tensor:
        return policy.tokenizer.to_normalised(value * policy.tokenizer.first_step)

    own = normalised(DECODERS["l1"].decode(ops, seen, EpisodeState()).value)
    right, left = judged(ops, seen, seen), judged(ops, seen, misled)
    ops.check()
    apart = float((normalised(left.draft) - own).abs().mean())
    moved = float((normalised(left.executed) - own).abs().mean())
    return Substitution(moved / apart, right.stand, left.stand, apart, len(observations))


@dataclass(frozen=True)
class Judged:
    """draft, executed: chunk coefficients [B, P]; stand: share of the drafted tokens."""

    draft: Tensor
    executed: Tensor
    stand: float


def judged(ops: Primitives, seen: PolicyInput, drafted_from: PolicyInput) -> Judged:
    """What the target, which sees `seen`, makes of the draft of something else."""
    draft = ops.draft(drafted_from, None)
    result = look(ops, seen, draft)
    assert result.accepted is not None
    return Judged(ops.forecast(draft).value, result.value, float(result.accepted.float().mean()))
