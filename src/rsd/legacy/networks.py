"""The original experiment's networks, so that its users' checkpoints can be read: autoencoder, drafts, heads.

Files are recognised by their parameters' names, sizes are read off the weights, and every name and shape must fit.
Two kinds of draft and three of head are in use (see `read_network`); those that predict one symbol per level instead
of one per latent scalar can be run, but make no action chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsd.pt_files import read_pt
from rsd.types import ACTION_DIM, RsdError

HEADS = 8  # attention heads of every transformer in these files; not to be read off the weights
EPSILON = 1e-5  # what the robust quantiser adds to a standard deviation

Weights = dict[str, Tensor]


class LevelDraft(nn.Module):
    """Features [B, D] -> logits [B, L, K], one symbol per level: draft and head of the first kind."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        width, inputs = weights["input_proj.weight"].shape
        ff = weights["transformer.layers.0.linear1.weight"].shape[0]
        layers = _count(weights, "transformer.layers.")
        self.input_proj = nn.Linear(inputs, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, ff, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output_proj = nn.Linear(width, weights["output_proj.weight"].shape[0])

    def forward(self, features: Tensor, symbols: int = 7) -> Tensor:
        hidden = self.transformer(self.input_proj(features).unsqueeze(1)).squeeze(1)
        return self.output_proj(hidden).unflatten(-1, (-1, symbols))


class ChunkDraftDecoder(nn.Module):
    """One pre-norm layer that attends to itself, on a sequence of one."""

    def __init__(self, width: int, ff: int, positions: int) -> None:
        super().__init__()
        self.decoder_layer = nn.TransformerDecoderLayer(
            width, HEADS, ff, activation="gelu", batch_first=True, norm_first=True
        )
        self.position_encoding = nn.Parameter(torch.zeros(1, positions, width))
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position_encoding[:, : x.shape[1]]
        return self.output_norm(self.decoder_layer(x, x))


class ChunkDraft(nn.Module):
    """Features [B, D] -> logits [B, 3, 128, 7]: every latent scalar of the chunk at the coarse levels."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        width, inputs = weights["input_projection.weight"].shape
        ff = weights["decoder.decoder_layer.linear1.weight"].shape[0]
        self.input_projection = nn.Linear(inputs, width)
        self.decoder = ChunkDraftDecoder(width, ff, weights["decoder.position_encoding"].shape[1])
        self.classification_heads = _level_heads(weights, "classification_heads", width)

    def forward(self, features: Tensor, symbols: int = 7) -> Tensor:
        hidden = self.decoder(self.input_projection(features).unsqueeze(1)).squeeze(1)
        return torch.stack([head(hidden).unflatten(-1, (-1, symbols)) for head in self.classification_heads], dim=1)


class ChunkHead(nn.Module):
    """Features [B, D], and coarse tokens if it is conditioned on them -> logits [B, 8, 128, 7] of all levels.

    The conditioned one is told the draft's tokens ("mode locking"): it embeds them and fuses both.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        width, inputs = weights["feature_proj.0.weight"].shape
        self.feature_proj = _projection(inputs, width)
        self.conditioned = "token_embedding.weight" in weights
        if self.conditioned:
            symbols, embedding = weights["token_embedding.weight"].shape
            self.token_embedding = nn.Embedding(symbols, embedding)
            self.token_proj = _projection(weights["token_proj.0.weight"].shape[1], width)
            self.fusion = _projection(2 * width, width)
        self.layer_heads = _level_heads(weights, "layer_heads", width)

    def forward(self, features: Tensor, coarse: Tensor | None = None, symbols: int = 7) -> Tensor:
        """coarse: int [B, c, 128]."""
        hidden = self.feature_proj(features)
        if self.conditioned:
            if coarse is None:
                raise RsdError("this head is conditioned on coarse tokens: give it a draft")
            embedded = self.token_embedding(coarse.transpose(1, 2)).flatten(1)  # [B, 128, c, E], flat
            hidden = self.fusion(torch.cat([hidden, self.token_proj(embedded)], dim=-1))
        return torch.stack([head(hidden).unflatten(-1, (-1, symbols)) for head in self.layer_heads], dim=1)


class Autoencoder(nn.Module):
    """Action [.., 7] <-> latent [.., 16], quantised in 8 levels of 7 values in linspace(-1, 1), step by step.

    layernorm: whether each level normalises its residual by the sample's own mean and deviation. Tokens alone then
    decode only with `scales` [levels, 2], the mean and deviation of each level over a user's data (`calibrate`).
    """

    scales: Tensor

    def __init__(self, weights: Weights, layernorm: bool) -> None:
        super().__init__()
        hidden, actions = weights["encoder.0.weight"].shape
        latent = weights["encoder.2.weight"].shape[0]
        self.encoder = nn.Sequential(nn.Linear(actions, hidden), nn.Mish(), nn.Linear(hidden, latent), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Mish(), nn.Linear(hidden, actions))
        self.rfsq = nn.Module()
        levels = _count(weights, "rfsq.layers.")
        self.rfsq.layers = nn.ModuleList(nn.Module() for _ in range(levels))
        for index, level in enumerate(self.rfsq.layers):
            level.register_buffer("boundaries", torch.zeros_like(weights[f"rfsq.layers.{index}.boundaries"]))
        self.layernorm, self.latent, self.calibrated = layernorm, latent, not layernorm
        scales = torch.tensor([0.0, 1.0]).repeat(levels, 1)
        self.register_buffer("scales", scales, persistent=False)

    def _values(self, level: int) -> Tensor:
        values = self.rfsq.layers[level].boundaries  # type: ignore[union-attr,index]
        assert isinstance(values, Tensor)
        return values

    def quantise(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """actions [N, H, 7] -> tokens [N, levels, H*16], exact latent [N, H, 16], statistics [levels, N, H, 2]."""
        residual = self.encoder(actions)
        total, tokens, statistics = torch.zeros_like(residual), [], []
        for level in range(len(self.scales)):
            values, mean, deviation = self._values(level), torch.zeros(()), torch.ones(())
            if self.layernorm:
                mean, deviation = residual.mean(-1, keepdim=True), residual.std(-1, keepdim=True) + EPSILON
            index = (((residual - mean) / deviation).unsqueeze(-1) - values).abs().argmin(-1)
            value = values[index] * deviation + mean
            total, residual = total + value, residual - value
            tokens.append(index.flatten(-2))
            shape = (*residual.shape[:-1], 1)
            statistics.append(torch.cat([mean.expand(shape), deviation.expand(shape)], dim=-1))
        return torch.stack(tokens, dim=-2), total, torch.stack(statistics)

    @torch.no_grad()
    def calibrate(self, actions: Tensor) -> dict[str, float]:
        """Take each level's mean and deviation over chunks [N, 8, 7] as constants; -> errors of both decodes.

        What the constants cost is the difference: mean squared error in the file's action units.
        """
        tokens, latent, statistics = self.quantise(actions)
        if self.layernorm:
            self.scales = statistics.flatten(1, 2).mean(1)
            self.calibrated = True
        static = (self.decode(tokens) - actions).square().mean()
        return {
            "mse_own_statistics": float((self.decoder(latent) - actions).square().mean()),
            "mse_static_scales": float(static),
        }

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens int [B, levels, H*16] -> actions [B, H, 7] in the file's units."""
        if not self.calibrated:
            raise RsdError(
                "autoencoder: trained with per-sample LayerNorm, whose statistics are not in the tokens; "
                "calibrate static scales on your own action chunks (--calibration) to decode it"
            )
        latent = torch.zeros(tokens.shape[0], tokens.shape[2], device=tokens.device)
        for level, (mean, deviation) in enumerate(self.scales):
            latent = latent + self._values(level)[tokens[:, level]] * deviation + mean
        return self.decoder(latent.unflatten(-1, (-1, self.latent)))


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.LayerNorm(outputs))


def _level_heads(weights: Weights, name: str, width: int) -> nn.ModuleList:
    heads = nn.ModuleList()
    for index in range(_count(weights, f"{name}.")):
        middle, outputs = (weights[f"{name}.{index}.{part}.weight"].shape[0] for part in (0, 3))
        heads.append(nn.Sequential(*_projection(width, middle), nn.Linear(middle, outputs)))
    return heads


def _count(weights: Weights, prefix: str) -> int:
    numbers = {int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix)}
    return len(numbers)


