"""The primitives that every decoder is composed of, for any engine: draft, prefill, verify, accept, extend.

A primitive is a function of tensors that asks the host nothing, so an engine may run it as it is (eager) or record it
once and replay it (`runtime.engines`). Called from within another primitive it is part of that one. Symbols are the
likeliest ones unless there is a sampler. A model output that is not finite is noted and raises `RsdError` before
anything leaves the policy: a NaN would win an argmax as an ordinary token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from rsd.decoding.acceptance import AcceptanceRule, accept
from rsd.decoding.gate import SkipRule
from rsd.decoding.sampling import Sampler
from rsd.decoding.state import Blocks, Draft, Forecast, PolicyInput, Verification, filled, rows_of
from rsd.decoding.timing import Stopwatch
from rsd.models.feature_drafter import FeatureDrafter
from rsd.models.fusing import fusible
from rsd.models.streams import fork
from rsd.models.target import BlockTarget
from rsd.models.trunk import KVCache
from rsd.models.visual_drafter import Memory, VisualDrafter
from rsd.nested import tensors_of, with_tensors
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What an engine has to know of a primitive. stage: under which its time is counted. small: of operations too
    small for two threads to meet after each. by: what it depends on beside its inputs, `rule` or `telling` of
    `Primitives`. whole: a composition of other primitives, recorded as one by engines that gain by it."""

    name: str
    stage: str
    small: bool = False
    by: str = ""
    whole: bool = False


class Engine(Protocol):
    """What primitives run on: `runtime.engines.Recordings`, or None for PyTorch operation by operation."""

    whole: bool

    def __call__(self, ops: Primitives, step: Step, body: Callable[..., T], args: tuple[Any, ...]) -> T:
        """What body(ops, *args) gives."""


