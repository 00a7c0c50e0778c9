"""What the main and the draft are trained on: the prefixes that decoding will meet.

Teacher forcing alone makes the main take a draft's digits as evidence of the truth and copy their error. So
part of the batch continues the draft's own coarse digits (detached; the targets are what is still missing
after them), and part has its digits jittered within the code's margin, targets recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rsd.models.draft import DraftModel
from rsd.models.main import MainModel
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import Rfsq
from rsd.training.dataset import Batch


@dataclass(frozen=True)
class LossConfig:
    """draft_share: part of the batch on the draft's prefixes; jitter: largest share of digits disturbed in
    the rest; level_decay: weight of a level's loss relative to the one above, past the coarse ones; the
    others are weights."""

    draft_share: float = 0.5
    jitter: float = 0.4
    level_decay: float = 0.7
    regress: float = 5.0
    parallel: float = 0.5
    gripper: float = 1.0


def policy_losses(
    main: MainModel, draft: DraftModel, tokenizer: ActionTokenizer, batch: Batch, config: LossConfig
) -> dict[str, Tensor]:
    """Batch -> named scalar losses; `total` is what to minimise."""
    code, c = Rfsq(main.code, torch.ones(1, device=batch.chunk.device)), draft.config.levels
    target = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step  # [B, P] in first steps
    gripper = tokenizer.gripper_symbols(batch.chunk)

    prefix = main.embed_prefix(batch.images, batch.state, main.encode_text(batch.words))
    features, cache = main.prefill(prefix)

    own = torch.rand(len(target), 1, device=target.device) < config.draft_share
    drafted, losses = draft_losses(draft, features.detach(), target, gripper, own, code)

    value, prefixes, digits = torch.zeros_like(target), [torch.zeros_like(target)], []
    jitter = config.jitter * torch.rand(len(target), 1, device=target.device)
    for level in range(1, main.code.levels + 1):
        digit = code.digit(target - value, level)
        digits.append(digit.long() + main.code.half)
        shown = jittered(digit, jitter, main.code.margin(level), main.code.half)
        shown = torch.where(own, drafted[level - 1] if level <= c else digit, shown)
        value = value + shown * main.code.weight(level)
        prefixes.append(value)
    blocks = [features, *main.extend(prefixes[1:-1], gripper, 2, cache)]

    weights = [config.level_decay ** max(0, level - c) for level in range(1, main.code.levels + 1)]
    levels = [
        F.cross_entropy(_logits(main.logits(block, i + 1)), digit.flatten())
        for i, (block, digit) in enumerate(zip(blocks, digits, strict=True))
    ]
    losses["levels"] = _weighted(levels, weights)
    plain = code.quantise(target)[0]
    at_once = main.parallel_logits(features)
    levels = [F.cross_entropy(_logits(at_once[:, i]), plain[:, i].flatten()) for i in range(main.code.levels)]
    losses["parallel"] = _weighted(levels, weights)
    closing = main.gripper_logits(features).float()
    losses["gripper"] = F.binary_cross_entropy_with_logits(closing, gripper.float())
    wanted = tokenizer.to_normalised(target * tokenizer.first_step)
    errors = []
    for index, block in enumerate(blocks[: c + 1]):
        estimate = prefixes[index] + main.residual(block, index + 1).float()
        errors.append((tokenizer.to_normalised(estimate * tokenizer.first_step) - wanted).abs().mean())
    losses["l1"], losses["regress"] = errors[0], errors[-1]
    losses["total"] = (
        losses["levels"]
        + config.parallel * losses["parallel"]
        + config.gripper * losses["gripper"]
        + config.regress * (errors[0] + sum(errors[1:]) / c)
        + losses["draft"]
    )
    return losses


def draft_losses(
    draft: DraftModel, features: Tensor, target: Tensor, gripper: Tensor, own: Tensor, code: Rfsq
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """features [B, H, D] of the main, target [B, P]; own bool [B, 1]: the draft continues its own digits.

    Returns the digits per level that its prefix was built from, and its losses.
    """
    read, gripper_logits = draft.read(features)
    value, shown, errors = torch.zeros_like(target), [], []
    for level in range(1, draft.config.levels + 1):
        logits = draft.logits(read, value, gripper, level)
        digit = code.digit(target - value, level)
        errors.append(F.cross_entropy(_logits(logits), digit.long().flatten() + code.config.half))
        shown.append(torch.where(own, (logits.argmax(-1) - code.config.half).float(), digit))
        value = value + shown[-1] * code.config.weight(level)
    grip = F.binary_cross_entropy_with_logits(gripper_logits.float(), gripper.float())
    return shown, {"draft": _weighted(errors, [1.0] * len(errors)) + grip}


def jittered(digit: Tensor, rate: Tensor, margin: int, half: int) -> Tensor:
    """digit [B, P] with a share rate [B, 1] moved by up to +-margin (finer levels take it out), in range."""
    if margin == 0:
        return digit
    move = torch.randint(1, margin + 1, digit.shape, device=digit.device)
    move = torch.where(torch.rand_like(digit) < 0.5, -move, move)
    return torch.where(torch.rand_like(digit) < rate, (digit + move).clamp(-half, half), digit)


def _logits(logits: Tensor) -> Tensor:
    return logits.float().flatten(0, 1)  # [B, P, K] -> [B*P, K]


def _weighted(losses: list[Tensor], weights: list[float]) -> Tensor:
    terms = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(terms).sum() / sum(weights)
