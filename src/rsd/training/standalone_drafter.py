"""Training a drafter on what a target, any policy, answered: no target of this package takes part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsd.data.demonstrations import load_demonstrations
from rsd.models.bundle import code_sizes
from rsd.models.config import StandaloneDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.tokenizer.fit import MIN_CHUNKS
from rsd.training.config import Augmentation, DrafterLoss, LoopConfig
from rsd.training.dataset import Batch, FrameDataset, chunk_targets, held_against
from rsd.training.loop import check_state, one_run_a_folder, train_and_save
from rsd.training.losses import drafter_losses, shares_of, visual_total
from rsd.training.policy import data_provenance, load_folders, resolve_device, split
from rsd.types import RsdError

MAX_FRAMES, ROWS = 2048, 128  # of the validation: frames at most, and of them at once
Save = Callable[[StandaloneDrafter, dict[str, Any], Path], None]


@dataclass(frozen=True)
class TrainStandaloneConfig:
    """data: folders of a target's rollouts; init_sha256: of the drafter that it starts from."""

    data: tuple[Path, ...]
    output: Path
    drafter: StandaloneDrafterConfig
    loss: DrafterLoss
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
    if (found := sum(map(len, chunks))) < MIN_CHUNKS:
        raise RsdError(f"{folder}: expected at least {MIN_CHUNKS} chunks, found {found}; take more --num-rollouts")
    return ActionTokenizer.fit(np.concatenate(chunks), TokenizerConfig(horizon=horizon))


@one_run_a_folder
def train_standalone(
    config: TrainStandaloneConfig, tokenizer: ActionTokenizer, init: StandaloneDrafter | None, save: Save
) -> Path:
    """-> the checkpoint's directory, written by `save`; init: weights to start from."""
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
        return losses_of(model, tokenizer, batch, config.loss)[0]

    check = partial(validate, tokenizer=tokenizer, dataset=validation, config=config.loss)
    return train_and_save(config, model, losses, device, save, check, data_provenance(config.data, dataset))


def losses_of(
    model: StandaloneDrafter, tokenizer: ActionTokenizer, batch: Batch, config: DrafterLoss
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and gripper, the chunk, the forecast of its deviation; `total`. -> losses, and how far each row's chunk
    leads the fingertip away from the target's, mm [B]."""
    goal, grip = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step, tokenizer.gripper_symbols(batch.chunk)
    condition = model.encode_text(batch.words)[1]
    features = model.visual.perceive(batch.images, model.normalise(batch.state), condition, None)
    shares = shares_of(batch, len(goal), config)
    _, values, apart = drafter_losses(model.visual, tokenizer, features, goal, grip, batch.chunk, *shares)
    return {**values, "total": visual_total(values, config)}, apart


@torch.no_grad()
def validate(
    model: StandaloneDrafter, tokenizer: ActionTokenizer, dataset: FrameDataset, config: DrafterLoss
) -> dict[str, object]:
    """On held-out rollouts: mean error (normalised), and quantiles of the fingertip's deviation from the target, mm."""
    batches = [dataset.batch(frames) for frames in dataset.spread(MAX_FRAMES, ROWS)]
    everything = replace(config, forecast_every=0)
    found = [losses_of(model.eval(), tokenizer, batch, everything) for batch in batches]
    apart = torch.cat([each for _, each in found]).cpu().numpy()
    errors, rows = zip(*((float(values["visual_regress"]), len(each)) for values, each in found), strict=True)
    error, (p50, p90) = float(np.average(errors, weights=rows)), np.percentile(apart, (50, 90)).round(1).tolist()
    return {"frames": len(apart), "l1_error": round(error, 4), "deviation_mm": {"p50": p50, "p90": p90}}
