"""`rsd calibrate`: when may the target be skipped? Rollouts on random placements, then the threshold that keeps a
promise.
None of the benchmark's initial states is used. The rollouts skip as `rsd-skip` would at the threshold tried, with the
target run beside every skipped chunk; `decoding.calibration` fits the threshold; the result goes into the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.checkpoint import facts_of, read_content, weights_hash
from rsd.decoding.calibration import (
    FILE_NAME,
    SCORE,
    SkipCalibration,
    SkipPromise,
    episodes_needed,
    executed,
    fit_threshold,
)
from rsd.decoding.gate import SkipRule
from rsd.evaluation.backend import LIBERO, Backend, describe_checkpoint
from rsd.evaluation.bench_config import CalibrateConfig
from rsd.evaluation.config import EvalConfig, asked_rule
from rsd.evaluation.evaluate import ERRORS_FILE, evaluate
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes, scored
from rsd.evaluation.tables import say
from rsd.options import DecodeOptions, resolve
from rsd.output import terminal
from rsd.sim.failures import WatchedLibero
from rsd.types import RsdError

FAR = 1e6  # mm
MOST_ERRORS = 0.05  # of the rollouts; what is left out of more of them could be what deviates
FIRST_PLACEMENT = 1_000_000  # placement seeds of the calibration: one a trial


class PlacementEnv(WatchedLibero):
    """Trial k is a random placement instead of the benchmark's initial state k."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        trial = (options or {})["init_state"]
        return super().reset(seed=seed, options={"placement_seed": FIRST_PLACEMENT + trial})


def unlimited(suite: str, task_id: int) -> int:
    return 10**6


def describe(config: EvalConfig) -> dict[str, Any]:
    return {**describe_checkpoint(config), "initial_states": f"random placements from seed {FIRST_PLACEMENT}"}


PLACEMENTS: Backend = replace(LIBERO, make_env=PlacementEnv, count_init_states=unlimited, describe_policy=describe)


def calibrate(config: CalibrateConfig, backend: Backend = PLACEMENTS) -> SkipCalibration:
    """Rollouts, fit, table; writes the calibration into `output`, and into the checkpoint directory if it may."""
    directory = Path(config.policy)
    if not directory.is_dir():
        raise RsdError(f"calibrate: expected a checkpoint directory to write into, found {config.policy!r}")
    content = read_content(directory)
    if not content["policy"].get("visual_drafter"):
        found = f"{directory} has no visual drafter, whose chunks rsd-skip executes"
        raise RsdError(f"calibrate: {found}; train one with it")
    asked = DecodeOptions("rsd-skip", asked_rule(config.acceptance), skip=SkipRule(), execute=config.execute)
    decoding = resolve(facts_of(directory, content), asked)
    if decoding.fine != "regress":
        found = f"acceptance {decoding.rule.name!r} decodes the fine levels one after another"
        raise RsdError(f"calibrate: {found}; take another rule")
    sha256 = weights_hash(directory)
    shared = {field.name for field in fields(EvalConfig)} & vars(config).keys() - {"output"}
    rollouts = EvalConfig(
        **{name: getattr(config, name) for name in shared},
        decode="rsd-skip",
        skip_threshold_mm=config.tried_mm,
        audit=True,
        output=str(config.output),
    )
    needed = episodes_needed(config.alpha, config.delta, config.test)
    for suite in rollouts.suites:
        planned = config.num_trials * len(rollouts.task_ids(suite, [task for task, *_ in backend.list_tasks(suite)]))
        if planned < needed:
            found = f"risk <= {config.alpha:g} at confidence {1 - config.delta:g} takes {needed} rollouts of each suite"
            raise RsdError(f"calibrate: {found}, {suite} would have {planned}; raise --num-trials, alpha or delta")
    install = config.overwrite or not (directory / FILE_NAME).exists()
    if install and not os.access(directory, os.W_OK):
        raise RsdError(f"calibrate: not permitted to write into {directory}; calibrate a copy of it")
    summary = evaluate(rollouts, backend=backend)
    if summary.errors > MOST_ERRORS * summary.episodes:
        found = f"{summary.errors} of {summary.episodes} rollouts ended in an error"
        raise RsdError(f"calibrate: {found}, see {config.output / ERRORS_FILE}; run again to repeat them")
    episodes = scored(read_episodes(config.output / EPISODES_FILE).values())
    by_suite = {suite: [e for e in episodes if e.suite == suite] for suite in rollouts.suites}
    fitted = {suite: fit(own, config, sha256) for suite, own in by_suite.items()}
    # every threshold up to a fitted one has been tested and passed: so has the strictest, in each suite
    strictest = min(fitted.values(), key=lambda one: one.threshold)
    calibration = replace(strictest, suites=",".join(fitted), execute=decoding.execute)
    calibration.save(config.output)
    if install:
        calibration.save(directory)
    tell = partial(say, terminal())
    if summary.errors:
        tell(f"{summary.errors} of {summary.episodes} rollouts ended in an error and are left out")
    for suite, one in fitted.items():
        own = by_suite[suite]
        limit = "" if one.threshold <= max(chunk_stat(e, SCORE).max() for e in own) else " (no threshold failed)"
        skipped = float(np.concatenate([chunk_stat(e, "skipped") for e in own]).mean())
        tell(
            f"{suite}: {one.episodes} rollouts, {one.chunks} chunks; threshold {one.threshold:.1f} mm{limit}: "
            f"{one.skip_share:.1%} of the chunks without the target (the rollouts had {skipped:.1%}), "
            f"risk {one.empirical_risk:.3f}, promised <= {config.alpha:g} at confidence {1 - config.delta:g}; "
            f"success of the rollouts {sum(e.success for e in own)}/{len(own)}"
        )
    if len(fitted) > 1:
        shares = ", ".join(f"{suite} {share_at(own, calibration):.1%}" for suite, own in by_suite.items())
        tell(f"written: {calibration.threshold:.1f} mm, the strictest; chunks without the target by that: {shares}")
    if install:
        tell(f"calibration: {directory / FILE_NAME}; next: rsd eval --policy {directory} --decode rsd-skip")
    else:
        tell(f"calibration: {config.output / FILE_NAME}; {directory} keeps its own, which --overwrite replaces")
    return calibration


