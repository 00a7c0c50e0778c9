"""`python -m studies.legacy`: the original experiment's checkpoints, checked, calibrated where they need it, and run.

What it ran was: features of OpenVLA, a draft for the coarse levels, a head for all levels, agreement(0.7) between the
two, and the autoencoder's decoder. Nothing here stands in for a file that is missing or cannot be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rsd.checks import told
from rsd.conventions import CHUNK_SIZE
from rsd.decoding.acceptance import acceptance_rule, accepted_prefix
from rsd.decoding.timing import Stopwatch
from rsd.json_files import read_versioned
from rsd.manifest import file_sha256
from rsd.output import writing
from rsd.pt_files import read_pt, save_tensors
from rsd.targets.openvla.llama import Attend
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.training.tokenizer import demonstration_chunks
from rsd.types import ACTION_DIM, ActionChunk, ChunkStats, Observation, RsdError, check_observation, real_array
from studies.config import LegacyConfig

FORMAT_VERSION = 1
SETTINGS_FILE, WEIGHTS_FILE = "legacy.json", "legacy.safetensors"
HEADS = 8  # attention heads of every transformer in these files; not to be read off the weights
SYMBOLS = 7
EPSILON = 1e-5  # what the robust quantiser adds to a standard deviation

Weights = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


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

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.decoder(self.input_projection(features).unsqueeze(1)).squeeze(1)
        return _logits(self.classification_heads, hidden)


class ChunkHead(nn.Module):
    """Features [B, D], and coarse tokens if it is conditioned on them -> logits [B, 8, 128, 7] of all levels.

    The conditioned one is told the draft's tokens ("mode locking"): it embeds them and fuses both."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        width, inputs = weights["feature_proj.0.weight"].shape
        self.feature_proj = _projection(inputs, width)
        self.conditioned = "token_embedding.weight" in weights
        if self.conditioned:
            self.token_embedding = nn.Embedding(*weights["token_embedding.weight"].shape)
            self.token_proj = _projection(weights["token_proj.0.weight"].shape[1], width)
            self.fusion = _projection(2 * width, width)
        self.layer_heads = _level_heads(weights, "layer_heads", width)

    def forward(self, features: Tensor, coarse: Tensor | None = None) -> Tensor:
        """coarse: int [B, c, 128]."""
        hidden = self.feature_proj(features)
        if self.conditioned:
            if coarse is None:
                raise RsdError("this head is conditioned on coarse tokens: give it a draft")
            embedded = self.token_embedding(coarse.transpose(1, 2)).flatten(1)  # [B, 128, c, E], flat
            hidden = self.fusion(torch.cat([hidden, self.token_proj(embedded)], dim=-1))
        return _logits(self.layer_heads, hidden)


class Autoencoder(nn.Module):
    """Action [.., 7] <-> latent [.., 16], quantised in 8 levels of 7 values in linspace(-1, 1), step by step.

    layernorm: whether each level normalises its residual by the sample's own mean and deviation. Tokens alone then
    decode only with `scales` [levels, 2], the mean and deviation of each level over a user's data (`calibrate`)."""

    def __init__(self, weights: Weights, layernorm: bool) -> None:
        super().__init__()
        hidden, actions = weights["encoder.0.weight"].shape
        self.layernorm, self.latent = layernorm, weights["encoder.2.weight"].shape[0]
        self.levels = _count(weights, "rfsq.layers.")
        self.encoder = nn.Sequential(nn.Linear(actions, hidden), nn.Mish(), nn.Linear(hidden, self.latent), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(self.latent, hidden), nn.Mish(), nn.Linear(hidden, actions))
        values = [weights[f"rfsq.layers.{level}.boundaries"] for level in range(self.levels)]
        layers = [nn.ParameterDict({"boundaries": nn.Parameter(value, requires_grad=False)}) for value in values]
        self.rfsq = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.scales = None if layernorm else torch.tensor([0.0, 1.0]).repeat(self.levels, 1)

    def values(self, level: int) -> Tensor:
        """What a level's symbols stand for [7]."""
        return self.get_parameter(f"rfsq.layers.{level}.boundaries")

    def quantise(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """actions [N, H, 7] -> tokens [N, levels, H*16], exact latent [N, H, 16], statistics [levels, N, H, 2]."""
        residual = self.encoder(actions)
        total, tokens, statistics = torch.zeros_like(residual), [], []
        for level in range(self.levels):
            mean, deviation = residual.new_zeros(*residual.shape[:-1], 1), residual.new_ones(*residual.shape[:-1], 1)
            if self.layernorm:
                mean, deviation = residual.mean(-1, keepdim=True), residual.std(-1, keepdim=True) + EPSILON
            index = (((residual - mean) / deviation).unsqueeze(-1) - self.values(level)).abs().argmin(-1)
            value = self.values(level)[index] * deviation + mean
            total, residual = total + value, residual - value
            tokens.append(index.flatten(-2))
            statistics.append(torch.cat([mean, deviation], dim=-1))
        return torch.stack(tokens, dim=-2), total, torch.stack(statistics)

    @torch.no_grad()
    def calibrate(self, actions: Tensor) -> dict[str, float]:
        """Take each level's mean and deviation over chunks [N, 8, 7] as constants; -> errors of both decodes.

        What the constants cost is the difference: mean squared error in the file's action units."""
        tokens, latent, statistics = self.quantise(actions)
        if self.layernorm:
            self.scales = statistics.flatten(1, 2).mean(1)
        return {
            "mse_own_statistics": float((self.decoder(latent) - actions).square().mean()),
            "mse_static_scales": float((self.decode(tokens) - actions).square().mean()),
        }

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens int [B, levels, H*16] -> actions [B, H, 7] in the file's units."""
        if self.scales is None:
            raise RsdError(
                "autoencoder: trained with per-sample LayerNorm, whose statistics are not in the tokens; "
                "calibrate static scales on your own action chunks (--calibration) to decode it"
            )
        latent = torch.zeros(tokens.shape[0], tokens.shape[2], device=tokens.device)
        for level, (mean, deviation) in enumerate(self.scales):
            latent = latent + self.values(level)[tokens[:, level]] * deviation + mean
        return self.decoder(latent.unflatten(-1, (-1, self.latent)))


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.LayerNorm(outputs))


