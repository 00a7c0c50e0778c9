"""`rsd train policy --backbone openvla`: residual tokens on a published checkpoint, by LoRA, to a policy directory.

The losses, the loop and the demonstrations are the compact policy's. The base stays frozen in the precision it is
loaded in, bfloat16 on a GPU; what is trained (updates, heads, drafts) is float32, and is all that a state or a
checkpoint of the training holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsd.data.demonstrations import folder_provenance
from rsd.models.target import state_features
from rsd.targets.openvla.loading import load_openvla
from rsd.targets.openvla.lora import Adapter, LoraConfig
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.policy import read_normalisation
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.published import Settings, component_file, fingerprint, locate_openvla, locate_under
from rsd.targets.openvla.rsd_policy import BASE_FILES, OpenVlaRsdConfig, OpenVlaRsdModel, save_openvla_rsd
from rsd.targets.openvla.statistics import Statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training import parallel
from rsd.training.config import TrainOpenVlaConfig
from rsd.training.loop import train_and_save
from rsd.training.losses import policy_losses
from rsd.training.openvla_frames import OpenVlaFrames, Survey, pick, survey
from rsd.training.policy import episode_numbers, join
from rsd.training.run_folder import one_run_a_folder
from rsd.training.validation import validate
from rsd.types import RsdError

VALIDATION_BATCH = 8


@dataclass
class Trainee:
    """model: what computes; trained: the part of it that changes, none of the base; adapter: of its updates."""

    model: OpenVlaRsdModel
    trained: nn.ModuleDict
    adapter: Adapter


def prepare(
    openvla: OpenVlaModel, config: OpenVlaRsdConfig, lora: LoraConfig, tokenizer: ActionTokenizer, checkpointing: bool
) -> Trainee:
    """Freeze the base, add what is trained, in float32."""
    openvla.requires_grad_(False)
    adapter = Adapter(openvla, lora)
    model = OpenVlaRsdModel(openvla, config, tokenizer)
    trained = nn.ModuleDict({"added": model.added(), "updates": adapter.updates}).float()
    trained.requires_grad_(True)
    openvla.language_model.checkpointing = checkpointing
    towers = openvla.vision_backbone
    for tower in (towers.featurizer, towers.fused_featurizer):
        tower.checkpointing = checkpointing and lora.vision
    towers.overlap = False  # a second stream's memory could be given away before the backward pass has read it
    return Trainee(model, trained, adapter)


def finish(trainee: Trainee) -> OpenVlaRsdModel:
    """The model as a policy runs it: updates merged, everything in the base's precision."""
    model, openvla = trainee.model, trainee.model.target.openvla
    trainee.adapter.merge()
    openvla.language_model.checkpointing = False
    openvla.vision_backbone.overlap = True
    model.added().to(openvla.dtype)
    return model


@one_run_a_folder
def train_openvla(config: TrainOpenVlaConfig) -> Path:
    """Run the training; returns the policy's directory. Prints the offline validation of every decoder."""
    device = join(config.device)
    if config.validation_frames < 1:
        raise RsdError(f"--validation-frames {config.validation_frames}: expected at least 1")
    base = locate_openvla(config.source)
    if base is None:
        raise RsdError(f"--from {config.source}: expected a checkpoint in OpenVLA's format (docs/openvla.md)")
    tokenizer = ActionTokenizer.load(config.tokenizer).to(device)
    seen, rank = survey(config.data), parallel.rank()
    mine, held_out = episode_numbers(len(seen.frames), config.validation_every, rank, parallel.world_size())
    sizes, prompt, normalisation = observing(config, base, seen), Prompt(base), read_normalisation(base)

    def frames(numbers: list[int]) -> OpenVlaFrames:
        return OpenVlaFrames(
            pick(config.data, numbers),
            tokenizer.config.horizon,
            device,
            prompt=prompt,
            bounds=sizes.bounds,
            normalisation=normalisation,
            center_crop=sizes.center_crop,
            views=sizes.views,
        )

    dataset = frames(mine)
    visual = config.visual_drafter is not None
    dataset.check(config.loop.batch_size, config.remembered_chunks if visual else None, config.augment)
    # what is wrong with the others is found now, not after the training; the first process validates
    validation = frames(held_out if rank == 0 else held_out[:1])
    if rank == 0:
        print(f"{len(seen.frames)} demonstrations, {len(held_out)} held out; {len(dataset)} frames in this process")
    openvla = load_openvla(base, base=locate_under(base), device=str(device))
    torch.manual_seed(config.loop.seed)
    trainee = prepare(openvla, sizes, config.lora, tokenizer, config.checkpointing)
    model = trainee.model

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, config.remembered_chunks if visual else 0, config.augment)
        return policy_losses(model.target, model.feature_drafter, model.visual_drafter, tokenizer, batch, config.loss)

    named = str(base.resolve()) if Path(config.source).is_dir() else config.source

    def save(ema: nn.ModuleDict, provenance: dict[str, Any], directory: Path) -> None:
        trainee.trained.load_state_dict(ema.state_dict())
        save_openvla_rsd(ema["added"], trainee.adapter, tokenizer, sizes, base, named, provenance, directory)

    def check(ema: nn.ModuleDict) -> dict[str, object]:
        return validate(finish(trainee), tokenizer, validation, config.validation_frames, VALIDATION_BATCH)

    data = {
        "sources": [folder_provenance(folder) for folder in config.data],
        "episodes": len(seen.frames) - len(held_out),
        "frames": sum(seen.frames) - sum(seen.frames[number] for number in held_out),
        "instructions": seen.instructions,
    }
    belongs = fingerprint(base, BASE_FILES)  # a state of the training belongs to its base
    return train_and_save(config, trainee.trained, losses, device, save, check, data, base_fingerprint=belongs)


def observing(config: TrainOpenVlaConfig, base: Path, seen: Survey) -> OpenVlaRsdConfig:
    """Sizes and scales: cameras and crop as the base was trained, the state as its projector expects it."""
    stored, projector = Settings.load(base), component_file(base, "proprio_projector")
    cameras = config.cameras or stored.cameras or 2
    if projector is not None:
        statistics = Statistics.load(base)
        found = statistics.state(statistics.key(config.unnorm_key or stored.unnorm_key))
        # a number that is left as it is lies between -1 and 1
        low, high = np.where(found.mask, found.low, -1.0), np.where(found.mask, found.high, 1.0)
    else:
        low, high = np.quantile(seen.states.astype(np.float64), (0.01, 0.99), axis=0)
    features = state_features(torch.from_numpy(seen.states))
    return OpenVlaRsdConfig(
        cameras=cameras,
        center_crop=stored.center_crop,
        state_low=tuple(low.tolist()),
        state_high=tuple(high.tolist()),
        state_mean=tuple(features.mean(0).tolist()),
        state_std=tuple((features.std(0) + 1e-3).tolist()),
        feature_drafter=config.feature_drafter,
        visual_drafter=config.visual_drafter,
    )