def share_at(episodes: Iterable[EpisodeResult], calibration: SkipCalibration) -> float:
    """The share of the rollouts' chunks that would go without the target by a calibration."""
    skips = []
    for episode in episodes:
        forced = chunk_stat(episode, "forced").astype(bool)
        per = calibration.skips_per_agreement
        stands = chunk_stat(episode, "stood").astype(bool) if per else None
        limits = calibration.threshold, calibration.max_skips
        skips.append(executed(chunk_stat(episode, SCORE), *limits, forced, stands, per))
    return float(np.concatenate(skips).mean())


def fit(episodes: Iterable[EpisodeResult], config: CalibrateConfig, sha256: str) -> SkipCalibration:
    """Audited rollouts of one suite -> the calibration."""
    ordered = sorted(episodes, key=lambda episode: episode.key)
    suites, rules = ({getattr(episode, name) for episode in ordered} for name in ("suite", "acceptance"))
    if len(suites) != 1 or len(rules) != 1:
        found = f"{len(ordered)} of {sorted(suites)} by {sorted(rules)}"
        raise RsdError(f"calibrate: expected rollouts of one suite by one acceptance rule, found {found}")
    shared = {field.name for field in fields(SkipPromise)} & vars(config).keys() - {"acceptance"}
    asked: dict[str, Any] = {name: getattr(config, name) for name in shared}
    promise = SkipPromise(**asked, score=SCORE, suites=suites.pop(), acceptance=rules.pop(), weights_sha256=sha256)
    # the betting test needs exchangeable episodes: task after task, tasks that are easy would vouch for the others
    ordered = [ordered[i] for i in np.random.default_rng(config.seed).permutation(len(ordered))]
    return fit_threshold(
        [chunk_stat(episode, SCORE) for episode in ordered],
        [deviations(episode) for episode in ordered],
        promise,
        [chunk_stat(episode, "forced").astype(bool) for episode in ordered],
        [chunk_stat(episode, "stood").astype(bool) for episode in ordered] if config.skips_per_agreement else None,
    )


def deviations(episode: EpisodeResult) -> NDArray[np.float64]:
    """mm by chunk; another gripper symbol than the target's is further than any epsilon."""
    apart = chunk_stat(episode, "deviation_mm")
    if "gripper_differs" in episode.chunk_stats:  # not recorded by the first audits
        apart = np.where(chunk_stat(episode, "gripper_differs") > 0, FAR, apart)
    return apart


def chunk_stat(episode: EpisodeResult, name: str) -> NDArray[np.float64]:
    """One number a chunk; `RsdError` where the rollout did not record it."""
    values = np.array(episode.chunk_stats.get(name, [None]), dtype=np.float64)  # None: NaN
    if np.isnan(values).any():
        raise RsdError(f"episode {episode.key}: has no {name} of every chunk; roll out with rsd-skip and --audit")
    return values
