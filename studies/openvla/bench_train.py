"""How long one LoRA training step takes and how much memory: the losses of `rsd train policy --backbone openvla`.

Forward pass, backward pass and optimiser, on a batch that lies on the device; the augmentation of images is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rsd.conventions import CHUNK_SIZE
from rsd.models.target import STATE_FEATURES
from rsd.models.text import BUCKETS
from rsd.targets.openvla.lora import LoraConfig
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.rsd_policy import OpenVlaRsdConfig
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.training.dataset import Batch
from rsd.training.loop import LoopConfig, optimiser_of
from rsd.training.losses import LossConfig, policy_losses
from rsd.training.openvla import Trainee, prepare
from rsd.words import MAX_WORDS
from studies.openvla.bench_cases import MOTION_DIM, Case, Inputs, Pass, full_config, ideal_ms, random_model

if TYPE_CHECKING:
    from studies.openvla.bench import Bench

CASE, CAMERAS = "lora-step", 2
REPEATS = 8  # a step takes a second
TIMES_FORWARD = 3  # the forward pass, the same again from checkpoints, and gradients of activations, none of weights


def run_train(bench: Bench, dtype: torch.dtype) -> None:
    """One row for each of the configured batch sizes, with the options that training has by default."""
    from studies.openvla.bench import Row  # which imports this module

    with torch.inference_mode(False), torch.enable_grad():
        tokenizer = ActionTokenizer(TokenizerConfig(), -torch.ones(MOTION_DIM), torch.ones(MOTION_DIM), 1.0)
        tokenizer = tokenizer.to(bench.config.device)
        model = random_model(full_config(bench.config.size), bench.config.device, dtype)
        trainee = prepare(model, OpenVlaRsdConfig(cameras=CAMERAS), LoraConfig(), tokenizer, checkpointing=True)
        found = []
        for size in bench.config.train_batches:
            row = Row("train", CASE, CAMERAS, size)

            def step(size: int = size) -> Callable[[], Any]:
                return training_step(trainee, tokenizer, size, bench.config.prompt_tokens)

            def ideal(size: int = size) -> float:
                assert bench.ceiling is not None
                return step_ideal(model, bench, size)

            bench.run_row(row, step, ideal, min(bench.config.repeats, REPEATS))
            if row.p50_ms:
                found.append({"batch": size, "chunks_per_s": round(1e3 * size / row.p50_ms, 2), **timed(row)})
            bench.free()
        trained = sum(parameter.numel() for parameter in trainee.trained.parameters())
        settings = {"lora_rank": LoraConfig().rank, "cameras": CAMERAS, "trained_parameters": trained}
        bench.notes["train"] = {**settings, "steps": found}


def timed(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("p50_ms", "p95_ms", "share", "peak_gib")}


def training_step(trainee: Trainee, tokenizer: ActionTokenizer, size: int, prompt_tokens: int) -> Callable[[], Any]:
    """A call that makes one step on a random batch of `size` chunks."""
    inputs = Inputs(trainee.model.target.openvla, CAMERAS, size, prompt_tokens)
    device = inputs.pixels.device
    words = torch.randint(1, BUCKETS, (size, MAX_WORDS), device=device)
    chunk = torch.rand(size, CHUNK_SIZE, MOTION_DIM + 1, device=device) * 2 - 1
    chunk[..., -1] = chunk[..., -1].sign()
    state = torch.cat([inputs.state, torch.randn(size, STATE_FEATURES, device=device)], dim=1)
    batch = Batch(inputs.pixels, state, torch.cat([words, inputs.prompt], dim=1), chunk, paired=True)
    parameters = list(trainee.trained.parameters())
    optimiser = optimiser_of(parameters, LoopConfig(), device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            losses = policy_losses(trainee.model, tokenizer, batch, LossConfig())
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def step_ideal(model: OpenVlaModel, bench: Bench, size: int) -> float:
    """Roofline of a step in milliseconds: vision once, every pass of the trunk three times."""
    assert bench.ceiling is not None
    length = CAMERAS * model.config.vision[0].patches + bench.config.prompt_tokens + 1
    levels = TokenizerConfig().levels
    passes = [Pass(length + CHUNK_SIZE), Pass((levels - 1) * CHUNK_SIZE, length + CHUNK_SIZE)]
    case = Case(CASE, lambda: (), [], TIMES_FORWARD * passes, True)
    return ideal_ms(model, case, bench.ceiling, size, CAMERAS)
