"""A policy's checkpoint directory: find it, read it, check that its files belong together, write it.

It holds `config.json` (sizes, decoding defaults, provenance), `model.safetensors` (large matrices and convolutions
int8, the rest fp16), `tokenizer.json` and, for `rsd-skip`, `skip_calibration.json`. Loading is strict: weights that are
missing, misshapen or not finite are an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsd import hub
from rsd.decoding.calibration import FILE_NAME as CALIBRATION_FILE
from rsd.decoding.calibration import SkipCalibration
from rsd.decoding.strategies import DECODERS
from rsd.json_files import read_versioned
from rsd.models.rsd_model import PolicyConfig, RsdModel
from rsd.options import Checkpoint
from rsd.tokenizer.action_tokenizer import FILE_NAME as TOKENIZER_FILE
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, PROVEN_FILE = "config.json", "model.safetensors", "proven.json"
BACKBONE, OPENVLA = "backbone", "openvla"  # in config.json; the compact main where it is absent
LARGE = 2**14  # numbers in a weight; smaller ones are not worth rounding
SCALE = ".scale"  # after the name of a weight that is stored as int8

Config = TypeVar("Config")


def locate_checkpoint(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; otherwise `owner/name` on the Hugging Face hub, downloaded to its cache."""
    # linear codes only, see `check_code`; an adapter where the main is OpenVLA
    files = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CALIBRATION_FILE, PROVEN_FILE, "lora_adapter/*"]
    return hub.locate(path_or_hub_id, "policy", "a checkpoint directory", files)


def checkpoint_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's config.json, which holds the hashes of its other files."""
    return _sha256(locate_checkpoint(path_or_hub_id) / CONFIG_FILE)


def weights_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's weights file."""
    return _sha256(locate_checkpoint(path_or_hub_id) / WEIGHTS_FILE)


def read_content(directory: Path) -> dict[str, Any]:
    """config.json, of this format and with the files that belong to it."""
    path = directory / CONFIG_FILE
    content = read_versioned(path, "checkpoint", FORMAT_VERSION, "use the rsd-vla that wrote it, or train again")
    if not isinstance(content.get("policy"), dict):
        raise RsdError(f"{path}: unknown or missing field ('policy'); copy the checkpoint again")
    digests = content.get("sha256", {})
    for name in dict.fromkeys([WEIGHTS_FILE, TOKENIZER_FILE, *digests]):
        file = directory / name
        if not file.is_file():
            raise RsdError(f"{file}: not found; the checkpoint is incomplete, copy it again")
        if _sha256(file) != digests.get(name):
            raise RsdError(f"{file}: does not belong to this {CONFIG_FILE} (sha256 differs); copy it again")
    if content.get(BACKBONE, OPENVLA) != OPENVLA:
        raise RsdError(f"{path}: expected no {BACKBONE} or {OPENVLA}, found {content[BACKBONE]!r}; use a newer rsd-vla")
    return content


def parse_config(directory: Path, content: dict[str, Any], from_json: Callable[[dict[str, Any]], Config]) -> Config:
    """The policy's configuration: what `from_json` makes of its part of config.json."""
    try:
        return from_json(content["policy"])
    except (KeyError, TypeError) as error:
        raise RsdError(f"{directory / CONFIG_FILE}: unknown or missing field ({error})") from None


def load_model(directory: Path, content: dict[str, Any], tokenizer: ActionTokenizer) -> tuple[RsdModel, PolicyConfig]:
    """A compact policy's models, on the CPU, and their configuration; content: its config.json."""
    config = parse_config(directory, content, PolicyConfig.from_json)
    model = RsdModel(config, tokenizer)
    load_weights(model, directory / WEIGHTS_FILE)
    return model, config


