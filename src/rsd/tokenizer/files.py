"""A tokenizer on disk: `tokenizer.json`, and `tokenizer.safetensors` with the matrix of `pca`.

The JSON is readable and bit-exact (float32 values survive the decimal round trip) and holds the hash of the
safetensors file, so that whoever hashes the JSON has hashed both. Format 1 (config of horizon, transform, levels,
symbols, rho; low, high, first_step) is read as what it was: the present defaults for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsd.checks import Checked, between, checked, told
from rsd.json_files import check_version, from_json, read_object
from rsd.manifest import file_sha256
from rsd.tokenizer.config import EncodeStatistics, TokenizerConfig
from rsd.types import RsdError

FORMAT_VERSION = 2
VERSION_1_FIELDS = {"horizon", "transform", "levels", "symbols", "rho"}
# fields that format 2 did not have at first: left out at their defaults, so that its first readers read the file
LATER_FIELDS: dict[str, Any] = {"binary_values": (), "limit": 1.0}
# of codes that only a study knows; with these values they say nothing
STUDY_FIELDS: dict[str, Any] = {"bits": 0, "refine": False, "active": None}
UNUSED_FIELDS = ("channels", "learn")  # were of those codes
WEIGHTS_FILE = "tokenizer.safetensors"
REMEDY = "fit it again"
MOST_ACTION = 1e8  # of a robot without a limit; a range may be wider than the actions
Limits = list[Annotated[float, between(-1e9, 1e9)]]


@dataclass(frozen=True)
class StoredTokenizer(Checked):
    """tokenizer.json."""

    config: TokenizerConfig
    low: Limits
    high: Limits
    first_step: Annotated[float, between(1e-9, 1e9)]
    calibration: EncodeStatistics | None = None
    sha256: str | None = None


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
        checked(Annotated[int, between(1, 1024)], config.get("channels", 1), f"{path}: field config.channels")
        checked(dict[str, Any], config.get("learn", {}), f"{path}: field config.learn")
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
        raise RsdError(f"{path}: not readable as safetensors ({told(error)}); it is damaged") from None
    if tensors.keys() != {"matrix"}:
        raise RsdError(f"{path}: expected the tensor matrix, found {', '.join(sorted(tensors))}; {REMEDY}")
    if (matrix := tensors["matrix"]).dtype != torch.float32:
        raise RsdError(f"{path}: matrix expected torch.float32, found {matrix.dtype}; {REMEDY}")
    return matrix
