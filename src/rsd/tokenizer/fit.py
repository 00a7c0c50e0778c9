"""Calibration: from training chunks to the constants of a code."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsd.checks import real_array
from rsd.tokenizer.action_tokenizer import ActionTokenizer, binary_dimensions
from rsd.tokenizer.config import OVER_TIME, TokenizerConfig
from rsd.tokenizer.files import MOST_ACTION
from rsd.tokenizer.transforms import principal_components, transform_matrix
from rsd.types import RsdError

MIN_CHUNKS = 100  # fewer cannot place the 1 % and 99 % quantiles
CHUNKS_PER_SCALAR = 4  # of a learned transform: fewer would fit noise
REACH_QUANTILE = 0.9999
STILL = 1e-6  # a dimension that moves less than this is constant
PART = 512  # chunks encoded at a time


class Prepared(NamedTuple):
    """What calibration begins with. chunks: float32 [N, H, A]; config: with the binary dimensions' values; low, high:
    see `dimension_range`; normalised: the motion [N, H, M], about [-1, 1]."""

    chunks: Tensor
    config: TokenizerConfig
    low: Tensor
    high: Tensor
    normalised: Tensor


def calibrate(chunks: np.ndarray, config: TokenizerConfig) -> ActionTokenizer:
    """chunks float [N, H, A] -> a tokenizer; RsdError where they cannot calibrate one."""
    given = prepare(chunks, config, config.transform not in OVER_TIME)
    matrix, first_step = first_step_of(given.normalised, config)
    tokenizer = ActionTokenizer(given.config, given.low, given.high, first_step, matrix)
    count(tokenizer, given.chunks)
    return tokenizer


def prepare(chunks: np.ndarray, config: TokenizerConfig, learned: bool) -> Prepared:
    """learned: whether something is, for which more chunks are needed."""
    chunks = real_array("tokenizer fit: chunks", chunks, shape=("N", config.horizon, "A"))
    binary = binary_dimensions(config, chunks.shape[2])
    motion = np.delete(chunks, binary, axis=2)
    needed = max(MIN_CHUNKS, CHUNKS_PER_SCALAR * motion.shape[1] * motion.shape[2] if learned else 0)
    if len(chunks) < needed:
        raise RsdError(f"tokenizer fit: expected at least {needed} chunks, found {len(chunks)}; take more data")
    largest = float(np.abs(motion).max())
    if largest > (limit := config.limit or MOST_ACTION):
        remedy = "give the robot's own limit, or 0 for none" if config.limit else "convert them"
        found = f"expected actions within +-{limit:g} (--tokenizer.limit), found {largest:g}"
        raise RsdError(f"tokenizer fit: {found}; {remedy}")
    low, high = dimension_range(motion, config)
    half_width = (high - low) / 2
    scale = torch.where(half_width > STILL / 2, half_width, torch.ones_like(half_width))
    normalised = (torch.from_numpy(motion) - (low + high) / 2) / scale
    return Prepared(torch.from_numpy(chunks), with_binary_values(chunks, config), low, high, normalised)


def count(tokenizer: ActionTokenizer, chunks: Tensor) -> None:
    """What of the training chunks is clipped becomes the tokenizer's `calibration`."""
    for part in chunks.split(PART):
        tokenizer.encode(part)
    tokenizer.calibration = tokenizer.statistics
    tokenizer.reset_statistics()


