"""What decoding strategies are made of: the models at hand, what is seen, what comes out, and the steps between.

Values of motion scalars are in units of the tokenizer's first step D_1. Symbols are the likeliest ones unless the
`Decoder` has a sampler. A model output that is not finite is noted and raises `RsdError` before anything leaves the
policy: a NaN would win an argmax as an ordinary token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rsd.decoding.acceptance import AcceptanceRule
from rsd.decoding.calibration import may_rest
from rsd.decoding.sampling import Sampler
from rsd.models.draft import DraftModel
from rsd.models.fusing import fusible
from rsd.models.light_draft import LightDraft, Memory
from rsd.models.main import MainModel
from rsd.models.trunk import KVCache
from rsd.models.vision import unit_images
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import RsdError


class Stopwatch:
    """Wall time by stage in milliseconds; the device is synchronised at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ms = device, dict[str, float]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class EpisodeMemory:
    """What an episode's earlier chunks leave behind: the light draft's view of the main's last run, chunks since
    then without the main, and the gripper symbol executed last, int [B]."""

    main: Memory | None = None
    skipped: int = 0
    gripper: Tensor | None = None

    def renew(self, main: Memory | None, gripper: Tensor) -> None:
        """The main has run: its view, and the gripper symbols [B, H] of the chunk to be executed."""
        # a copy: a CUDA graph writes its next chunk where this one stands
        self.main, self.skipped, self.gripper = main, 0, gripper[:, -1].clone()


@dataclass
class Scene:
    """pixels: uint8 [B, 2, S, S, 3] as the cameras give them, or what the models take; state features [B, 11]; text:
    language tokens and condition."""

    pixels: Tensor
    state: Tensor
    text: tuple[Tensor, Tensor]
    memory: EpisodeMemory = field(default_factory=EpisodeMemory)

    @property
    def images(self) -> Tensor:
        """[B, 2, 3, S, S] in [-0.5, 0.5], or what else the models take.

        Made anew by each reader, so that a graph holds it: outside one, PyTorch shares a hundred thousand numbers out
        to threads, which wait for each other where cores are busy."""
        return unit_images(self.pixels) if self.pixels.dtype == torch.uint8 else self.pixels

    def prefix(self, main: MainModel, watch: Stopwatch) -> Tensor:
        """The main's prefix tokens [B, N, D]: its whole perception."""
        with watch.stage("vision"):
            return main.embed_prefix(self.images, self.state, self.text)


@dataclass
class Decoded:
    """value: [B, P] chunk coefficients in first steps; gripper: int [B, H], 1 = close; motion: tokens
    [B, L, P] or None where a strategy gives no tokens; the rest is counted per sample (see `ChunkStats`)."""

    value: Tensor
    gripper: Tensor
    motion: Tensor | None = None
    main_passes: int = 0
    prefills: int = 1
    num_draft_tokens: list[int] = field(default_factory=list)  # per level
    accepted: Tensor | None = None  # bool [B, c, P]
    accepted_gripper: Tensor | None = None  # bool [B, H]
    accepted_levels: Tensor | None = None  # int [B]
    proposal: Proposal | None = None
    # what is left to do once the chunk is under way: the main's own decoding of the same observation
    follow_up: Callable[[Stopwatch], Decoded] | None = None


class Drafted(NamedTuple):
    """Coarse tokens [B, c, P], gripper int [B, H], what the levels 1..k decode to, k = 1..c, each [B, P], and the
    probabilities [B, c, P, K] that the tokens were drawn with, None if they are the likeliest ones."""

    motion: Tensor
    gripper: Tensor
    prefixes: list[Tensor]
    probs: Tensor | None = None


class Sketch(NamedTuple):
    """What the light draft drafted, and what it had in mind, features [B, H, d]."""

    drafted: Drafted
    features: Tensor


@dataclass
class Proposal:
    """What a draft with its own perception has to say: coarse tokens [B, c, P], gripper int [B, H], and where the
    decoder `foresees`: its whole chunk [B, P] in first steps, and how many mm it expects to lead the fingertip away
    from the main's chunk [B].

    forced: whether the main had to run whatever was expected, where a strategy asked. probs: see `Drafted`."""

    motion: Tensor
    gripper: Tensor
    value: Tensor | None = None
    expected_deviation_mm: Tensor | None = None
    forced: bool | None = None
    probs: Tensor | None = None


@dataclass(frozen=True)
class SkipRule:
    """The main stays idle while the draft expects to deviate less than threshold_mm, at most max_skips chunks in a
    row, and never where the gripper switches. The draft attends to what the main left behind for memory_chunks chunks;
    after that it acts on what it sees, as at an episode's start: what has moved meanwhile would mislead it."""

    threshold_mm: float = 0.0
    max_skips: int = 4
    memory_chunks: int = 2

    def may_skip(self, memory: EpisodeMemory, proposal: Proposal) -> bool:
        """Whether the proposal may be executed as it is (one observation); notes on it whether it was free to."""
        proposal.forced = self.must_look(memory, proposal)
        # as a double precision number: the calibration compares these very values
        assert proposal.expected_deviation_mm is not None
        score = float(proposal.expected_deviation_mm.max())
        return may_rest(score, self.threshold_mm, memory.skipped, self.max_skips, proposal.forced)

    def must_look(self, memory: EpisodeMemory, proposal: Proposal) -> bool:
        """Where the gripper is to switch; an episode begins with an open one."""
        before = torch.zeros_like(proposal.gripper[:, 0]) if memory.gripper is None else memory.gripper
        return bool((proposal.gripper != before[:, None]).any())

    def skip(self, memory: EpisodeMemory) -> None:
        """The proposal is executed as it is."""
        memory.skipped += 1
        if memory.skipped >= self.memory_chunks:
            memory.main = None


