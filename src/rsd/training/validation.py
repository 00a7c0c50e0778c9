"""Offline validation on held-out episodes: every decoder's error beside the draft's acceptance.

A metric for debugging, not the judge: regression looks good in it, closed-loop success decides.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS, Decoder, look, names
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import DecodeResult, EpisodeState, PolicyInput
from rsd.models.bundle import RsdModel
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.dataset import FrameDataset

MAX_FRAMES, BATCH = 2048, 128


@torch.no_grad()
def validate(
    model: RsdModel, tokenizer: ActionTokenizer, dataset: FrameDataset, frames: int = MAX_FRAMES, batch: int = BATCH
) -> dict[str, object]:
    """-> mean absolute error (normalised units) and gripper accuracy by decoder; acceptance by level.

    frames: at most so many, spread over the episodes; batch: of them at once."""
    model.eval()
    batches = dataset.spread(frames, batch)
    runs = [(name, name, "exact") for name in names(drafts=False, visual=False)]
    rules = ["margin", "agreement", "exact"] + ["residual"] * model.target.whole_block
    runs += [(f"rsd {rule}", "rsd", rule) for rule in rules]
    if model.visual_drafter is not None:
        runs += [("visual", "draft-first", "margin")]
        runs += [(f"rsd-fused {rule}", "rsd-fused", rule) for rule in rules if rule in ("margin", "residual")]
    report: dict[str, object] = {"frames": sum(map(len, batches)), "episodes": dataset.episodes}
    for title, name, rule_name in runs:
        rule = acceptance_rule(rule_name, tokenizer.config.rfsq)
        ops = Primitives(model.target, model.feature_drafter, rule, visual_drafter=model.visual_drafter)
        parts = [_decode(ops, DECODERS[name], tokenizer, dataset, part) for part in batches]
        row: dict[str, object] = {
            "l1_error": round(float(torch.cat([error for error, _, _ in parts]).mean()), 4),
            "gripper_accuracy": round(float(torch.cat([grip for _, grip, _ in parts]).float().mean()), 4),
        }
        accepted = [d.accepted for _, _, d in parts if d.accepted is not None]
        if accepted:
            tokens = torch.cat(accepted)
            row["acceptance"] = rule.name
            row["tokens_accepted_by_level"] = [round(float(x), 4) for x in tokens.float().mean((0, 2))]
            row["levels_accepted"] = [round(float(x), 4) for x in tokens.all(-1).float().mean(0)]
        report[title] = row
    return report


def _decode(
    ops: Primitives, entry: Decoder, tokenizer: ActionTokenizer, dataset: FrameDataset, frames: Tensor
) -> tuple[Tensor, Tensor, DecodeResult]:
    batch, seen = dataset.batch(frames), frames_seen(ops, dataset, frames)
    result = entry.decode(ops, seen, remembering(ops, entry, dataset, frames))
    ops.check()
    value = tokenizer.to_normalised(result.value.float() * tokenizer.first_step)
    wanted = tokenizer.to_normalised(tokenizer.to_coefficients(batch.chunk))
    right = result.gripper == tokenizer.gripper_symbols(batch.chunk)
    return (value - wanted).abs().mean((1, 2)), right.float().mean(1), result


def remembering(ops: Primitives, entry: Decoder, dataset: FrameDataset, frames: Tensor) -> EpisodeState:
    """What the target's run one chunk before those frames left behind, where a decoder remembers it."""
    count = len(frames)
    begin = EpisodeState(None, (0,) * count, (0,) * count, (False,) * count)
    if not entry.remembers:
        return begin
    earlier = frames_seen(ops, dataset, dataset.earlier(frames, 1))
    result = entry.decode(ops, earlier, begin)
    if result.pending and result.draft is not None:
        result = look(ops, earlier, result.draft)
    return replace(begin, memory=result.memory)


def frames_seen(ops: Primitives, dataset: FrameDataset, frames: Tensor) -> PolicyInput:
    batch = dataset.batch(frames)
    return PolicyInput(batch.images, batch.state, ops.target.encode_text(batch.words))