# files


@dataclass(frozen=True)
class LegacyFile:
    """weights of one file, and what else it says: accuracies, its trainer's settings."""

    path: Path
    weights: Weights
    rest: dict[str, Any]


def read_file(path: Path) -> LegacyFile:
    """{'model_state_dict' or 'model': ..., ...} or a bare state dict; tensors and plain numbers only."""
    content = read_pt(path)
    key = next((name for name in ("model_state_dict", "model") if isinstance(content.get(name), dict)), None)
    weights = content[key] if key else content
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        found = sorted(map(str, content))[:8]
        raise RsdError(f"{path}: expected a state dict, bare or under model_state_dict; found keys {found}")
    rest = {name: value for name, value in content.items() if key and name != key and "optimizer" not in name}
    return LegacyFile(path, {name: value.float() for name, value in weights.items()}, rest)


KINDS: dict[str, tuple[str, Callable[[Weights], nn.Module]]] = {
    "input_proj.weight": ("one symbol per level", LevelDraft),
    "input_projection.weight": ("coarse levels of the chunk", ChunkDraft),
    "feature_proj.0.weight": ("all levels of the chunk", ChunkHead),
}


def read_network(path: Path) -> nn.Module:
    """A draft or head file, whichever it is: `LevelDraft`, `ChunkDraft` or `ChunkHead`."""
    file = read_file(path)
    for name, (_, build) in KINDS.items():
        if name in file.weights:
            return _filled(file, build)
    raise RsdError(f"{path}: neither draft nor head; expected one of {sorted(KINDS)}, found {sorted(file.weights)[:5]}")


