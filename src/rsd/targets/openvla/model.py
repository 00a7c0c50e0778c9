"""OpenVLA and OpenVLA-OFT: vision, projector, Llama-2 trunk, and OFT's heads, with their decoding passes.

The sequence is: start token, image patches (then OFT's proprioception token), the prompt's other tokens, and for
OFT 56 empty action positions and a stop token. OpenVLA reads it causally and continues it token by token; OFT lets
every position see every other and reads all actions from one pass (arXiv 2406.09246, 2502.19645).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd.checks import checked, from_json, shown
from rsd.conventions import CHUNK_SIZE
from rsd.targets.openvla.llama import Attend, Llama, LlamaConfig, StaticCache
from rsd.targets.openvla.vision import DINO, SIGLIP, TIMM_MODELS, FusedVision, Projector, VitConfig
from rsd.types import ACTION_DIM, STATE_DIM, RsdError

STOP_TOKEN = 2
ACTION_TOKENS = CHUNK_SIZE * ACTION_DIM  # OFT's empty positions for LIBERO


# What a published config.json has to say where it says anything; the first three it has to say.
SUPPORTED: dict[str, Any] = {
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "image_resize_strategy": "resize-naive",
    "timm_model_ids": list(TIMM_MODELS),
    "use_fused_vision_backbone": True,
    "text_config.model_type": "llama",
    "text_config.hidden_act": "silu",
    "text_config.rope_scaling": None,
    "text_config.attention_bias": False,
    "text_config.mlp_bias": False,
    "text_config.rope_parameters.rope_type": "default",
}
REQUIRED = list(SUPPORTED)[:3]
LLAMA_NAMES = {  # of `text_config` -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_positions",
}


@dataclass(frozen=True)
class OpenVlaConfig:
    """What config.json says, sizes made explicit.

    padding: how many ids the vocabulary was padded by; action tokens are the last ids before them."""

    vision: tuple[VitConfig, VitConfig] = (TIMM_MODELS[DINO], TIMM_MODELS[SIGLIP])
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    action_bins: int = 256
    padding: int = 64

    @property
    def vision_dim(self) -> int:
        return self.vision[0].dim + self.vision[1].dim

    @classmethod
    def from_json(cls, content: dict[str, Any], source: str) -> OpenVlaConfig:
        """Content of a published config.json; `RsdError` names what this implementation does not read.

        timm_model_kwargs, sizes of the two towers in the order of timm_model_ids, is an addition of this package
        for small test checkpoints."""

        def expect(key: str, found: Any, wanted: Any) -> None:
            if found != wanted:
                raise RsdError(f"{source}: {key}: expected {wanted!r}, found {shown(found)}; only this is supported")

        for key, wanted in SUPPORTED.items():
            expect(key, said(content, key, None if key in REQUIRED else wanted), wanted)
        text = checked(dict[str, Any], said(content, "text_config", {}), f"{source}: field text_config")
        # transformers 5 writes it so
        theta = said(content, "text_config.rope_parameters.rope_theta", LlamaConfig.rope_theta)
        sizes = {ours: text[theirs] for theirs, ours in LLAMA_NAMES.items() if text.get(theirs) is not None}
        llama = from_json(LlamaConfig, {"rope_theta": theta, **sizes}, f"{source}: text_config")
        for key, size in {"num_key_value_heads": llama.heads, "head_dim": llama.head_dim}.items():
            expect(f"text_config.{key}", said(text, key, size), size)
        towers = content.get("timm_model_kwargs") or [{}, {}]
        if not (isinstance(towers, list) and len(towers) == 2 and all(isinstance(size, dict) for size in towers)):
            raise RsdError(f"{source}: timm_model_kwargs: expected two objects, found {shown(towers)}")
        dino, siglip = (
            from_json(VitConfig, {**vars(tower), **size}, f"{source}: timm_model_kwargs")
            for tower, size in zip(TIMM_MODELS.values(), towers, strict=True)
        )
        numbers = {"action_bins": content.get("n_action_bins", 256), "padding": content.get("pad_to_multiple_of", 64)}
        return replace(from_json(cls, numbers, source), vision=(dino, siglip), llama=llama)


def said(content: Any, path: str, otherwise: Any) -> Any:
    """What a config.json says at a path, or `otherwise` where it says nothing, or null."""
    for key in path.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return otherwise if content is None else content


class ActionHead(nn.Module):
    """OFT's L1 head: hidden states of one step's seven positions -> seven numbers, normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.model = MlpResNet(ACTION_DIM * dim, dim, ACTION_DIM)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, H*7, D] -> [B, H, 7]."""
        return self.model(hidden.unflatten(1, (-1, ACTION_DIM)).flatten(2))


class MlpResNet(nn.Module):
    def __init__(self, input_dim: int, dim: int, output_dim: int, blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(input_dim), nn.Linear(input_dim, dim)
        self.mlp_resnet_blocks = nn.ModuleList(ResNetBlock(dim) for _ in range(blocks))
        self.layer_norm2, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ResNetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ProprioProjector(nn.Module):
    """Normalised proprioception [B, 8] -> one embedding [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(STATE_DIM, dim), nn.Linear(dim, dim)

    def forward(self, state: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(state)))


