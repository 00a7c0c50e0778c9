"""`rsd train policy`, target and drafts together, and `rsd train drafter`: demonstrations to a checkpoint directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsd.checkpoint import save_checkpoint
from rsd.checks import each_once
from rsd.data.demonstrations import Demonstration, folder_provenance, load_demonstrations
from rsd.data.lerobot import located
from rsd.decoding.acceptance import acceptance_rule
from rsd.devices import check_device
from rsd.environment import variable
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.options import executed_steps
from rsd.output import plural, shown
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.training import parallel
from rsd.training.config import DEFAULT_TOKENIZER, TrainCorrectorConfig, TrainDrafterConfig, TrainPolicyConfig
from rsd.training.dataset import Batch, FrameDataset, held_against
from rsd.training.loop import check_state, one_run_a_folder, train_and_save
from rsd.training.losses import TargetRun, draft_losses, policy_losses, visual_drafter_losses, visual_total
from rsd.training.validation import validate
from rsd.types import EAGER, RsdError


@one_run_a_folder
def train_policy(config: TrainPolicyConfig) -> Path:
    """Run the training; returns the checkpoint directory. Prints the offline validation of every decoder."""
    acceptance_rule(config.policy.acceptance, RfsqConfig())  # or a whole training could not be loaded
    device = join(config.device)
    check_state(config)
    start = RsdPolicy.from_pretrained(config.init, decode="ar", engine=EAGER) if config.init else None
    if start and not start.core.body.compact:
        raise RsdError(f"--init {config.init}: expected a compact policy, found one on OpenVLA")
    tokenizer = choose_tokenizer(config, start).to(device)
    execute = executed_steps(config.policy.execute, tokenizer.config.horizon, "--policy.execute")
    visual, side = config.policy.visual_drafter is not None, config.policy.target.image_size
    remembered, asking = config.remembered_chunks if visual else None, config.loss.grounding > 0
    dataset, validation = load_frames(config, tokenizer, device, side, execute, remembered, asking)

    torch.manual_seed(config.loop.seed)
    model = RsdModel.of(config.policy, tokenizer).to(device)
    if start:
        take_over(model, start, config)
    else:
        model.target.state_mean.copy_(dataset.state.mean(0))
        model.target.state_std.copy_(dataset.state.std(0) + 1e-3)

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, remembered or 0, config.augment, asking)
        return policy_losses(model, tokenizer, batch, config.loss)

    def save(ema: RsdModel, provenance: dict[str, Any], directory: Path) -> None:
        made = {**provenance, "init": start.provenance if start else {}}
        save_checkpoint(ema, tokenizer, config.policy, made, directory)

    check = partial(validate, tokenizer=tokenizer, dataset=validation)
    return train_and_save(config, model, losses, device, save, check, data_provenance(config.data, dataset))


def choose_tokenizer(config: TrainPolicyConfig, start: RsdPolicy | None) -> ActionTokenizer:
    """The one named, else the starting checkpoint's, else `DEFAULT_TOKENIZER`."""
    if start is None:
        return ActionTokenizer.load(config.tokenizer or DEFAULT_TOKENIZER)
    if config.tokenizer is None:
        return start.tokenizer
    tokenizer = ActionTokenizer.load(config.tokenizer)
    if not config.init_matching and tokenizer.to_json() != start.tokenizer.to_json():
        found = f"another tokenizer than {config.init} has"
        raise RsdError(f"--tokenizer {config.tokenizer}: {found}; leave it out, or start heads afresh: --init-matching")
    return tokenizer


def take_over(model: RsdModel, start: RsdPolicy, config: TrainPolicyConfig) -> None:
    """Give the model the weights of the checkpoint that `init` names.

    A checkpoint without a visual drafter leaves the model's own as it is; anything else that does not fit is an error,
    unless `init_matching` asks for what does."""
    own, given = model.state_dict(), start.model.state_dict()
    for part in config.init_fresh:
        if not any(name.startswith(f"{part}.") for name in own):
            raise RsdError(f"--init-fresh {part}: expected the beginning of a weight's name, such as target.level_head")
    afresh = tuple(f"{part}." for part in config.init_fresh)
    kept = {name: tensor for name, tensor in given.items() if not name.startswith(afresh)}
    fitting = {name: tensor for name, tensor in kept.items() if name in own and tensor.shape == own[name].shape}
    fresh = sorted(own.keys() - fitting.keys())
    lacking = [name for name in fresh if start.config.visual_drafter or not name.startswith("visual_drafter.")]
    if config.init_matching:
        missing = sum(own[name].numel() for name in fresh) / sum(tensor.numel() for tensor in own.values())
        parts = sorted({".".join(name.split(".")[:2]) for name in fresh})
        print(f"--init-matching: {missing:.0%} of the weights start afresh: {', '.join(parts) or 'none'}")
    elif lacking or len(fitting) < len(given):
        found = f"its sizes {start.config} differ from the run's {config.policy}"
        raise RsdError(f"--init {config.init}: {found}; --init-matching takes over what fits")
    model.load_state_dict({**own, **fitting})


