"""Calibrated skipping: when may the draft's chunk be executed without asking the target? No simulator in here.

A draft chunk is executed where its uncertainty score is below a threshold, the target is not forced (`forced`: at
gripper switches, say) and fewer than `max_skips` chunks in a row went without the target: `executed`. It *deviates*
if it is more than `epsilon_mm` from the target's (`fingertip_deviation`). `fit_threshold` picks the largest threshold
whose risk is at most alpha with confidence 1 - delta over the draw of the calibration episodes.

Episodes are exchangeable, the chunks of one are not, so an episode gives ONE loss in [0, 1]: the share of its executed
draft chunks that deviate, 0 if none is executed. The risk is the expected loss of an episode. Method: Learn then Test
(Angelopoulos et al., arXiv 2110.01052), p-values for "risk > alpha" at every threshold, fixed-sequence testing from
strict to loose until one is not rejected. The losses change at observed scores only, so testing between all of them
tests EVERY threshold, in an order that no data decided. (A grid of a few quantiles of the same data would not: it
steps over thresholds that might have failed.)
Nothing asks the risk to grow with the threshold; as a share it need not.

What is promised, and what not: the promise holds for episodes drawn as the calibration's were. Executing drafts
changes which states an episode visits; calibrate on rollouts that skip about as often as the result will (again
with the fitted threshold if need be), never on demonstrations, and put `realised_risk` of the evaluation beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rsd import manifest
from rsd.checks import (
    Checked,
    Epsilon,
    Millimetres,
    Proper,
    Rules,
    Sha256,
    Share,
    Some,
    Where,
    between,
    check_shape,
    checked,
    real_array,
)
from rsd.conventions import ACTION_METRES, ACTION_RADIANS
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.risk_tests import P_VALUES, clopper_pearson_upper, hoeffding_bentkus_upper
from rsd.json_files import from_json, read_versioned, write_atomically
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import ACTION_DIM, RsdError, Steps

FORMAT_VERSION = 3
FILE_NAME = "skip_calibration.json"
SCORE: Final = "expected_deviation_mm"
LEVER_METRES = 0.1  # a turn counts as what it moves this far from the grip site: a held object's far end
BLOCK = 256  # thresholds tested at once

Amount = Annotated[int, between(1, 1e6)]
Names = Annotated[str, Where(re.compile(r"\w+(,\w+)*").fullmatch, "that is names with commas between")]
Test = Literal["hoeffding-bentkus", "betting"]
Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Chunks = TypeVar("Chunks", torch.Tensor, NDArray[np.floating])


def may_skip(score: float, threshold: float, skipped: int, max_skips: int, forced: bool) -> bool:
    """The decision for one chunk, after `skipped` ones in a row without the target. A NaN score never may."""
    return bool(score < threshold and skipped < max_skips and not forced)


def most_skips(max_skips: int, per_agreement: int | None, stood: int) -> int:
    """Chunks in a row that may go without the target, after `stood` runs of it in a row at which the draft stood."""
    return max_skips if per_agreement is None else min(max_skips, per_agreement * stood)


@dataclass(frozen=True, kw_only=True)
class SkipPromise(Checked):
    """What is to be promised of skipping, and of what.

    alpha, delta: risk <= alpha with confidence 1 - delta; test: see `risk_tests`. epsilon_mm: a chunk deviates beyond
    it. max_skips: chunks in a row without the target, at most. memory_chunks, skips_per_agreement: see `gate.SkipRule`.
    score: its name. suites: what is calibrated for, with commas between. acceptance: how the target judges drafts
    meanwhile. weights_sha256: of the checkpoint's weights file that makes scores and chunks.
    """

    alpha: Proper
    delta: Proper
    test: Test
    epsilon_mm: Epsilon
    max_skips: Amount
    memory_chunks: Amount
    skips_per_agreement: Amount | None = None
    score: Literal["expected_deviation_mm"]
    suites: Names
    acceptance: str
    weights_sha256: Sha256

    def rules(self) -> Rules:
        acceptance_rule(self.acceptance, RfsqConfig())  # raises for what is none
        yield from ()

    @property
    def words(self) -> str:
        return f"risk <= {self.alpha:g} at confidence {1 - self.delta:g}, epsilon {self.epsilon_mm:g} mm"


@dataclass(frozen=True, kw_only=True)
class SkipCalibration(SkipPromise):
    """When the target may be skipped, and what was promised for it.

    threshold: execute the draft's chunk where its score (>= 0) is below; 0 = never. loss: an episode's.
    p_value, empirical_risk, skip_share: of the calibration set at this threshold (share of chunks without target), of
    several suites the one with the strictest threshold. execute: steps executed of a chunk, None: all (before it was
    recorded).
    """

    threshold: Millimetres
    loss: Literal["share"]
    p_value: Share
    empirical_risk: Share
    skip_share: Share
    episodes: Some
    chunks: Some
    execute: Steps | None = None

    def rules(self) -> Rules:
        yield from super().rules()
        kept = self.threshold == 0 or self.p_value <= self.delta
        yield kept, f"p_value at most delta, {self.delta:g}, where anything is skipped", f"{self.p_value:g}"
        yield self.chunks >= self.episodes, "a chunk an episode at least", f"{self.chunks} of {self.episodes} episodes"

    def check_belongs(self, weights_sha256: str) -> None:
        """Raise unless calibrated for these weights: other weights have other scores."""
        if weights_sha256 != self.weights_sha256:
            raise RsdError(
                f"skip calibration: made for weights {self.weights_sha256[:12]}, found {weights_sha256[:12]}; "
                "calibrate this checkpoint (rsd calibrate)"
            )

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, directory: Path) -> None:
        """Write it into a directory, and its hash into the manifest of a checkpoint that has one."""
        write_atomically(directory / FILE_NAME, json.dumps(self.to_json(), indent=1) + "\n")
        if manifest.read_manifest(directory) is not None:
            manifest.seal(directory, only=[FILE_NAME])

    @classmethod
    def load(cls, directory: Path) -> SkipCalibration:
        path = checked(Path, directory, "skip calibration's directory") / FILE_NAME
        content = read_versioned(path, "skip calibration", FORMAT_VERSION, "calibrate again")
        return from_json(cls, content, str(path), ignore=("format_version",))


def executed(
    scores: Floats,
    threshold: float | Floats,
    max_skips: int,
    forced: Bools | None = None,
    stands: Bools | None = None,
    per_agreement: int | None = None,
) -> Bools:
    """Which chunks go without the target: scores [..., T] of an episode in order, threshold a number or [..., 1].

    stands: whether the target would let the draft of that chunk stand, needed with `per_agreement` (`most_skips`)."""
    below = scores < threshold
    if forced is not None:
        below = below & ~forced
    out, run = np.zeros_like(below), np.zeros(below.shape[:-1], dtype=np.int64)
    earned, most = np.zeros_like(run), np.full_like(run, max_skips)
    for chunk in range(below.shape[-1]):
        if per_agreement is not None:
            most = np.minimum(max_skips, per_agreement * earned)
        out[..., chunk] = skipped = below[..., chunk] & (run < most)
        run = np.where(skipped, run + 1, 0)
        if stands is not None:
            earned = np.where(skipped, earned, np.where(stands[..., chunk], earned + 1, 0))
    return out


def fit_threshold(
    scores: Sequence[Floats],
    deviations: Sequence[Floats],
    promise: SkipPromise,
    forced: Sequence[Bools] | None = None,
    stands: Sequence[Bools] | None = None,
) -> SkipCalibration:
    """Per episode: scores [T] >= 0, deviations [T] in mm of every draft chunk (executed or not), forced and stands bool
    [T], see `executed`.

    Threshold 0, never skip, is the answer where already the most certain chunks deviate too often. Too few
    episodes to promise anything, even had none deviated, are an error that says how many it takes.
    """
    _check_episodes(scores, deviations, forced)
    alpha, delta, test = promise.alpha, promise.delta, promise.test
    n, needed = len(scores), episodes_needed(alpha, delta, test)
    if n < needed:
        found = f"risk <= {alpha:g} at confidence {1 - delta:g} takes at least {needed} calibration episodes, found {n}"
        raise RsdError(f"skip calibration: {found}; collect more, or allow a larger alpha or delta")
    u = _pad(scores, np.inf)  # [n, T]; padding is never executed
    held = None if forced is None else _pad(forced, False)
    stood = None if stands is None else _pad(stands, False)
    deviates = _pad(deviations, 0.0) > promise.epsilon_mm
    observed = np.unique(np.concatenate(scores))
    thresholds = np.append(observed, np.nextafter(observed[-1], np.inf))  # the first executes nothing

    best, p_best, risk, share = 0.0, 1.0, 0.0, 0.0
    for start in range(0, len(thresholds), BLOCK):
        block = thresholds[start : start + BLOCK]
        limits = promise.max_skips, held, stood, promise.skips_per_agreement
        skips = executed(u[None], block[:, None, None], *limits)  # [block, n, T]
        losses = _losses(skips, deviates)  # [block, n]
        p = P_VALUES[test](losses, alpha, delta)
        passed = len(block) if (p <= delta).all() else int((p > delta).argmax())
        if passed:
            last = passed - 1
            best, p_best, risk = float(block[last]), float(p[last]), float(losses[last].mean())
            share = int(skips[last].sum()) / sum(map(len, scores))
        if passed < len(block):
            break
    return SkipCalibration(
        **vars(promise),
        threshold=best if share > 0.0 else 0.0,  # what executed nothing was tested on nothing
        loss="share",
        p_value=p_best,
        empirical_risk=risk,
        skip_share=share,
        episodes=n,
        chunks=sum(map(len, scores)),
    )


def episodes_needed(alpha: float, delta: float, test: str) -> int:
    """The fewest calibration episodes that can promise risk <= alpha at confidence 1 - delta, if none deviates."""
    n = math.ceil(math.log(delta) / math.log1p(-alpha))  # (1 - alpha) ** n <= delta: no test can do with fewer
    while P_VALUES[test](np.zeros(n), alpha, delta) > delta:
        n += 1
    return n


@dataclass(frozen=True)
class RealisedRisk:
    """What became of the promise on other episodes. Upper bounds hold with confidence 1 - delta each.

    executed, beyond, gripper_only: draft chunks over all episodes (no interval: chunks of an episode are not
    independent): those executed, of these the ones further than epsilon, and those nearer whose gripper differs
    (None where that was not recorded).
    share, share_upper: mean loss of an episode, bound of Hoeffding-Bentkus.
    any, any_upper: rate of episodes where any executed chunk deviates, bound of Clopper-Pearson.
    """

    episodes: int
    chunks: int
    executed: int
    beyond: int
    gripper_only: int | None
    share: float
    share_upper: float
    any: float
    any_upper: float


def realised_risk(
    skipped: Sequence[Bools],
    deviations: Sequence[Floats],
    gripper_differs: Sequence[Bools] | None = None,
    *,
    epsilon_mm: float,
    delta: float,
) -> RealisedRisk:
    """Per episode: skipped bool [T], chunks that went without the target; deviations [T] in mm, computed beside the
    control for those (NaN allowed for the others); gripper_differs bool [T], of chunks with another gripper symbol
    than the target's, which deviate however near they are."""
    if not len(skipped) or any(len(a) != len(b) for a, b in zip(skipped, deviations, strict=True)):
        raise RsdError("realised risk: expected episodes with one flag and one deviation a chunk")
    ran, apart = _pad(skipped, False), _pad(deviations, np.nan)
    if not np.isfinite(apart[ran]).all():
        raise RsdError("realised risk: an executed draft chunk has no finite deviation; compute the target's beside it")
    beyond = apart > epsilon_mm
    deviates = beyond if gripper_differs is None else beyond | _pad(gripper_differs, False)
    share = _losses(ran, deviates)
    n, hits = len(skipped), int((ran & deviates).any(-1).sum())
    return RealisedRisk(
        episodes=n,
        chunks=sum(map(len, skipped)),
        executed=int(ran.sum()),
        beyond=int((ran & beyond).sum()),
        gripper_only=None if gripper_differs is None else int((ran & deviates & ~beyond).sum()),
        share=float(share.mean()),
        share_upper=hoeffding_bentkus_upper(float(share.mean()), n, delta),
        any=hits / n,
        any_upper=clopper_pearson_upper(hits, n, delta),
    )


