"""Writes small random checkpoints in the published format of OpenVLA and OpenVLA-OFT.

Only numpy and safetensors are used and every tensor is drawn from its own name, so that the published code, run in an
environment of its own to make the fixtures (docs/openvla.md), reads the very same files.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DIM, LAYERS, HEADS, MLP, VOCAB = 32, 3, 4, 64, 32064
DINO = {"dim": 32, "depth": 3, "heads": 2, "mlp_dim": 64}
SIGLIP = {"dim": 48, "depth": 4, "heads": 3, "mlp_dim": 179}
PATCHES, REGISTERS = 256, 4
SUITE = "libero_spatial_no_noops"

Weights = dict[str, np.ndarray]


def draw(name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> np.ndarray:
    """float32, normal; by default scaled like a linear layer's weights. RandomState's stream never changes."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return (around + random.standard_normal(shape) * (fan_in**-0.5 if scale is None else scale)).astype(np.float32)


def linear(prefix: str, outputs: int, inputs: int, bias: bool = True, scale: float | None = None) -> Weights:
    weights = {f"{prefix}.weight": draw(f"{prefix}.weight", outputs, inputs, scale=scale)}
    return {**weights, f"{prefix}.bias": draw(f"{prefix}.bias", outputs, scale=0.1)} if bias else weights


def norm(prefix: str, dim: int, bias: bool = True) -> Weights:
    weights = {f"{prefix}.weight": draw(f"{prefix}.weight", dim, scale=0.2, around=1.0)}
    return {**weights, f"{prefix}.bias": draw(f"{prefix}.bias", dim, scale=0.1)} if bias else weights


def tower(prefix: str, size: dict[str, int], dino: bool) -> Weights:
    dim, mlp = size["dim"], size["mlp_dim"]
    weights = {
        f"{prefix}.patch_embed.proj.weight": draw(f"{prefix}.patch", dim, 3, 14, 14),
        f"{prefix}.patch_embed.proj.bias": draw(f"{prefix}.patch_bias", dim, scale=0.1),
        f"{prefix}.pos_embed": draw(f"{prefix}.pos_embed", 1, PATCHES, dim, scale=0.3),
        **norm(f"{prefix}.norm", dim),
    }
    if dino:
        weights[f"{prefix}.cls_token"] = draw(f"{prefix}.cls_token", 1, 1, dim, scale=0.3)
        weights[f"{prefix}.reg_token"] = draw(f"{prefix}.reg_token", 1, REGISTERS, dim, scale=0.3)
    else:  # SigLIP's pooling, unused by OpenVLA but published
        pool = f"{prefix}.attn_pool"
        weights[f"{pool}.latent"] = draw(f"{pool}.latent", 1, 1, dim)
        weights |= {**linear(f"{pool}.q", dim, dim), **linear(f"{pool}.kv", 2 * dim, dim)}
        weights |= {**linear(f"{pool}.proj", dim, dim), **norm(f"{pool}.norm", dim)}
        weights |= {**linear(f"{pool}.mlp.fc1", mlp, dim), **linear(f"{pool}.mlp.fc2", dim, mlp)}
    for index in range(size["depth"]):
        at = f"{prefix}.blocks.{index}"
        weights |= {**norm(f"{at}.norm1", dim), **norm(f"{at}.norm2", dim)}
        weights |= {**linear(f"{at}.attn.qkv", 3 * dim, dim), **linear(f"{at}.attn.proj", dim, dim)}
        weights |= {**linear(f"{at}.mlp.fc1", mlp, dim), **linear(f"{at}.mlp.fc2", dim, mlp)}
        if dino:
            for scale in ("ls1", "ls2"):
                weights[f"{at}.{scale}.scale_factor"] = draw(f"{at}.{scale}", dim, scale=0.3, around=0.7)
    return weights


def vision_and_projector() -> Weights:
    weights = tower("vision_backbone.featurizer", DINO, dino=True)
    weights |= tower("vision_backbone.fused_featurizer", SIGLIP, dino=False)
    fused = DINO["dim"] + SIGLIP["dim"]
    weights |= linear("projector.fc1", 4 * fused, fused)
    return weights | {**linear("projector.fc2", DIM, 4 * fused), **linear("projector.fc3", DIM, DIM)}


