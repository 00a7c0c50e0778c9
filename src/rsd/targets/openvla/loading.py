"""Reading published OpenVLA and OpenVLA-OFT directories into the native model: by name, strictly, shard by shard.

Nothing is unpickled: safetensors, or torch.load with weights_only. Every tensor of a checkpoint must have its place
and every parameter its tensor, in its shape; only parts known to take no part in a prediction are left unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rsd.checks import checked, told
from rsd.conventions import CHUNK_SIZE
from rsd.pt_files import read_pt, refuse_pointer
from rsd.targets.openvla.model import OpenVlaConfig, OpenVlaModel
from rsd.targets.openvla.published import (
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    component_file,
    read_json,
)
from rsd.types import RsdError


@dataclass(frozen=True)
class Slot:
    """Where a published tensor goes: rows [start, start + rows) of a parameter."""

    parameter: Tensor
    start: int
    shape: tuple[int, ...]

    def view(self) -> Tensor:
        return self.parameter[self.start : self.start + self.shape[0]]


def load_openvla(
    directory: Path,
    *,
    base: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> OpenVlaModel:
    """Directory of OpenVLA, or of an OFT fine-tune -> model in eval mode.

    base: the model that `directory/lora_adapter` was trained on, where the directory holds no merged weights.
    dtype: bfloat16 on a GPU, as published, and float32 on a CPU, unless given. chunk: see `Settings`.
    Peak memory of the host is one tensor: shards are read through memory maps, straight to the device."""
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    merged = sorted(directory.glob("model*.safetensors"))
    source = directory if merged else base
    if source is None:
        raise RsdError(_nothing_to_load(directory))
    config = OpenVlaConfig.from_json(read_json(source / CONFIG_FILE), str(source / CONFIG_FILE))
    heads = {name: component_file(directory, name) for name in ("action_head", "proprio_projector")}
    for pattern, what in (("noisy_action_projector--*", "diffusion"), ("vision_backbone--*", "FiLM")):
        if found := list(directory.glob(pattern)):
            raise RsdError(f"{found[0]}: this is an OFT checkpoint with {what}, which is not supported")
    with torch.device("meta"):
        parts = {"action_head": heads["action_head"] is not None, "proprio": heads["proprio_projector"] is not None}
        model = OpenVlaModel(config, **parts, chunk=chunk or CHUNK_SIZE)
    model.to(dtype).to_empty(device=device)
    model.language_model.reset_rotary(device, dtype)
    for name, path in heads.items():  # before the 15 GB
        if path is not None:
            load_component(getattr(model, name), path)
    load_weights(model, source)
    if not merged:
        merge_adapter(model, directory / ADAPTER_DIR)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise RsdError(f"{source}: {name} holds NaN or infinity; the checkpoint is damaged")
    return model.eval()


def _nothing_to_load(directory: Path) -> str:
    adapter = directory / ADAPTER_DIR / ADAPTER_CONFIG
    if adapter.is_file():
        name = read_json(adapter).get("base_model_name_or_path")
        return (
            f"{directory}: holds a LoRA adapter and no merged weights (model*.safetensors); "
            f"name the model it was trained on with `base` (the adapter says {name!r})"
        )
    if list(directory.glob("pytorch_model*.bin")):
        return f"{directory}: weights are pickled (pytorch_model*.bin); expected safetensors: save the model again"
    return f"{directory}: no weights; expected model*.safetensors as in the published checkpoints"


# the trunk and the eyes


def slots(model: OpenVlaModel) -> dict[str, Slot]:
    """Published name -> its place. Llama's fused matrices have a place for each part."""
    found: dict[str, Slot] = {}

    def add(name: str, parameter: Tensor, start: int = 0, rows: int | None = None) -> None:
        found[name] = Slot(parameter, start, (rows or parameter.shape[0], *parameter.shape[1:]))

    for part in ("vision_backbone", "projector"):
        for name, parameter in getattr(model, part).named_parameters():
            add(f"{part}.{name}", parameter)
    llama = model.language_model
    dim, mlp = llama.config.dim, llama.config.mlp_dim
    prefix = "language_model.model"
    add(f"{prefix}.embed_tokens.weight", llama.embed_tokens.weight)
    add(f"{prefix}.norm.weight", llama.norm)
    add("language_model.lm_head.weight", llama.lm_head.weight)
    for index, layer in enumerate(llama.blocks):
        at = f"{prefix}.layers.{index}"
        for row, name in enumerate(("q_proj", "k_proj", "v_proj")):
            add(f"{at}.self_attn.{name}.weight", layer.qkv.weight, row * dim, dim)
        add(f"{at}.self_attn.o_proj.weight", layer.o_proj.weight)
        for row, name in enumerate(("gate_proj", "up_proj")):
            add(f"{at}.mlp.{name}.weight", layer.gate_up.weight, row * mlp, mlp)
        add(f"{at}.mlp.down_proj.weight", layer.down_proj.weight)
        add(f"{at}.input_layernorm.weight", layer.input_layernorm)
        add(f"{at}.post_attention_layernorm.weight", layer.post_attention_layernorm)
    return found


def unused_names(config: OpenVlaConfig) -> re.Pattern[str]:
    """Published tensors that no prediction depends on: see `openvla_vision`; and old transformers' buffers."""
    towers = [
        rf"vision_backbone\.{name}\.(blocks\.{vit.depth - 1}\.|norm\.|attn_pool\.).*"
        for name, vit in zip(("featurizer", "fused_featurizer"), config.vision, strict=True)
    ]
    return re.compile("|".join([*towers, r"language_model\..*\.rotary_emb\.inv_freq"]))


