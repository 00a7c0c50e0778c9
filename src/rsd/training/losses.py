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
    code, c = Rfsq(main.code), draft.config.levels
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

    # made on the device: a list copied there would stop it at every step
    levels = torch.arange(1, main.code.levels + 1, device=target.device)
    weights = config.level_decay ** (levels - c).clamp(min=0)
    weights = weights / weights.sum()
    logits = main.level_head.every_level(torch.stack(blocks, dim=1))
    losses["levels"] = (level_errors(logits, torch.stack(digits, dim=1)) * weights).sum()
    losses["parallel"] = (level_errors(main.parallel_logits(features), code.quantise(target)[0]) * weights).sum()
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
    value, shown, logits, digits = torch.zeros_like(target), [], [], []
    for level in range(1, draft.config.levels + 1):
        logits.append(draft.logits(read, value, gripper, level))
        digit = code.digit(target - value, level)
        digits.append(digit.long() + code.config.half)
        shown.append(torch.where(own, (logits[-1].argmax(-1) - code.config.half).float(), digit))
        value = value + shown[-1] * code.config.weight(level)
    closing = F.binary_cross_entropy_with_logits(gripper_logits.float(), gripper.float())
    errors = level_errors(torch.stack(logits, dim=1), torch.stack(digits, dim=1))
    return shown, {"draft": errors.mean() + closing}


def jittered(digit: Tensor, rate: Tensor, margin: int, half: int) -> Tensor:
    """digit [B, P] with a share rate [B, 1] moved by up to +-margin (finer levels take it out), in range."""
    if margin == 0:
        return digit
    move = torch.randint(1, margin + 1, digit.shape, device=digit.device)
    move = torch.where(torch.rand_like(digit) < 0.5, -move, move)
    return torch.where(torch.rand_like(digit) < rate, (digit + move).clamp(-half, half), digit)


def level_errors(logits: Tensor, symbols: Tensor) -> Tensor:
    """Logits [B, L, P, K], symbols int [B, L, P] -> mean cross entropy of each level [L]."""
    errors = F.cross_entropy(logits.float().flatten(0, 2), symbols.flatten(), reduction="none")
    return errors.unflatten(0, symbols.shape).mean((0, 2))
