"""`rsd train draft`: a new draft for a main model that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rsd.checkpoint import save_checkpoint
from rsd.models.draft import DraftConfig
from rsd.models.rsd_model import RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.rfsq import Rfsq
from rsd.training import parallel
from rsd.training.dataset import Augmentation, FrameDataset
from rsd.training.loop import LoopConfig, describe, train
from rsd.training.losses import draft_losses
from rsd.training.policy import load_folders, resolve_device, split
from rsd.training.validation import validate
from rsd.types import RsdError
from rsd.versions import versions


@dataclass(frozen=True)
class TrainDraftConfig:
    """Train a new draft for a finished main model."""

    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory or hub id whose main model is kept."""
    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of rendered demonstrations (HDF5)."""
    output: Path = Path("runs/draft")
    """Run folder; the checkpoint with the new draft goes to `checkpoint/` in it."""
    device: str = "auto"
    """cuda, cpu or auto."""
    validation_every: int = 40
    """Every n-th episode is kept out of training for the offline validation."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    own_prefix: float = 0.5
    """Share of the batch on which the draft continues its own digits."""
    augment: Augmentation = field(default_factory=Augmentation)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=5_000))


def train_draft(config: TrainDraftConfig) -> Path:
    """Run the training; returns the checkpoint directory."""
    if parallel.launched():
        raise RsdError("train draft: runs in one process; drop torchrun")
    device = resolve_device(config.device)
    source = RsdPolicy.from_pretrained(config.policy, decode="ar")
    if type(source) is not RsdPolicy:
        raise RsdError(f"train draft: {config.policy} has OpenVLA as its main; its drafts are trained with it")
    tokenizer, policy = source.tokenizer.to(device), replace(source.config, draft=config.draft)
    training, held_out = split(load_folders(config.data), config.validation_every)
    dataset = FrameDataset(training, tokenizer.config.horizon, device)
    model = RsdModel(policy, tokenizer)
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith("draft.")}
    kept = {name: value for name, value in source.model.state_dict().items() if not name.startswith("draft.")}
    model.load_state_dict({**fresh, **kept})
    model.to(device).requires_grad_(False)
    model.draft.requires_grad_(True)
    code = Rfsq(model.main.code)

    def losses() -> dict[str, Tensor]:
        frames = torch.randint(0, len(dataset), (config.loop.batch_size,), device=device)
        batch = dataset.batch(frames, augment=config.augment)
        model.main.eval()  # `train` puts the whole model in training mode
        with torch.no_grad():
            prefix = model.main.embed_prefix(batch.images, batch.state, model.main.encode_text(batch.words))
            features, _ = model.main.prefill(prefix)
        target = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step
        own = torch.rand(len(target), 1, device=device) < config.own_prefix
        gripper = tokenizer.gripper_symbols(batch.chunk)
        values = draft_losses(model.draft, features, target, gripper, own, code)[1]
        return {**values, "total": values["draft"]}

    resolved = describe(config)
    ema = train(model, losses, config.loop, config.output, device, resolved)
    assert isinstance(ema, RsdModel)
    report = validate(ema, tokenizer, FrameDataset(held_out, tokenizer.config.horizon, device))
    made = {"training": resolved, "validation": report, "versions": versions()}
    directory = config.output / "checkpoint"
    save_checkpoint(ema, tokenizer, policy, {**source.provenance, "draft": made}, directory)
    return directory
