"""A tokenizer on disk and on the hub: `tokenizer.json`, and `tokenizer.safetensors` where something was learned.

The JSON is readable and bit-exact (float32 values survive the decimal round trip) and holds the hash of the
safetensors file, so that whoever hashes the JSON has hashed both. Format 1 (config of horizon, transform, levels,
symbols, rho; low, high, first_step) is read as what it was: the present defaults for everything else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from rsd import hub
from rsd.json_files import check_version, from_json, read_object
from rsd.tokenizer.config import AUTOENCODERS, EncodeStatistics, TokenizerConfig
from rsd.tokenizer.learned import Autoencoder, Refiner
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


@dataclass(frozen=True)
class StoredTokenizer:
    """tokenizer.json; see `to_json`."""

    config: TokenizerConfig
    low: list[float]
    high: list[float]
    first_step: float
    active: list[str] | None = None
    calibration: EncodeStatistics | None = None
    sha256: str | None = None


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
    stored = read_tokenizer_json(path)
    config, first_step, active = stored.config, float(stored.first_step), read_active(stored.active, str(path))
    low, high = (torch.tensor(limits, dtype=torch.float32) for limits in (stored.low, stored.high))
    if not torch.isfinite(torch.cat([low, high])).all():
        raise RsdError(f"{path}: expected finite range limits, found {stored.low} and {stored.high}")
    learned = config.transform in AUTOENCODERS
    scalars = config.horizon * (config.channels if learned else len(low))
    if active is not None and list(active.shape) != [config.levels, scalars]:
        raise RsdError(f"{path}: active: expected [{config.levels}, {scalars}], found {list(active.shape)}")
    tensors = read_tensors(directory / WEIGHTS_FILE, stored.sha256)
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
    if stored.calibration is not None:
        tokenizer.calibration = stored.calibration
    return tokenizer


def read_tokenizer_json(path: Path) -> StoredTokenizer:
    """The content as format 2 has it, whichever of the two formats the file is of."""
    content = read_object(path, "a checkpoint directory")
    if type(version := content.get("format_version")) is int and version == 1:
        config = content.get("config")
        if unknown := set(config if isinstance(config, dict) else {}) - VERSION_1_FIELDS:
            raise RsdError(f"{path}: a field is unknown in format 1: {', '.join(sorted(unknown))}")
    else:
        check_version(content, str(path), "tokenizer", FORMAT_VERSION, REMEDY)
    return from_json(StoredTokenizer, content, str(path), ignore=("format_version",))


def read_active(rows: list[str] | None, where: str) -> Tensor | None:
    if rows is None:
        return None
    if any(set(row) - {"0", "1"} for row in rows) or len(set(map(len, rows))) != 1:
        raise RsdError(f"{where}: active: expected strings of 0 and 1 of one length; {REMEDY}")
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
        if value.dtype != torch.float32:
            raise RsdError(f"{path}: {name} expected torch.float32, found {value.dtype}; {REMEDY}")
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
