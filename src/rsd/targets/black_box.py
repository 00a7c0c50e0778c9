"""Speculation on any policy: a distilled drafter proposes, a gate decides whether the target is asked at all.

The target is a black box that gives chunks. What of a draft it would have let stand is told in RFSQ digits and as the
fingertip's deviation. It is always asked on an episode's first observation, where the gripper switches, after
`max_skips` chunks without it, and as long as the draft of its last run did not stand (see `gate.SkipRule`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from rsd.checks import Millimetres, checked
from rsd.conventions import shrunk
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.calibration import fingertip_deviation
from rsd.decoding.decoders import proposed
from rsd.decoding.gate import SkipRule
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import Draft, EpisodeState, Forecast, PolicyInput
from rsd.decoding.timing import Stopwatch
from rsd.devices import check_device
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.models.target import BlockTarget, state_features
from rsd.models.text import word_ids
from rsd.policy import TextCache
from rsd.runtime.engines import choose_engine, make_engine
from rsd.targets.drafter_files import StoredDrafter, load_models, read_drafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import (
    AUTO,
    RSD_ASYNC,
    TARGET_ONLY,
    VERIFY_PENDING,
    ActionChunk,
    Chunks,
    ChunkStats,
    Continues,
    Observation,
    Policy,
    RsdError,
)

DRAFTED = ChunkStats("rsd-skip")
RULE = "margin"  # a drafted digit stands if the finer levels can take out what it is off


@dataclass(frozen=True)
class Proposal:
    """A draft, actions float32 [H, 7] of it, and what the gate says."""

    draft: Draft
    forecast: Forecast
    actions: NDArray[np.float32]
    forced: bool
    trusted: bool

    @property
    def expected_mm(self) -> float:
        return float(self.forecast.deviation_mm[0])


class Drafter:
    """A loaded drafter, without an episode; one thread at a time."""

    def __init__(self, model: StandaloneDrafter, tokenizer: ActionTokenizer, stored: StoredDrafter, where: str) -> None:
        self.model, self.stored, self.where = model.eval(), stored, where
        self.device = next(model.parameters()).device
        self.tokenizer = tokenizer.to(self.device)
        self.horizon = tokenizer.config.horizon
        rule = acceptance_rule(RULE, tokenizer.config.rfsq)
        target, unused = cast(BlockTarget, model), cast(FeatureDrafter, None)  # of a target only what `draft` reads
        self.ops = Primitives(target, unused, rule, visual_drafter=model.visual)
        self.ops.engine = make_engine(choose_engine(AUTO, str(self.device), recordable=True))
        device = self.device
        self._texts = TextCache(lambda text: model.encode_text(word_ids([text]).to(device)))

    @torch.inference_mode()
    def propose(self, observation: Observation, state: EpisodeState, skip: SkipRule) -> Proposal:
        """`RsdError` where the drafter's output is not finite."""
        self.ops.watch, self.ops.checks = Stopwatch(self.device), []
        draft, forecast = proposed(self.ops, self._seen(observation), None)
        self.ops.check()
        actions = self.tokenizer.actions_of(forecast.value * self.tokenizer.first_step, draft.gripper)
        (forced,) = skip.forces(draft, state)
        (trusted,) = skip.trusts(forecast, state, (forced,))
        return Proposal(draft, forecast, actions[0].float().cpu().numpy().copy(), forced, trusted)

    def must_look(self, state: EpisodeState, skip: SkipRule) -> bool:
        """Whether the target will be asked whatever is drafted."""
        return not state.seen[0] or state.skipped[0] >= skip.most(state)[0]

    @torch.inference_mode()
    def judged(self, proposal: Proposal, actions: NDArray[np.float32], stats: ChunkStats = DRAFTED) -> ChunkStats:
        """The statistics, with what the target's actions [n >= H, 7] make of a draft; `stood`: within epsilon."""
        chunk = torch.from_numpy(self.cut(actions)[None]).to(self.device)
        truth = self.tokenizer.to_coefficients(chunk) / self.tokenizer.first_step
        gripper, code, draft = self.tokenizer.gripper_symbols(chunk), self.tokenizer.config.rfsq, proposal.draft
        levels = range(1, draft.motion.shape[1] + 1)
        before = torch.stack([torch.zeros_like(truth), *draft.prefixes[:-1]], 1)
        step, margin = (truth.new_tensor([[of(level)] for level in levels]) for of in (code.weight, code.margin))
        digits = ((truth[:, None] - before) / step).round().clamp(-code.half, code.half)
        accepted = (digits - (draft.motion - code.half)).abs() <= margin  # [1, c, P]
        drafted, own = (torch.from_numpy(each).double() for each in (proposal.actions, self.cut(actions)))
        deviation = float(fingertip_deviation(drafted, own))
        same = draft.gripper == gripper
        whole = accepted.all(2)[0].tolist()
        return replace(
            stats,
            acceptance=RULE,
            num_draft_tokens=[accepted.shape[2]] * len(levels),
            num_accepted_tokens=accepted.sum((0, 2)).tolist(),
            accepted_levels=whole.index(False) if False in whole else len(whole),
            gripper_acceptance=float(same.float().mean()),
            stood=deviation <= self.stored.epsilon_mm and bool(same.all()),
            deviation_mm=deviation,
            gripper_differs=not bool(same.all()),
        )

    def cut(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first H of the target's actions [n, 7]."""
        if len(actions) < self.horizon:
            found = f"chunks of {self.horizon} actions, found one of {len(actions)}"
            raise RsdError(f"{self.where}: distilled from a target with {found}; distil one for this target")
        return np.ascontiguousarray(actions[: self.horizon], dtype=np.float32)

    def after(self, state: EpisodeState, executed: NDArray[np.float32], stood: bool | None) -> EpisodeState:
        """executed: actions [>= H, 7] that the robot takes; stood: whether the draft did, None: nobody asked."""
        if stood is None:
            return state.went_without(1)
        return state.looked(None, int(executed[self.horizon - 1][-1] > 0), stood)

    def skip_rule(
        self,
        skip_threshold_mm: Millimetres | None = None,
        max_skips: Chunks | None = None,
        skips_per_agreement: Chunks | None = None,
    ) -> SkipRule:
        """As calibrated, else drafts that expect to deviate less than the drafter's epsilon. One agreement earns all
        the chunks without the target, and a rejected draft none."""
        own, stored = self.stored.calibration, self.stored
        threshold = own.threshold if own is not None else stored.epsilon_mm
        threshold = threshold if skip_threshold_mm is None else skip_threshold_mm
        most = max_skips or stored.max_skips
        return SkipRule(threshold, most, 1, skips_per_agreement=skips_per_agreement or most)

    def _seen(self, observation: Observation) -> PolicyInput:
        pixels = torch.from_numpy(shrunk(observation.images, self.stored.config.image_size)[None]).to(self.device)
        state = state_features(torch.from_numpy(observation.state[None])).to(self.device)
        return PolicyInput(pixels, state, self._texts(observation.instruction))


def load_drafter(directory: Path, device: str = "cpu") -> Drafter:
    stored = read_drafter(directory := checked(Path, directory, "drafter directory"))
    model, tokenizer = load_models(directory, stored)
    return Drafter(model.to(check_device(device)), tokenizer, stored, str(directory))


class SpeculatingPolicy:
    """One episode of a target with its drafter, for a rollout."""

    def __init__(
        self, drafter: Drafter, target: Policy | None, skip: SkipRule, decode: str, audit: bool = False, steps: int = 0
    ) -> None:
        """target: None with `drafter-only`. audit: it is also asked beside every skipped chunk, outside the times.
        steps: of `rsd-fused`, whose target `Continues` from every draft."""
        self.drafter, self.target, self.skip, self.decode, self.audit = drafter, target, skip, decode, audit
        self.steps = steps
        self.image_size = target.image_size if target is not None else max(128, drafter.stored.config.image_size)
        self._state = EpisodeState()
        self._pending: tuple[Observation, Proposal, ActionChunk] | None = None

    def reset(self, seed: int | None = None) -> None:
        self._state, self._pending = EpisodeState(), None
        if self.target is not None:
            self.target.reset(seed)

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `draft`, `target`, `total`. `rsd-async`: what is left of the chunk before is done first."""
        self.complete()
        begin = time.perf_counter()
        if self.decode == TARGET_ONLY:
            return self._timed(ActionChunk(self._asked(observation), ChunkStats(self.decode, prefills=1)), begin, begin)
        proposal = self.drafter.propose(observation, self._state, self.skip)
        drafted = time.perf_counter()
        stats = ChunkStats(self.decode, expected_deviation_mm=proposal.expected_mm)
        if self.target is None:
            return self._timed(ActionChunk(proposal.actions, replace(stats, skipped=True)), begin, drafted)
        if self.steps:
            target = cast(Continues, self.target)
            actions = target.continue_from(observation, proposal.actions, self.steps).actions
            stats = replace(stats, prefills=1, denoising_steps=self.steps, steps_in_full=target.num_inference_steps)
            return self._timed(ActionChunk(self.drafter.cut(actions), stats), begin, drafted)
        if self.decode == RSD_ASYNC:
            chunk = ActionChunk(proposal.actions, replace(stats, skipped=False))
            self._pending = observation, proposal, self._timed(chunk, begin, drafted)
            return self._pending[2]
        stats = replace(stats, skipped=proposal.trusted, forced=proposal.forced)
        if proposal.trusted:
            self._state = self.drafter.after(self._state, proposal.actions, None)
            chunk = self._timed(ActionChunk(proposal.actions, stats), begin, drafted)
            return self._audited(chunk, proposal, observation) if self.audit else chunk
        chunk = self._timed(ActionChunk(self._asked(observation), replace(stats, prefills=1)), begin, drafted)
        stats = self.drafter.judged(proposal, chunk.actions, chunk.stats)
        self._state = self.drafter.after(self._state, chunk.actions, stats.stood)
        return replace(chunk, stats=stats)

    def complete(self) -> ActionChunk | None:
        """With `rsd-async`: the target is asked now -> the last chunk with its `answer`; else None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        (observation, proposal, chunk), begin = pending, time.perf_counter()
        answer = self._asked(observation)
        latency = {**chunk.stats.latency_ms, VERIFY_PENDING: 1e3 * (time.perf_counter() - begin)}
        stats = self.drafter.judged(proposal, answer, replace(chunk.stats, prefills=1, latency_ms=latency))
        return replace(chunk, stats=stats, answer=answer)

    def _asked(self, observation: Observation) -> NDArray[np.float32]:
        assert self.target is not None
        return self.drafter.cut(self.target.predict(observation).actions)

    def _audited(self, chunk: ActionChunk, proposal: Proposal, observation: Observation) -> ActionChunk:
        found = self.drafter.judged(proposal, self._asked(observation), chunk.stats)
        kept = ("stood", "deviation_mm", "gripper_differs")  # what was not asked accepted nothing
        return replace(chunk, stats=replace(chunk.stats, **{name: getattr(found, name) for name in kept}))

    def _timed(self, chunk: ActionChunk, begin: float, drafted: float) -> ActionChunk:
        end = time.perf_counter()
        times = {"draft": drafted - begin, "target": end - drafted, "total": end - begin}
        latency = {name: 1e3 * seconds for name, seconds in times.items()}
        return replace(chunk, stats=replace(chunk.stats, latency_ms=latency))