def shards(directory: Path) -> list[Path]:
    """The files that the index lists, or the only one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = checked(dict[str, str], read_json(index).get("weight_map", {}), f"{index}: field weight_map")
        paths = [directory / name for name in sorted(set(named.values()))]
    else:
        paths = sorted(directory.glob("model*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise RsdError(f"{directory}: missing weights {missing or 'model*.safetensors'}; the download is incomplete")
    return paths


def plain(name: str) -> str:
    """A tensor's name without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put in."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def tensors(path: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """By their plain names; `RsdError` where two share one."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            names = {plain(name): name for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if len(names) != len(file.keys()):
                raise RsdError(f"{path}: holds tensors twice, with and without module. or _orig_mod.; save it again")
            for name, stored in names.items():
                yield name, file.get_tensor(stored)
    except SafetensorError as error:
        raise RsdError(f"{path}: not readable as safetensors ({told(error)}); it is cut off or damaged") from None


@torch.no_grad()
def load_weights(model: OpenVlaModel, directory: Path) -> None:
    expected, unused = slots(model), unused_names(model.config)
    loaded: set[str] = set()
    unknown: list[str] = []
    for path in shards(directory):
        for name, value in tensors(path, str(model.device)):
            slot = expected.get(name)
            if slot is None:
                unknown += [] if unused.fullmatch(name) else [name]
                continue
            _check_shape(path, name, value, slot.shape)
            slot.view().copy_(value)
            loaded.add(name)
    missing = sorted(expected.keys() - loaded)
    if missing or unknown:
        raise RsdError(
            f"{directory}: weights do not fit {CONFIG_FILE}; "
            f"missing {len(missing)} {missing[:3]}, unknown {len(unknown)} {sorted(unknown)[:3]}"
        )


def _check_shape(path: Path, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise RsdError(f"{path}: {name}: expected {list(shape)}, found {list(value.shape)}")


# OFT's components


@torch.no_grad()
def load_component(module: nn.Module, path: Path) -> None:
    """`action_head--*` or `proprio_projector--*`: a state dict, its names possibly with a wrapper's prefix."""
    content = read_pt(path)
    if odd := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise RsdError(f"{path}: expected a state dict (names to tensors), found no tensor under {odd[0]!r:.80}")
    weights = {plain(str(name)): value for name, value in content.items()}
    _check_numbers(module, weights, path)
    expected = dict(module.named_parameters())
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise RsdError(f"{path}: expected {sorted(expected)}; missing {missing}, unknown {unknown}")
    for name, parameter in expected.items():
        _check_shape(path, name, weights[name], tuple(parameter.shape))
        parameter.copy_(weights[name])


def _check_numbers(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`RsdError` for the action or state of another robot than LIBERO's, by its name."""
    for what, name, axis in (("actions", "model.fc2.weight", 0), ("a state", "fc1.weight", 1)):
        own, given = dict(module.named_parameters()).get(name), weights.get(name)
        if own is not None and given is not None and given.ndim == 2 and given.shape[axis] != own.shape[axis]:
            found = given.shape[axis]
            robot = {14: ", of two arms (ALOHA)", 7: ", of another robot (Bridge)"}.get(found, "")
            expected = f"{what} of {own.shape[axis]} numbers as LIBERO has them"
            raise RsdError(f"{path}: expected {expected}, found {found}{robot}: not supported")


# LoRA


@torch.no_grad()
def merge_adapter(model: OpenVlaModel, directory: Path) -> None:
    """Add a PEFT LoRA adapter to the weights: W += (alpha / r) B A, in float32."""
    source = directory / ADAPTER_CONFIG
    settings = read_json(source)
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if settings.get(key):
            raise RsdError(f"{source}: {key} is {settings[key]!r}: not supported; merge with PEFT")
    if settings.get("bias", "none") != "none" or settings.get("peft_type", "LORA") != "LORA":
        raise RsdError(f"{source}: expected a LoRA adapter without biases; merge it with PEFT")
    rank, alpha = (checked(float, settings.get(key), f"{source}: field {key}") for key in ("r", "lora_alpha"))
    if rank < 1:
        raise RsdError(f"{source}: expected a rank r of at least 1, found {rank}")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise RsdError(f"{path}: not found; the adapter is incomplete")
    expected, unused = slots(model), unused_names(model.config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors(path, str(model.device)):
        if whole := re.fullmatch(r"base_model\.model\.(.+\.(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight", name):
            slot = expected.get(f"{whole[1]}.weight")  # PEFT saves these two with an adapter that reaches them
            if slot is None or tuple(value.shape) != slot.shape:
                found = f"{name} {list(value.shape)}"
                raise RsdError(f"{path}: {found} is no weight of this model; is this its base model?")
            slot.view().copy_(value)
            continue
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise RsdError(f"{path}: unknown tensor {name}; expected LoRA factors only")
        pairs.setdefault(match[1] + ".weight", {})[match[2]] = value
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise RsdError(f"{path}: {name} has factor {', '.join(pair)} only")
        if unused.fullmatch(name):
            continue
        slot = expected.get(name)
        if slot is None:
            raise RsdError(f"{path}: {name} is no weight of this model; is this its base model?")
        a, b = pair["A"].float().flatten(1), pair["B"].float().flatten(1)
        wanted = (slot.shape[0], slot.view()[0].numel())
        if (b.shape[0], a.shape[1]) != wanted or a.shape[0] != b.shape[1]:
            raise RsdError(f"{path}: {name}: factors {list(b.shape)} x {list(a.shape)} do not make {list(wanted)}")
        slot.view().copy_(slot.view().float() + scale * (b @ a).view(slot.shape))
