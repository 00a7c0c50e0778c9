"""`rsd train policy --backbone openvla`: residual tokens on a published checkpoint, by LoRA, to a policy directory.

The losses, the loop and the demonstrations are the compact policy's. The base stays frozen in the precision it is
loaded in, bfloat16 on a GPU; what is trained (updates, heads, drafts) is float32, and is all that a state or a
checkpoint of the training holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsd.data.demonstrations import Demonstration, folder_provenance
from rsd.models.target import state_features
from rsd.options import executed_steps
from rsd.targets.openvla.images import crop, prepare_images
from rsd.targets.openvla.loading import load_openvla
from rsd.targets.openvla.lora import Adapter, LoraConfig
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.policy import RENDER_SIZE, read_normalisation
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.published import Settings, component_file, fingerprint, locate_openvla, locate_under
from rsd.targets.openvla.rsd_policy import BASE_FILES, OpenVlaRsdConfig, OpenVlaRsdModel, save_openvla_rsd
from rsd.targets.openvla.statistics import Statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training import parallel
from rsd.training.config import TrainOpenVlaConfig
from rsd.training.dataset import Augmentation, FrameDataset, held_against, random_colour
from rsd.training.loop import check_state, one_run_a_folder, train_and_save
from rsd.training.losses import policy_losses
from rsd.training.policy import episode_numbers, join, load_folders
from rsd.training.validation import validate
from rsd.types import STATE_DIM, RsdError

VALIDATION_BATCH = 8
IMAGES_A_JOB = 16


@dataclass(frozen=True)
class Survey:
    """What all folders hold together, read without images. frames: with images, by episode; states: theirs, float32
    [sum of frames, 8]."""

    frames: list[int]
    instructions: list[str]
    states: NDArray[np.float32]


def survey(folders: Iterable[Path], tokenizer: ActionTokenizer) -> Survey:
    everything = list(held_against(tokenizer, load_folders(folders, images=False)))
    states = [demonstration.state[:: demonstration.image_every] for demonstration in everything]
    instructions = list(dict.fromkeys(demonstration.instruction for demonstration in everything))
    together = np.concatenate([np.zeros((0, STATE_DIM), np.float32), *states])
    return Survey(list(map(len, states)), instructions, together)


def pick(folders: Iterable[Path], numbers: Iterable[int]) -> Iterator[Demonstration]:
    """These demonstrations of all folders, one at a time: the images of a real data set fill a host's memory."""
    wanted = set(numbers)
    everything = load_folders(folders, image_size=RENDER_SIZE)
    return (demonstration for number, demonstration in enumerate(everything) if number in wanted)