@dataclass
class Decoder:
    """What a strategy works with. fine: how `rsd` gets the fine levels, `regress` or `sequential`. sampler: draws the
    motion tokens, drafted ones too, which it then judges in the place of `rule`; without one they are the likeliest.
    foresees: the light draft completes its chunk and says how far it may lead astray; its coarse tokens, which are
    all that `rsd-fused` needs, come sooner without."""

    main: MainModel
    draft: DraftModel
    rule: AcceptanceRule
    fine: str = "regress"
    light: LightDraft | None = None
    skip: SkipRule = field(default_factory=SkipRule)
    sampler: Sampler | None = None
    foresees: bool = True
    checks: list[Tensor] = field(default_factory=list)

    @property
    def code(self) -> Rfsq:
        """The quantiser in units of D_1."""
        return Rfsq(self.main.code)

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


@fusible
def greedy_gripper(decoder: Decoder, features: Tensor) -> Tensor:
    """Block-1 features -> int64 [B, H], 1 = close.

    The likeliest also where motion is drawn: the next chunk takes back a digit, but not a bowl let go. (At 99 %
    certainty a step, one chunk of eight steps in thirteen would draw such a step.)"""
    return (decoder.finite(decoder.main.gripper_logits(features)) > 0).long()


def choose(decoder: Decoder, logits: Tensor) -> Tensor:
    """Logits [..., K] -> symbols int64 [...]: the likeliest, or drawn where the decoder has a sampler."""
    decoder.finite(logits)
    return logits.argmax(-1) if decoder.sampler is None else decoder.sampler.draw(logits)


def propose(decoder: Decoder, features: Tensor) -> Drafted:
    """What the draft makes of the main's block-1 features."""
    return draft_levels(decoder, decoder.draft, features)


def scout(decoder: Decoder, scene: Scene) -> Proposal:
    """The light draft's proposal, made before the main has seen anything."""
    return proposed(decoder, sketch(decoder, scene))


def proposed(decoder: Decoder, sketched: Sketch) -> Proposal:
    """What was drafted as a proposal, complete where the decoder `foresees`."""
    if decoder.foresees:
        return complete(decoder, sketched)
    drafted = sketched.drafted
    return Proposal(drafted.motion, drafted.gripper, probs=drafted.probs)


def sketch(decoder: Decoder, scene: Scene) -> Sketch:
    """What the main needs of the light draft: its coarse tokens."""
    light = light_of(decoder)
    state = decoder.main.normalise(scene.state)
    features = light.perceive(scene.images, state, scene.text[1], scene.memory.main)
    return Sketch(draft_levels(decoder, light.levels, features), features)


@fusible
def complete(decoder: Decoder, sketched: Sketch) -> Proposal:
    """What acting without the main needs besides: the whole chunk, and how far it may lead astray."""
    light, (motion, gripper, prefixes, probs) = light_of(decoder), sketched.drafted
    value = prefixes[-1] + decoder.finite(light.remainder(sketched.features, prefixes[-1], gripper))
    deviation = decoder.finite(light.log_deviation(sketched.features)).expm1().clamp(min=0)
    return Proposal(motion, gripper, value, deviation, probs=probs)


def light_of(decoder: Decoder) -> LightDraft:
    """The light draft, which a checkpoint may lack."""
    if decoder.light is None:
        raise RsdError("this checkpoint has no light draft: decode with rsd, l1 or ar, or train one (`policy.light`)")
    return decoder.light


@fusible
def draft_levels(decoder: Decoder, model: DraftModel, features: Tensor) -> Drafted:
    """A draft's symbols, level by level, and its gripper."""
    code = decoder.code
    read, gripper_logits = model.read(features)
    gripper = (decoder.finite(gripper_logits) > 0).long()
    value = torch.zeros(len(read), decoder.main.horizon * decoder.main.motion_dim, device=read.device)
    motion, prefixes, logits = [], [], []
    for level in range(1, model.config.levels + 1):
        logits.append(model.logits(read, value, gripper, level))
        motion.append(choose(decoder, logits[-1]))
        value = value + code.value(motion[-1], level)
        prefixes.append(value)
    probs = None if decoder.sampler is None else decoder.sampler.probs(torch.stack(logits, dim=1))
    return Drafted(torch.stack(motion, dim=1), gripper, prefixes, probs)