class OpenVlaModel(nn.Module):
    """The model of a checkpoint; OFT's heads are there only if the checkpoint has them."""

    def __init__(
        self, config: OpenVlaConfig, *, action_head: bool = False, proprio: bool = False, chunk: int = CHUNK_SIZE
    ) -> None:
        """chunk: steps that OFT predicts at once."""
        super().__init__()
        self.config, self.action_tokens = config, chunk * ACTION_DIM
        self.vision_backbone = FusedVision(config.vision)
        self.projector = Projector(config.vision_dim, config.llama.dim)
        self.language_model = Llama(config.llama)
        self.action_head = ActionHead(config.llama.dim) if action_head else None
        self.proprio_projector = ProprioProjector(config.llama.dim) if proprio else None

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.device

    def embed_images(self, pixels: Tensor) -> Tensor:
        """pixels [B, cameras, 6, S, S], normalised -> [B, cameras*256, D]."""
        return self.projector(self.vision_backbone(pixels.to(self.dtype)))

    def embed_prefix(self, images: Tensor, prompt: Tensor, state: Tensor | None = None) -> Tensor:
        """Embedded images, prompt ids [B, T], normalised state [B, 8] -> [B, 1 + images (+ 1) + T - 1, D]."""
        words = self.language_model.embed_tokens(prompt)
        parts = [words[:, :1], images]
        if (state is None) != (self.proprio_projector is None):
            found = "no state" if state is None else "a state"
            raise RsdError(f"proprioception: found {found}, but the checkpoint says otherwise")
        if state is not None and self.proprio_projector is not None:
            parts.append(self.proprio_projector(state.to(self.dtype)).unsqueeze(1))
        return torch.cat([*parts, words[:, 1:]], dim=1)

    # OpenVLA: token by token

    def prefill(self, prefix: Tensor, room: int) -> tuple[Tensor, StaticCache]:
        """One causal pass; -> hidden state of the last position [B, 1, D] and a cache with `room` more positions."""
        cache = self.language_model.new_cache(len(prefix), prefix.shape[1] + room)
        return self.language_model(prefix, Attend(causal=True), cache, keep=1), cache

    def next_token(self, token: Tensor, cache: StaticCache) -> Tensor:
        """token [B, 1] -> hidden state of its position [B, 1, D]; the cache grows by one."""
        return self.language_model(self.language_model.embed_tokens(token), Attend(), cache)

    # OpenVLA-OFT: all at once

    def action_hidden(self, prefix: Tensor) -> Tensor:
        """One bidirectional pass over prefix, empty action positions and the stop token -> [B, 7 H, D].

        An action is read one position early, where a causal model would have predicted it."""
        empty = prefix.new_zeros(len(prefix), self.action_tokens, prefix.shape[2])
        stop = self.language_model.embed_tokens.weight[STOP_TOKEN].expand(len(prefix), 1, -1)
        x = torch.cat([prefix, empty, stop], dim=1)
        hidden = self.language_model(x, Attend(), keep=self.action_tokens + 2)
        return hidden[:, : self.action_tokens]

    def head(self, hidden: Tensor) -> Tensor:
        """OFT's L1 head on what `action_hidden` gives -> normalised actions float32 [B, H, 7]."""
        if self.action_head is None:
            raise RsdError("no action head is loaded: this checkpoint cannot decode with `l1`")
        return self.action_head(hidden).float()

    def token_values(self, tokens: Tensor) -> Tensor:
        """Action token ids [B, n] -> normalised actions float32 [B, n], the centres of their bins.

        As published, an id outside the action tokens counts as the nearest of them."""
        bins = torch.linspace(-1.0, 1.0, self.config.action_bins, dtype=torch.float64, device=tokens.device)
        centres = (bins[1:] + bins[:-1]) / 2
        index = self.config.llama.vocab_size - self.config.padding - tokens - 1
        return centres[index.clamp(0, len(centres) - 1)].float()
