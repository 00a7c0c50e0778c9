"""A tokenizer on disk and on the hub: `tokenizer.json`, and `tokenizer.safetensors` where something was learned.

The JSON is readable and bit-exact (float32 values survive the decimal round trip) and holds the hash of the
safetensors file, so that whoever hashes the JSON has hashed both. Format 1 (config of horizon, transform, levels,
symbols, rho; low, high, first_step) is read as what it was: the present defaults for everything else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from rsd import hub
from rsd.json_files import read_versioned
from rsd.tokenizer.config import AUTOENCODERS, EncodeStatistics, TokenizerConfig
from rsd.tokenizer.learned import Autoencoder, LearnConfig, Refiner
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError

if TYPE_CHECKING:
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

FORMAT_VERSION = 2
VERSION_1_FIELDS = {"horizon", "transform", "levels", "symbols", "rho"}
# fields that format 2 did not have at first: left out at their defaults, so that its first readers read the file
LATER_FIELDS: dict[str, Any] = {"binary_values": (), "limit": 1.0}
WEIGHTS_FILE = "tokenizer.safetensors"
REMEDY = "fit it again"


def to_json(tokenizer: ActionTokenizer) -> dict[str, Any]:
    active = tokenizer.parts.active
    config = {**asdict(tokenizer.config), "binary": list(tokenizer.config.binary)}
    for name, default in LATER_FIELDS.items():
        if config[name] == default:
            del config[name]
    return {
        "format_version": FORMAT_VERSION,
        "config": config,
        "low": tokenizer.low.tolist(),
        "high": tokenizer.high.tolist(),
        "first_step": tokenizer.first_step,
        # a string of 0 and 1 per level, one character a coefficient
        "active": None if active is None else ["".join(str(int(cell)) for cell in level) for level in active],
        "calibration": asdict(tokenizer.calibration),
        "sha256": None,
    }


def learned_tensors(tokenizer: ActionTokenizer) -> dict[str, Tensor]:
    parts, found = tokenizer.parts, dict[str, Tensor]()
    if parts.matrix is not None:
        found["matrix"] = parts.matrix
    for name, net in (("autoencoder", parts.autoencoder), ("refiner", parts.refiner)):
        if net is not None:
            found |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def save(tokenizer: ActionTokenizer, directory: Path) -> None:
    from rsd.tokenizer.action_tokenizer import FILE_NAME

    content, tensors = to_json(tokenizer), learned_tensors(tokenizer)
    weights = directory / WEIGHTS_FILE
    weights.unlink(missing_ok=True)  # of a tokenizer that lay here before
    if tensors:
        save_file(tensors, weights)
        content["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (directory / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def load(directory: Path) -> ActionTokenizer:
    from rsd.tokenizer.action_tokenizer import FILE_NAME, ActionTokenizer, Parts

    path = directory / FILE_NAME
    content = read_tokenizer_json(path)
    try:
        config = config_from_json(content["config"])
        low, high = torch.tensor(content["low"]), torch.tensor(content["high"])
        first_step = float(content["first_step"])
        calibration = EncodeStatistics(**content["calibration"]) if "calibration" in content else None
        active = read_active(content.get("active"))
    except (TypeError, ValueError) as error:
        raise RsdError(f"{path}: a field is unknown, missing or not a number ({error})") from None
    if low.ndim != 1 or high.ndim != 1 or not torch.isfinite(torch.cat([low, high])).all():
        raise RsdError(f"{path}: expected finite range limits, found {content['low']} and {content['high']}")
    learned = config.transform in AUTOENCODERS
    scalars = config.horizon * (config.channels if learned else len(low))
    if active is not None and list(active.shape) != [config.levels, scalars]:
        raise RsdError(f"{path}: active: expected [{config.levels}, {scalars}], found {list(active.shape)}")
    tensors = read_tensors(directory / WEIGHTS_FILE, content.get("sha256"))
    net, refiner = None, None
    rfsq = Rfsq(config.rfsq, first_step, active)
    if learned:
        whole = config.transform == "chunk-autoencoder"
        net = Autoencoder(config.horizon, len(low), config.channels, whole, config.learn.hidden)
        fill(net, "autoencoder", tensors, directory / WEIGHTS_FILE)
    if config.refine:
        refiner = Refiner(scalars, rfsq.steps, config.learn.hidden)
        fill(refiner, "refiner", tensors, directory / WEIGHTS_FILE)
    parts = Parts(tensors.pop("matrix", None), net, refiner, active)
    if tensors:
        raise RsdError(f"{directory / WEIGHTS_FILE}: unknown tensors {', '.join(sorted(tensors))}; {REMEDY}")
    tokenizer = ActionTokenizer(config, low, high, first_step, parts)
    if calibration is not None:
        tokenizer.calibration = calibration
    return tokenizer


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The content as format 2 has it, whichever of the two formats the file is of."""
    try:
        content = read_versioned(path, "tokenizer", FORMAT_VERSION, REMEDY)
    except RsdError:
        if not is_version_1(path):
            raise
        content = read_versioned(path, "tokenizer", 1, REMEDY)
        unknown = set(content.get("config", {})) - VERSION_1_FIELDS
        if unknown:
            raise RsdError(f"{path}: a field is unknown in format 1: {', '.join(sorted(unknown))}") from None
    missing = {"config", "low", "high", "first_step"} - content.keys()
    if missing:
        raise RsdError(f"{path}: missing {', '.join(sorted(missing))}")
    return content


