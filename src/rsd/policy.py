"""The policy: observations in, action chunks out. Its files are in `checkpoint`, its models in `models.bundle`.

There is one path. `SpeculativePolicy.predict` takes one observation each of any number of robots with what their
episodes left behind, and keeps nothing: a robot is a batch of one, a server holds one state a session, a worker pool
many. `RsdPolicy` keeps one episode for a script.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsd import hub
from rsd.checkpoint import backbone_of, facts_of, load_model, locate_checkpoint, read_content, save_checkpoint
from rsd.checks import Seed, checked
from rsd.decoding.acceptance import leading
from rsd.decoding.calibration import fingertip_deviation
from rsd.decoding.decoders import DECODERS, look
from rsd.decoding.gate import SkipRule
from rsd.decoding.primitives import Primitives
from rsd.decoding.sampling import Sampler
from rsd.decoding.state import DecodeResult, Draft, EpisodeState, Forecast, PolicyInput, kept, rows_of, stacked
from rsd.decoding.timing import Stopwatch
from rsd.devices import check_device
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.config import OwnDecoding
from rsd.models.target import committed_features, state_features
from rsd.models.text import word_ids
from rsd.options import Checkpoint, DecodeOptions, Decoding, RuntimeOptions, options_of, resolve
from rsd.output import writing
from rsd.runtime.engines import choose_engine, make_engine
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import ACTION_DIM, VERIFY_PENDING, ActionChunk, ChunkStats, Observation, RsdError, check_observation

OF_OTHERS = ("episodes.jsonl", "training_state.pt", "drafter.json", "corrector.json")  # in folders of something else
TEXT_CACHE = 64  # instructions whose encoding is kept
CACHED_CHARACTERS = 1000  # longer instructions are encoded every time: a client could send 64 of any length
LOG = logging.getLogger(__name__)


class Body(Protocol):
    """What differs between the compact models and OpenVLA's: how observations become their input.

    image_size in pixels a side; cameras: how many of an observation's are looked at, the first ones; compact: whether
    the models are the compact ones; prompted: whether a memory is of one instruction only."""

    image_size: int
    cameras: int
    compact: bool
    prompted: bool

    def __call__(self, observations: Sequence[Observation]) -> PolicyInput: ...

    def save(self, directory: Path) -> None:
        """Write the checkpoint directory."""
        ...


class TextCache:
    """What instructions are encoded to, kept of the last TEXT_CACHE short ones."""

    def __init__(self, encode: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        self._encode, self._kept = encode, lru_cache(TEXT_CACHE)(encode)

    def __call__(self, instruction: str) -> tuple[Tensor, Tensor]:
        return (self._kept if len(instruction) <= CACHED_CHARACTERS else self._encode)(instruction)


class CompactBody:
    """The compact models: pixels uint8 [B, 2, S, S, 3], state features [B, 11], encoded instructions."""

    compact, prompted, cameras = True, False, 2

    def __init__(
        self, model: RsdModel, tokenizer: ActionTokenizer, config: PolicyConfig, provenance: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.config, self.provenance = model, tokenizer, config, provenance
        self.image_size, target = config.target.image_size, model.target
        self._texts = TextCache(lambda text: target.encode_text(word_ids([text]).to(target.state_mean.device)))

    def __call__(self, observations: Sequence[Observation]) -> PolicyInput:
        size, device = self.image_size, self.model.target.state_mean.device
        for observation in observations:
            if observation.images.shape[1:3] != (size, size):
                found = " x ".join(map(str, observation.images.shape[1:3]))
                raise RsdError(f"observation images: expected {size} x {size} pixels, found {found}")
        pixels = torch.from_numpy(np.stack([o.images for o in observations])).to(device)
        state = state_features(torch.from_numpy(np.stack([o.state for o in observations]))).to(device)
        if self.config.target.committed:
            state = torch.cat([state, self._committed(observations).to(device)], dim=1)
        texts = [self._texts(o.instruction) for o in observations]
        return PolicyInput(pixels, state, (torch.cat([t for t, _ in texts]), torch.cat([c for _, c in texts])))

    def _committed(self, observations: Sequence[Observation]) -> Tensor:
        """What is committed of each, float32 [B, H*8]; `RsdError` where that is a whole chunk."""
        horizon, nothing = self.tokenizer.config.horizon, np.zeros((0, ACTION_DIM), np.float32)
        given = [nothing if o.committed is None else o.committed for o in observations]
        if (most := max(map(len, given))) >= horizon:
            found = f"{most} of chunks of {horizon}"
            raise RsdError(f"observation committed: expected fewer actions than a chunk has, found {found}")
        told = np.stack([np.pad(actions, ((0, horizon - len(actions)), (0, 0))) for actions in given])
        return committed_features(torch.from_numpy(told), torch.tensor([len(actions) for actions in given]))

    def save(self, directory: Path) -> None:
        save_checkpoint(self.model, self.tokenizer, self.config, self.provenance, directory)


@dataclass(frozen=True)
class Pending:
    """What `verify_pending` goes on from: what was seen and drafted, the episodes and their chunks."""

    seen: PolicyInput
    draft: Draft
    forecast: Forecast | None
    states: tuple[EpisodeState, ...]
    chunks: tuple[ActionChunk, ...]


class Prediction(NamedTuple):
    """Chunks and the episodes' states after them; pending: what the target has yet to verify, if anything."""

    chunks: list[ActionChunk]
    states: list[EpisodeState]
    pending: Pending | None


