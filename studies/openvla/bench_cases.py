"""What `python -m studies.openvla` times: whole decisions from pixels, as functions of tensors, with their ideal
cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rsd.conventions import CHUNK_SIZE
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import EpisodeState, PolicyInput
from rsd.evaluation.roofline import Ceiling
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.models.target import STATE_FEATURES, TargetConfig
from rsd.models.visual_drafter import Memory, VisualDrafterConfig
from rsd.nested import tensors_of
from rsd.targets.openvla.llama import LlamaConfig
from rsd.targets.openvla.model import ACTION_TOKENS, OpenVlaConfig, OpenVlaModel
from rsd.targets.openvla.target import OpenVlaTarget, OpenVlaVisualDrafter
from rsd.targets.openvla.vision import DINO, SIGLIP, TIMM_MODELS
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import ACTION_DIM, CAMERAS, STATE_DIM, RsdError

MOTION_DIM = ACTION_DIM - 1


@dataclass(frozen=True)
class Pass:
    """One pass of the trunk for the roofline: new positions, and positions already in the cache."""

    new: int
    cached: int = 0


@dataclass(frozen=True)
class Case:
    """fn(*inputs) is one whole decision; passes: of the trunk; vision: whether the images are encoded in it."""

    name: str
    fn: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    passes: list[Pass]
    vision: bool


def full_config(size: str) -> OpenVlaConfig:
    """`7b`: OpenVLA's own sizes; `tiny`: the same structure, for a check on a CPU."""
    if size == "7b":
        return OpenVlaConfig()
    if size != "tiny":
        raise RsdError(f"--size {size}: expected 7b or tiny")
    towers = (
        replace(TIMM_MODELS[DINO], dim=64, depth=3, heads=2, mlp_dim=128, image_size=56),
        replace(TIMM_MODELS[SIGLIP], dim=96, depth=3, heads=2, mlp_dim=128, image_size=56),
    )
    return OpenVlaConfig(towers, LlamaConfig(vocab_size=512, dim=64, layers=2, heads=4, mlp_dim=128))


