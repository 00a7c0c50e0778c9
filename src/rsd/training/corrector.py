"""`rsd train corrector`: the residual head over a target's stale chunks, on demonstrations, beside a frozen target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsd.checkpoint import weights_hash
from rsd.models.corrector import ChunkCorrector, rest_of, stale_run
from rsd.models.target import TargetModel
from rsd.policy import RsdPolicy
from rsd.targets.corrector import StoredCorrector, save_corrector
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import Augmentation, TrainCorrectorConfig
from rsd.training.dataset import FrameDataset
from rsd.training.loop import check_state, one_run_a_folder, train_and_save
from rsd.training.policy import data_provenance, in_one_process, load_frames
from rsd.types import EAGER, RsdError

MAX_FRAMES, ROWS = 1024, 128  # of the validation: frames at most, and of them at once


@one_run_a_folder
def train_corrector(config: TrainCorrectorConfig) -> Path:
    """Run the training; returns the corrector's directory."""
    device = in_one_process("train corrector", config.device)
    check_state(config)
    source = RsdPolicy.from_pretrained(config.policy, decode="l1", engine=EAGER)
    target, tokenizer = source.model.target.to(device).requires_grad_(False), source.tokenizer.to(device)
    if not isinstance(target, TargetModel):
        raise RsdError(f"train corrector: expected a compact policy, found {config.policy} on OpenVLA")
    dataset, validation = load_frames(config, tokenizer, device, target.config.image_size, target.horizon)
    torch.manual_seed(config.loop.seed)
    model = ChunkCorrector(config.corrector, target).to(device)

    def losses() -> dict[str, Tensor]:
        frames = dataset.draw(config.loop.batch_size)[0]
        return corrector_losses(model, target, tokenizer, dataset, frames, config.augment)

    def save(ema: ChunkCorrector, made: dict[str, Any], directory: Path) -> None:
        stored = StoredCorrector(config.corrector, weights_hash(config.policy), made)
        save_corrector(ema, stored, directory)

    def check(ema: ChunkCorrector) -> dict[str, object]:
        return validate(ema, target, tokenizer, validation)

    return train_and_save(config, model, losses, device, save, check, data_provenance(config.data, dataset))


def corrector_losses(
    model: ChunkCorrector,
    target: TargetModel,
    tokenizer: ActionTokenizer,
    dataset: FrameDataset,
    frames: Tensor,
    augment: Augmentation | None,
) -> dict[str, Tensor]:
    """frames int [B], each with a chunk of an observation drawn from 0 to H - 1 steps before -> named scalar losses:
    motion (normalised) and gripper of now and the steps after it, in which now counts as much as all others;
    `uncorrected`, the motion's without a correction; `total` is what to minimise."""
    back = torch.randint(0, (model.horizon - 1) // dataset.spacing + 1, frames.shape, device=frames.device)
    seen = torch.maximum(frames - back, dataset.first[frames])
    batch = dataset.batch(torch.cat([frames, seen]), augment=augment)
    now, before = slice(None, len(frames)), slice(len(frames), None)
    tokens, condition = target.encode_text(batch.words)
    asked = tokens[before], condition[before]
    stale = stale_run(target, tokenizer, batch.images[before], batch.state[before], asked)
    index = (frames - seen) * dataset.spacing
    rest = rest_of(stale.chunk, index)
    state, wanted = target.normalise(batch.state[now]), batch.chunk[now]
    motion, closing = model(batch.images[now], state, condition[now], stale.read, rest, index)
    weights = torch.full((model.horizon,), 0.5 / (model.horizon - 1), device=frames.device)
    weights[:1].fill_(0.5)  # `weights[0] =` would copy from the host, which a recorded step cannot
    apart, before_it = ((each - wanted[..., :-1]).abs() / tokenizer.scale for each in (motion, rest[..., :-1]))
    grip = F.binary_cross_entropy_with_logits(closing.float(), (wanted[..., -1] > 0).float(), reduction="none")
    values = {"motion": (apart.mean(-1) * weights).sum(1).mean(), "gripper": (grip * weights).sum(1).mean()}
    total = 5.0 * values["motion"] + values["gripper"]
    return {**values, "uncorrected": (before_it.mean(-1) * weights).sum(1).mean(), "total": total}


@torch.no_grad()
def validate(
    model: ChunkCorrector, target: TargetModel, tokenizer: ActionTokenizer, dataset: FrameDataset
) -> dict[str, object]:
    """On held-out demonstrations: mean losses, with and without the correction."""
    model.eval()
    batches = dataset.spread(MAX_FRAMES, ROWS)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same ages whenever it is asked
        found = [(len(part), corrector_losses(model, target, tokenizer, dataset, part, None)) for part in batches]
    frames = sum(count for count, _ in found)
    means = {name: sum(count * float(values[name]) for count, values in found) / frames for name in found[0][1]}
    return {"frames": frames, **{name: round(value, 4) for name, value in means.items() if name != "total"}}