def with_binary_values(chunks: np.ndarray, config: TokenizerConfig) -> TokenizerConfig:
    """The config with the two values of every binary dimension; none where all are -1 and 1, which is the default.

    One that is always 1 or always -1 is taken for LIBERO's gripper at rest.
    """
    pairs = []
    for place, dimension in enumerate(config.binary):
        found = np.unique(chunks[..., dimension].astype(np.float32)).tolist()
        wanted = list(config.binary_values[place]) if config.binary_values else found
        if len(found) == 1 and found[0] in (-1.0, 1.0) and not config.binary_values:
            wanted = [-1.0, 1.0]
        if len(wanted) != 2 or not set(found) <= set(np.array(wanted, np.float32).tolist()):
            expected = "two values" if not config.binary_values else f"{wanted[0]:g} and {wanted[1]:g}"
            shown = ", ".join(f"{value:g}" for value in found[:3]) + (", ..." if len(found) > 3 else "")
            raise RsdError(
                f"tokenizer fit: expected dimension {dimension} to be binary and to hold {expected}, found "
                f"{len(found)} ({shown}); name the binary dimensions with --tokenizer.binary (no number: there are "
                "none), or their values with --tokenizer.binary-values"
            )
        pairs.append((float(wanted[0]), float(wanted[1])))
    return replace(config, binary_values=tuple(pairs) if set(pairs) - {(-1.0, 1.0)} else ())


def dimension_range(motion: np.ndarray, config: TokenizerConfig) -> tuple[Tensor, Tensor]:
    """motion [N, H, M] -> what becomes -1 and +1 in each dimension [M]."""
    flat = motion.reshape(-1, motion.shape[2]).astype(np.float64)
    if (np.ptp(flat, axis=0) <= STILL).all():
        raise RsdError("tokenizer fit: no motion dimension ever moves; expected chunks of a robot at work")
    if config.normalisation == "minmax":
        low, high = flat.min(0), flat.max(0)
    elif config.normalisation == "standard":
        low, high = flat.mean(0) - flat.std(0), flat.mean(0) + flat.std(0)
    else:
        low, high = np.quantile(flat, [0.01, 0.99], axis=0)
    if config.normalisation == "reach":
        centre = torch.tensor((low + high) / 2, dtype=torch.float32)
        scale = dimension_reach(torch.from_numpy(motion) - centre, config)
        return centre - scale, centre + scale
    # a dimension may rest nearly always and still move: its quantiles meet, its extremes do not
    resting = (high - low <= STILL) & (np.ptp(flat, axis=0) > STILL)
    low, high = np.where(resting, flat.min(0), low), np.where(resting, flat.max(0), high)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def dimension_reach(centred: Tensor, config: TokenizerConfig) -> Tensor:
    """centred motion [N, H, M] -> scale [M]: a steady action of that size is a coefficient at the first level's end.

    All but one scalar in 10,000 of EACH dimension are within: a dimension that is small most of the time and large
    at times (a turn of the wrist) would otherwise leave the others' coarse levels at zero.
    """
    over_time = config.transform if config.transform in OVER_TIME else "dct"
    magnitude = over_steps(transform_matrix(over_time, config.horizon), centred).abs().flatten(0, 1).numpy()
    reach = torch.tensor(np.quantile(magnitude, REACH_QUANTILE, axis=0), dtype=torch.float32)
    return torch.where(reach > STILL, reach / config.horizon**0.5, torch.ones_like(reach))


def over_steps(matrix: Tensor, motion: Tensor) -> Tensor:
    """matrix [R, H] times motion [N, H, M] -> [N, R, M], for statistics: the last bits do not matter here."""
    return torch.einsum("rh,nhm->nrm", matrix, motion)


def first_step_of(normalised: Tensor, config: TokenizerConfig) -> tuple[Tensor | None, float]:
    """Normalised motion [N, H, M] -> the matrix of `pca`, if that is the transform, and the first step D_1."""
    horizon, half = normalised.shape[1], config.rfsq.half
    if config.transform == "pca":
        matrix = principal_components(normalised)
        coefficients = normalised.flatten(1) @ matrix.T
    elif config.normalisation == "reach":
        return None, horizon**0.5 / (half + 0.5)
    else:
        matrix = None
        coefficients = over_steps(transform_matrix(config.transform, horizon), normalised).flatten(1)
    largest = np.quantile(coefficients.abs().numpy(), REACH_QUANTILE, axis=0).max()
    return matrix, float(largest) / (half + 0.5)
