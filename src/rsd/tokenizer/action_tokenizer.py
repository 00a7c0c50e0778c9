"""Action chunk <-> residual tokens: normalise, transform over time, quantise by level; the gripper apart."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsd.conventions import CHUNK_SIZE
from rsd.json_files import read_versioned
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.tokenizer.transforms import transform_matrix
from rsd.types import ACTION_DIM, RsdError

FORMAT_VERSION = 1
FILE_NAME = "tokenizer.json"
MIN_CHUNKS = 100  # fewer cannot place the 1 % and 99 % quantiles


class ChunkTokens(NamedTuple):
    """motion: int64 [B, L, H*M] symbols 0..K-1, coarse level first; gripper: int64 [B, H], 1 = close."""

    motion: Tensor
    gripper: Tensor


@dataclass(frozen=True)
class TokenizerConfig:
    """horizon: steps in a chunk; transform: see `transforms`; levels, symbols, rho: see `RfsqConfig`."""

    horizon: int = CHUNK_SIZE
    transform: str = "dct"
    levels: int = 8
    symbols: int = 7
    rho: float = 2.0

    @property
    def rfsq(self) -> RfsqConfig:
        return RfsqConfig(self.levels, self.symbols, self.rho)


class ActionTokenizer:
    """Calibrated once from training chunks, then a constant code.

    Motion dims (all but the last) are centred between q01 and q99 and scaled so that a steady action at the
    dimension's reach (see `fit`) is +-1, transformed over time and quantised with ONE first step D_1 for all
    coefficients (in a code with equal steps the fine structure of a chunk costs symbols only in the levels that
    resolve it). The last dim is the gripper: one binary symbol a step, exact.
    """

    def __init__(self, config: TokenizerConfig, low: Tensor, high: Tensor, first_step: float) -> None:
        self.config = config
        self.low, self.high = low.float(), high.float()
        if self.low.shape != self.high.shape or self.low.ndim != 1:
            found = f"{list(low.shape)} and {list(high.shape)}"
            raise RsdError(f"tokenizer range: expected two vectors of one length, found {found}")
        # a constant dimension has no range: scale 1 keeps it finite and its token at zero
        width = self.high - self.low
        self.scale = torch.where(width > 1e-6, width / 2, torch.ones_like(width))
        self.centre = (self.high + self.low) / 2
        self.matrix = transform_matrix(config.transform, config.horizon)
        self.first_step = float(first_step)
        self.rfsq = Rfsq(config.rfsq, self.first_step)

    def to(self, device: torch.device | str) -> ActionTokenizer:
        """The same code with its constants on `device`; chunks and coefficients must be there too."""
        moved = copy.copy(self)
        for name in ("low", "high", "scale", "centre", "matrix"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    # calibration

    @classmethod
    def fit(cls, chunks: np.ndarray, config: TokenizerConfig | None = None) -> ActionTokenizer:
        """chunks float [N, H, A], last dim = gripper (-1 open, +1 close) -> a calibrated tokenizer."""
        config = config or TokenizerConfig()
        if chunks.ndim != 3 or chunks.shape[1] != config.horizon or chunks.shape[2] < 2:
            expected = f"chunks [N, {config.horizon}, A]"
            raise RsdError(f"tokenizer fit: expected {expected}, found {list(chunks.shape)}")
        if len(chunks) < MIN_CHUNKS:
            raise RsdError(f"tokenizer fit: expected at least {MIN_CHUNKS} chunks, found {len(chunks)}")
        if not np.isfinite(chunks).all():
            raise RsdError("tokenizer fit: found NaN or infinity in the chunks; check the demonstrations")
        motion = chunks[..., :-1].reshape(-1, chunks.shape[2] - 1)
        low, high = np.quantile(motion, [0.01, 0.99], axis=0)
        centre = torch.tensor((low + high) / 2, dtype=torch.float32)
        plain = cls(config, centre - 1, centre + 1, 1.0)
        coefficients = plain.to_coefficients(torch.tensor(chunks, dtype=torch.float32))
        # all but one scalar in 10,000 of EACH dimension within the first level: a dimension that is small most of the
        # time and large at times (a turn of the wrist) would otherwise leave the others' coarse levels at zero
        magnitude = coefficients.abs().unflatten(1, (config.horizon, -1)).flatten(0, 1).numpy()
        reach = torch.tensor(np.quantile(magnitude, 0.9999, axis=0), dtype=torch.float32)
        if bool((reach <= 1e-6).all()):
            raise RsdError("tokenizer fit: no motion dimension ever moves; expected chunks of a robot at work")
        scale = torch.where(reach > 1e-6, reach / config.horizon**0.5, torch.ones_like(reach))
        first_step = config.horizon**0.5 / (config.rfsq.half + 0.5)
        return cls(config, centre - scale, centre + scale, first_step)

    # chunks <-> coefficients

    @property
    def motion_dim(self) -> int:
        return len(self.low)

    @property
    def scalars(self) -> int:
        """Motion scalars P = H * M of one level."""
        return self.config.horizon * self.motion_dim

    def to_coefficients(self, chunk: Tensor) -> Tensor:
        """chunk float [B, H, A] -> coefficients [B, H*M], row k of the transform at k*M .. k*M+M-1."""
        normalised = (chunk[..., :-1].float() - self.centre) / self.scale
        return self._mix(self.matrix, normalised).flatten(1)

    def to_normalised(self, coefficients: Tensor) -> Tensor:
        """coefficients [B, H*M] -> normalised motion [B, H, M] over time (about [-1, 1])."""
        grid = coefficients.unflatten(-1, (self.config.horizon, self.motion_dim))
        return self._mix(self.matrix.T, grid)

    def _mix(self, matrix: Tensor, grid: Tensor) -> Tensor:
        """matrix [R, H] times grid [B, H, M]. A sum of products, not a matrix product: autocast would round
        that to bf16, and its result may depend on the batch size."""
        return (matrix[:, :, None] * grid.float()[:, None]).sum(2)

    def to_actions(self, coefficients: Tensor, gripper: Tensor) -> Tensor:
        """coefficients [B, H*M], gripper int [B, H] (1 = close) -> actions float32 [B, H, A] in [-1, 1]."""
        normalised = self.to_normalised(coefficients)
        motion = normalised * self.scale + self.centre
        grip = (2.0 * gripper.float() - 1.0).unsqueeze(-1)
        return torch.cat([motion, grip], dim=-1).clamp(-1.0, 1.0)

    def gripper_symbols(self, chunk: Tensor) -> Tensor:
        """chunk [B, H, A] -> int64 [B, H], 1 where the gripper is told to close."""
        return (chunk[..., -1] > 0).long()

    # tokens

    def encode(self, chunk: Tensor) -> ChunkTokens:
        """chunk float [B, H, A] -> tokens."""
        self._check_chunk(chunk)
        return ChunkTokens(self.rfsq.quantise(self.to_coefficients(chunk))[0], self.gripper_symbols(chunk))

    def decode(self, tokens: ChunkTokens, levels: int | None = None) -> Tensor:
        """tokens (optionally only their first `levels`) -> actions float32 [B, H, A] in [-1, 1]."""
        motion = tokens.motion if levels is None else tokens.motion[:, :levels]
        self.rfsq.check(motion)
        return self.to_actions(self.rfsq.dequantise(motion), tokens.gripper)

    def forward(self, chunk: Tensor) -> tuple[ChunkTokens, Tensor]:
        """chunk [B, H, A] -> tokens, and the chunk they decode to: bit by bit `decode(encode(chunk))`."""
        self._check_chunk(chunk)
        motion, z_hat = self.rfsq.quantise(self.to_coefficients(chunk))
        gripper = self.gripper_symbols(chunk)
        return ChunkTokens(motion, gripper), self.to_actions(z_hat, gripper)

    def _check_chunk(self, chunk: Tensor) -> None:
        expected = [self.config.horizon, self.motion_dim + 1]
        if chunk.ndim != 3 or list(chunk.shape[1:]) != expected:
            raise RsdError(f"action chunk: expected [B, *{expected}], found {list(chunk.shape)}")
        if not torch.isfinite(chunk).all():
            raise RsdError("action chunk: found NaN or infinity")

    # files

    def to_json(self) -> dict[str, object]:
        return {
            "format_version": FORMAT_VERSION,
            "config": asdict(self.config),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "first_step": self.first_step,
        }

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` (readable, bit-exact: float32 values survive the decimal round trip)."""
        (directory / FILE_NAME).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ActionTokenizer:
        path = directory / FILE_NAME
        content = read_versioned(path, "tokenizer", FORMAT_VERSION, "fit it again")
        missing = {"config", "low", "high", "first_step"} - content.keys()
        if missing:
            raise RsdError(f"{path}: missing {', '.join(sorted(missing))}")
        try:
            config = TokenizerConfig(**content["config"])
            low, high = torch.tensor(content["low"]), torch.tensor(content["high"])
            first_step = float(content["first_step"])
        except (TypeError, ValueError) as error:
            raise RsdError(f"{path}: a field is unknown, missing or not a number ({error})") from None
        if len(low) != ACTION_DIM - 1 or not torch.isfinite(torch.cat([low, high])).all():
            found = f"{content['low']} and {content['high']}"
            raise RsdError(f"{path}: expected {ACTION_DIM - 1} finite range limits, found {found}")
        return cls(config, low, high, first_step)