def fingertip_deviation(draft: Chunks, target: Chunks) -> Chunks:
    """Chunks [..., H, 7] in action units -> mm [...], how far apart the two commands come, at the worst step.

    Norm of the summed difference of commanded translation plus `LEVER_METRES` times that of rotation (axis-angle,
    summed as vectors: exact to first order). The gripper is left out: it is binary, and the target is asked where
    it switches. Commands, not motion: the controller's goal starts anew from where the arm is at every step, so the
    arm travels less. Measured in LIBERO for steady commands of 8 steps, each axis and size alike: 0.20 of the
    commanded translation at the chunk's end, 0.26 once at rest (rotation 0.3 to 0.5). Never waits for a device.
    """
    if not (isinstance(draft, torch.Tensor) and isinstance(target, torch.Tensor)):
        pair = (torch.tensor(real_array("chunk", chunk, "float64")) for chunk in (draft, target))
        return fingertip_deviation(*pair).numpy()
    check_shape("draft's chunk", draft.shape, (..., "H", ACTION_DIM))
    check_shape("target's chunk", target.shape, draft.shape)
    apart = (draft.clamp(-1.0, 1.0) - target.clamp(-1.0, 1.0)).cumsum(-2)  # the controller clamps, too
    metres = ACTION_METRES * apart[..., :3].norm(dim=-1)
    metres = metres + LEVER_METRES * ACTION_RADIANS * apart[..., 3:6].norm(dim=-1)
    return 1e3 * metres.amax(-1)