class OpenVlaFrames(FrameDataset):
    """`FrameDataset` with images uint8 [N, views, 224, 224, 3] on the host; batches go to `device`.

    A batch's state is [B, 19] and its words are [B, 32 + T], see `targets.openvla.target`. All prompts of a batch are
    of one length T: then no position is padded, in training as in decoding. Views: cameras that any reader needs."""

    def __init__(
        self,
        demonstrations: Iterable[Demonstration],
        horizon: int,
        device: torch.device,
        sizes: OpenVlaRsdConfig,
        prompt: Prompt,
        normalisation: tuple[Tensor, Tensor],
    ) -> None:
        raw: list[NDArray[np.float32]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = prepared(demonstrations, sizes.views, pool, raw)
            super().__init__(made, horizon, torch.device("cpu"), execute=sizes.execute, asking=False)
        self.device, self.center_crop = device, sizes.center_crop
        self.mean, self.std = (value.to(device) for value in normalisation)
        given = torch.from_numpy(sizes.bounds.normalise(np.concatenate(raw))).float()
        self.state = torch.cat([given, self.state], dim=1)
        self.state_std = self.state.std(0)
        self.prompts = [torch.tensor(prompt.ids(text)) for text in self.instructions]
        self.length = torch.tensor([len(ids) for ids in self.prompts])[self.task]  # of each frame's prompt

    def _random(self, count: int) -> Tensor:
        """Frames of one prompt length, which is drawn as often as frames have it."""
        length = self.length[torch.randint(0, len(self), ())]
        alike = torch.nonzero(self.length == length).squeeze(1)
        return alike[torch.randint(0, len(alike), (count,))]

    def spread(self, most: int, size: int) -> list[Tensor]:
        (frames,) = super().spread(most, len(self))
        lengths = self.length[frames]
        return [part for length in lengths.unique() for part in frames[lengths == length].split(size)]

    def _pixels(self, images: Tensor, augment: Augmentation | None) -> Tensor:
        """The crop takes the place of a shift's border: with `center_crop` it moves by up to augment.shift pixels (5
        stay inside the image), without it the image itself is shifted."""
        pixels = images.permute(0, 1, 4, 2, 3).float()
        if self.center_crop:
            pixels = crop(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        pixels = pixels / 255.0
        if augment is not None:
            pixels = random_colour(pixels - 0.5, augment) + 0.5
        return (pixels.repeat(1, 1, 2, 1, 1) - self.mean) / self.std

    def _words(self, task: Tensor, wording: Tensor) -> Tensor:
        prompts = torch.stack([self.prompts[index] for index in task.tolist()])
        return torch.cat([super()._words(task, wording), prompts], dim=1)


def prepared(
    demonstrations: Iterable[Demonstration], views: int, pool: ThreadPoolExecutor, raw: list[NDArray[np.float32]]
) -> Iterator[Demonstration]:
    """Demonstrations with images of 224 px as the pipeline leaves them before the crop; their states go to `raw`."""
    for demonstration in demonstrations:
        images = demonstration.images
        if images is not None:
            if images.shape[2:4] != (RENDER_SIZE, RENDER_SIZE):
                raise RsdError(
                    f"{demonstration.source}: images of {images.shape[2]} x {images.shape[3]} px, OpenVLA's pipeline "
                    f"starts from {RENDER_SIZE}; render again with --image-size {RENDER_SIZE}"
                )
            flat = images[:, :views].reshape(-1, *images.shape[2:])
            parts = pool.map(resized, [flat[i : i + IMAGES_A_JOB] for i in range(0, len(flat), IMAGES_A_JOB)])
            small = np.concatenate(list(parts))
            demonstration = replace(demonstration, images=small.reshape(len(images), -1, *small.shape[1:]))
        raw.append(demonstration.state[:: demonstration.image_every])
        yield demonstration


def resized(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n, 256, 256, 3] -> [n, 224, 224, 3]: JPEG round trip and Lanczos-3."""
    return prepare_images(images, center_crop=False).permute(0, 2, 3, 1).byte().numpy()


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
    return Trainee(model, trained, adapter)


def finish(trainee: Trainee) -> OpenVlaRsdModel:
    """The model as a policy runs it: updates merged, everything in the base's precision."""
    model, openvla = trainee.model, trainee.model.target.openvla
    trainee.adapter.merge()
    openvla.language_model.checkpointing = False
    model.added().to(openvla.dtype)
    return model


@one_run_a_folder
def train_openvla(config: TrainOpenVlaConfig) -> Path:
    """Run the training; returns the policy's directory. Prints the offline validation of every decoder."""
    device = join(config.device)
    base = locate_openvla(config.source)
    if base is None:
        raise RsdError(f"--from {config.source}: expected a checkpoint in OpenVLA's format (docs/openvla.md)")
    belongs = fingerprint(base, BASE_FILES)  # a state of the training belongs to its base
    check_state(config, base_fingerprint=belongs)
    tokenizer = ActionTokenizer.load(config.tokenizer).to(device)
    executed_steps(config.execute, tokenizer.config.horizon, "--execute")
    seen, rank = survey(config.data, tokenizer), parallel.rank()
    mine, held_out = episode_numbers(len(seen.frames), config.validation_every, rank, parallel.world_size())
    sizes, prompt, normalisation = observing(config, base, seen), Prompt(base), read_normalisation(base)

    def frames(numbers: list[int]) -> OpenVlaFrames:
        chosen, horizon = pick(config.data, numbers), tokenizer.config.horizon
        return OpenVlaFrames(chosen, horizon, device, sizes, prompt, normalisation)

    dataset = frames(mine)
    visual = config.visual_drafter is not None
    dataset.check(config.loop.batch_size, config.remembered_chunks if visual else None, config.augment)
    # only the first process validates; what is wrong with those held out is found now, not after the training
    validation = frames(held_out) if rank == 0 else dataset
    if rank == 0:
        print(f"{len(seen.frames)} demonstrations, {len(held_out)} held out; {len(dataset)} frames in this process")
    openvla = load_openvla(base, base=locate_under(base), device=str(device))
    torch.manual_seed(config.loop.seed)
    trainee = prepare(openvla, sizes, config.lora, tokenizer, config.checkpointing)
    model = trainee.model

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, config.remembered_chunks if visual else 0, config.augment)
        return policy_losses(model, tokenizer, batch, config.loss)

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
        execute=config.execute,
    )
