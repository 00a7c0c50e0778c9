"""`rsd import-legacy`: the original experiment's checkpoints, checked, calibrated where they need it, and run.

What it ran was: features of OpenVLA, a draft for the coarse levels, a head for all levels, agreement(0.7) between the
two, and the autoencoder's decoder. Nothing here stands in for a file that is missing or cannot be decoded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsd.conventions import CHUNK_SIZE
from rsd.decoding.acceptance import AcceptanceRule, acceptance_rule, accepted_prefix
from rsd.decoding.timing import Stopwatch
from rsd.json_files import read_versioned
from rsd.legacy.config import ImportLegacyConfig
from rsd.legacy.networks import Autoencoder, ChunkDraft, ChunkHead, LevelDraft, Weights, read_autoencoder, read_network
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import ACTION_DIM, ActionChunk, ChunkStats, Observation, RsdError, check_observation

FORMAT_VERSION = 1
SETTINGS_FILE, WEIGHTS_FILE = "legacy.json", "legacy.safetensors"


class LegacyDecoder:
    """Features [B, D] -> tokens and action chunks; acceptance: agreement(SHARE) or exact, level by level."""

    def __init__(
        self, autoencoder: Autoencoder, head: ChunkHead, draft: ChunkDraft | None, acceptance: str = "agreement(0.7)"
    ) -> None:
        self.autoencoder, self.head, self.draft = autoencoder, head, draft
        self.acceptance = acceptance if draft else ""
        self.rule: AcceptanceRule = acceptance_rule(acceptance, RfsqConfig())
        if self.rule.per_scalar:
            raise RsdError(f"acceptance {acceptance}: this code has no margins; expected agreement(SHARE) or exact")
        if head.conditioned and draft is None:
            raise RsdError("the head is conditioned on a draft's tokens: a draft file is needed")

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
                assert self.rule.accept is not None  # of a rule that is not per scalar
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
        autoencoder = Autoencoder(_part(weights, "autoencoder"), bool(settings["layernorm"]))
        autoencoder.load_state_dict(_part(weights, "autoencoder"))
        autoencoder.scales, autoencoder.calibrated = weights["scales"], True
        head = ChunkHead(_part(weights, "head"))
        head.load_state_dict(_part(weights, "head"))
        draft = None
        if settings["sources"].get("draft"):
            draft = ChunkDraft(_part(weights, "draft"))
            draft.load_state_dict(_part(weights, "draft"))
            draft.eval()
        return cls(autoencoder.eval(), head.eval(), draft, acceptance)


class LegacyPolicy:
    """An imported checkpoint on the features of an OpenVLA policy; actions in the environment's units."""

    def __init__(self, openvla: OpenVlaPolicy, decoder: LegacyDecoder) -> None:
        self.openvla, self.decoder = openvla, decoder
        width, expected = openvla.model.config.llama.dim, decoder.head.feature_proj[0].in_features
        if width != expected:
            raise RsdError(f"legacy head: reads features of {expected} numbers, this OpenVLA has {width}")

    @property
    def image_size(self) -> int:
        return self.openvla.image_size

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


