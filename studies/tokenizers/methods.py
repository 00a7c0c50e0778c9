"""The codes that are compared. A method yields its settings one after another, each fitted on the training chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.types import RsdError
from studies.tokenizers.codecs import Bins, Codec, LayerNormRfsq, ResidualCode, Splines
from studies.tokenizers.extended import AUTOENCODERS, Extension, fit
from studies.tokenizers.learned import LearnConfig
from studies.tokenizers.metrics import Chunks, rms


@dataclass(frozen=True)
class Entry:
    """A fitted code. curve: entries that share it are one line of the plot. levels: the prefixes to measure."""

    curve: str
    setting: str
    codec: Codec
    levels: list[int]
    extra: dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How much a method may learn; the quick one is for tests and for timing."""

    learn: LearnConfig
    vq_steps: int
    vq_levels: tuple[int, int]  # of 1,024 and of 256 vectors


FULL = Effort(LearnConfig(), 80, (16, 56))
QUICK = Effort(LearnConfig(steps=5), 2, (4, 4))
Method = Callable[[Chunks, Effort], Iterator[Entry]]

OURS = "ours"
BUDGETS = (40, 80, 150, 250, 350, 450)
LEVELS = 11  # the shipped code has 8: more are measured to reach the higher rates
CODES = ((7, 3.0, 7), (7, 7.0, 4), (5, 2.0, 8))  # symbols, rho, levels
SHIPPED = Path("results/tokenizers/of_8_steps")  # of earlier policies


def our_entry(
    curve: str, setting: str, config: TokenizerConfig, chunks: Chunks, extension: Extension | None = None
) -> Entry:
    actions = chunks.scale.denormalise(chunks.train)
    gripper = np.ones((*actions.shape[:2], 1), np.float32)
    tokenizer = fit(np.concatenate([actions, gripper], axis=2), config, extension)
    return Entry(curve, setting, ResidualCode(tokenizer, chunks.scale), every_level(config.levels), {})


def every_level(count: int) -> list[int]:
    return list(range(1, count + 1))


def extension_of(transform: str, refine: bool, learn: LearnConfig) -> Extension:
    channels = 6 if transform == "chunk-autoencoder" else 16  # as many latents as numbers; the original's 16
    autoencoder: Any = transform if transform in AUTOENCODERS else ""
    return Extension(autoencoder, channels, refine=refine, learn=learn)


