"""`rsd import-legacy`: the original experiment's checkpoints, checked, calibrated where they need it, and run.

What it ran was: features of OpenVLA, a draft for the coarse levels, a head for all levels, agreement(0.7) between the
two, and the autoencoder's decoder. Nothing here stands in for a file that is missing or cannot be decoded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsd.conventions import CHUNK_SIZE
from rsd.data.demonstrations import load_demonstrations
from rsd.decoding.acceptance import acceptance_rule, accepted_prefix
from rsd.decoding.timing import Stopwatch
from rsd.json_files import read_versioned
from rsd.legacy.config import ImportLegacyConfig
from rsd.legacy.networks import (
    SYMBOLS,
    Autoencoder,
    ChunkDraft,
    ChunkHead,
    filled,
    read_autoencoder,
    read_draft,
    read_head,
)
from rsd.manifest import file_sha256
from rsd.output import writing
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.training.dataset import chunk_targets
from rsd.types import ACTION_DIM, ActionChunk, ChunkStats, Observation, RsdError, check_observation, real_array

FORMAT_VERSION = 1
SETTINGS_FILE, WEIGHTS_FILE = "legacy.json", "legacy.safetensors"


class LegacyDecoder:
    """Features [B, D] -> tokens and action chunks; acceptance: agreement(SHARE) or exact, level by level."""

    def __init__(
        self, autoencoder: Autoencoder, head: ChunkHead, draft: ChunkDraft | None, acceptance: str = "agreement(0.7)"
    ) -> None:
        """`RsdError` where the networks do not fit each other."""
        self.autoencoder, self.head, self.draft = autoencoder, head, draft
        self.acceptance = acceptance if draft else ""
        self.rule = acceptance_rule(acceptance, RfsqConfig())
        if self.rule.accept is None or self.rule.per_scalar:
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
        """What `rsd import-legacy` wrote."""
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
        save_file({name: value.contiguous() for name, value in weights.items()}, directory / WEIGHTS_FILE)
        settings = {"format_version": FORMAT_VERSION, "layernorm": self.autoencoder.layernorm, **content}
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")


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
                features = self.openvla.prompt_features(observation)
            actions, stats = self.decoder.decode(features.cpu())
        if not torch.isfinite(actions).all():
            raise RsdError("the imported checkpoint gave non-finite actions: damaged weights")
        stats = replace(stats, latency_ms={**stats.latency_ms, **watch.ms})
        return ActionChunk(actions[0].clamp(-1.0, 1.0).float().numpy(), stats)


def import_legacy(config: ImportLegacyConfig) -> LegacyDecoder:
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
            raise RsdError(f"{path}: expected action chunks of np.save, found {error!s:.200}") from None
    else:
        labels = [demonstration.labels for demonstration in load_demonstrations(path, images=False)]
        if not labels:
            raise RsdError(f"{path}: found no demonstrations; collect some with `rsd demos collect`")
        chunks = np.concatenate([chunk_targets(label, CHUNK_SIZE) for label in labels])
    if chunks.ndim != 3 or chunks.shape[1:] != (CHUNK_SIZE, ACTION_DIM):
        raise RsdError(f"{path}: expected chunks [N, {CHUNK_SIZE}, {ACTION_DIM}], found {list(chunks.shape)}")
    return chunks