def _level_heads(weights: Weights, name: str, width: int) -> nn.ModuleList:
    heads = nn.ModuleList()
    for index in range(_count(weights, f"{name}.")):
        middle, outputs = (weights[f"{name}.{index}.{part}.weight"].shape[0] for part in (0, 3))
        heads.append(nn.Sequential(*_projection(width, middle), nn.Linear(middle, outputs)))
    return heads


def _logits(heads: nn.ModuleList, hidden: Tensor) -> Tensor:
    return torch.stack([head(hidden).unflatten(-1, (-1, SYMBOLS)) for head in heads], dim=1)


def _count(weights: Weights, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


# files


def read_file(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights of {'model_state_dict' or 'model': ..., ...} or of a bare state dict, and what else a file says."""
    content = read_pt(path)
    key = next((name for name in ("model_state_dict", "model") if isinstance(content.get(name), dict)), None)
    weights = content[key] if key else content
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        found = sorted(map(str, content))[:8]
        raise RsdError(f"{path}: expected a state dict, bare or under model_state_dict; found keys {found}")
    return {name: value.float() for name, value in weights.items()}, content if key else {}


def read_draft(path: Path) -> ChunkDraft:
    """Of the coarse levels of a chunk."""
    return _read_chunk_network(path, "input_projection.weight", ChunkDraft)


def read_head(path: Path) -> ChunkHead:
    """Of all levels of a chunk."""
    return _read_chunk_network(path, "feature_proj.0.weight", ChunkHead)


def _read_chunk_network(path: Path, mark: str, build: Callable[[Weights], Network]) -> Network:
    weights, _ = read_file(path)
    if "input_proj.weight" in weights and "output_proj.weight" in weights:
        levels = len(weights["output_proj.weight"]) // SYMBOLS
        raise RsdError(
            f"{path}: predicts one symbol for each of {levels} levels, where a chunk needs one for each of its latent "
            "scalars; no action can be decoded from it. Train a draft and head of the other kind"
        )
    if mark not in weights:
        what = "draft" if mark.startswith("input") else "head"
        raise RsdError(f"{path}: no {what}; expected {mark}, found {sorted(weights)[:5]}")
    return filled(path, weights, build)


def read_autoencoder(path: Path, layernorm: bool | None = None) -> Autoencoder:
    """layernorm: as it was trained; needed where the file's own settings do not say (`use_layernorm`)."""
    weights, rest = read_file(path)
    if "encoder.0.weight" not in weights:
        raise RsdError(f"{path}: no autoencoder; expected encoder.0.weight, found {sorted(weights)[:5]}")
    settings = rest.get("config")
    said = settings.get("use_layernorm") if isinstance(settings, dict) else None
    if layernorm is not None and said is not None and layernorm != said:
        raise RsdError(f"{path}: says use_layernorm {said}, but {layernorm} was asked for")
    settled = said if layernorm is None else layernorm
    if settled is None:
        raise RsdError(f"{path}: does not say whether it was trained with LayerNorm; give --layernorm True or False")
    model = filled(path, weights, lambda weights: Autoencoder(weights, bool(settled)))
    if (found := weights["encoder.0.weight"].shape[1]) != ACTION_DIM:
        raise RsdError(f"{path}: expected actions of {ACTION_DIM} numbers, found {found}")
    return model


def filled(path: Path, weights: Weights, build: Callable[[Weights], Network]) -> Network:
    """The network of a file with its weights; `RsdError` lists what differs, key by key."""
    try:
        model = build(weights).eval()
    except (KeyError, ValueError, RuntimeError) as error:
        raise RsdError(f"{path}: not complete: {error}") from None
    expected = model.state_dict()
    lines = [f"{name} is missing, expected {list(expected[name].shape)}" for name in expected.keys() - weights.keys()]
    for name, value in weights.items():
        if name not in expected:
            lines.append(f"{name} {list(value.shape)} is unknown")
        elif value.shape != expected[name].shape:
            lines.append(f"{name}: expected {list(expected[name].shape)}, found {list(value.shape)}")
        elif not torch.isfinite(value).all():
            lines.append(f"{name} holds NaN or infinity")
    if lines:
        raise RsdError(f"{path}: does not fit {type(model).__name__}: " + "; ".join(sorted(lines)[:10]))
    model.load_state_dict(weights)
    return model


class LegacyDecoder:
    """Features [B, D] -> tokens and action chunks; acceptance: agreement(SHARE) or exact, level by level."""

    def __init__(
        self, autoencoder: Autoencoder, head: ChunkHead, draft: ChunkDraft | None, acceptance: str = "agreement(0.7)"
    ) -> None:
        """`RsdError` where the networks do not fit each other."""
        self.autoencoder, self.head, self.draft = autoencoder, head, draft
        self.acceptance = acceptance if draft else ""
        self.rule = acceptance_rule(acceptance, RfsqConfig())
        if self.rule.unit != "level":
            raise RsdError(f"acceptance {acceptance}: this code has no margins; expected agreement(SHARE) or exact")
        if head.conditioned and draft is None:
            raise RsdError("the head is conditioned on a draft's tokens: a draft file is needed")
        self.features = head.get_submodule("feature_proj.0").in_features
        levels, logits = autoencoder.levels, CHUNK_SIZE * autoencoder.latent * SYMBOLS
        pairs: dict[str, tuple[object, object]] = {
            "values of an autoencoder's level": (SYMBOLS, len(autoencoder.values(0))),
            "levels of the head": (levels, len(head.layer_heads)),
            "logits of a level of the head": (logits, head.get_submodule("layer_heads.0.3").out_features),
        }
        if draft is not None:
            pairs["features that the draft reads"] = self.features, draft.input_projection.in_features
            outputs = draft.get_submodule("classification_heads.0.3").out_features
            pairs["logits of a level of the draft"] = logits, outputs
        for what, (expected, found) in pairs.items():
            if found != expected:
                raise RsdError(f"{what}: expected {expected}, found {found}; these files are not of one experiment")

    @torch.inference_mode()
    def decode(self, features: Tensor) -> tuple[Tensor, ChunkStats]:
        """-> actions [B, 8, 7] in the autoencoder's units, statistics of the first sample."""
        watch, stats = Stopwatch(features.device), ChunkStats("legacy", self.acceptance, prefills=1)
        drafted = None
        if self.draft is not None:
            with watch.stage("draft"):
                drafted = self.draft(features.float()).argmax(-1)  # [B, c, P]
        with watch.stage("verify"):
            logits = self.head(features.float(), drafted)
            tokens = logits.argmax(-1)  # [B, L, P]
            if drafted is not None:
                levels = drafted.shape[1]
                assert self.rule.accept is not None
                accepted = self.rule.accept(drafted, logits[:, :levels])
                kept = accepted_prefix(accepted)
                stands = torch.arange(levels, device=kept.device) < kept[:, None]
                tokens[:, :levels] = torch.where(stands[..., None], drafted, tokens[:, :levels])
                stats = replace(
                    stats,
                    num_draft_tokens=[drafted.shape[2]] * levels,
                    num_accepted_tokens=accepted[0].sum(-1).tolist(),
                    accepted_levels=int(kept[0]),
                )
        with watch.stage("decode"):
            actions = self.autoencoder.decode(tokens)
        return actions, replace(stats, latency_ms=watch.ms)

    @classmethod
    def from_pretrained(cls, directory: Path, *, acceptance: str = "agreement(0.7)") -> LegacyDecoder:
        """What this module as a command wrote."""
        path = directory / SETTINGS_FILE
        settings = read_versioned(path, "imported checkpoint", FORMAT_VERSION, "import the original files again")
        weights = load_file(directory / WEIGHTS_FILE)

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

        layernorm = bool(settings["layernorm"])
        autoencoder = filled(path, part("autoencoder"), lambda weights: Autoencoder(weights, layernorm))
        autoencoder.scales = weights["scales"]
        draft = filled(path, part("draft"), ChunkDraft) if part("draft") else None
        return cls(autoencoder, filled(path, part("head"), ChunkHead), draft, acceptance)

    def save(self, directory: Path, content: dict[str, Any]) -> None:
        """Write the directory. content: what else its settings say."""
        directory.mkdir(parents=True, exist_ok=True)
        parts = {"autoencoder": self.autoencoder, "head": self.head} | ({"draft": self.draft} if self.draft else {})
        state = nn.ModuleDict(parts).state_dict()
        assert self.autoencoder.scales is not None
        weights = {**state, "scales": self.autoencoder.scales}
        save_tensors({name: value.contiguous() for name, value in weights.items()}, directory / WEIGHTS_FILE)
        settings = {"format_version": FORMAT_VERSION, "layernorm": self.autoencoder.layernorm, **content}
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")


@torch.inference_mode()
def prompt_features(openvla: OpenVlaPolicy, observation: Observation) -> Tensor:
    """The trunk's final hidden state of the prompt's last word [1, D], which old drafts and heads read.

    That word is the colon of "Out:": token 29871, which follows it when actions are predicted, is left out."""
    prompt = torch.tensor([openvla.prompt.ids(observation.instruction)[:-1]], device=openvla.device)
    images = openvla.model.embed_images(openvla._pixels(observation.images))
    prefix = openvla.model.embed_prefix(images, prompt, openvla._state(observation, None))
    return openvla.model.language_model(prefix, Attend(causal=openvla.decode == "ar"), keep=1)[:, 0]


class LegacyPolicy:
    """An imported checkpoint on the features of an OpenVLA policy; actions in the environment's units."""

    def __init__(self, openvla: OpenVlaPolicy, decoder: LegacyDecoder) -> None:
        self.openvla, self.decoder, self.image_size = openvla, decoder, openvla.image_size
        if (width := openvla.model.config.llama.dim) != decoder.features:
            raise RsdError(f"legacy head: reads features of {decoder.features} numbers, this OpenVLA has {width}")

    def reset(self, seed: int | None = None) -> None:
        """A new episode begins; nothing is drawn, nor remembered from one prediction to the next."""

    def predict(self, observation: Observation) -> ActionChunk:
        """The autoencoder's actions are the environment's own (gripper -1 = open), as it was trained on them."""
        check_observation(observation)
        watch = Stopwatch(self.openvla.device)
        with watch.stage("total"):
            with watch.stage("prefill"):
                features = prompt_features(self.openvla, observation)
            actions, stats = self.decoder.decode(features.cpu())
        if not torch.isfinite(actions).all():
            raise RsdError("the imported checkpoint gave non-finite actions: damaged weights")
        stats = replace(stats, latency_ms={**stats.latency_ms, **watch.ms})
        return ActionChunk(actions[0].clamp(-1.0, 1.0).float().numpy(), stats)


def import_legacy(config: LegacyConfig) -> LegacyDecoder:
    """Check the files, calibrate, write; `RsdError` says which file cannot make an action chunk, and why."""
    autoencoder = read_autoencoder(config.autoencoder, config.layernorm)
    draft = read_draft(config.draft) if config.draft else None
    head, report = read_head(config.head), dict[str, float]()
    if config.calibration is not None:
        report = autoencoder.calibrate(torch.from_numpy(read_chunks(config.calibration)))
    elif autoencoder.layernorm:
        raise RsdError(
            f"{config.autoencoder}: trained with per-sample LayerNorm, whose statistics no token carries: it cannot "
            "decode as it is. Give --calibration with your own action chunks for static scales"
        )
    decoder, files = LegacyDecoder(autoencoder, head, draft), (config.autoencoder, config.head, config.draft)
    sources = {
        name: {"file": path.name, "sha256": file_sha256(path)} if path else None
        for name, path in zip(("autoencoder", "head", "draft"), files, strict=True)
    }
    with writing(config.output, SafetensorError):
        decoder.save(config.output, {"sources": sources, "calibration": report})
    print(f"written to {config.output}")
    for name, value in report.items():
        print(f"{name}: {value:.6f} (mean squared error on the calibration chunks)")
    return decoder


def read_chunks(path: Path) -> NDArray[np.float32]:
    """Action chunks float32 [N, 8, 7] of a .npy file, or cut from demonstrations."""
    if path.suffix == ".npy":
        try:
            chunks = real_array(str(path), np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise RsdError(f"{path}: expected action chunks of np.save, found {told(error, 200)}") from None
    else:
        chunks, _ = demonstration_chunks([path], CHUNK_SIZE)
    if chunks.ndim != 3 or chunks.shape[1:] != (CHUNK_SIZE, ACTION_DIM):
        raise RsdError(f"{path}: expected chunks [N, {CHUNK_SIZE}, {ACTION_DIM}], found {list(chunks.shape)}")
    return chunks


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("legacy")
