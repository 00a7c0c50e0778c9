"""Action chunk <-> residual tokens: normalise, transform, quantise by level; binary dimensions (the gripper) apart."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsd import hub
from rsd.checks import between, checked
from rsd.devices import check_device
from rsd.exact import integers, reals
from rsd.json_files import write_atomically
from rsd.manifest import file_sha256
from rsd.output import writing
from rsd.pt_files import save_tensors
from rsd.tokenizer.config import OVER_TIME, EncodeStatistics, TokenizerConfig
from rsd.tokenizer.files import FORMAT_VERSION, REMEDY, WEIGHTS_FILE, read_matrix, read_tokenizer_json
from rsd.tokenizer.rfsq import Rfsq
from rsd.tokenizer.transforms import ordered_product, transform_matrix
from rsd.types import RsdError

FILE_NAME = "tokenizer.json"


class ChunkTokens(NamedTuple):
    """motion: int64 [B, L, P] symbols 0..K-1, coarse level first; gripper: int64 [B, H], 1 = the upper value (LIBERO:
    close), and [B, H, G] where the number G of binary dimensions is not one."""

    motion: Tensor
    gripper: Tensor


class ActionTokenizer:
    """Calibrated once from training chunks, then a constant code.

    Motion dimensions are shifted and scaled to about [-1, 1] (see `calibrate`), transformed and quantised with ONE
    first step D_1 for all coefficients (in a code with equal steps the fine structure of a chunk costs symbols only
    in the levels that resolve it). A binary dimension (the gripper) is a symbol a step, exact.

    Everything is a fixed sequence of single-precision operations: tokens and decoded actions are bit by bit the same
    on every device and in every batch.
    """

    def __init__(
        self, config: TokenizerConfig, low: Tensor, high: Tensor, first_step: float, matrix: Tensor | None = None
    ) -> None:
        """low, high: what becomes -1 and +1 of each motion dimension [M]; matrix: float32 [P, P] of `pca`."""
        self.config = config
        self.low = reals("tokenizer range, low", low, ("M",), finite=True)
        self.high = reals("tokenizer range, high", high, (len(self.low),), finite=True)
        if not len(self.low) or not (self.low <= self.high).all():
            raise RsdError(f"tokenizer range: expected low <= high, found {low.tolist()} and {high.tolist()}")
        # a constant dimension has no range: scale 1 keeps it finite and its token at zero
        width = self.high - self.low
        self.scale = torch.where(width > 1e-6, width / 2, torch.ones_like(width))
        self.centre = (self.high + self.low) / 2
        self.action_dim = len(self.low) + len(config.binary)
        binary = binary_dimensions(config, self.action_dim)
        motion = [d for d in range(self.action_dim) if d not in binary]
        pairs = config.binary_values or ((-1.0, 1.0),) * len(binary)
        by_dimension = sorted(zip((d % self.action_dim for d in config.binary), pairs, strict=True))
        values = torch.tensor([pair for _, pair in by_dimension], dtype=torch.float32).reshape(-1, 2)
        self.binary_low, self.binary_high = values[:, 0].contiguous(), values[:, 1].contiguous()
        self.binary_middle = values.mean(1)
        self.binary_last = motion == list(range(len(motion)))
        # tensors, so that indexing a chunk on a GPU copies nothing there
        self.motion_index, self.binary_index = torch.tensor(motion), torch.tensor(binary, dtype=torch.long)
        self.order = torch.tensor([*motion, *binary]).argsort()
        self.motion_dim = len(self.low)
        if config.transform in OVER_TIME:
            self.matrix = transform_matrix(config.transform, config.horizon)
        else:
            what = f"tokenizer: the matrix of transform {config.transform}"
            self.matrix = reals(what, matrix, (self.scalars, self.scalars), finite=True)
        self.rfsq = Rfsq(config.rfsq, first_step)
        self.first_step = float(first_step)
        self.calibration = EncodeStatistics(0, 0, [0] * self.scalars)
        self.reset_statistics()

    def to(self, device: torch.device | str) -> ActionTokenizer:
        """The same code with its constants on `device`; chunks and coefficients must be there too."""
        moved, device = copy.copy(self), check_device(str(device))
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        moved.reset_statistics()
        return moved

    @classmethod
    def fit(cls, chunks: np.ndarray, config: TokenizerConfig | None = None) -> ActionTokenizer:
        """chunks float [N, H, A], binary dimensions of two values (LIBERO: -1 open, +1 close) -> a tokenizer."""
        from rsd.tokenizer.fit import calibrate

        return calibrate(chunks, checked(TokenizerConfig | None, config, "tokenizer config") or TokenizerConfig())

    # chunks <-> coefficients

    @property
    def scalars(self) -> int:
        """Motion scalars P = H * motion_dim of one level."""
        return self.config.horizon * self.motion_dim

    @property
    def shape(self) -> tuple[str, int, int]:
        """Of a batch of chunks."""
        return "B", self.config.horizon, self.action_dim

    def normalise(self, chunk: Tensor) -> Tensor:
        """chunk float [B, H, A] -> motion [B, H, M], about [-1, 1]."""
        chunk = reals("action chunk", chunk, self.shape, finite=True, wait=False)
        motion = chunk[..., : len(self.low)] if self.binary_last else chunk.index_select(-1, self.motion_index)
        return (motion - self.centre) / self.scale

    def to_coefficients(self, chunk: Tensor) -> Tensor:
        """chunk float [B, H, A] -> coefficients [B, P]; over time, row k of the transform is at k*M .. k*M+M-1."""
        normalised = self.normalise(chunk)
        if self.config.transform not in OVER_TIME:
            normalised = normalised.flatten(1).unsqueeze(-1)
        return ordered_product(self.matrix, normalised).flatten(1)

    def to_normalised(self, coefficients: Tensor) -> Tensor:
        """coefficients [B, P] -> normalised motion [B, H, M] over time (about [-1, 1])."""
        coefficients = reals("coefficients", coefficients, ("B", self.scalars), finite=True, wait=False)
        shape = (self.config.horizon, self.motion_dim)
        if self.config.transform not in OVER_TIME:
            return ordered_product(self.matrix.T, coefficients.unsqueeze(-1)).squeeze(-1).unflatten(-1, shape)
        return ordered_product(self.matrix.T, coefficients.unflatten(-1, shape))

    def to_actions(self, coefficients: Tensor, gripper: Tensor) -> Tensor:
        """coefficients [B, P], gripper int [B, H] or [B, H, G] -> actions float32 [B, H, A] within the limit."""
        coefficients = reals("coefficients", coefficients, ("B", self.scalars), finite=True)
        return self.actions_of(coefficients, self._checked_gripper(gripper, len(coefficients)))

    def actions_of(self, coefficients: Tensor, gripper: Tensor) -> Tensor:
        """`to_actions` of what is known to be right: on a GPU nothing waits for a look at it."""
        motion = self.to_normalised(coefficients) * self.scale + self.centre
        binary = torch.where(gripper > 0, self.binary_high, self.binary_low)
        actions = torch.cat([motion, binary.unsqueeze(-1) if gripper.ndim == 2 else binary], dim=-1)
        if not self.binary_last:
            actions = actions.index_select(-1, self.order)
        limit = self.config.limit
        return actions.clamp(-limit, limit) if limit else actions

    def gripper_symbols(self, chunk: Tensor) -> Tensor:
        """chunk [B, H, A] -> int64 [B, H] (or [B, H, G]), 1 where it is nearer to the upper of its two values."""
        chunk = reals("action chunk", chunk, self.shape, finite=True)
        binary = chunk[..., len(self.low) :] if self.binary_last else chunk.index_select(-1, self.binary_index)
        symbols = (binary > self.binary_middle).long()
        return symbols.squeeze(-1) if symbols.shape[-1] == 1 else symbols

    # tokens

    def encode(self, chunk: Tensor) -> ChunkTokens:
        """chunk float [B, H, A] -> tokens. What lies beyond the code's reach is clipped and counted."""
        return self._quantise(chunk)[0]

    def decode(self, tokens: ChunkTokens, levels: int | None = None) -> Tensor:
        """tokens (optionally only their first `levels`) -> actions float32 [B, H, A] within the limit."""
        motion, gripper = self._checked_tokens(tokens, levels)
        return self.to_actions(self.rfsq.dequantise(motion), gripper)

    def forward(self, chunk: Tensor) -> tuple[ChunkTokens, Tensor]:
        """chunk [B, H, A] -> tokens, and the chunk they decode to: bit by bit `decode(encode(chunk))`."""
        tokens, z_hat = self._quantise(chunk)
        return tokens, self.to_actions(z_hat, tokens.gripper)

    def _quantise(self, chunk: Tensor) -> tuple[ChunkTokens, Tensor]:
        chunk = reals("action chunk", chunk, self.shape, finite=True)
        coefficients = self.to_coefficients(chunk)
        clipped = coefficients.abs() > self.rfsq.reach()
        self._chunks += len(chunk)
        self._clipped_chunks += clipped.any(1).sum()
        self._clipped += clipped.sum(0)
        motion, z_hat = self.rfsq.quantise(coefficients)
        return ChunkTokens(motion, self.gripper_symbols(chunk)), z_hat

    def _checked_tokens(self, tokens: ChunkTokens, levels: int | None) -> ChunkTokens:
        """The tokens as int64, of the code's shapes and symbols, without what is below `levels`."""
        if not isinstance(tokens, ChunkTokens):
            raise RsdError(f"tokens: expected ChunkTokens, as of encode, found {type(tokens).__name__}")
        motion = integers("motion tokens", tokens.motion, ("B", "levels", self.scalars), (0, self.config.symbols - 1))
        given = motion.shape[1]
        if given > self.config.levels:
            raise RsdError(f"motion tokens: expected at most {self.config.levels} levels, found {given}")
        levels = given if levels is None else checked(Annotated[int, between(0, given)], levels, "levels")
        return ChunkTokens(motion[:, :levels], self._checked_gripper(tokens.gripper, len(motion)))

    def _checked_gripper(self, gripper: Tensor, count: int) -> Tensor:
        grippers = len(self.config.binary)
        shape = (count, self.config.horizon, *([] if grippers == 1 else [grippers]))
        return integers("gripper tokens", gripper, shape, (0, 1))

    # statistics

    @property
    def statistics(self) -> EncodeStatistics:
        """Counted since the tokenizer was made, moved or reset."""
        return EncodeStatistics(self._chunks, int(self._clipped_chunks), self._clipped.tolist())

    def reset_statistics(self) -> None:
        # on the device of the chunks: counting must not wait for it
        device = self.centre.device
        self._chunks = 0
        self._clipped_chunks = torch.zeros((), dtype=torch.long, device=device)
        self._clipped = torch.zeros(self.scalars, dtype=torch.long, device=device)

    # files, see `files`

    def to_json(self) -> dict[str, Any]:
        ranges = {"low": self.low.tolist(), "high": self.high.tolist(), "first_step": self.first_step}
        kept = {**ranges, "calibration": asdict(self.calibration), "sha256": None}
        return {"format_version": FORMAT_VERSION, "config": asdict(self.config), **kept}

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` (readable, bit-exact) and, with `pca`, `tokenizer.safetensors`."""
        directory = checked(Path, directory, "tokenizer directory")
        content, weights = self.to_json(), directory / WEIGHTS_FILE
        with writing(directory, SafetensorError):
            weights.unlink(missing_ok=True)  # of a tokenizer that lay here before
            if self.config.transform == "pca":
                save_tensors({"matrix": self.matrix.cpu().contiguous()}, weights)
                content["sha256"] = file_sha256(weights)
        write_atomically(directory / FILE_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ActionTokenizer:
        """Read what `save` wrote; `RsdError` on anything missing or odd."""
        directory = checked(Path, directory, "tokenizer directory")
        path = directory / FILE_NAME
        stored = read_tokenizer_json(path)
        matrix = None if stored.sha256 is None else read_matrix(directory / WEIGHTS_FILE, stored.sha256)
        try:
            ranges = torch.tensor(stored.low), torch.tensor(stored.high)
            tokenizer = cls(stored.config, *ranges, stored.first_step, matrix)
        except RsdError as error:
            raise RsdError(f"{path}: {error}; {REMEDY}") from None
        tokenizer.calibration = stored.calibration or tokenizer.calibration
        return tokenizer

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> None:
        """Upload to the Hugging Face hub (needs a login)."""
        hub.upload(self.save, repo_id, private)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> ActionTokenizer:
        """A directory (a policy's checkpoint is one) or a hub repository."""
        wanted = f"a directory with {FILE_NAME}"
        return cls.load(hub.locate(path_or_hub_id, "tokenizer", wanted, [FILE_NAME, WEIGHTS_FILE]))


def binary_dimensions(config: TokenizerConfig, action_dim: int) -> list[int]:
    """The binary dimensions as sorted numbers 0..A-1; RsdError where they do not fit the action."""
    found = sorted({d % action_dim for d in config.binary if -action_dim <= d < action_dim})
    if len(found) != len(config.binary) or len(found) >= action_dim:
        expected = f"distinct dimensions within {action_dim}, and one left for the motion"
        raise RsdError(f"tokenizer binary: expected {expected}, found {list(config.binary)}")
    return found