def is_version_1(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format_version") == 1


def config_from_json(content: dict[str, Any]) -> TokenizerConfig:
    changes: dict[str, Any] = {}
    if "binary" in content:
        changes["binary"] = tuple(int(d) for d in content["binary"])
    if "binary_values" in content:
        changes["binary_values"] = tuple((float(low), float(high)) for low, high in content["binary_values"])
    if "learn" in content:
        changes["learn"] = LearnConfig(**content["learn"])
    return TokenizerConfig(**{**content, **changes})


def read_active(rows: list[str] | None) -> Tensor | None:
    if rows is None:
        return None
    if any(set(row) - {"0", "1"} for row in rows):
        raise ValueError("active: expected strings of 0 and 1")
    return torch.tensor([[float(cell) for cell in row] for row in rows])


def read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    if digest is None:
        return {}
    if not path.is_file():
        raise RsdError(f"{path}: not found; the tokenizer is incomplete, copy it again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise RsdError(f"{path}: does not belong to this tokenizer.json (sha256 differs); copy it again")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise RsdError(f"{path}: not readable as safetensors ({error}); it is damaged") from None
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise RsdError(f"{path}: {name} holds NaN or infinity")
    return dict(tensors)


def fill(net: torch.nn.Module, prefix: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Move the tensors named `prefix.*` into `net`, names and shapes being exactly its own."""
    names = [name for name in tensors if name.startswith(f"{prefix}.")]
    own = {name.removeprefix(f"{prefix}."): tensors.pop(name) for name in names}
    try:
        net.load_state_dict(own)
    except RuntimeError as error:
        raise RsdError(f"{path}: does not fit its tokenizer.json ({' '.join(str(error).split())})") from None
    net.requires_grad_(False)


def push_to_hub(tokenizer: ActionTokenizer, repo_id: str, *, private: bool = False) -> None:
    hub.upload(lambda directory: save(tokenizer, directory), repo_id, private)


def from_pretrained(path_or_hub_id: str | Path) -> ActionTokenizer:
    from rsd.tokenizer.action_tokenizer import FILE_NAME

    expected = f"a directory with {FILE_NAME}"
    return load(hub.locate(path_or_hub_id, "tokenizer", expected, [FILE_NAME, WEIGHTS_FILE]))
