"""The published way to run the model, for comparison: transformers' Llama and timm's towers, eager, image by image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rsd.targets.openvla.model import ACTION_TOKENS, ActionHead, ProprioProjector
from rsd.targets.openvla.vision import Projector, VitConfig
from rsd.types import ACTION_DIM, STATE_DIM
from studies.openvla.bench_cases import full_config

if TYPE_CHECKING:
    from studies.openvla.bench import Bench


class Reference(nn.Module):
    """Same sizes and same sequence as ours, from the libraries that the published code uses."""

    def __init__(self, size: str, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM  # not installed with the package

        config = full_config(size)
        self.config = config
        llama = LlamaConfig(
            vocab_size=config.llama.vocab_size,
            hidden_size=config.llama.dim,
            num_hidden_layers=config.llama.layers,
            num_attention_heads=config.llama.heads,
            intermediate_size=config.llama.mlp_dim,
        )
        llama._attn_implementation = "sdpa"
        with torch.device(device):
            torch.set_default_dtype(dtype)
            try:
                self.language_model = LlamaForCausalLM(llama)
                self.towers = nn.ModuleList(timm_tower(vit) for vit in config.vision)
                self.projector = Projector(config.vision_dim, config.llama.dim)
                self.action_head = ActionHead(config.llama.dim)
                self.proprio = ProprioProjector(config.llama.dim)
            finally:
                torch.set_default_dtype(torch.float32)

    def embed_images(self, pixels: Tensor) -> Tensor:
        features = []
        for image in pixels.unbind(1):  # one image and one tower after another, as published
            pair = [tower_features(tower, image[:, 3 * i : 3 * i + 3]) for i, tower in enumerate(self.towers)]
            features.append(torch.cat(pair, dim=2))
        return self.projector(torch.cat(features, dim=1))

    def embed_prefix(self, images: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        words = self.language_model.get_input_embeddings()(prompt)
        proprio = self.proprio(state.to(images.dtype)).unsqueeze(1)
        return torch.cat([words[:, :1], images, proprio, words[:, 1:]], dim=1)

    def prefill(self, images: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        prefix = self.embed_prefix(images, prompt, state)
        return self.language_model(inputs_embeds=prefix, use_cache=True).logits[:, -1:]

    def l1(self, pixels: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        prefix = self.embed_prefix(self.embed_images(pixels), prompt, state)
        empty = prefix.new_zeros(len(prefix), ACTION_TOKENS + 1, prefix.shape[2])
        output = self.language_model(
            inputs_embeds=torch.cat([prefix, empty], dim=1), output_hidden_states=True, use_cache=False
        )
        return self.action_head(output.hidden_states[-1][:, -ACTION_TOKENS - 2 : -2])

    def ar7(self, pixels: Tensor, prompt: Tensor, state: Tensor) -> Tensor:
        prefix = self.embed_prefix(self.embed_images(pixels), prompt, state)
        output = self.language_model(inputs_embeds=prefix, use_cache=True)
        tokens = [output.logits[:, -1:].argmax(-1)]
        while len(tokens) < ACTION_DIM:
            output = self.language_model(
                input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True
            )
            tokens.append(output.logits[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1)


def timm_tower(vit: VitConfig) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # not installed with the package

    options: dict[str, Any] = {"class_token": False, "global_pool": "map"}
    if vit.registers:
        options = {"reg_tokens": vit.registers, "no_embed_class": True, "init_values": 1e-5}
    return VisionTransformer(
        img_size=vit.image_size,
        patch_size=vit.patch,
        embed_dim=vit.dim,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=vit.mlp_dim / vit.dim + 1e-6,
        num_classes=0,
        **options,
    )


def tower_features(tower: nn.Module, image: Tensor) -> Tensor:
    (features,) = tower.get_intermediate_layers(image, n={len(tower.blocks) - 2})  # type: ignore[operator,arg-type]
    return features


def run_reference(bench: Bench, dtype: torch.dtype) -> None:
    from studies.openvla.bench import Row  # which imports this module

    config = bench.config
    try:
        model = Reference(config.size, config.device, dtype).eval()
        bench.sync()
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        bench.rows.append(Row("reference", "all", 0, 0, error=message))
        bench.free()
        return
    import timm  # not installed with the package
    import transformers

    bench.notes["reference"] = {"transformers": transformers.__version__, "timm": timm.__version__}
    side = model.config.vision[0].image_size
    for cameras in config.cameras:
        pixels = torch.randn(1, cameras, 6, side, side, device=config.device, dtype=dtype)
        prompt = torch.randint(3, model.config.llama.vocab_size, (1, config.prompt_tokens), device=config.device)
        state = torch.rand(1, STATE_DIM, device=config.device, dtype=dtype)
        images = model.embed_images(pixels).clone()

        cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
            "vision": (model.embed_images, [pixels]),
            "prefill": (model.prefill, [images, prompt, state]),
            "l1": (model.l1, [pixels, prompt, state]),
            "ar7": (model.ar7, [pixels, prompt, state]),
        }
        for name, (fn, inputs) in cases.items():
            if name in config.cases:
                bench.run_row(Row("reference", name, cameras, 1), partial(partial, fn, *inputs), None)
    del model
    bench.free()
