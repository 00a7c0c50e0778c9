"""Calibration: from training chunks to the constants of a code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rsd.tokenizer.action_tokenizer import ActionTokenizer, Parts, binary_dimensions
from rsd.tokenizer.allocation import active_cells, allocate
from rsd.tokenizer.config import AUTOENCODERS, OVER_TIME, TokenizerConfig
from rsd.tokenizer.learned import Autoencoder, Refiner, quantise_prefix, train_autoencoder, train_refiner
from rsd.tokenizer.rfsq import Rfsq
from rsd.tokenizer.transforms import principal_components, transform_matrix
from rsd.types import RsdError

MIN_CHUNKS = 100  # fewer cannot place the 1 % and 99 % quantiles
CHUNKS_PER_SCALAR = 4  # of a learned transform: fewer would fit noise
REACH_QUANTILE = 0.9999
STILL = 1e-6  # a dimension that moves less than this is constant
PART = 512  # chunks encoded at a time
ALLOCATION_CHUNKS = 20_000  # the search looks at no more


def calibrate(chunks: np.ndarray, config: TokenizerConfig) -> ActionTokenizer:
    """chunks float [N, H, A] -> a tokenizer; RsdError where they cannot calibrate one."""
    needed = check_chunks(chunks, config)
    binary = binary_dimensions(config, chunks.shape[2])
    motion = np.delete(chunks, binary, axis=2).astype(np.float32)
    if len(chunks) < needed:
        raise RsdError(f"tokenizer fit: expected at least {needed} chunks, found {len(chunks)}")
    largest = float(np.abs(motion).max())
    if config.limit and largest > config.limit:
        raise RsdError(
            f"tokenizer fit: expected actions within +-{config.limit:g} (--tokenizer.limit), found {largest:g}; give "
            "the robot's own limit, or 0 for none"
        )
    low, high = dimension_range(motion, config)
    config = with_binary_values(chunks, config)
    half_width = (high - low) / 2
    scale = torch.where(half_width > STILL / 2, half_width, torch.ones_like(half_width))
    normalised = (torch.from_numpy(motion) - (low + high) / 2) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.learn.seed)  # the networks' first weights
        parts, first_step = code_parts(normalised, config)
        tokenizer = ActionTokenizer(config, low, high, first_step, parts)
        parts = budget_and_refiner(tokenizer, torch.from_numpy(chunks.astype(np.float32)))
    tokenizer = ActionTokenizer(config, low, high, first_step, parts)
    for part in torch.from_numpy(chunks.astype(np.float32)).split(PART):
        tokenizer.encode(part)
    tokenizer.calibration = tokenizer.statistics
    tokenizer.reset_statistics()
    return tokenizer


def check_chunks(chunks: np.ndarray, config: TokenizerConfig) -> int:
    """Raises RsdError for a wrong shape or numbers that are not finite; returns how many chunks are needed."""
    if chunks.ndim != 3 or chunks.shape[1] != config.horizon or chunks.shape[2] <= len(config.binary):
        expected = f"chunks [N, {config.horizon}, A]"
        raise RsdError(f"tokenizer fit: expected {expected}, found {list(chunks.shape)}")
    if not np.isfinite(chunks).all():
        raise RsdError("tokenizer fit: found NaN or infinity in the chunks; check the demonstrations")
    learned = config.transform not in OVER_TIME or config.refine
    scalars = chunks.shape[1] * (chunks.shape[2] - len(config.binary))
    return max(MIN_CHUNKS, CHUNKS_PER_SCALAR * scalars if learned else 0)


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


def code_parts(normalised: Tensor, config: TokenizerConfig) -> tuple[Parts, float]:
    """Normalised motion [N, H, M] -> the learned transform, if any, and the first step D_1."""
    horizon, motion = normalised.shape[1:]
    code = config.rfsq
    if config.transform in AUTOENCODERS:  # its latents end at -1 and 1
        whole = config.transform == "chunk-autoencoder"
        net = Autoencoder(horizon, motion, config.channels, whole, config.learn.hidden)
        first_step = 1.0 / (code.half + 0.5)
        train_autoencoder(net, normalised, Rfsq(code, first_step), config.learn)
        return Parts(autoencoder=net), first_step
    matrix = principal_components(normalised) if config.transform == "pca" else None
    if config.normalisation == "reach" and matrix is None:
        return Parts(), horizon**0.5 / (code.half + 0.5)
    if matrix is not None:
        coefficients = normalised.flatten(1) @ matrix.T
    else:
        coefficients = over_steps(transform_matrix(config.transform, horizon), normalised).flatten(1)
    largest = np.quantile(coefficients.abs().numpy(), REACH_QUANTILE, axis=0).max()
    return Parts(matrix=matrix), float(largest) / (code.half + 0.5)


def budget_and_refiner(tokenizer: ActionTokenizer, chunks: Tensor) -> Parts:
    """The tokenizer's parts with the tokens that the budget of bits affords, and with its refiner."""
    config, parts = tokenizer.config, tokenizer.parts
    if not config.bits and not config.refine:
        return parts
    coefficients = torch.cat([tokenizer.to_coefficients(part) for part in chunks.split(PART)])
    active, refiner = None, None
    if config.bits:
        some = coefficients[:: max(1, len(coefficients) // ALLOCATION_CHUNKS)].numpy()
        runs = allocate(some, config.rfsq, tokenizer.first_step, config.bits)
        active = torch.from_numpy(active_cells(runs, config.levels))
    if config.refine:
        rfsq = Rfsq(config.rfsq, tokenizer.first_step, active)
        refiner = Refiner(tokenizer.scalars, rfsq.steps, config.learn.hidden)

        def decode_prefix(rows: Tensor, levels: Tensor) -> Tensor:
            return quantise_prefix(rfsq, coefficients[rows], levels)

        train_refiner(refiner, coefficients, decode_prefix, config.learn)
    return Parts(parts.matrix, parts.autoencoder, refiner, active)
