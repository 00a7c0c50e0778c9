"""What the target and the draft are trained on: the prefixes that decoding will meet.

Teacher forcing alone makes the target take a draft's digits as evidence of the truth and copy their error. So
part of the batch continues the draft's own coarse digits (detached; the targets are what is still missing
after them), and part has its digits jittered within the code's margin, targets recomputed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rsd.decoding.calibration import fingertip_deviation
from rsd.models.bundle import RsdModel
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.target import BlockTarget, TargetModel, committed_features
from rsd.models.trunk import KVCache
from rsd.models.visual_drafter import VisualDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import Rfsq
from rsd.training.config import DrafterLoss, LossConfig
from rsd.training.dataset import Batch
from rsd.types import RsdError


def policy_losses(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, config: LossConfig
) -> dict[str, Tensor]:
    """Batch (paired, if there is a visual drafter) -> named scalar losses; `total` is what to minimise.

    Neither draft's losses reach the target."""
    target, draft = model.target, model.feature_drafter
    if config.committed:
        batch = with_committed(target, batch, config.committed)
    code, c = Rfsq(target.code), draft.config.levels
    truth = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step  # [B, P] in first steps
    gripper = tokenizer.gripper_symbols(batch.chunk)

    text = target.encode_text(batch.words)
    prefix = target.embed_prefix(batch.images, batch.state, text)
    features, cache = target.prefill(prefix)
    length = prefix.shape[1]

    own = torch.rand(len(truth), 1, device=truth.device) < config.draft_share
    drafted, losses = draft_losses(draft, features.detach(), truth, gripper, own, code)
    if model.visual_drafter is not None:
        run = TargetRun(target.remembered(length), cache, features, text[1])
        ahead, visual_losses = visual_drafter_losses(model, run, batch, truth, gripper, tokenizer, config)
        losses.update(visual_losses)
        # half of the later moments' prefixes are the visual drafter's, whose tokens ride in the prefill
        riding = torch.rand(len(ahead[0]), 1, device=truth.device) < 0.5
        for level in range(min(c, len(ahead))):
            later, earlier = drafted[level].chunk(2)
            drafted[level] = torch.cat([torch.where(riding & own[: len(later)], ahead[level], later), earlier])

    value, prefixes, digits = torch.zeros_like(truth), [torch.zeros_like(truth)], []
    jitter = config.jitter * torch.rand(len(truth), 1, device=truth.device)
    for level in range(1, target.code.levels + 1):
        digit = code.digit(truth - value, level)
        digits.append(digit.long() + target.code.half)
        shown = jittered(digit, jitter, target.code.margin(level), target.code.half)
        shown = torch.where(own, drafted[level - 1] if level <= c else digit, shown)
        value = value + shown * target.code.weight(level)
        prefixes.append(value)
    judging, told = None, prefixes[c]
    if target.whole_block:
        if config.counterfactual:  # another episode's, most likely; what it misses is as far as the two are apart
            other = torch.rand(len(truth), 1, device=truth.device) < config.counterfactual
            told = torch.where(other, told.roll(1, 0), told)
        judging = target.whole(told, cache, length)
    part = slice(None, None, config.levels_every)
    kept = KVCache([keys[part] for keys in cache.keys], [values[part] for values in cache.values])
    blocks = [features[part], *target.extend([prefix[part] for prefix in prefixes[1:-1]], gripper[part], 2, kept)]

    # made on the device: a list copied there would stop it at every step
    levels = torch.arange(1, target.code.levels + 1, device=truth.device)
    weights = config.level_decay ** (levels - c).clamp(min=0)
    weights = weights / weights.sum()
    logits = target.level_head.first_levels(torch.stack(blocks, dim=1))
    losses["levels"] = (level_errors(logits, torch.stack(digits, dim=1)[part]) * weights).sum()
    losses["parallel"] = (level_errors(target.parallel_logits(features), code.quantise(truth)[0]) * weights).sum()
    wanted = tokenizer.to_normalised(truth * tokenizer.first_step)

    def closing_error(block: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(target.gripper_logits(block).float(), gripper.float())

    def chunk_error(block: Tensor, level: int, value: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of a block that was told the levels 1..level of those rows, which decode to `value`."""
        estimate = value[rows] + target.residual(block, level + 1).float()
        return (tokenizer.to_normalised(estimate * tokenizer.first_step) - wanted[rows]).abs().mean()

    losses["gripper"] = closing_error(features)
    finer = enumerate(blocks[1 : c + 1], start=1)
    errors = [chunk_error(features, 0, prefixes[0]), *(chunk_error(block, k, prefixes[k], part) for k, block in finer)]
    losses["l1"], losses["regress"] = errors[0], errors[-1]
    losses["total"] = (
        losses["levels"]
        + config.parallel * losses["parallel"]
        + config.gripper * losses["gripper"]
        + config.regress * (errors[0] + sum(errors[1:]) / c)
        + losses["draft"]
    )
    if judging is not None:
        losses["whole"] = chunk_error(judging, c, told)
        losses["total"] = losses["total"] + config.regress * losses["whole"] + config.gripper * closing_error(judging)
    if config.grounding:
        losses["grounding"] = grounding_loss(target, batch)
        losses["total"] = losses["total"] + config.grounding * losses["grounding"]
    if model.visual_drafter is not None:
        losses["total"] = losses["total"] + visual_total(losses, config)
    return losses


def with_committed(target: BlockTarget, batch: Batch, share: float) -> Batch:
    """A share of the rows is told what was executed of its first steps, up to all but one, and its chunk begins with
    that; of pairs the earlier moments alone, for a visual drafter learns the later ones' chunks. In what a policy drove
    it is the policy's, and the rest is what the expert says where it led. A drafter remembers nothing of a row that is
    told: it would read there what it is to draft."""
    if not isinstance(target, TargetModel) or target.committed_in is None or batch.done is None:
        raise RsdError("--loss.committed: expected a target that is --policy.target.committed")
    rows, steps = batch.chunk.shape[:2]
    count = torch.randint(1, steps, (rows,), device=batch.chunk.device)
    count = count * (torch.rand(rows, device=count.device) < share)
    count[: rows // 2 * batch.paired] = 0
    told = (torch.arange(steps, device=count.device) < count[:, None])[..., None]
    state = torch.cat([batch.state, committed_features(batch.done, count)], dim=1)
    return replace(batch, state=state, chunk=torch.where(told, batch.done, batch.chunk), told=count > 0)


def grounding_loss(target: BlockTarget, batch: Batch) -> Tensor:
    """How badly the target says which image token shows what another sentence asks for, on the even rows of the batch.

    A policy that has seen few combinations of thing and place learns places by heart; the same pictures asked for each
    of their things teach it to look. The aim is shared out to the four tokens about a spot, by their nearness."""
    if not isinstance(target, TargetModel) or target.grounding_head is None or batch.asked is None:
        raise RsdError("--loss.grounding: expected a target that is --policy.target.grounded")
    words, spot = batch.asked
    text = target.encode_text(words)
    logits = target.grounding_logits(target.embed_prefix(batch.images[::2], batch.state[::2], text)).float()
    side = round(logits.shape[1] ** 0.5)
    known = spot.isfinite().all(1)
    at = (torch.where(known[:, None], spot, 0.5) * side - 0.5).clamp(0, side - 1)  # in tokens, from the first's middle
    cells = torch.arange(side, device=at.device)
    across, down = ((1 - (cells - at[:, axis, None]).abs()).clamp(min=0) for axis in (0, 1))  # each [B/2, side]
    aim = (down[:, :, None] * across[:, None, :]).flatten(1)
    errors = -(aim * F.log_softmax(logits, dim=-1)).sum(-1)
    return (errors * known).sum() / known.sum().clamp(min=1)


class TargetRun(NamedTuple):
    """The target's prefill of a batch: positions of its cache to remember, features of block 1 [B, H, D], instructions
    [B, Dt]."""

    length: int
    cache: KVCache
    features: Tensor
    condition: Tensor


def visual_drafter_losses(
    model: RsdModel,
    run: TargetRun,
    batch: Batch,
    truth: Tensor,
    gripper: Tensor,
    tokenizer: ActionTokenizer,
    config: DrafterLoss,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The visual drafter acts at the later moment of each pair and remembers the target's run at the earlier one.

    Returns its own digits per level [B/2, P] and its losses: tokens and gripper; its chunk; how well it forecasts its
    chunk's deviation from the target's."""
    target, visual_drafter = model.target, model.visual_drafter
    assert visual_drafter is not None
    if not batch.paired:
        raise RsdError("visual drafter: expected a batch of paired frames (FrameDataset.draw with most_chunks > 0)")
    later = slice(0, len(truth) // 2)
    past = KVCache(values=[values.detach()[len(truth) // 2 :] for values in run.cache.values])
    memory = visual_drafter.remember(visual_drafter.reads(past, run.length))
    state, condition = target.normalise(batch.state[later]), run.condition.detach()[later]
    known = torch.rand(len(state), device=state.device) >= config.blind
    if batch.told is not None:
        known = known & ~batch.told[len(truth) // 2 :]
    features = visual_drafter.perceive(batch.images[later], state, condition, memory, known)
    meant = target.residual(run.features[later], 1).detach().float() * tokenizer.first_step
    reference = tokenizer.to_actions(meant, gripper[later])[:, : batch.execute]
    shares = shares_of(batch, len(state), config)
    goal, grip = truth[later], gripper[later]
    return drafter_losses(visual_drafter, tokenizer, features, goal, grip, reference, *shares)[:2]


def drafter_losses(
    drafter: VisualDrafter,
    tokenizer: ActionTokenizer,
    features: Tensor,
    goal: Tensor,
    gripper: Tensor,
    reference: Tensor,
    trains: Tensor | None = None,
    forecasts: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """A visual drafter's features [B, H, d], what it is to draft [B, P] and [B, H], the target's actions [B, n, 7] ->
    its digits per level [B, P]; losses of tokens and gripper, of the chunk, and of the forecast of its deviation from
    the target's; that deviation, mm [B]. trains, forecasts: see `shares_of`."""
    code, unit = Rfsq(drafter.code), tokenizer.first_step
    own = torch.ones(len(goal), 1, dtype=torch.bool, device=goal.device)
    digits, losses = draft_losses(drafter.levels, features, goal, gripper, own, code, trains)
    coarse = sum((digit * code.step(level) for level, digit in enumerate(digits, start=1)), torch.zeros_like(goal))
    value = coarse + drafter.remainder(features, coarse, gripper).float()
    wanted, found = tokenizer.to_normalised(goal * unit), tokenizer.to_normalised(value * unit)
    drafted = tokenizer.to_actions(value.detach() * unit, gripper)[:, : reference.shape[1]]
    apart, forecast = fingertip_deviation(drafted, reference), drafter.log_deviation(features.detach()).float()
    named = {
        "visual": losses["draft"],
        "visual_regress": weighted((found - wanted).abs().flatten(1).mean(1), trains),
        "deviation": weighted(F.smooth_l1_loss(forecast, torch.log1p(apart), reduction="none"), forecasts),
    }
    return digits, named, apart


def shares_of(batch: Batch, rows: int, config: DrafterLoss) -> tuple[Tensor | None, Tensor | None]:
    """Which of the first rows train the drafts, and which the forecast of their deviation: 1 or 0 [rows]; None: all."""
    if not config.forecast_every:
        return None, None
    if batch.episode is None:
        raise RsdError("--loss.forecast-every: expected batches that know their episodes")
    forecasts = (batch.episode[:rows] % config.forecast_every == 0).float()
    return 1 - forecasts, forecasts


def weighted(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of errors [B], of those rows alone that weigh anything."""
    return errors.mean() if weights is None else (errors * weights).sum() / weights.sum().clamp(min=1)


def visual_total(losses: dict[str, Tensor], config: DrafterLoss) -> Tensor:
    """What the visual drafter minimises, of the losses of `visual_drafter_losses`."""
    return losses["visual"] + config.regress * losses["visual_regress"] + config.deviation * losses["deviation"]


def draft_losses(
    draft: FeatureDrafter,
    features: Tensor,
    truth: Tensor,
    gripper: Tensor,
    own: Tensor,
    code: Rfsq,
    rows: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """features [B, H, D] of the target, target [B, P]; own bool [B, 1]: the draft continues its own digits; rows: see
    `weighted`.

    Returns the digits per level that its prefix was built from, and its losses."""
    read, gripper_logits = draft.read(features)
    value, shown, logits, digits = torch.zeros_like(truth), [], [], []
    for level in range(1, draft.config.levels + 1):
        logits.append(draft.logits(read, value, gripper, level))
        digit = code.digit(truth - value, level)
        digits.append(digit.long() + code.config.half)
        shown.append(torch.where(own, (logits[-1].argmax(-1) - code.config.half).float(), digit))
        value = value + shown[-1] * code.config.weight(level)
    closing = F.binary_cross_entropy_with_logits(gripper_logits.float(), gripper.float(), reduction="none").mean(1)
    errors = symbol_errors(torch.stack(logits, dim=1), torch.stack(digits, dim=1)).mean((1, 2))
    return shown, {"draft": weighted(errors + closing, rows)}


def jittered(digit: Tensor, rate: Tensor, margin: int, half: int) -> Tensor:
    """digit [B, P] with a share rate [B, 1] moved by up to +-margin (finer levels take it out), in range."""
    if margin == 0:
        return digit
    move = torch.randint(1, margin + 1, digit.shape, device=digit.device)
    move = torch.where(torch.rand_like(digit) < 0.5, -move, move)
    return torch.where(torch.rand_like(digit) < rate, (digit + move).clamp(-half, half), digit)


def level_errors(logits: Tensor, symbols: Tensor) -> Tensor:
    """Logits [B, L, P, K], symbols int [B, L, P] -> mean cross entropy of each level [L]."""
    return symbol_errors(logits, symbols).mean((0, 2))


def symbol_errors(logits: Tensor, symbols: Tensor) -> Tensor:
    """The same of every symbol [B, L, P]."""
    errors = F.cross_entropy(logits.float().flatten(0, 2), symbols.flatten(), reduction="none")
    return errors.unflatten(0, symbols.shape)