def data_provenance(folders: Iterable[Path], dataset: FrameDataset) -> dict[str, object]:
    return {
        "sources": [folder_provenance(folder) for folder in folders],
        "episodes": dataset.episodes,
        "frames": len(dataset),
        "instructions": dataset.instructions,
    }


def load_folders(folders: Iterable[Path], images: bool = True, image_size: int = 0) -> Iterator[Demonstration]:
    """The demonstrations of all of them, in order; image_size: see `load_demonstrations`."""
    folders = list(folders)
    each_once("--data", [located(folder)[0] for folder in folders])
    everything = (load_demonstrations(folder, images=images, image_size=image_size) for folder in folders)
    return shown(chain.from_iterable(everything), "demonstrations read")


def load_frames(
    config: TrainPolicyConfig | TrainDrafterConfig | TrainCorrectorConfig,
    tokenizer: ActionTokenizer,
    device: torch.device,
    image_size: int,
    execute: int,
    remembered: int | None = None,
    asking: bool = False,
) -> tuple[FrameDataset, FrameDataset]:
    """What is trained on and what is held out, all of it checked; remembered: batches will be of pairs of frames, up to
    so many chunks apart of which `execute` steps are executed, None: of single ones; asking: see `FrameDataset`."""
    everything = held_against(tokenizer, load_folders(config.data, image_size=image_size))
    parts, horizon = split(everything, config.validation_every), tokenizer.config.horizon
    training, validation = (FrameDataset(part, horizon, device, image_size, execute, asking) for part in parts)
    training.check(config.loop.batch_size, remembered, config.augment)
    print(f"{plural(training.episodes, 'demonstration')}, {len(training)} frames; held out {validation.episodes}")
    return training, validation


def split(demonstrations: Iterable[Demonstration], every: int) -> tuple[list[Demonstration], list[Demonstration]]:
    """Whole episodes apart: every `every`-th one for validation."""
    everything = list(demonstrations)
    training, held_out = episode_numbers(len(everything), every)
    return [everything[number] for number in training], [everything[number] for number in held_out]


def episode_numbers(episodes: int, every: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[int]]:
    """Numbers of the demonstrations that this process trains on, and of those held out: every `every`-th one."""
    if episodes < 2:
        raise RsdError(f"training data: expected at least 2 demonstrations, found {episodes}")
    every = min(every, episodes)
    training = [number for number in range(episodes) if (number + 1) % every]
    if len(training) < world:
        raise RsdError(f"training data: {len(training)} demonstrations for {world} processes; start fewer of them")
    return training[rank::world], list(range(every - 1, episodes, every))


def join(device: str) -> torch.device:
    """Join the other processes of `torchrun`, if there are any -> this one's device."""
    parallel.join()
    found = resolve_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one; `cuda` is this process's own GPU, and without one an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return torch.device(f"cuda:{int(variable('LOCAL_RANK', '0'))}" if name == "cuda" else name)


def in_one_process(command: str, device: str) -> torch.device:
    """The device of a training that `torchrun` cannot spread; `RsdError` if it has started this one."""
    if parallel.launched():
        raise RsdError(f"{command}: runs in one process; drop torchrun")
    return resolve_device(device)


@one_run_a_folder
def train_drafter(config: TrainDrafterConfig) -> Path:
    """Run the training; returns the checkpoint directory."""
    device = in_one_process("train drafter", config.device)
    check_state(config)
    source = RsdPolicy.from_pretrained(config.policy, decode="ar", engine=EAGER)
    if not source.core.body.compact:
        raise RsdError(f"train drafter: {config.policy} has OpenVLA as its target; its drafts are trained with it")
    tokenizer, visual = source.tokenizer.to(device), config.kind == "visual"
    torch.manual_seed(config.loop.seed)
    model, policy = with_draft(source, config)
    side = source.config.target.image_size
    remembered = config.remembered_chunks if visual else None
    dataset, validation = load_frames(config, tokenizer, device, side, source.execute, remembered)
    model.to(device).requires_grad_(False)
    model.get_submodule(f"{config.kind}_drafter").requires_grad_(True)

    def losses() -> dict[str, Tensor]:
        batch = dataset.draw_batch(config.loop.batch_size, remembered or 0, config.augment)
        model.target.eval()  # `train` puts the whole model in training mode
        with torch.no_grad():
            text = model.target.encode_text(batch.words)
            prefix = model.target.embed_prefix(batch.images, batch.state, text)
            features, cache = model.target.prefill(prefix)
        run = TargetRun(model.target.remembered(prefix.shape[1]), cache, features, text[1])
        return losses_of(model, tokenizer, batch, run, config)

    def save(ema: RsdModel, made: dict[str, Any], directory: Path) -> None:
        save_checkpoint(ema, tokenizer, policy, {**source.provenance, f"{config.kind}_drafter": made}, directory)

    check = partial(validate, tokenizer=tokenizer, dataset=validation)
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
        values = visual_drafter_losses(model, run, batch, truth, gripper, tokenizer, config.loss)[1]
        return {**values, "total": visual_total(values, config.loss)}
    own = torch.rand(len(truth), 1, device=truth.device) < config.own_prefix
    values = draft_losses(model.feature_drafter, run.features, truth, gripper, own, Rfsq(model.target.code))[1]
    return {**values, "total": values["draft"]}
