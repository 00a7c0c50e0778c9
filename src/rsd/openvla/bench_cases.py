"""What `rsd bench openvla` times: whole decisions from pixels, as functions of tensors, with their ideal cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rsd.conventions import CHUNK_SIZE
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.recorded import Silent
from rsd.decoding.steps import Decoder, EpisodeMemory, Sketch, complete, draft_levels
from rsd.decoding.strategies import check_in_prefill
from rsd.evaluation.roofline import Ceiling
from rsd.models.draft import DraftConfig, DraftModel
from rsd.models.light_draft import LightDraft, LightDraftConfig, Memory
from rsd.models.main import STATE_FEATURES, MainConfig
from rsd.models.openvla import ACTION_TOKENS, OpenVlaConfig, OpenVlaModel
from rsd.models.openvla_llama import LlamaConfig
from rsd.models.openvla_rfsq import OpenVlaMain
from rsd.models.openvla_vision import DINO, SIGLIP, TIMM_MODELS
from rsd.models.streams import fork
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
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
        Case("ar7", lambda *values: model.generate(prefix(*values)), inputs.all(), [Pass(length), *continued], True),
    ]


def rfsq_cases(model: OpenVlaModel, inputs: Inputs) -> list[Case]:
    """The decoders of residual tokens on the same trunk, as `decoding.strategies` has them, without its statistics.

    `rsd` is timed with every drafted level accepted. In `rsd-fused` the light draft works beside the vision towers
    and reads what the main remembers of an earlier chunk; `light` is its own chunk.
    """
    code = RfsqConfig()
    torch.manual_seed(0)
    main = OpenVlaMain(model, code, CHUNK_SIZE, MOTION_DIM).eval()
    draft = DraftModel(DraftConfig(), code, CHUNK_SIZE, MOTION_DIM, model.config.llama.dim)
    draft = draft.to(model.device, model.dtype).eval()
    rfsq, coarse, h = Rfsq(code), draft.config.levels, CHUNK_SIZE
    batch, length = len(inputs.prompt), inputs.prefix_length

    def prefix(pixels: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        return main.embed_prefix(pixels, state, (prompt, prompt))

    def gripper_of(features: Tensor) -> Tensor:
        return (main.gripper_logits(features) > 0).long()

    def ar(*values: Tensor) -> Tensor:
        features, cache = main.prefill(prefix(*values))
        gripper, motion = gripper_of(features), main.logits(features, 1).argmax(-1).unsqueeze(1)
        for level in range(2, code.levels + 1):
            (features,) = main.extend([rfsq.dequantise(motion)], gripper, level, cache)
            motion = torch.cat([motion, main.logits(features, level).argmax(-1).unsqueeze(1)], dim=1)
        return rfsq.dequantise(motion)

    def verified(motion: Tensor, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits = torch.stack([main.logits(block, level + 1) for level, block in enumerate(blocks[:-1])], dim=1)
        return rfsq.dequantise(motion) + main.residual(blocks[-1], coarse + 1), logits

    def prefixes(motion: Tensor) -> list[Tensor]:
        return [rfsq.dequantise(motion[:, :level]) for level in range(1, coarse + 1)]

    def rsd(*values: Tensor) -> tuple[Tensor, Tensor]:
        features, cache = main.prefill(prefix(*values))
        read, _ = draft.read(features)
        gripper = gripper_of(features)
        motion = torch.empty(batch, 0, h * MOTION_DIM, dtype=torch.long, device=model.device)
        for level in range(1, coarse + 1):
            symbols = draft.logits(read, rfsq.dequantise(motion), gripper, level).argmax(-1)
            motion = torch.cat([motion, symbols.unsqueeze(1)], dim=1)
        return verified(motion, [features, *main.extend(prefixes(motion), gripper, 2, cache)])

    def proposed(decoder: Decoder, *values: Tensor) -> Sketch:
        images, features, condition, *memory = values
        past = Memory(memory[: len(memory) // 2], memory[len(memory) // 2 :])
        seen = light.perceive(images, features, condition, past)
        return Sketch(draft_levels(decoder, light.levels, seen), seen)

    def fused(pixels: Tensor, prompt: Tensor, state: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        decoder = Decoder(main, draft, rule, light=light)
        looked = fork(lambda: prefix(pixels, prompt, state), model.device)
        drafted, memory = proposed(decoder, *values).drafted, EpisodeMemory()
        decoded = check_in_prefill(decoder, looked(), drafted, memory, Silent(model.device))
        assert memory.main is not None
        return decoded.value, *memory.main.keys, *memory.main.values

    def alone(*values: Tensor) -> tuple[Tensor, Tensor]:
        decoder = Decoder(main, draft, rule, light=light)
        proposal = complete(decoder, proposed(decoder, *values))
        assert proposal.value is not None
        assert proposal.expected_deviation_mm is not None
        return proposal.value, proposal.expected_deviation_mm

    own = LightDraftConfig()
    seen_by = MainConfig(dim=model.config.llama.dim, heads=model.config.llama.heads)
    light = LightDraft(own, code, CHUNK_SIZE, MOTION_DIM, seen_by).to(model.device, model.dtype).eval()
    rule, side = acceptance_rule("margin", code), seen_by.image_size
    shapes = [(len(CAMERAS), 3, side, side), (STATE_FEATURES,), (seen_by.text_dim,)]
    shapes += [(own.heads, length + h, own.dim // own.heads)] * (2 * own.layers)
    glance = [torch.randn(batch, *shape, device=model.device, dtype=model.dtype) for shape in shapes]
    first = Pass(length + h)
    levels = [Pass(h, length + h * level) for level in range(1, code.levels)]
    return [
        Case("rfsq-ar", ar, inputs.all(), [first, *levels], True),
        Case("rsd", rsd, inputs.all(), [first, Pass(coarse * h, length + h)], True),
        Case("rsd-fused", fused, [*inputs.all(), *glance], [Pass(length + (coarse + 1) * h)], True),
        Case("light", alone, glance, [], False),
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
