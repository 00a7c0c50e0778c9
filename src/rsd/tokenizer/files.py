"""A tokenizer on disk and on the hub: `tokenizer.json`, and `tokenizer.safetensors` with the matrix of `pca`.

The JSON is readable and bit-exact (float32 values survive the decimal round trip) and holds the hash of the
safetensors file, so that whoever hashes the JSON has hashed both. Format 1 (config of horizon, transform, levels,
symbols, rho; low, high, first_step) is read as what it was: the present defaults for everything else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsd import hub
from rsd.checks import Checked, between
from rsd.json_files import check_version, from_json, read_object
from rsd.manifest import file_sha256
from rsd.tokenizer.config import EncodeStatistics, TokenizerConfig
from rsd.tokenizer.rfsq import FirstStep
from rsd.types import RsdError

if TYPE_CHECKING:
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

FORMAT_VERSION = 2
VERSION_1_FIELDS = {"horizon", "transform", "levels", "symbols", "rho"}
# fields that format 2 did not have at first: left out at their defaults, so that its first readers read the file
LATER_FIELDS: dict[str, Any] = {"binary_values": (), "limit": 1.0}
# of codes that only a study knows; with these values they say nothing
STUDY_FIELDS: dict[str, Any] = {"bits": 0, "refine": False, "active": None}
UNUSED_FIELDS = ("channels", "learn")  # were of those codes
WEIGHTS_FILE = "tokenizer.safetensors"
REMEDY = "fit it again"
Limits = list[Annotated[float, between(-1e9, 1e9)]]


@dataclass(frozen=True)
class StoredTokenizer(Checked):
    """tokenizer.json; see `to_json`."""

    config: TokenizerConfig
    low: Limits
    high: Limits
    first_step: FirstStep
    calibration: EncodeStatistics | None = None
    sha256: str | None = None


def to_json(tokenizer: ActionTokenizer) -> dict[str, Any]:
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
        "calibration": asdict(tokenizer.calibration),
        "sha256": None,
    }


def save(tokenizer: ActionTokenizer, directory: Path) -> None:
    from rsd.tokenizer.action_tokenizer import FILE_NAME

    content, weights = to_json(tokenizer), directory / WEIGHTS_FILE
    weights.unlink(missing_ok=True)  # of a tokenizer that lay here before
    if tokenizer.config.transform == "pca":
        save_file({"matrix": tokenizer.matrix.cpu().contiguous()}, weights)
        content["sha256"] = file_sha256(weights)
    (directory / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def load(directory: Path) -> ActionTokenizer:
    from rsd.tokenizer.action_tokenizer import FILE_NAME, ActionTokenizer

    path = directory / FILE_NAME
    stored = read_tokenizer_json(path)
    matrix = None if stored.sha256 is None else read_matrix(directory / WEIGHTS_FILE, stored.sha256)
    try:
        tokenizer = ActionTokenizer(
            stored.config, torch.tensor(stored.low), torch.tensor(stored.high), stored.first_step, matrix
        )
    except RsdError as error:
        raise RsdError(f"{path}: {error}; {REMEDY}") from None
    if stored.calibration is not None:
        tokenizer.calibration = stored.calibration
    return tokenizer


def read_tokenizer_json(path: Path) -> StoredTokenizer:
    """The content as format 2 has it, whichever of the two formats the file is of."""
    content = read_object(path, "a checkpoint directory")
    config = content.get("config")
    config = config if isinstance(config, dict) else {}
    if type(version := content.get("format_version")) is int and version == 1:
        if unknown := set(config) - VERSION_1_FIELDS:
            raise RsdError(f"{path}: a field is unknown in format 1: {', '.join(sorted(unknown))}")
    else:
        check_version(content, str(path), "tokenizer", FORMAT_VERSION, REMEDY)
    for name, unused in STUDY_FIELDS.items():
        if {**config, **content}.get(name, unused) != unused:
            raise RsdError(f"{path}: {name}: a code of studies/tokenizers, which no policy reads; {REMEDY}")
    if config:
        known = {name: value for name, value in config.items() if name not in (*STUDY_FIELDS, *UNUSED_FIELDS)}
        content = {**content, "config": known}
    return from_json(StoredTokenizer, content, str(path), ignore=("format_version", "active"))


def read_matrix(path: Path, digest: str) -> Tensor:
    if not path.is_file():
        raise RsdError(f"{path}: not found; the tokenizer is incomplete, copy it again")
    if file_sha256(path) != digest:
        raise RsdError(f"{path}: does not belong to this tokenizer.json (sha256 differs); copy it again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise RsdError(f"{path}: not readable as safetensors ({error}); it is damaged") from None
    if tensors.keys() != {"matrix"}:
        raise RsdError(f"{path}: expected the tensor matrix, found {', '.join(sorted(tensors))}; {REMEDY}")
    if (matrix := tensors["matrix"]).dtype != torch.float32:
        raise RsdError(f"{path}: matrix expected torch.float32, found {matrix.dtype}; {REMEDY}")
    return matrix


def push_to_hub(tokenizer: ActionTokenizer, repo_id: str, *, private: bool = False) -> None:
    hub.upload(lambda directory: save(tokenizer, directory), repo_id, private)


def from_pretrained(path_or_hub_id: str | Path) -> ActionTokenizer:
    from rsd.tokenizer.action_tokenizer import FILE_NAME

    expected = f"a directory with {FILE_NAME}"
    return load(hub.locate(path_or_hub_id, "tokenizer", expected, [FILE_NAME, WEIGHTS_FILE]))