def ours(transform: str, refine: bool = False) -> Method:
    def method(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
        horizon = chunks.train.shape[1]
        config = TokenizerConfig(
            horizon,
            "dct" if transform in AUTOENCODERS else transform,  # type: ignore[arg-type]
            levels=5 if transform in AUTOENCODERS else LEVELS,
            normalisation="quantile",
        )
        extension = extension_of(transform, refine, effort.learn)
        name = f"{OURS}, {transform}" + (" + refiner" if refine else "")
        yield our_entry(name, "K 7, rho 2", config, chunks, extension)

    return method


def our_codes(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    for symbols, rho, levels in CODES:
        config = TokenizerConfig(
            chunks.train.shape[1], levels=levels, symbols=symbols, rho=rho, normalisation="quantile"
        )
        setting = f"K {symbols}, rho {rho:g}"
        yield our_entry(f"{OURS}, dct, {setting}", setting, config, chunks)


def our_budgets(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    """One code per budget of nominal bits, whole codes only."""
    for bits in BUDGETS:
        config = TokenizerConfig(
            chunks.train.shape[1], "pca", levels=8, symbols=3, rho=2.4, normalisation="quantile"
        )
        setting = f"K 3, rho 2.4, {bits} bits"
        entry = our_entry(f"{OURS}, pca, budget", setting, config, chunks, Extension(bits=bits))
        yield Entry(entry.curve, entry.setting, entry.codec, [config.levels], {})


def shipped(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    tokenizer = ActionTokenizer.load(SHIPPED)
    if tokenizer.config.horizon != chunks.train.shape[1]:
        raise RsdError(f"{SHIPPED}: a horizon of {tokenizer.config.horizon}; leave `shipped` out of --methods")
    levels = every_level(tokenizer.config.levels)
    yield Entry(f"{OURS}, shipped", "K 7, rho 2, reach", ResidualCode(tokenizer, chunks.scale), levels, {})


def bins(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    horizon, motion = chunks.train.shape[1:]
    extremes = np.abs(chunks.train).max((0, 1))
    for alphabet in (2, 4, 8, 16, 32, 64, 128, 256):
        for name, limits in (("bins", np.ones(motion, np.float32)), ("bins, min-max", extremes)):
            yield Entry(name, f"{alphabet} bins", Bins(alphabet, limits, horizon), [1], {})


def splines(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    for points, alphabet in ((2, 16), (2, 64), (3, 64), (3, 256), (4, 256), (5, 256), (6, 256), (8, 256)):
        setting = f"{points} control points, {alphabet} bins"
        yield Entry("B-spline", setting, Splines(chunks.train, points, alphabet), [1], {})


def layer_norm(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    codec = LayerNormRfsq(chunks.entropy, 8, 7)
    honest = codec.decode(codec.encode(chunks.held_out), 8)
    extra = {
        "rmse_forward": rms(codec.forward(chunks.held_out) - chunks.held_out),
        "rmse_decode": rms(honest - chunks.held_out),
    }
    yield Entry("LayerNorm RFSQ", "K 7, 8 levels", codec, every_level(8), extra)


def fast(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    from studies.tokenizers.fast import Fast  # the extra `tokenizers`

    for factor in (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0):
        codec = Fast(chunks.train, factor)
        undecodable = codec.undecodable_share(codec.encode(chunks.held_out))
        yield Entry("FAST", f"scale {factor:g}", codec, [1], {"undecodable_after_one_error": undecodable})


def residual_vq(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    from studies.tokenizers.vector import ResidualVq, count_parameters  # the extra `tokenizers`

    for alphabet, levels in zip((1024, 256), effort.vq_levels, strict=True):
        codec = ResidualVq(chunks.train, alphabet, levels, effort.vq_steps)
        measured = sorted({level for level in every_level(levels) if level <= 8 or level % 4 == 0})
        name, setting = f"RVQ {alphabet}", f"{alphabet} vectors a level"
        yield Entry(name, setting, codec, measured, {"parameters": float(count_parameters(codec))})
        if alphabet == 1024:
            codec.fit_refiner(chunks.train, effort.learn)
            extra = {"parameters": float(count_parameters(codec))}
            yield Entry(name + " + refiner", setting, codec, measured, extra)


def residual_fsq(chunks: Chunks, effort: Effort) -> Iterator[Entry]:
    from studies.tokenizers.vector import ResidualFsq, count_parameters  # the extra `tokenizers`

    for latents, levels in ((16, 4), (48, 3)):
        codec = ResidualFsq(chunks.train, latents, levels, effort.learn)
        extra = {"parameters": float(count_parameters(codec))}
        yield Entry(f"ResidualFSQ, {latents} latents", "levels 7 7 7 7", codec, every_level(levels), extra)


METHODS: dict[str, Method] = {
    "ours-dct": ours("dct"),
    "ours-dct-refined": ours("dct", refine=True),
    "ours-pca": ours("pca"),
    "ours-identity": ours("identity"),
    "ours-step-autoencoder": ours("step-autoencoder"),
    "ours-chunk-autoencoder": ours("chunk-autoencoder"),
    "ours-codes": our_codes,
    "ours-budgets": our_budgets,
    "shipped": shipped,
    "bins": bins,
    "fast": fast,
    "rvq": residual_vq,
    "residual-fsq": residual_fsq,
    "layernorm-rfsq": layer_norm,
    "splines": splines,
}