def _losses(skips: Bools, deviates: Bools) -> Floats:
    """Executed and deviating chunks bool [..., n, T] -> losses of the episodes [..., n]."""
    return (skips & deviates).sum(-1) / np.maximum(skips.sum(-1), 1)


def _pad(rows: Sequence[NDArray[Any]], fill: float | bool) -> NDArray[Any]:
    """Rows of different lengths -> [n, longest]."""
    out = np.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _check_episodes(scores: Sequence[Floats], deviations: Sequence[Floats], forced: Sequence[Bools] | None) -> None:
    flags = scores if forced is None else forced
    if not len(scores) or not len(scores) == len(deviations) == len(flags):
        found = f"{len(scores)}, {len(deviations)} and {len(flags)}"
        raise RsdError(f"skip calibration: expected scores, deviations and flags of the same episodes, found {found}")
    for index, (u, d, f) in enumerate(zip(scores, deviations, flags, strict=True)):
        if np.ndim(u) != 1 or not np.shape(u) == np.shape(d) == np.shape(f) or not len(u):
            found = f"{np.shape(u)}, {np.shape(d)}, {np.shape(f)}"
            raise RsdError(f"skip calibration, episode {index}: expected one number a chunk each, found shapes {found}")
        if not (np.isfinite(u).all() and np.isfinite(d).all() and np.min(u) >= 0 and np.min(d) >= 0):
            raise RsdError(f"skip calibration, episode {index}: expected finite scores and deviations >= 0")
