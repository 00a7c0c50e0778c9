"""What makes the native model faster without changing its files: compiled layers, FP8 matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd.targets.openvla.model import OpenVlaModel
from rsd.types import RsdError

FP8 = torch.float8_e4m3fn
FP8_MAX = float(torch.finfo(FP8).max)  # 448


class Fp8Linear(nn.Module):
    """A linear layer whose product runs in FP8 (e4m3): weights scaled per output, inputs per row as they come."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX  # [out, 1]
        self.register_buffer("weight", (weight.float() / scale).to(FP8))
        self.register_buffer("scale", scale.T.contiguous())  # [1, out]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX
        product = torch._scaled_mm(
            (rows.float() / scale).to(FP8), self.weight.T, scale, self.scale, out_dtype=x.dtype, use_fast_accum=True
        )
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, x.shape[:-1])


def use_fp8(model: OpenVlaModel, *, vision: bool = False) -> None:
    """Replace the trunk's matrices (and the vision blocks' and the projector's) in place; embeddings and heads stay.

    Needs a GPU with FP8 units (compute capability 8.9 or later) and the model in bfloat16."""
    if model.dtype != torch.bfloat16:
        raise RsdError(f"FP8: expected a bfloat16 model, found {model.dtype}; load it with dtype bfloat16")
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 9):
        name = torch.cuda.get_device_name(model.device)
        raise RsdError(f"FP8: {name} has no FP8 units (compute capability 8.9 or later); leave fp8 out")
    parts: list[nn.Module] = [model.language_model.layers]
    if vision:
        towers = model.vision_backbone
        parts += [towers.featurizer.blocks, towers.fused_featurizer.blocks, model.projector]
    for part in parts:
        for owner in list(part.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear) and not (child.in_features % 16 or child.out_features % 16):
                    setattr(owner, name, Fp8Linear(child))


def compile_layers(model: OpenVlaModel) -> None:
    """Compile what repeats: the two halves of a trunk layer and a vision block, once each, not the whole graph.

    Attention itself stays with PyTorch's own kernels. The first shape met gets code of its own, all others share code
    for any length."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.language_model.blocks:
        layer.before = torch.compile(layer.before)  # type: ignore[method-assign]
        layer.after = torch.compile(layer.after)  # type: ignore[method-assign]
    for tower in (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer):
        for block in tower.blocks:
            block.compile()
    model.projector.compile()