def llama() -> Weights:
    top = "language_model.model"
    lm_head = draw("lm_head", VOCAB, DIM)
    lm_head[31744:32000] *= 4.0  # so that action tokens win, as they do after training
    weights = {
        f"{top}.embed_tokens.weight": draw("embed", VOCAB, DIM, scale=1.0),
        "language_model.lm_head.weight": lm_head,
        **norm(f"{top}.norm", DIM, bias=False),
    }
    for index in range(LAYERS):
        at = f"{top}.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights |= linear(f"{at}.self_attn.{name}", DIM, DIM, bias=False, scale=2.0 * DIM**-0.5)
        weights |= {**linear(f"{at}.mlp.gate_proj", MLP, DIM, bias=False)}
        weights |= {**linear(f"{at}.mlp.up_proj", MLP, DIM, bias=False)}
        weights |= {**linear(f"{at}.mlp.down_proj", DIM, MLP, bias=False)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights |= norm(f"{at}.{name}", DIM, bias=False)
    return weights


def config() -> dict[str, Any]:
    """As published, with the sizes that a real checkpoint leaves to its defaults."""

    def timm(size: dict[str, int]) -> dict[str, int]:
        return {key: size[key] for key in ("dim", "depth", "heads", "mlp_dim")}

    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "timm_model_kwargs": [timm(DINO), timm(SIGLIP)],
        "use_fused_vision_backbone": True,
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "llm_max_length": 2048,
        "norm_stats": statistics(),
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": DIM,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": MLP,
            "pad_token_id": 32000,
            "torch_dtype": "float32",
        },
    }


def statistics(*names: str) -> dict[str, Any]:
    """dataset_statistics.json: q01 and q99 of actions and state; the gripper stays as it is."""
    action = {
        "q01": [-0.74, -0.66, -0.94, -0.11, -0.2, -0.19, 0.0],
        "q99": [0.93, 0.86, 0.94, 0.12, 0.21, 0.33, 1.0],
        "mask": [True] * 6 + [False],
    }
    proprio = {
        "q01": [-0.42, -0.27, 0.9, 2.6, -1.0, -0.5, 0.0, -0.04],
        "q99": [0.14, 0.3, 1.3, 3.6, 1.3, 0.5, 0.04, 0.0],
    }
    for table in (action, proprio):
        table["min"] = [value - 0.1 for value in table["q01"]]
        table["max"] = [value + 0.1 for value in table["q99"]]
    return {name: {"action": action, "proprio": proprio} for name in names or (SUITE,)}


def preprocessor() -> dict[str, Any]:
    """preprocessor_config.json; the means were rounded to bfloat16 where the published files were made."""
    means = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
    stds = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, 224, 224], [3, 224, 224]],
        "interpolations": ["bicubic", "bicubic"],
        "means": means,
        "stds": stds,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std} for mean, std in zip(means, stds, strict=True)
        ],
        "use_fused_vision_backbone": True,
    }


def tokenizer() -> dict[str, Any]:
    """tokenizer.json of the Llama kind (BPE with byte fallback, spaces as U+2581), here without merges."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {"▁": 29871, ":": 29901}
    free = (number for number in range(29872, 32000) if number != 29901)
    vocab |= {chr(code): next(free) for code in range(33, 127) if chr(code) != ":"}
    special = [{"id": number, "content": name} for number, name in ((0, "<unk>"), (1, "<s>"), (2, "</s>"))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, **flags} for token in [*special, {"id": 32000, "content": "<PAD>"}]],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [],
        },
    }


def block_image(seed: int, side: int = 224, blocks: int = 16) -> np.ndarray:
    """uint8 [side, side, 3] of random square blocks: the same integers on every machine."""
    colours = np.random.RandomState(seed).randint(0, 256, (blocks, blocks, 3))
    return np.kron(colours, np.ones((side // blocks, side // blocks, 1), int)).astype(np.uint8)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_checkpoint(directory: Path) -> Path:
    """OpenVLA: configuration, two shards with their index, tokenizer, statistics."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config())
    write_json(directory / "preprocessor_config.json", preprocessor())
    write_json(directory / "dataset_statistics.json", statistics())
    write_json(directory / "tokenizer.json", tokenizer())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    write_json(directory / "special_tokens_map.json", names)
    settings = {**names, "tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right"}
    write_json(directory / "tokenizer_config.json", settings)
    shards = {"model-00001-of-00002.safetensors": vision_and_projector(), "model-00002-of-00002.safetensors": llama()}
    for name, weights in shards.items():
        save_file(weights, directory / name, metadata={"format": "pt"})
    index = {name: file for file, weights in shards.items() for name in weights}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return directory