class Verified(NamedTuple):
    """The chunks with what the target found of each, and the episodes' states after it."""

    chunks: list[ActionChunk]
    states: list[EpisodeState]


class SpeculativePolicy:
    """A loaded policy without an episode: safe to share between robots, sessions and threads."""

    def __init__(
        self,
        model: RsdModel,
        tokenizer: ActionTokenizer,
        config: OwnDecoding,
        options: DecodeOptions | None = None,
        runtime: RuntimeOptions | None = None,
        *,
        body: Body | None = None,
        facts: Checkpoint | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """body: None takes the compact models'; facts: what of the checkpoint decides, None where none was read."""
        runtime = runtime or RuntimeOptions()
        facts = facts or Checkpoint(
            visual_drafter=model.visual_drafter is not None,
            **{each.name: getattr(config, each.name) for each in fields(OwnDecoding)},
        )
        facts = replace(facts, code=tokenizer.config.rfsq, horizon=tokenizer.config.horizon)
        self.decoding = decoding = resolve(facts, options or DecodeOptions())
        self.decode, self.temperature, self.execute = decoding.decode, decoding.temperature, decoding.execute
        self.acceptance = decoding.rule.name if DECODERS[self.decode].drafts else ""  # of one that accepts nothing
        self.model, self.provenance = model.eval(), provenance or {}
        self.config: Any = config  # a `PolicyConfig`, or what the backbone's body has
        self.device = model.target.state_mean.device
        self.tokenizer = tokenizer.to(self.device)
        if body is None:
            body = CompactBody(model, tokenizer, checked(PolicyConfig, config, "policy: config"), self.provenance)
        self.body: Body = body
        self.image_size, self.cameras = self.body.image_size, self.body.cameras
        if runtime.batch > 1:
            check_batch(runtime.batch, decoding)
        if self.device.type == "cuda":  # TF32: ten bits of mantissa, as many as the fp16 on disk; a third off a pass
            torch.set_float32_matmul_precision("high")
        recordable = decoding.recordable(facts.compact, str(self.device))
        self.engine = choose_engine(runtime.engine, str(self.device), recordable, compact=facts.compact)
        sampler = None
        if self.temperature:
            sampler = Sampler(self.temperature, torch.Generator(self.device).manual_seed(0))
        self.ops = Primitives(
            model.target, model.feature_drafter, decoding.rule, decoding.fine, model.visual_drafter,
            skip=decoding.skip, sampler=sampler, engine=make_engine(self.engine), rows=runtime.batch,
            execute=self.execute
        )
        self._decode = DECODERS[self.decode].decode
        self._rehearsed = self.ops.engine is None
        self._turn = threading.RLock()

    def seed(self, seed: int) -> None:
        """Of what is drawn from now on, at a temperature or by a synthetic acceptance; in a new policy it is 0."""
        self.ops.turn = seed
        if self.ops.sampler is not None:
            self.ops.sampler.generator.manual_seed(seed)

    def predict(
        self, observations: Sequence[Observation], states: Sequence[EpisodeState | None] | None = None
    ) -> Prediction:
        """One observation each of several episodes -> their chunks, float32 [H, 7], environment-ready.

        states: of an earlier prediction of the same episodes, None at an episode's start; what is given stays as it
        is. latency_ms is that of the whole batch. `RsdError` for a model output that is not finite."""
        if not isinstance(observations, Sequence):
            raise RsdError(f"predict: expected a list of observations, found {type(observations).__name__}")
        observations = [check_observation(observation) for observation in observations]
        states = checked(tuple[EpisodeState | None, ...] | None, states, "predict: states")
        count, rows = len(observations), self.ops.rows
        if not 0 < count <= rows or (states is not None and len(states) != count):
            found = f"{count} with {count if states is None else len(states)} states"
            raise RsdError(f"batch: expected 1 to {rows} observations and a state of each, found {found}")
        with self._computing() as watch:
            with watch.stage("total"):
                with watch.stage("preprocess"):
                    seen = self.body(observations)
                begun = [self._begun(o, s) for o, s in zip(observations, states or [None] * count, strict=True)]
                if not self._rehearsed:
                    self._rehearse(seen, count)
                result = self._decode(self.ops, seen, self._together(begun))
                self.ops.check()
                actions = self._to_actions(result.value, result.gripper)
                after = begun if result.pending else self._after(begun, result)
            stats = [replace(self._stats(result, row), latency_ms=dict(watch.ms)) for row in range(count)]
            if self.decoding.audit and result.draft is not None and not result.pending:
                stats = self._audited(seen, result, stats)
            chunks, pending = [ActionChunk(actions[row], stats[row], self.execute) for row in range(count)], None
            if result.pending:
                assert result.draft is not None
                pending = Pending(seen, kept(result.draft), kept(result.forecast), tuple(begun), tuple(chunks))
        return Prediction(chunks, after, pending)

    def verify_pending(self, pending: Pending) -> Verified:
        """The target's pass over what was seen for chunks that are being executed: these with what it finds of them,
        its own `answer` if the decoder corrects, and states that remember it."""
        pending = checked(Pending, pending, "verify_pending")
        with self._computing() as watch:
            with watch.stage(VERIFY_PENDING):
                result = look(self.ops, pending.seen, pending.draft)
                self.ops.check()
                after = self._after(pending.states, result)
            result, stats = replace(result, draft=pending.draft, forecast=pending.forecast), []
            for row, chunk in enumerate(pending.chunks):
                times = {**chunk.stats.latency_ms, VERIFY_PENDING: watch.ms[VERIFY_PENDING]}
                stats.append(replace(self._stats(result, row), latency_ms=times))
            if self.decoding.audit:
                stats = self._audited(pending.seen, result, stats)
            answers: Sequence[np.ndarray | None] = [None] * len(stats)
            if DECODERS[self.decode].corrects:
                answers = list(self._to_actions(result.value, result.gripper))
            rows = zip(pending.chunks, stats, answers, strict=True)
            return Verified([replace(chunk, stats=s, answer=answer) for chunk, s, answer in rows], after)

    # the parts of it

    @contextmanager
    def _computing(self) -> Iterator[Stopwatch]:
        """One at a time, with a stopwatch of its own; what a failure leaves to be checked is not the next one's."""
        with self._turn, torch.inference_mode():
            self.ops.watch, self.ops.checks = Stopwatch(self.device), []
            yield self.ops.watch

    def _begun(self, observation: Observation, state: EpisodeState | None) -> EpisodeState:
        """The episode's state, of which nothing is left where a memory was read under another instruction."""
        instruction = observation.instruction if self.body.prompted else ""
        if state is None or state.instruction != instruction:
            return EpisodeState(instruction=instruction)
        return state

    def _together(self, states: Sequence[EpisodeState]) -> EpisodeState:
        return states[0] if self.ops.rows == 1 else stacked(states)

    def _rehearse(self, seen: PolicyInput, count: int) -> None:
        """Record everything that an episode will need, so that no later chunk has to wait for it."""
        given, self.ops.skip = self.ops.skip, SkipRule()
        states = [EpisodeState()] * count
        for _ in range(2 if DECODERS[self.decode].remembers else 1):
            result = self._decode(self.ops, seen, self._together(states))
            if result.pending:
                assert result.draft is not None
                result = look(self.ops, seen, kept(result.draft))
            states = self._after(states, result)
        self.ops.check()
        self.ops.skip, self.ops.watch.ms, self._rehearsed = given, {}, True

    def _after(self, states: Sequence[EpisodeState], result: DecodeResult) -> list[EpisodeState]:
        """The episodes' states after a decoding."""
        if not DECODERS[self.decode].remembers:
            return [replace(state, seen=(True,)) for state in states]
        grippers: list[int] = result.gripper[:, self.execute - 1].tolist()
        stands = result.stood() if DECODERS[self.decode].gated else None
        stood: list[bool] = [False] * len(states) if stands is None else stands.tolist()
        after = []
        for row, (state, gripper) in enumerate(zip(states, grippers, strict=True)):
            if result.skipped is not None and result.skipped[row]:
                after.append(state.went_without(self.ops.skip.memory_chunks))
            else:
                after.append(state.looked(rows_of(result.memory, [row]), gripper, stood[row]))
        return after

    def _to_actions(self, value: Tensor, gripper: Tensor) -> np.ndarray:
        if not torch.isfinite(value).all():
            raise RsdError("decoding gave non-finite actions: damaged weights or an odd tokenizer range")
        return self.tokenizer.actions_of(value * self.tokenizer.first_step, gripper).float().cpu().numpy()

    def _stats(self, result: DecodeResult, row: int) -> ChunkStats:
        """What is known of one row's chunk, without times."""
        skipped = result.skipped is not None and result.skipped[row]
        passes = (0, 0) if skipped else (result.prefills, result.target_passes)
        stats = ChunkStats(self.decode, self.acceptance, *passes)
        if result.draft is not None:
            forced = None if result.forced is None else result.forced[row]
            deviation = None if result.forecast is None else float(result.forecast.deviation_mm[row])
            stats = replace(stats, skipped=skipped, forced=forced, expected_deviation_mm=deviation)
        if result.accepted is None or result.accepted_levels is None or skipped:
            return stats
        assert result.accepted_gripper is not None
        kept = leading(result.accepted[row : row + 1])  # [1, P]: what lies below a level that fell is not executed
        levels, grippers = int(result.accepted_levels[row]), float(result.accepted_gripper[row].float().mean())
        return replace(
            stats,
            num_draft_tokens=result.num_draft_tokens,
            num_accepted_tokens=[int((kept > level).sum()) for level in range(len(result.num_draft_tokens))],
            accepted_levels=levels,
            gripper_acceptance=grippers,
            stood=levels == len(result.num_draft_tokens) and grippers == 1.0,
        )

    def _audited(self, seen: PolicyInput, result: DecodeResult, stats: list[ChunkStats]) -> list[ChunkStats]:
        """With how far each draft leads the fingertip away from the target's chunk, mm, and whether grippers differ,
        both in the steps that are executed, and whether the draft stands.

        The target's chunk is the one it gives after reading the draft, as when it is asked; where it was not, it looks
        for it."""
        draft = result.draft
        assert draft is not None
        forecast = result.forecast or self.ops.forecast(draft)
        audited, steps = [], slice(self.execute)
        drafted = self._to_actions(forecast.value, draft.gripper)[:, steps]
        for row, known in enumerate(stats):
            asked = rows_of(replace(result, draft=None, forecast=None, memory=None), [row])
            if known.prefills == 0:
                asked = look(self.ops, rows_of(seen, [row]), rows_of(draft, [row]))
                self.ops.check()
            targets = self._to_actions(asked.value, asked.gripper)[:, steps]
            differs = not torch.equal(draft.gripper[row, steps], asked.gripper[0, steps])
            found = replace(known, deviation_mm=float(fingertip_deviation(drafted[row], targets[0])))
            expected = float(forecast.deviation_mm[row])
            stands = asked.stood()
            stood = None if stands is None else bool(stands[0])
            audited.append(replace(found, gripper_differs=differs, expected_deviation_mm=expected, stood=stood))
        return audited

    # checkpoint

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint directory; a skip calibration is of one weights file, so make it anew there."""
        target: Path = checked(Path, directory, "checkpoint directory")
        if odd := [p.name for p in sorted(target.glob("*")) if p.name in OF_OTHERS or p.suffix == ".hdf5"]:
            raise RsdError(f"{target}: expected a checkpoint, or nothing yet, found {odd[0]} in it; choose another one")
        with writing(target, SafetensorError):
            self.body.save(target)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> None:
        """Upload the checkpoint to the Hugging Face hub (needs a login)."""
        hub.upload(self.save_pretrained, repo_id, private)


def check_batch(batch: int, decoding: Decoding) -> None:
    """Raise unless several observations can be decoded at once."""
    why = ""
    if decoding.temperature:
        why = f"--temperature {decoding.temperature:g} draws each episode from its own seed, one observation at a time"
    elif decoding.fine == "sequential" and DECODERS[decoding.decode].drafts:
        rule = decoding.rule.name
        why = f"--acceptance {rule} decodes the fine levels one after another, each observation at its own pace"
    if why:
        raise RsdError(f"--batch {batch}: {why}; leave --batch out")


def load_policy(
    path_or_hub_id: str | Path, options: DecodeOptions | None = None, runtime: RuntimeOptions | None = None
) -> SpeculativePolicy:
    """A checkpoint directory, or a hub repository of one; `RsdError` on anything missing or odd."""
    options, runtime = options or DecodeOptions(), runtime or RuntimeOptions()
    check_device(runtime.device)
    directory = locate_checkpoint(path_or_hub_id)
    content = read_content(directory)
    facts = facts_of(directory, content)
    decoding = resolve(facts, options)  # before the weights
    recordable = decoding.recordable(facts.compact, runtime.device)
    choose_engine(runtime.engine, runtime.device, recordable, compact=facts.compact)
    if runtime.batch > 1:
        check_batch(runtime.batch, decoding)
    if decoding.why:
        level = logging.INFO if facts.visual_drafter else logging.WARNING  # another checkpoint could do better
        LOG.log(level, "%s: decodes by %s: %s", directory, decoding.decode, decoding.why)
    if (backbone := backbone_of(content)) is not None:
        loaded: SpeculativePolicy = backbone.load(directory, content, facts, options, runtime)
        return loaded
    tokenizer = ActionTokenizer.load(directory)
    model, config = load_model(directory, content, tokenizer)
    provenance = content.get("provenance", {})
    return SpeculativePolicy(
        model.to(runtime.device), tokenizer, config, options, runtime, facts=facts, provenance=provenance
    )


class RsdPolicy:
    """One episode of a `SpeculativePolicy`, for a script or a rollout: `reset`, `predict`, `verify`."""

    def __init__(self, core: SpeculativePolicy) -> None:
        self.core, self.model, self.tokenizer, self.config = core, core.model, core.tokenizer, core.config
        self.decode, self.acceptance, self.engine = core.decode, core.acceptance, core.engine
        self.execute = core.execute
        self.image_size, self.cameras, self.device = core.image_size, core.cameras, core.device
        self.provenance, self.save_pretrained = core.provenance, core.save_pretrained
        self.push_to_hub = core.push_to_hub
        self._state: EpisodeState | None = None
        self._pending: Pending | None = None
        self._turn = threading.RLock()  # `verify` may come from another thread

    @classmethod
    def of(
        cls,
        model: RsdModel,
        tokenizer: ActionTokenizer,
        config: PolicyConfig,
        provenance: dict[str, Any] | None = None,
        **options: Any,
    ) -> RsdPolicy:
        """A policy of models at hand; options: as of `from_pretrained`, but for the device, which is the models'."""
        return cls(SpeculativePolicy(model, tokenizer, config, *options_of(**options), provenance=provenance))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> RsdPolicy:
        """Load a checkpoint; options: by name, those of `DecodeOptions` and `RuntimeOptions`."""
        return cls(load_policy(path_or_hub_id, *options_of(**options)))

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far; call it before an episode's first observation.

        seed: of what is drawn from now on at a temperature; without one the random numbers go on where they were.
        """
        seed = checked(Seed | None, seed, "reset: seed")
        with self._turn:
            self._state = self._pending = None
            if seed is not None:
                self.core.seed(seed)

    def predict(self, observation: Observation) -> ActionChunk:
        """Observation -> chunk float32 [H, 7], environment-ready; a failure ends the episode.

        With a decoder that verifies later, what is left of the chunk before is done first."""
        with self._turn:
            self.verify()
            with self._ending_the_episode():
                (chunk,), (self._state,), self._pending = self.core.predict([observation], [self._state])
        return chunk

    def verify(self) -> ChunkStats | None:
        """`complete`, of which only the statistics are asked."""
        chunk = self.complete()
        return None if chunk is None else chunk.stats

    def complete(self) -> ActionChunk | None:
        """With `draft-first` and `rsd-async`: the target's pass for the last chunk -> that chunk, its statistics
        complete now and with `rsd-async` with its `answer`; else None.

        Call it while that chunk is executed, from any thread; otherwise the next prediction begins with it."""
        with self._turn:
            pending, self._pending = self._pending, None
            if pending is None:
                return None
            with self._ending_the_episode():
                (chunk,), (self._state,) = self.core.verify_pending(pending)
        return chunk

    @contextmanager
    def _ending_the_episode(self) -> Iterator[None]:
        """What a failed prediction leaves behind must not reach the next one."""
        try:
            yield
        except RsdError:
            self.reset()
            raise