def random_model(config: OpenVlaConfig, device: str, dtype: torch.dtype, seed: int = 0) -> OpenVlaModel:
    """Random weights scaled so that activations stay in range, made on the device."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = OpenVlaModel(config, action_head=True, proprio=True)
    model.to(dtype).to_empty(device=device)
    model.language_model.reset_rotary(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        model.language_model.embed_tokens.weight.normal_()
    return model.eval()


class Inputs:
    """Random pixels, prompt and state of one batch."""

    def __init__(self, model: OpenVlaModel, cameras: int, batch: int, prompt_tokens: int) -> None:
        side = model.config.vision[0].image_size
        generator = torch.Generator(model.device).manual_seed(0)
        shape = (batch, cameras, 6, side, side)
        self.pixels = torch.randn(shape, generator=generator, device=model.device).to(model.dtype)
        self.prompt = torch.randint(
            3, model.config.llama.vocab_size, (batch, prompt_tokens), generator=generator, device=model.device
        )
        self.state = torch.rand((batch, STATE_DIM), generator=generator, device=model.device) * 2 - 1
        self.prefix_length = cameras * model.config.vision[0].patches + prompt_tokens + 1

    def all(self) -> list[Tensor]:
        return [self.pixels, self.prompt, self.state]


def openvla_cases(model: OpenVlaModel, inputs: Inputs) -> list[Case]:
    """Vision, causal prefill, OFT's chunk with the L1 head, OpenVLA's seven tokens."""
    length = inputs.prefix_length

    def prefix(pixels: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        return model.embed_prefix(model.embed_images(pixels), prompt, state)

    def l1(*values: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.action_hidden(prefix(*values))
        return model.head(hidden), hidden

    embedded = model.embed_images(inputs.pixels).clone()
    continued = [Pass(1, length + index) for index in range(ACTION_DIM - 1)]
    return [
        Case("vision", model.embed_images, [inputs.pixels], [], True),
        Case("l1", l1, inputs.all(), [Pass(length + ACTION_TOKENS + 1)], True),
        Case(
            "prefill",
            lambda *values: model.prefill(model.embed_prefix(*values), 0)[0],
            [embedded, inputs.prompt, inputs.state],
            [Pass(length)],
            False,
        ),
        Case("ar7", lambda *values: generate(model, prefix(*values)), inputs.all(), [Pass(length), *continued], True),
    ]


def generate(model: OpenVlaModel, prefix: Tensor, count: int = ACTION_DIM) -> Tensor:
    """Greedy continuation of the prefix -> ids [B, count]; one prefill and count - 1 passes of one token."""
    hidden, cache = model.prefill(prefix, count - 1)
    tokens = [model.language_model.logits(hidden).argmax(-1)]
    while len(tokens) < count:
        hidden = model.next_token(tokens[-1], cache)
        tokens.append(model.language_model.logits(hidden).argmax(-1))
    return torch.cat(tokens, dim=1)


class Parts(Primitives):
    """Primitives that are parts of somebody's own recording: no engine, no times, nothing left to check."""

    @contextmanager
    def inline(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside, self.checks = False, []


def rfsq_cases(model: OpenVlaModel, inputs: Inputs) -> list[Case]:
    """The decoders of residual tokens on the same trunk. In `rsd-fused` the visual drafter works beside the vision
    towers and reads what the target remembers of an earlier chunk; `visual_drafter` is its own chunk."""
    code, own, (batch, cameras, *_) = RfsqConfig(), VisualDrafterConfig(), inputs.pixels.shape
    torch.manual_seed(0)
    target = OpenVlaTarget(model, code, CHUNK_SIZE, MOTION_DIM, cameras).eval()
    draft = FeatureDrafter(DrafterConfig(), code, CHUNK_SIZE, MOTION_DIM, model.config.llama.dim)
    visual_drafter = OpenVlaVisualDrafter(own, code, CHUNK_SIZE, MOTION_DIM, model.config.llama.dim)
    for part in (draft, visual_drafter):
        part.to(model.device, model.dtype).eval()
    ops = Parts(target, draft, acceptance_rule("margin", code), visual_drafter=visual_drafter)

    def decide(name: str, *values: Tensor) -> tuple[Tensor, ...]:
        pixels, prompt, state, condition, *memory = values
        half = len(memory) // 2
        past = EpisodeState(Memory(memory[:half], memory[half:]) if memory else None)
        with ops.inline():
            result = DECODERS[name].decode(ops, PolicyInput(pixels, state, (prompt, condition)), past)
        return tuple(tensors_of(result))

    h, length, coarse = CHUNK_SIZE, inputs.prefix_length, draft.config.levels


    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=model.device, dtype=model.dtype)

    condition = noise(batch, TargetConfig().text_dim)
    features = torch.randn(batch, STATE_DIM + STATE_FEATURES, device=model.device)
    both = noise(batch, len(CAMERAS), *inputs.pixels.shape[2:])  # the drafter always has two cameras
    past = [noise(batch, own.heads, length + h, own.dim // own.heads) for _ in range(2 * own.layers)]
    alone, beside = [*inputs.all(), condition], [both, inputs.prompt, features, condition, *past]
    first = Pass(length + h)
    levels = [Pass(h, length + h * level) for level in range(1, code.levels)]
    return [
        Case("rfsq-ar", partial(decide, "ar"), alone, [first, *levels], True),
        Case("rsd", partial(decide, "rsd"), alone, [first, Pass(coarse * h, length + h)], True),
        Case("rsd-fused", partial(decide, "rsd-fused"), beside, [Pass(length + (coarse + 1) * h)], True),
        Case("light", partial(decide, "draft-first"), beside, [], False),
    ]


def ideal_ms(model: OpenVlaModel, case: Case, ceiling: Ceiling, batch: int, cameras: int) -> float:
    """Roofline: each pass takes the longer of its arithmetic and of reading its weights and its cache once."""
    config, total = model.config.llama, 0.0
    weights = sum(_matrices(layer) for layer in model.language_model.blocks)
    for step in case.passes:
        positions = step.new + step.cached
        attention = 4.0 * step.new * positions * config.dim * config.layers
        flops = batch * (2.0 * weights * step.new + attention)
        cache = 2.0 * config.layers * config.dim * positions * batch
        total += max(flops / ceiling.flops, 2.0 * (weights + cache) / ceiling.bandwidth)
    if case.vision:
        for tower, vit in zip(
            (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer), model.config.vision, strict=True
        ):
            tokens = vit.patches + (vit.registers + 1 if vit.registers else 0)
            matrices = _matrices(tower)
            attention = 4.0 * tokens**2 * vit.dim * (vit.depth - 1)
            flops = batch * cameras * (2.0 * matrices * tokens + attention)
            total += max(flops / ceiling.flops, 2.0 * matrices / ceiling.bandwidth)
        projector = _matrices(model.projector)
        patches = batch * cameras * model.config.vision[0].patches
        total += max(2.0 * projector * patches / ceiling.flops, 2.0 * projector / ceiling.bandwidth)
    return 1e3 * total


def _matrices(module: nn.Module) -> int:
    """Numbers in the weight matrices of all layers inside."""
    weights = [getattr(layer, "weight", None) for layer in module.modules()]
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)
