"""Training a drafter on what a target, any policy, answered: no target of this package takes part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rsd.data.demonstrations import load_demonstrations
from rsd.decoding.calibration import fingertip_deviation
from rsd.models.bundle import code_sizes
from rsd.models.config import StandaloneDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.tokenizer.rfsq import Rfsq
from rsd.training.config import Augmentation, LoopConfig, LossConfig
from rsd.training.dataset import Batch, FrameDataset, chunk_targets, held_against
from rsd.training.loop import check_state, one_run_a_folder, train_and_save
from rsd.training.losses import draft_losses, visual_total
from rsd.training.policy import data_provenance, load_folders, resolve_device, split

MAX_FRAMES, ROWS = 2048, 128  # of the validation: frames at most, and of them at once
Save = Callable[[StandaloneDrafter, dict[str, Any], Path], None]


@dataclass(frozen=True)
class TrainStandaloneConfig:
    """data: folders of a target's rollouts; init_sha256: of the drafter that it starts from."""

    data: tuple[Path, ...]
    output: Path
    drafter: StandaloneDrafterConfig
    loss: LossConfig
    augment: Augmentation
    loop: LoopConfig
    device: str = "auto"
    validation_every: int = 20
    init_sha256: str = ""


def fit_tokenizer(folder: Path, horizon: int) -> ActionTokenizer:
    """From the chunks that a target drove with."""
    chunks = [
        chunk_targets(each.labels, horizon)[:: each.image_every] for each in load_demonstrations(folder, images=False)
    ]
    return ActionTokenizer.fit(np.concatenate(chunks), TokenizerConfig(horizon=horizon))


def train_standalone(
    config: TrainStandaloneConfig, tokenizer: ActionTokenizer, init: StandaloneDrafter | None, save: Save
) -> Path:
    """-> the checkpoint's directory, written by `save`; init: weights to start from."""

    @one_run_a_folder
    def alone(asked: TrainStandaloneConfig) -> Path:
        return _train(asked, tokenizer, init, save)

    return alone(config)


def _train(
    config: TrainStandaloneConfig, tokenizer: ActionTokenizer, init: StandaloneDrafter | None, save: Save
) -> Path:
    device = resolve_device(config.device)
    check_state(config)
    tokenizer = tokenizer.to(device)
    horizon, size = tokenizer.config.horizon, config.drafter.image_size
    parts = split(held_against(tokenizer, load_folders(config.data, image_size=size)), config.validation_every)
    dataset, validation = (FrameDataset(part, horizon, device, size, paired=False) for part in parts)
    dataset.check(config.loop.batch_size, None, config.augment)
    print(f"{dataset.episodes} rollouts, {len(dataset)} frames; held out {validation.episodes}")
    torch.manual_seed(config.loop.seed)
    model = StandaloneDrafter(config.drafter, *code_sizes(tokenizer)).to(device)
    if init is not None:
        model.load_state_dict(init.state_dict())
    else:
        model.state_mean.copy_(dataset.state.mean(0))
        model.state_std.copy_(dataset.state.std(0) + 1e-3)
    model.visual.memory_in.requires_grad_(False)  # there is no memory

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, 0, config.augment)
        return drafter_losses(model, tokenizer, batch, config.loss)[0]

    def check(ema: StandaloneDrafter) -> dict[str, object]:
        return validate(ema, tokenizer, validation, config.loss)

    return train_and_save(config, model, losses, device, save, check, data_provenance(config.data, dataset))


def drafter_losses(
    model: StandaloneDrafter, tokenizer: ActionTokenizer, batch: Batch, config: LossConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and gripper, the chunk, the forecast of its deviation; `total`. -> losses, and how far each row's chunk
    leads the fingertip away from the target's, mm [B]."""
    drafter, unit, code = model.visual, tokenizer.first_step, Rfsq(model.code)
    goal, grip = tokenizer.to_coefficients(batch.chunk) / unit, tokenizer.gripper_symbols(batch.chunk)
    condition = model.encode_text(batch.words)[1]
    features = drafter.perceive(batch.images, model.normalise(batch.state), condition, None)
    own = torch.ones(len(goal), 1, dtype=torch.bool, device=goal.device)
    digits, losses = draft_losses(drafter.levels, features, goal, grip, own, code)
    steps = (digit * code.step(level) for level, digit in enumerate(digits, start=1))
    coarse = sum(steps, torch.zeros_like(goal))
    value = coarse + drafter.remainder(features, coarse, grip).float()
    apart = fingertip_deviation(tokenizer.to_actions(value.detach() * unit, grip), batch.chunk)
    wanted, found = tokenizer.to_normalised(goal * unit), tokenizer.to_normalised(value * unit)
    values = {
        "visual": losses["draft"],
        "visual_regress": (found - wanted).abs().mean(),
        "deviation": F.smooth_l1_loss(drafter.log_deviation(features.detach()).float(), torch.log1p(apart)),
    }
    return {**values, "total": visual_total(values, config)}, apart


@torch.no_grad()
def validate(
    model: StandaloneDrafter, tokenizer: ActionTokenizer, dataset: FrameDataset, config: LossConfig
) -> dict[str, object]:
    """On held-out rollouts: mean error (normalised), and quantiles of the fingertip's deviation from the target, mm."""
    batches = [dataset.batch(frames) for frames in dataset.spread(MAX_FRAMES, ROWS)]
    found = [drafter_losses(model.eval(), tokenizer, batch, config) for batch in batches]
    apart = torch.cat([each for _, each in found]).cpu().numpy()
    weights = [len(each) / len(apart) for _, each in found]
    error = sum(float(values["visual_regress"]) * weight for (values, _), weight in zip(found, weights, strict=True))
    p50, p90 = (round(float(value), 1) for value in np.percentile(apart, (50, 90)))
    return {"frames": len(apart), "l1_error": round(error, 4), "deviation_mm": {"p50": p50, "p90": p90}}