def primitive(
    stage: str, *, name: str = "", small: bool = False, by: str = "", whole: bool = False
) -> Callable[[Callable[Concatenate[Primitives, P], T]], Callable[Concatenate[Primitives, P], T]]:
    """Make a function of `Primitives` and tensors a primitive; see `Step`."""

    def decorate(body: Callable[Concatenate[Primitives, P], T]) -> Callable[Concatenate[Primitives, P], T]:
        step = Step(name or body.__name__, stage, small, by, whole)

        @functools.wraps(body)
        def call(ops: Primitives, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return ops.run(step, body, args)

        return call

    return decorate


class Primitives:
    """The models at hand and an engine; one thread at a time.

    rule: judges drafted levels. fine: how the fine levels come, `regress` or `sequential` (see `decoders.rsd`).
    sampler: draws the motion tokens, drafted ones too, which it then judges in the place of `rule`. rows: every call is
    filled up to so many rows, so that there is one way to multiply the matrices whatever a batch happens to hold.
    execute: steps of a chunk that are executed, None: all."""

    def __init__(
        self,
        target: BlockTarget,
        draft: FeatureDrafter,
        rule: AcceptanceRule,
        fine: str = "regress",
        visual_drafter: VisualDrafter | None = None,
        *,
        skip: SkipRule | None = None,
        sampler: Sampler | None = None,
        engine: Engine | None = None,
        rows: int = 1,
        execute: int | None = None,
    ) -> None:
        self.target, self.feature_drafter, self.visual_drafter = target, draft, visual_drafter
        self.rule, self.fine, self.skip, self.sampler = rule, fine, skip or SkipRule(), sampler
        self.engine, self.rows, self.execute = engine, rows, execute
        self.turn = 0  # of `acceptance.made_up`
        self.checks: list[Tensor] = []
        self.watch = Stopwatch(target.state_mean.device)
        self._inside = False

    @property
    def code(self) -> Rfsq:
        """The quantiser in units of D_1."""
        return Rfsq(self.target.code)

    @property
    def drafter(self) -> VisualDrafter:
        """The visual drafter, which a checkpoint may lack."""
        if self.visual_drafter is None:
            remedy = "decode with rsd, l1 or ar, or train one (`policy.visual_drafter`)"
            raise RsdError(f"this checkpoint has no visual drafter: {remedy}")
        return self.visual_drafter

    # how a primitive is run

    def run(self, step: Step, body: Callable[..., T], args: tuple[Any, ...]) -> T:
        """body(self, *args), timed, filled up to `rows`, and by the engine; within another primitive as it is."""
        if self._inside or (step.whole and not (self.engine and self.engine.whole)):
            return body(self, *args)
        self._inside = True
        try:
            with self.watch.stage(step.stage):
                if self.rows == 1:
                    return self.engine(self, step, body, args) if self.engine else body(self, *args)
                tensors = list(tensors_of(args))
                full = with_tensors(args, iter(filled(tensors, self.rows)))
                result = self.engine(self, step, body, full) if self.engine else body(self, *full)
                return rows_of(result, range(len(tensors[0])))
        finally:
            self._inside = False

    def beside(self, call: Callable[[], T]) -> Callable[[], T]:
        """Start a call -> its result; where a GPU records a composition, on a stream of its own."""
        if self._inside:
            return fork(call, self.watch.device)
        result = call()
        return lambda: result

    def finite(self, output: Tensor) -> Tensor:
        """The output as it is; `check` will look whether it was finite (looking at once would stop a GPU).

        NaN and infinity survive a sum; a sum is one kernel, looking at every number takes five."""
        self.checks.append(output.sum(dtype=torch.float32))
        return output

    def check(self) -> None:
        """Raise `RsdError` if any output since the last check was not finite."""
        checks, self.checks = self.checks, []
        if checks and not torch.stack(checks).isfinite().all():
            raise RsdError("the model gave non-finite output: damaged weights or an observation far out of range")

    # the target

    @primitive("vision")
    def embed(self, seen: PolicyInput) -> Tensor:
        """The target's prefix tokens [B, N, D]: its whole perception."""
        return self.target.embed_prefix(seen.images, seen.state, seen.text)

    @primitive("prefill")
    def prefill(self, prefix: Tensor, keep: int) -> Blocks:
        """One pass over what is seen -> block 1, which is told nothing, and the cache if it is to be kept."""
        features, cache = self.target.prefill(prefix)
        return Blocks([features], likelier_gripper(self, features), cache if keep else None)

    @primitive("prefill", by="telling")
    def prefill_with(self, prefix: Tensor, draft: Draft) -> Blocks:
        """One pass over what is seen and what was drafted -> block 1 and those that are told of the draft (the told
        block alone where the rule needs no block 1), what the drafter will remember, and the cache if levels are to be
        decoded over it."""
        if self.telling in ("levels", "last"):
            told, level = self._told(draft)
            features, cache = self.target.prefill_blocks(prefix, told, draft.gripper, level)
        elif self.telling == "nothing":
            features, cache = self.target.prefill_blocks(prefix, [], None)
        elif self.telling == "blind":
            features, cache = self.target.prefill_blind(prefix, draft.prefixes[-1])
        else:
            block, cache = self.target.prefill_whole(prefix, draft.prefixes[-1])
            features = [block]
        reads = self.drafter.reads(cache, self.target.remembered(prefix.shape[1]))
        memory = fork(lambda: self.drafter.remember(reads), prefix.device)
        gripper = likelier_gripper(self, features[0])
        return Blocks(features, gripper, cache if self.fine == "sequential" else None, memory())

    @primitive("verify", by="telling")
    def verify(self, draft: Draft, looked: Blocks) -> Blocks:
        """One pass over the blocks that are told of the draft, and of the target's gripper, after a prefill -> its
        block 1 and theirs."""
        assert looked.cache is not None
        cache = grown_apart(looked.cache)
        if self.telling in ("levels", "last"):
            told, level = self._told(draft)
            blocks = self.target.extend(told, looked.gripper, level, cache)
        else:
            blocks = [self.target.whole(draft.prefixes[-1], cache, cache.length - self.target.horizon)]
        left = cache if self.fine == "sequential" else None
        return Blocks([looked.features[0], *blocks], looked.gripper, left, looked.memory)

    @property
    def telling(self) -> str:
        """How the target is told of a draft: `levels`, a block a level; `last`, the last of these alone; or, if it is
        trained for that, a block that sees the prefix alone, `in-place` of block 1 or `blind`, beside it; `nothing`."""
        if self.rule.unit != "chunk":
            return "levels"
        if self.rule.untold:
            return "nothing"
        if not self.target.whole_block:
            return "last"
        return "blind" if self.rule.blind else "in-place"

    def _told(self, draft: Draft) -> tuple[list[Tensor], int]:
        """What blocks after block 1 are told of a draft, and the level of the first of them."""
        return (draft.prefixes, 2) if self.telling == "levels" else (draft.prefixes[-1:], len(draft.prefixes) + 1)

    @primitive("decode", small=True)
    def regress(self, features: Tensor) -> Tensor:
        """Block-1 features -> the target's own estimate of the chunk [B, P]."""
        return self.finite(self.target.residual(features, 1))

    @primitive("decode", small=True)
    def first_level(self, features: Tensor) -> Tensor:
        """Block-1 features -> the tokens of level 1, [B, 1, P]."""
        return self.choose(self.target.logits(features, 1)).unsqueeze(1)

    @primitive("decode", small=True)
    def all_levels(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Block-1 features -> tokens [B, L, P] of all levels at once, and what they decode to [B, P]."""
        motion = self.choose(self.target.parallel_logits(features))
        return motion, self.code.dequantise(motion)

    @primitive("decode")
    def extend(self, motion: Tensor, gripper: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Decode the levels that `motion` [B, k, P] lacks, one pass each -> [B, L, P], and their value [B, P]."""
        target, code = self.target, self.code
        value, levels = code.dequantise(motion), list(motion.unbind(1))
        cache = grown_apart(cache)
        for level in range(len(levels) + 1, code.config.levels + 1):
            (features,) = target.extend([value], gripper, level, cache)
            symbols, value = choose_level(self, features, value, level)
            levels.append(symbols)
        tokens = torch.stack(levels, dim=1)
        return tokens, code.dequantise(tokens)

    # the drafters

    @primitive("draft", small=True)
    def draft(self, seen: PolicyInput, memory: Memory | None) -> Draft:
        """The visual drafter's coarse tokens, made before the target has seen anything."""
        drafter = self.drafter
        known = memory.known if memory is not None else None
        features = drafter.perceive(seen.images, self.target.normalise(seen.state), seen.text[1], memory, known)
        return replace(draft_levels(self, drafter.levels, features), features=features)

    @primitive("draft", small=True)
    @fusible
    def forecast(self, draft: Draft) -> Forecast:
        """What acting on the visual drafter's tokens without the target needs besides."""
        drafter, prefix = self.drafter, draft.prefixes[-1]
        assert draft.features is not None
        value = prefix + self.finite(drafter.remainder(draft.features, prefix, draft.gripper))
        return Forecast(value, self.finite(drafter.log_deviation(draft.features)).expm1().clamp(min=0))

    @primitive("draft", small=True)
    def draft_from(self, features: Tensor) -> Draft:
        """The feature drafter's coarse tokens, read from the target's block 1."""
        return draft_levels(self, self.feature_drafter, features)

    @primitive("decode", small=True, by="rule")
    def accept(self, draft: Draft, blocks: Sequence[Tensor]) -> Verification:
        """The draft and the target's features of the blocks that judge it -> the chunk; see `acceptance`."""
        return accept(self, draft, list(blocks))

    def choose(self, logits: Tensor) -> Tensor:
        """Logits [..., K] -> symbols int64 [...]: the likeliest, or drawn where there is a sampler."""
        self.finite(logits)
        return logits.argmax(-1) if self.sampler is None else self.sampler.draw(logits)


# pieces that a compiler may take whole


@fusible
def likelier_gripper(ops: Primitives, features: Tensor) -> Tensor:
    """Features of block 1 -> int64 [B, H], 1 = close.

    The likeliest also where motion is drawn: the next chunk takes back a digit, but not a bowl let go. (At 99 %
    certainty a step, one chunk of eight steps in thirteen would draw such a step.)"""
    return (ops.finite(ops.target.gripper_logits(features)) > 0).long()


@fusible
def choose_level(ops: Primitives, features: Tensor, value: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Features of block `level`, which was told `value` [B, P] -> its symbols [B, P], and what they all decode to."""
    symbols = ops.choose(ops.target.logits(features, level))
    return symbols, value + ops.code.value(symbols, level)


@fusible
def draft_levels(ops: Primitives, model: FeatureDrafter, features: Tensor) -> Draft:
    """A drafter's symbols, level by level, and its gripper."""
    code = ops.code
    read, gripper_logits = model.read(features)
    gripper = (ops.finite(gripper_logits) > 0).long()
    value = torch.zeros(len(read), ops.target.horizon * ops.target.motion_dim, device=read.device)
    motion, prefixes, logits = [], [], []
    for level in range(1, model.config.levels + 1):
        logits.append(model.logits(read, value, gripper, level))
        motion.append(ops.choose(logits[-1]))
        value = value + code.value(motion[-1], level)
        prefixes.append(value)
    probs = None if ops.sampler is None else ops.sampler.probs(torch.stack(logits, dim=1))
    return Draft(torch.stack(motion, dim=1), gripper, prefixes, probs)


def grown_apart(cache: KVCache) -> KVCache:
    """A cache that may grow while the given one stays as it is; one that is allocated at once grows in place."""
    return KVCache(list(cache.keys), list(cache.values)) if isinstance(cache, KVCache) else cache
