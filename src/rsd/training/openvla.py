"""`rsd train policy --backbone openvla`: residual tokens on a published checkpoint, by LoRA, to a policy directory.

The losses, the loop and the demonstrations are the compact policy's. The base stays frozen in the precision it is
loaded in, bfloat16 on a GPU; what is trained (updates, heads, drafts) is float32, and is all that a state or a
checkpoint of the training holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from rsd.data.demonstrations import folder_provenance
from rsd.models.draft import DraftConfig
from rsd.models.light_draft import LightDraftConfig
from rsd.models.lora import Adapter, LoraConfig
from rsd.models.main import state_features
from rsd.models.openvla import OpenVlaModel
from rsd.models.openvla_files import component_file
from rsd.models.openvla_loading import load_openvla
from rsd.openvla.policy import read_normalisation
from rsd.openvla.prompt import Prompt
from rsd.openvla.published import Settings, fingerprint, locate_openvla, locate_under
from rsd.openvla.rsd_policy import BASE_FILES, OpenVlaRsdConfig, OpenVlaRsdModel, save_openvla_rsd
from rsd.openvla.statistics import Statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training import parallel
from rsd.training.dataset import Augmentation
from rsd.training.loop import LoopConfig, describe, train
from rsd.training.losses import LossConfig, policy_losses
from rsd.training.openvla_frames import OpenVlaFrames, Survey, episode_numbers, pick, survey
from rsd.training.policy import resolve_device
from rsd.training.tokenizer import DEFAULT_TOKENIZER
from rsd.training.validation import validate
from rsd.types import RsdError
from rsd.versions import versions

VALIDATION_BATCH = 8


@dataclass(frozen=True)
class TrainOpenVlaConfig:
    """Train residual tokens and drafts on an OpenVLA or OpenVLA-OFT checkpoint."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Directory or hub id in OpenVLA's published format."""
    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of demonstrations (HDF5) with images of 256 px."""
    tokenizer: Path = DEFAULT_TOKENIZER
    """Folder with tokenizer.json, from `rsd tokenizer fit`."""
    output: Path = Path("runs/openvla")
    """Run folder: resumable state, TensorBoard and, at the end, `checkpoint/`. The same command continues a run."""
    device: str = "auto"
    """cuda, cpu or auto."""
    cameras: int = 0
    """Cameras that the main reads, 1 or 2; 0: as many as the checkpoint was trained with, 2 if its files do not say."""
    unnorm_key: str = ""
    """Which data set's statistics the checkpoint's proprioception projector was trained with, if it has several."""
    validation_every: int = 40
    """Every n-th episode is kept out of training for the offline validation."""
    validation_frames: int = 256
    """At most so many of their frames are decoded, once by every decoder."""
    remembered_chunks: int = 4
    """The light draft is trained to remember the main's run of 1 to this many chunks before."""
    checkpointing: bool = True
    """Keep only every layer's input and compute its inside again in the backward pass: less memory, a third more
    time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    draft: DraftConfig = field(default_factory=lambda: DraftConfig(dim=256))
    light: LightDraftConfig | None = field(default_factory=LightDraftConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: Augmentation = field(default_factory=Augmentation)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            batch_size=16, learning_rate=3e-4, weight_decay=0.0, save_every=500, cuda_graph=False
        )
    )

    def __post_init__(self) -> None:
        if self.cameras not in (0, 1, 2):
            raise RsdError(f"--cameras {self.cameras}: expected 1 or 2, or 0 for what the checkpoint says")
        if self.loop.cuda_graph:
            raise RsdError("--loop.cuda-graph: batches have prompts of several lengths; leave it out")


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
    model, openvla = trainee.model, trainee.model.main.openvla
    trainee.adapter.merge()
    openvla.language_model.checkpointing = False
    openvla.vision_backbone.overlap = True
    model.added().to(openvla.dtype)
    return model


def train_openvla(config: TrainOpenVlaConfig) -> Path:
    """Run the training; returns the policy's directory. Prints the offline validation of every decoder."""
    parallel.join()
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    base = locate_openvla(config.source)
    if base is None:
        raise RsdError(f"--from {config.source}: expected a checkpoint in OpenVLA's format (docs/openvla.md)")
    tokenizer = ActionTokenizer.load(config.tokenizer).to(device)
    seen = survey(config.data)
    sizes, prompt, normalisation = observing(config, base, seen), Prompt(base), read_normalisation(base)
    mine, held_out = episode_numbers(len(seen.frames), config.validation_every, parallel.rank(), parallel.world_size())

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
    if parallel.rank() == 0:
        print(f"{len(seen.frames)} demonstrations, {len(held_out)} held out; {len(dataset)} frames in this process")
    openvla = load_openvla(base, base=locate_under(base), device=str(device))
    torch.manual_seed(config.loop.seed)
    trainee = prepare(openvla, sizes, config.lora, tokenizer, config.checkpointing)
    main, draft, light = trainee.model.main, trainee.model.draft, trainee.model.light
    remembered = config.remembered_chunks if light is not None else 0

    def losses() -> dict[str, Tensor]:
        batch = dataset.batch(*dataset.draw(config.loop.batch_size, remembered), augment=config.augment)
        return policy_losses(main, draft, light, tokenizer, batch, config.loss)

    resolved = {**describe(config), "base_fingerprint": fingerprint(base, BASE_FILES)}  # a state belongs to its base
    ema = train(trainee.trained, losses, config.loop, config.output, device, resolved)
    assert isinstance(ema, nn.ModuleDict)
    directory = config.output / "checkpoint"
    if parallel.rank() > 0:
        return directory
    trainee.trained.load_state_dict(ema.state_dict())
    report = validate(finish(trainee), tokenizer, frames(held_out), config.validation_frames, VALIDATION_BATCH)
    print(json.dumps(report, indent=1))
    data = {
        "sources": [folder_provenance(folder) for folder in config.data],
        "episodes": len(seen.frames) - len(held_out),
        "frames": sum(seen.frames) - sum(seen.frames[number] for number in held_out),
        "instructions": seen.instructions,
    }
    provenance = {
        "data": data,
        "training": resolved,
        "processes": parallel.world_size(),
        "validation": report,
        "versions": versions(),
    }
    named = str(base.resolve()) if Path(config.source).is_dir() else config.source
    added = ema["added"]
    save_openvla_rsd(added, trainee.adapter, tokenizer, sizes, base, named, provenance, directory)
    return directory


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
        draft=config.draft,
        light=config.light,
    )