@fusible
def as_drafted(decoder: Decoder, motion: Tensor, gripper: Tensor, probs: Tensor | None = None) -> Drafted:
    """`Drafted` from its tokens [B, c, P], gripper [B, H] and, if drawn, probabilities [B, c, P, K]."""
    value, prefixes = torch.zeros(motion.shape[::2], device=motion.device), []
    for level in range(1, motion.shape[1] + 1):
        value = value + decoder.code.value(motion[:, level - 1], level)
        prefixes.append(value)
    return Drafted(motion, gripper, prefixes, probs)


def told(decoder: Decoder, drafted: Drafted) -> tuple[list[Tensor], int]:
    """What the main's blocks after block 1 are told of a draft, and the level of the first of them: a block a level,
    or, under a rule that judges the draft as a whole, the last one alone."""
    prefixes = drafted.prefixes
    return (prefixes[-1:], len(prefixes) + 1) if decoder.rule.as_a_whole else (prefixes, 2)


def verify(decoder: Decoder, drafted: Drafted, gripper: Tensor, cache: KVCache) -> list[Tensor]:
    """One pass over the blocks that are told of the draft, and of the main's gripper -> their features."""
    main = decoder.main
    if judged_in_place(decoder):
        return [main.whole(drafted.prefixes[-1], cache, cache.length - main.horizon)]
    prefixes, level = told(decoder, drafted)
    return main.extend(prefixes, gripper, level, cache)


def verify_in_prefill(decoder: Decoder, prefix: Tensor, drafted: Drafted) -> tuple[list[Tensor], KVCache]:
    """One pass over what is seen, prefix [B, N, D], and what was drafted -> features of block 1 and of those that are
    told of the draft, and the cache; where the draft is judged in the place of block 1, of that block alone."""
    if judged_in_place(decoder):
        features, cache = decoder.main.prefill_whole(prefix, drafted.prefixes[-1])
        return [features], cache
    prefixes, level = told(decoder, drafted)
    return decoder.main.prefill_blocks(prefix, prefixes, drafted.gripper, level)


def judged_in_place(decoder: Decoder) -> bool:
    """Whether one block judges a draft as a whole, in the place of block 1, for which the main has to be trained."""
    return decoder.rule.as_a_whole and decoder.main.whole_block


def extend(decoder: Decoder, motion: Tensor, gripper: Tensor, cache: KVCache) -> tuple[Tensor, int]:
    """Decode the levels that `motion` [B, k, P] lacks, one pass each -> all levels [B, L, P], passes."""
    main, code = decoder.main, decoder.code
    value, levels = code.dequantise(motion), list(motion.unbind(1))
    missing = range(len(levels) + 1, code.config.levels + 1)
    for level in missing:
        (features,) = main.extend([value], gripper, level, cache)
        symbols, value = choose_level(decoder, features, value, level)
        levels.append(symbols)
    return torch.stack(levels, dim=1), len(missing)


@fusible
def choose_level(decoder: Decoder, features: Tensor, value: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Features of block `level`, which was told `value` [B, P] -> its symbols [B, P], and what they all decode to."""
    symbols = choose(decoder, decoder.main.logits(features, level))
    return symbols, value + decoder.code.value(symbols, level)


def regress_fine(decoder: Decoder, prefixes: list[Tensor], blocks: Tensor, kept: Tensor) -> Tensor:
    """A scalar's first kept[b, p] drafted levels plus what the block after them says they miss -> [B, P].

    prefixes: what the levels 1..k decode to, k = 1..c; blocks [B, c+1, H, D]: block k+1 has seen the levels 1..k.
    """
    missing = decoder.finite(decoder.main.residuals(blocks))
    prefix = torch.stack([torch.zeros_like(prefixes[0]), *prefixes], dim=1)  # [B, c+1, P]
    return (prefix + missing).gather(1, kept.unsqueeze(1)).squeeze(1)


def requantise(code: Rfsq, value: Tensor, drafted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, P] of `value` [B, P] that begin, scalar by scalar, with kept[b, p] of the drafted symbols, and
    what they decode to [B, P].

    A drafted digit after which the finer levels could no longer reach the value gives way to the value's own (the
    margins of a redundant code hold one level at a time, not all together), so inside the code's span the tokens
    are within half the last step of `value` whatever was drafted.
    """
    config, residual, decoded, symbols = code.config, value, torch.zeros_like(value, dtype=torch.float32), []
    stands = torch.ones_like(value, dtype=torch.bool)
    for level in range(1, config.levels + 1):
        digit = code.digit(residual, level)
        if level <= drafted.shape[1]:
            proposed = (drafted[:, level - 1] - config.half).to(value.dtype)
            left = residual - proposed * code.step(level)
            stands = stands & (kept >= level) & (left.abs() <= config.reach(level) * code.first_step)
            digit = torch.where(stands, proposed, digit)
        part = digit * code.step(level)
        residual, decoded = residual - part, decoded + part
        symbols.append(digit)
    return torch.stack(symbols, dim=1).long() + config.half, decoded


def single(kept: Tensor) -> int:
    """The one accepted length; sequential decoding goes sample by sample."""
    if len(kept) != 1:
        raise RsdError(f"fine='sequential' decodes one observation at a time, found a batch of {len(kept)}")
    return int(kept)
