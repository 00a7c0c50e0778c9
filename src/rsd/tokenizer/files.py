"""A tokenizer on disk: `tokenizer.json`, and `tokenizer.safetensors` with the matrix of `pca`.

The JSON is readable and bit-exact (float32 values survive the decimal round trip) and holds the hash of the
safetensors file, so that whoever hashes the JSON has hashed both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsd.checks import Checked, between, told
from rsd.json_files import check_version, from_json, read_object
from rsd.manifest import file_sha256
from rsd.tokenizer.config import EncodeStatistics, TokenizerConfig
from rsd.types import RsdError

FORMAT_VERSION = 2
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
    """The content; `RsdError` for what is damaged or of another format."""
    content = read_object(path, "a checkpoint directory")
    check_version(content, str(path), "tokenizer", FORMAT_VERSION, REMEDY)
    return from_json(StoredTokenizer, content, str(path), ignore=("format_version",))


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