def load_weights(model: nn.Module, path: Path) -> None:
    """Strict: names and shapes must be the model's own, values finite. fp16 or int8 on disk, float32 in memory."""
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise RsdError(f"{path}: not found") from None
    except SafetensorError as error:
        raise RsdError(f"{path}: not readable as safetensors ({error}); it is cut off or damaged") from None
    for name in [name for name, value in weights.items() if value.dtype == torch.int8]:
        scale = weights.pop(name + SCALE, None)
        if scale is None or list(scale.shape) != list(weights[name].shape[:1]):
            raise RsdError(f"{path}: {name} is int8 and lacks its scale per row; copy the checkpoint again")
        weights[name] = weights[name].float() * scale.view(-1, *[1] * (weights[name].ndim - 1))
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise RsdError(f"{path}: does not fit config.json; missing {missing[:5]}, unknown {unknown[:5]}")
    for name, value in weights.items():
        shape = list(expected[name].shape)
        if list(value.shape) != shape:
            raise RsdError(f"{path}: {name} expected {shape}, found {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise RsdError(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict({name: value.float() for name, value in weights.items()})


def load_calibration(directory: Path, weights_sha256: str | None = None) -> SkipCalibration:
    """The skip calibration of a checkpoint directory; `RsdError` without one, or if it is of other weights, whose hash
    may be known."""
    if not (directory / CALIBRATION_FILE).is_file():
        raise RsdError(f"{directory}: rsd-skip needs a {CALIBRATION_FILE}, found none; make it with `rsd calibrate`")
    calibration = SkipCalibration.load(directory)
    calibration.check_belongs(weights_sha256 or _sha256(directory / WEIGHTS_FILE))
    return calibration


def proven_decode(directory: Path, content: dict[str, Any]) -> tuple[str, str] | None:
    """The decoder that evaluations of this very checkpoint proved best and what they found; None if it does not say.

    content: its config.json, checked.
    proven.json: {"format_version": 1, "decode": "rsd-fused", "found": "122 of 126 where ...", "weights_sha256": "..."}.
    """
    path = directory / PROVEN_FILE
    if not path.is_file():
        return None
    proven = read_versioned(path, "proven decoder", 1, "write it anew")
    decode, found, weights = (proven.get(name) for name in ("decode", "found", "weights_sha256"))
    if decode not in DECODERS or not isinstance(found, str):
        expected = f"'decode' as one of {', '.join(DECODERS)} and 'found' as a text"
        raise RsdError(f"{path}: expected {expected}, found {decode!r} and {found!r}; write it anew, or delete it")
    if weights != content["sha256"][WEIGHTS_FILE]:
        remedy = "evaluate these and write it anew, or delete it"
        raise RsdError(f"{path}: is about other weights (sha256 {weights}); {remedy}")
    return str(decode), found


def facts_of(directory: Path, content: dict[str, Any]) -> Checkpoint:
    """What of a checkpoint decides how it may decode; content: its config.json, checked."""
    policy: dict[str, Any] = content["policy"]
    calibration: SkipCalibration | str
    try:
        calibration = load_calibration(directory, content["sha256"][WEIGHTS_FILE])
    except RsdError as error:  # to be raised where `rsd-skip` is asked for
        calibration = str(error)
    return Checkpoint(
        visual_drafter=bool(policy.get("light")),
        acceptance=policy.get("acceptance", PolicyConfig.acceptance),
        fine=policy.get("fine", PolicyConfig.fine),
        proven=proven_decode(directory, content),
        calibration=calibration,
        compact=BACKBONE not in content,
    )


def save_checkpoint(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    config: PolicyConfig,
    provenance: dict[str, Any],
    directory: Path,
) -> None:
    """Write `config.json`, `model.safetensors` and `tokenizer.json` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    require_finite(halves, directory)
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        half = halves[name]
        if half.ndim in (2, 4) and half.numel() >= LARGE:  # stacks of matrices have no row to scale
            weights[name], weights[name + SCALE] = quantise_rows(value.detach().float().cpu())
        else:
            weights[name] = half
    save_file(weights, directory / WEIGHTS_FILE)
    tokenizer.save(directory)
    write_content(directory, {"policy": asdict(config)}, (WEIGHTS_FILE, TOKENIZER_FILE), provenance)


def require_finite(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Raise unless all are finite in the precision that they are given in: call it before anything is written."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            found = f"{name} is not finite as {str(value.dtype).removeprefix('torch.')}"
            raise RsdError(f"{directory}: {found}; the training diverged, nothing was saved")


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [n, ...] -> int8 [n, ...] and a float32 scale per row [n]: weight = int8 * scale, within half a scale."""
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    shape = (-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale.view(shape)).to(torch.int8).contiguous(), scale


def write_content(
    directory: Path, fields: dict[str, Any], files: Iterable[str], provenance: dict[str, Any]
) -> None:
    """config.json: the fields, and the hashes of the files that belong to it, written before."""
    content = {
        "format_version": FORMAT_VERSION,
        **fields,
        "sha256": {name: _sha256(directory / name) for name in files},
        "provenance": provenance,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
