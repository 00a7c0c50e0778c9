"""Offline validation on held-out episodes: every decoder's error beside the draft's acceptance.

A metric for debugging, not the judge: regression looks good in it, closed-loop success decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.steps import Decoded, Decoder, EpisodeMemory, Scene, Stopwatch
from rsd.decoding.strategies import LIGHT, STRATEGIES, Strategy
from rsd.models.rsd_model import RsdModel
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.dataset import Batch, FrameDataset

MAX_FRAMES, BATCH = 2048, 128


@torch.no_grad()
def validate(
    model: RsdModel, tokenizer: ActionTokenizer, dataset: FrameDataset, frames: int = MAX_FRAMES, batch: int = BATCH
) -> dict[str, object]:
    """-> mean absolute error (normalised units) and gripper accuracy by decoder; acceptance by level.

    frames: at most so many, spread over the episodes; batch: of them at once.
    """
    model.eval()
    batches = dataset.spread(frames, batch)
    runs = [(name, name, "exact") for name in STRATEGIES if name != "rsd" and name not in LIGHT]
    rules = ["margin", "agreement", "exact"] + ["residual"] * model.main.whole_block
    runs += [(f"rsd {rule}", "rsd", rule) for rule in rules]
    if model.light is not None:
        runs += [("light", "rsd-ahead", "margin")]
        runs += [(f"rsd-fused {rule}", "rsd-fused", rule) for rule in rules if rule in ("margin", "residual")]
    report: dict[str, object] = {"frames": sum(map(len, batches)), "episodes": dataset.episodes}
    for title, name, rule_name in runs:
        rule = acceptance_rule(rule_name, tokenizer.config.rfsq)
        decoder = Decoder(model.main, model.draft, rule, light=model.light)
        parts = [_decode(decoder, STRATEGIES[name], tokenizer, dataset, part) for part in batches]
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
    decoder: Decoder, strategy: Strategy, tokenizer: ActionTokenizer, dataset: FrameDataset, frames: Tensor
) -> tuple[Tensor, Tensor, Decoded]:
    watch, memory = Stopwatch(frames.device), EpisodeMemory()
    if strategy in (STRATEGIES[name] for name in LIGHT):  # remembers the main's run one chunk ago
        earlier = strategy(decoder, _scene(decoder, dataset, dataset.earlier(frames, 1), memory)[0], watch)
        if earlier.follow_up:
            earlier.follow_up(watch)
    scene, batch = _scene(decoder, dataset, frames, memory)
    decoded = strategy(decoder, scene, watch)
    decoder.check()
    value = tokenizer.to_normalised(decoded.value.float() * tokenizer.first_step)
    wanted = tokenizer.to_normalised(tokenizer.to_coefficients(batch.chunk))
    right = decoded.gripper == tokenizer.gripper_symbols(batch.chunk)
    return (value - wanted).abs().mean((1, 2)), right.float().mean(1), decoded


def _scene(
    decoder: Decoder, dataset: FrameDataset, frames: Tensor, memory: EpisodeMemory
) -> tuple[Scene, Batch]:
    batch = dataset.batch(frames)
    return Scene(batch.images, batch.state, decoder.main.encode_text(batch.words), memory), batch
