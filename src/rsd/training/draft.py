"""`rsd train drafter`: another draft for a target that stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsd.checkpoint import save_checkpoint
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import Rfsq
from rsd.training import parallel
from rsd.training.config import TrainDrafterConfig
from rsd.training.dataset import Batch
from rsd.training.loop import train_and_save
from rsd.training.losses import TargetRun, draft_losses, visual_drafter_losses, visual_total
from rsd.training.policy import data_provenance, load_frames, resolve_device
from rsd.training.run_folder import one_run_a_folder
from rsd.training.validation import validate
from rsd.types import EAGER, RsdError


@one_run_a_folder
def train_drafter(config: TrainDrafterConfig) -> Path:
    """Run the training; returns the checkpoint directory."""
    if parallel.launched():
        raise RsdError("train drafter: runs in one process; drop torchrun")
    device = resolve_device(config.device)
    source = RsdPolicy.from_pretrained(config.policy, decode="ar", engine=EAGER)
    if not source.core.body.compact:
        raise RsdError(f"train drafter: {config.policy} has OpenVLA as its target; its drafts are trained with it")
    tokenizer, visual = source.tokenizer.to(device), config.kind == "visual"
    dataset, validation = load_frames(config, tokenizer, device, source.config.target.image_size, paired=visual)
    model, policy = with_draft(source, config)
    model.to(device).requires_grad_(False)
    model.get_submodule(f"{config.kind}_drafter").requires_grad_(True)

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, config.remembered_chunks if visual else 0, config.augment)
        model.target.eval()  # `train` puts the whole model in training mode
        with torch.no_grad():
            text = model.target.encode_text(batch.words)
            prefix = model.target.embed_prefix(batch.images, batch.state, text)
            features, cache = model.target.prefill(prefix)
        run = TargetRun(model.target.remembered(prefix.shape[1]), cache, features, text[1])
        return losses_of(model, tokenizer, batch, run, config)

    def save(ema: RsdModel, made: dict[str, Any], directory: Path) -> None:
        save_checkpoint(ema, tokenizer, policy, {**source.provenance, f"{config.kind}_drafter": made}, directory)

    def check(ema: RsdModel) -> dict[str, object]:
        return validate(ema, tokenizer, validation)

    return train_and_save(config, model, losses, device, save, check, data_provenance(config.data, dataset))


def with_draft(source: RsdPolicy, config: TrainDrafterConfig) -> tuple[RsdModel, PolicyConfig]:
    """The policy's model with the drafter that is to be trained, and its sizes."""
    part, policy, kept = f"{config.kind}_drafter", source.config, source.model.state_dict()
    if not config.resume_weights:
        policy = replace(policy, **{part: getattr(config, part)})
        kept = {name: value for name, value in kept.items() if not name.startswith(f"{part}.")}
    elif getattr(policy, part) is None:
        raise RsdError(f"--resume-weights: {config.policy} has no visual drafter; leave it out to start one afresh")
    model = RsdModel.of(policy, source.tokenizer)
    model.load_state_dict({**model.state_dict(), **kept})
    return model, policy


def losses_of(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, run: TargetRun, config: TrainDrafterConfig
) -> dict[str, Tensor]:
    """Losses of the one draft that is trained, beside a target that has run; `total` is what to minimise."""
    truth = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step
    gripper = tokenizer.gripper_symbols(batch.chunk)
    if config.kind == "visual":
        assert model.visual_drafter is not None
        _, values = visual_drafter_losses(
            model.visual_drafter, model.target, run, batch, truth, gripper, tokenizer, config.loss
        )
        return {**values, "total": visual_total(values, config.loss)}
    own = torch.rand(len(truth), 1, device=truth.device) < config.own_prefix
    values = draft_losses(model.feature_drafter, run.features, truth, gripper, own, Rfsq(model.target.code))[1]
    return {**values, "total": values["draft"]}