def head_weights() -> dict[str, Weights]:
    """OFT's components, with the prefix that DistributedDataParallel leaves in the published files."""
    head = {
        **norm("model.layer_norm1", 7 * DIM),
        **linear("model.fc1", DIM, 7 * DIM),
        **norm("model.layer_norm2", DIM),
        **linear("model.fc2", 7, DIM, scale=0.1),
    }
    for index in range(2):
        at = f"model.mlp_resnet_blocks.{index}.ffn"
        head |= {**norm(f"{at}.0", DIM), **linear(f"{at}.1", DIM, DIM)}
    proprio = {**linear("fc1", DIM, 8), **linear("fc2", DIM, DIM)}
    parts = {"action_head": head, "proprio_projector": proprio}
    return {part: {f"module.{name}": value for name, value in weights.items()} for part, weights in parts.items()}


def write_heads(directory: Path, *parts: str) -> Path:
    """Add OFT's `action_head--*` and `proprio_projector--*` (or those of them named) to a checkpoint."""
    import torch

    for part, weights in head_weights().items():
        if not parts or part in parts:
            tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
            torch.save(tensors, directory / f"{part}--150000_checkpoint.pt")
    return directory


def write_adapter(directory: Path, base: str, *, lm_head: bool = False) -> Path:
    """A LoRA adapter of PEFT on `base`, beside nothing but statistics, as an unmerged OFT run leaves it.

    lm_head: PEFT 0.11.1's "all-linear" reaches it, too, and then saves the matrix itself beside its factors."""
    adapter = directory / "lora_adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    rank, targets = 4, {}
    for name, weight in {**vision_and_projector(), **llama()}.items():
        if name.endswith("patch_embed.proj.weight"):  # PEFT's "proj" matches the convolution, too
            module = "base_model.model." + name.removesuffix(".weight")
            targets[f"{module}.lora_A.weight"] = draw(name + "A", rank, *weight.shape[1:])
            targets[f"{module}.lora_B.weight"] = draw(name + "B", weight.shape[0], rank, 1, 1, scale=0.05)
        left_out = "embed_tokens" in name or ("lm_head" in name and not lm_head)
        if weight.ndim == 2 and name.endswith(".weight") and not left_out:
            module = "base_model.model." + name.removesuffix(".weight")
            if "lm_head" in name:
                targets[f"{module}.base_layer.weight"] = weight
            targets[f"{module}.lora_A.weight"] = draw(name + "A", rank, weight.shape[1])
            targets[f"{module}.lora_B.weight"] = draw(name + "B", weight.shape[0], rank, scale=0.05)
    save_file(targets, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "base_model_name_or_path": base,
        "target_modules": sorted({name.split(".")[-3] for name in targets}),
        "task_type": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(adapter / "adapter_config.json", settings)
    write_json(directory / "dataset_statistics.json", statistics())
    write_json(directory / "tokenizer.json", tokenizer())
    write_json(directory / "preprocessor_config.json", preprocessor())
    return directory


def write_rsd_policy(
    directory: Path, base: Path, tokenizer: Any, *, visual_drafter: bool = True, **scales: Any
) -> Path:
    """What `rsd train policy --backbone openvla` leaves, with random weights; scales: fields of `OpenVlaRsdConfig`."""
    import torch

    from rsd.models.feature_drafter import DrafterConfig
    from rsd.models.visual_drafter import VisualDrafterConfig
    from rsd.targets.openvla.loading import load_openvla
    from rsd.targets.openvla.lora import LoraConfig
    from rsd.targets.openvla.rsd_policy import OpenVlaRsdConfig, save_openvla_rsd
    from rsd.training.openvla import prepare

    torch.manual_seed(0)
    draft = DrafterConfig(levels=3, dim=32, layers=1, heads=2)
    eyes = VisualDrafterConfig(2, (16, 16, 16, 32), dim=32, layers=1, heads=2, levels=draft) if visual_drafter else None
    config = OpenVlaRsdConfig(feature_drafter=draft, visual_drafter=eyes, **scales)
    trainee = prepare(load_openvla(base), config, LoraConfig(rank=4), tokenizer, checkpointing=False)
    with torch.no_grad():
        for name, parameter in trainee.adapter.updates.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0.0, 0.05)
        owners = [trainee.model.target] + (
            [trainee.model.visual_drafter.levels] if trainee.model.visual_drafter else []
        )
        for owner in owners:
            owner.gripper_head.bias.fill_(-100.0)  # open throughout: a switch would keep the target from resting
    added, provenance = trainee.model.added(), {"data": "random weights"}
    save_openvla_rsd(added, trainee.adapter, tokenizer, config, base, str(base), provenance, directory)
    return directory