def _part(weights: Weights, name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def import_legacy(config: ImportLegacyConfig) -> LegacyDecoder:
    """Check the files, calibrate, write; `RsdError` says which file cannot make an action chunk, and why."""
    autoencoder = read_autoencoder(config.autoencoder, config.layernorm)
    head = read_network(config.head)
    draft = read_network(config.draft) if config.draft else None
    for path, network in ((config.head, head), (config.draft, draft)):
        if isinstance(network, LevelDraft):
            levels, needed = network.output_proj.out_features // 7, CHUNK_SIZE * autoencoder.latent
            raise RsdError(
                f"{path}: predicts one symbol for each of {levels} levels, where a chunk needs {needed} for each; "
                "no action can be decoded from it. Train a draft and head of the other kind (one per latent scalar)"
            )
    if not isinstance(head, ChunkHead):
        raise RsdError(f"{config.head}: expected a head (feature_proj, layer_heads), found a {type(head).__name__}")
    if draft is not None and not isinstance(draft, ChunkDraft):
        raise RsdError(f"{config.draft}: expected a draft (input_projection), found a {type(draft).__name__}")
    _check_sizes(autoencoder, head, draft)
    report: dict[str, Any] = {}
    if config.calibration is not None:
        report = autoencoder.calibrate(torch.from_numpy(read_chunks(config.calibration)))
    elif autoencoder.layernorm:
        raise RsdError(
            f"{config.autoencoder}: trained with per-sample LayerNorm, whose statistics no token carries: it cannot "
            "decode as it is. Give --calibration with your own action chunks for static scales"
        )
    decoder = LegacyDecoder(autoencoder, head, draft)
    sources = {field.name: getattr(config, field.name) for field in fields(config)[:3]}
    save(decoder, config.output, sources, report)
    Console().print(f"written to {config.output}", soft_wrap=True, highlight=False)
    for name, value in report.items():
        Console().print(f"{name}: {value:.6f} (mean squared error on the calibration chunks)", highlight=False)
    return decoder


def _check_sizes(autoencoder: Autoencoder, head: ChunkHead, draft: ChunkDraft | None) -> None:
    levels, scalars = len(autoencoder.scales), CHUNK_SIZE * autoencoder.latent
    symbols = len(autoencoder._values(0))
    if len(head.layer_heads) != levels or head.layer_heads[0][3].out_features != scalars * symbols:  # type: ignore[index]
        found = (len(head.layer_heads), head.layer_heads[0][3].out_features)  # type: ignore[index]
        raise RsdError(f"head: expected {levels} levels of {scalars} x {symbols} logits, found {found}")
    if draft is not None:
        inputs, wanted = draft.input_projection.in_features, head.feature_proj[0].in_features
        outputs = draft.classification_heads[0][3].out_features  # type: ignore[index]
        if inputs != wanted or outputs != scalars * symbols:
            raise RsdError(
                f"draft: expected {wanted} features and {scalars} x {symbols} logits, found {inputs} and {outputs}"
            )


def read_chunks(path: Path) -> NDArray[np.float32]:
    """Action chunks float32 [N, 8, 7] of a .npy file, or cut from demonstrations."""
    if path.suffix == ".npy":
        try:
            chunks = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RsdError(f"{path}: expected action chunks of np.save, found {error!s:.200}") from None
        if not isinstance(chunks, np.ndarray) or chunks.dtype.kind not in "iuf":
            raise RsdError(f"{path}: expected one array of real numbers, found {getattr(chunks, 'dtype', 'several')}")
        chunks = chunks.astype(np.float32)
    else:
        from rsd.data.demonstrations import load_demonstrations
        from rsd.training.dataset import chunk_targets

        labels = [demonstration.labels for demonstration in load_demonstrations(path, images=False)]
        if not labels:
            raise RsdError(f"{path}: found no demonstrations; collect some with `rsd demos collect`")
        chunks = np.concatenate([chunk_targets(label, CHUNK_SIZE) for label in labels])
    if chunks.ndim != 3 or chunks.shape[1:] != (CHUNK_SIZE, ACTION_DIM) or not np.isfinite(chunks).all():
        raise RsdError(f"{path}: expected finite chunks [N, {CHUNK_SIZE}, {ACTION_DIM}], found {list(chunks.shape)}")
    return chunks


def save(decoder: LegacyDecoder, directory: Path, sources: dict[str, Path | None], report: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"autoencoder": decoder.autoencoder, "head": decoder.head, "draft": decoder.draft}
    weights = {
        f"{name}.{key}": value.contiguous()
        for name, part in parts.items()
        if part is not None
        for key, value in part.state_dict().items()
    }
    save_file({**weights, "scales": decoder.autoencoder.scales.contiguous()}, directory / WEIGHTS_FILE)
    content = {
        "format_version": FORMAT_VERSION,
        "layernorm": decoder.autoencoder.layernorm,
        "sources": {
            name: {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if path else None
            for name, path in sources.items()
        },
        "calibration": report,
    }
    (directory / SETTINGS_FILE).write_text(json.dumps(content, indent=1) + "\n")
