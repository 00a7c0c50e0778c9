"""Low-rank updates of an OpenVLA model's matrices (LoRA, arXiv 2106.09685), trained beside weights that stay.

Saved as PEFT saves them, under the published names, so that `openvla_loading.merge_adapter` and PEFT itself read them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.models.config import LoraConfig
from rsd.pt_files import save_tensors
from rsd.targets.openvla.loading import Slot, slots
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.published import ADAPTER_CONFIG, ADAPTER_WEIGHTS


class LowRank(nn.Module):
    """x -> B A x, zero to begin with; float32 whatever the matrix beside it is."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        device = linear.weight.device
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, device=device) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)


class LoraLinear(nn.Module):
    """Stands where a linear layer stood: W x + scale * B A x."""

    def __init__(self, linear: nn.Linear, update: LowRank, scale: float) -> None:
        super().__init__()
        self.linear, self.update, self.scale = linear, update, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.update(x)


@dataclass(frozen=True)
class Wrapped:
    """A layer in its place, and the published matrices that its rows are."""

    owner: nn.Module
    name: str
    layer: LoraLinear
    published: dict[str, Slot]


class Adapter:
    """Puts an update beside every matrix of the trunk (and of vision) when made; `merge` takes them out again.

    `updates` holds what is trained, and nothing of the model."""

    def __init__(self, model: OpenVlaModel, config: LoraConfig) -> None:
        self.config, self.updates = config, nn.ModuleDict()
        self.wrapped: list[Wrapped] = []
        places: dict[int, dict[str, Slot]] = {}
        for name, slot in slots(model).items():
            places.setdefault(id(slot.parameter), {})[name] = slot
        parts: dict[str, nn.Module] = {"language": model.language_model.layers}
        if config.vision:
            towers = model.vision_backbone
            parts |= {"dino": towers.featurizer.blocks, "siglip": towers.fused_featurizer.blocks}
            parts |= {"projector": model.projector}
        for part, module in parts.items():
            for path, owner in list(module.named_modules()):
                for name, child in list(owner.named_children()):
                    if isinstance(child, nn.Linear):
                        layer = LoraLinear(child, LowRank(child, config.rank), config.alpha / config.rank)
                        setattr(owner, name, layer)
                        self.updates["/".join([part, *path.split("."), name])] = layer.update
                        self.wrapped.append(Wrapped(owner, name, layer, places[id(child.weight)]))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights, in float32, and take the wrappers away; the updates can still be saved."""
        for item in self.wrapped:
            weight, update = item.layer.linear.weight, item.layer.update
            weight.copy_(weight.float() + item.layer.scale * (update.b.float() @ update.a.float()))
            setattr(item.owner, item.name, item.layer.linear)

    def save(self, directory: Path, base: str) -> None:
        """PEFT's two files. A matrix that is several published ones (queries, keys, values) gives each its rows of B
        and a copy of A."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors, targets = {}, []
        for item in self.wrapped:
            a, b = item.layer.update.a.detach().float().cpu(), item.layer.update.b.detach().float().cpu()
            for name, slot in item.published.items():
                module = name.removesuffix(".weight")
                targets.append(module)
                tensors[f"base_model.model.{module}.lora_A.weight"] = a.clone()
                tensors[f"base_model.model.{module}.lora_B.weight"] = b[slot.start : slot.start + slot.shape[0]].clone()
        save_tensors(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(targets),
            "inference_mode": True,
        }
        (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