def read_autoencoder(path: Path, layernorm: bool | None = None) -> Autoencoder:
    """layernorm: as it was trained; needed where the file's own settings do not say (`use_layernorm`)."""
    file = read_file(path)
    if "encoder.0.weight" not in file.weights:
        raise RsdError(f"{path}: no autoencoder; expected encoder.0.weight, found {sorted(file.weights)[:5]}")
    said = (file.rest.get("config") or {}).get("use_layernorm")
    if layernorm is not None and said is not None and layernorm != said:
        raise RsdError(f"{path}: says use_layernorm {said}, but {layernorm} was asked for")
    settled = said if layernorm is None else layernorm
    if settled is None:
        raise RsdError(f"{path}: does not say whether it was trained with LayerNorm; give --layernorm True or False")
    model = _filled(file, lambda weights: Autoencoder(weights, bool(settled)))
    assert isinstance(model, Autoencoder)
    if model.encoder[0].in_features != ACTION_DIM:
        raise RsdError(f"{path}: expected actions of {ACTION_DIM} numbers, found {model.encoder[0].in_features}")
    return model


def _filled(file: LegacyFile, build: Callable[[Weights], nn.Module]) -> nn.Module:
    """The network with the file's weights; `RsdError` lists what differs, key by key."""
    try:
        model = build(file.weights).eval()
    except (KeyError, ValueError, RuntimeError) as error:
        raise RsdError(f"{file.path}: not complete: {error}") from None
    expected = model.state_dict()
    missing = expected.keys() - file.weights.keys()
    lines = [f"{name} is missing, expected {list(expected[name].shape)}" for name in missing]
    for name, value in file.weights.items():
        if name not in expected:
            lines.append(f"{name} {list(value.shape)} is unknown")
        elif value.shape != expected[name].shape:
            lines.append(f"{name}: expected {list(expected[name].shape)}, found {list(value.shape)}")
        elif not torch.isfinite(value).all():
            lines.append(f"{name} holds NaN or infinity")
    if lines:
        raise RsdError(f"{file.path}: does not fit {type(model).__name__}: " + "; ".join(sorted(lines)[:10]))
    model.load_state_dict(file.weights)
    return model
