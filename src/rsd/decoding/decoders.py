"""The decoders, each once: what is seen and what the episode left behind in, one action chunk a robot out.

A decoder is a short function composed of primitives (`primitives`: embed, draft, prefill, verify, accept, extend), for
whatever engine runs them. What is registered with it says what it needs and can. To add one, write the function and
register it; where it accepts tokens is `acceptance`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsd.decoding.acceptance import judge, made_up, single
from rsd.decoding.primitives import Primitives, primitive
from rsd.decoding.state import Blocks, DecodeResult, Draft, EpisodeState, Forecast, PolicyInput, rows_of, scattered
from rsd.models.visual_drafter import Memory
from rsd.types import DRAFT_FIRST, RSD_ASYNC

Decode = Callable[[Primitives, PolicyInput, EpisodeState], DecodeResult]


@dataclass(frozen=True)
class Decoder:
    """A registered decoder: what it needs and can.

    drafts: proposes tokens, which the acceptance rule judges. visual: needs a visual drafter. remembers: the drafter
    attends to the target's last run, so chunks of an episode hang together. samples: its tokens are the target's and
    can be drawn at a temperature. gated: needs a skip rule, of a calibration or given. corrects: the pass that
    `Policy.verify_pending` makes later also gives the chunk's `answer`. lossless: with the rule `exact` its tokens are
    those of `ar`.
    """

    name: str
    decode: Decode
    drafts: bool = False
    visual: bool = False
    remembers: bool = False
    samples: bool = False
    gated: bool = False
    corrects: bool = False
    lossless: bool = False


DECODERS: dict[str, Decoder] = {}


def decoder(name: str, *, one_pass: bool = True, **properties: bool) -> Callable[[Decode], Decode]:
    """Register a decoder under that name; properties: the fields of `Decoder`. one_pass: it asks nothing of the host
    and reads of the state the memory alone, so that an engine may record all of it as one."""

    def register(decode: Decode) -> Decode:
        DECODERS[name] = entry = Decoder(name, decode, **properties)
        if one_pass:

            @primitive("target", name=name, whole=True)
            def whole(ops: Primitives, seen: PolicyInput, memory: Memory | None) -> DecodeResult:
                return decode(ops, seen, EpisodeState(memory))

            def decode_as_one(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
                return whole(ops, seen, state.memory if entry.remembers else None)

            DECODERS[name] = replace(entry, decode=decode_as_one)
        return decode

    return register


def names(**properties: bool) -> tuple[str, ...]:
    """The decoders of which all these properties are so."""
    return tuple(
        name for name, entry in DECODERS.items() if all(getattr(entry, key) == so for key, so in properties.items())
    )


@decoder("ar", samples=True, lossless=True)
def ar(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The baseline: level by level, one pass of the target a level (the first rides in the prefill)."""
    looked = ops.prefill(ops.embed(seen), True)
    return continued(ops, ops.first_level(looked.features[0]), looked)


@decoder("parallel", samples=True)
def parallel(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """All levels at once from the prefill (the original RFSQ head)."""
    looked = ops.prefill(ops.embed(seen), False)
    motion, value = ops.all_levels(looked.features[0])
    return DecodeResult(value, looked.gripper, motion)


@decoder("l1")
def l1(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """Continuous regression in one pass, the bar that OpenVLA-OFT's L1 head sets (arXiv 2502.19645)."""
    looked = ops.prefill(ops.embed(seen), False)
    return DecodeResult(ops.regress(looked.features[0]), looked.gripper)


@decoder("rsd", drafts=True, samples=True, lossless=True)
def rsd(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The feature drafter proposes the coarse levels 1..c; ONE pass verifies them and yields the fine ones.

    `fine="regress"`: never more than one pass. `fine="sequential"`: the target corrects the first level that does not
    stand (if all do, it adds the next), the rest takes one pass a level; with the rule `exact` the tokens are those of
    `ar`, and distributed as those of `ar` where they are drawn."""
    looked = ops.prefill(ops.embed(seen), True)
    draft = ops.draft_from(looked.features[0])
    return judged(ops, draft, ops.verify(draft, looked), passes=1)


@decoder("rsd-fused", drafts=True, visual=True, remembers=True, samples=True, lossless=True)
def rsd_fused(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The visual drafter proposes before the target looks; its tokens ride in the prefill: one pass in all."""
    prefix = ops.beside(lambda: ops.embed(seen))
    draft = ops.draft(seen, state.memory)
    return verified_in_prefill(ops, prefix(), draft)


@decoder("rsd-skip", one_pass=False, drafts=True, visual=True, remembers=True, gated=True)
def rsd_skip(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """As `rsd-fused`, but rows whose draft the gate trusts go without the target."""
    draft, forecast = proposed(ops, seen, state.memory)
    executed = replace(draft, gripper=draft.gripper[:, : ops.execute])  # a switch in the tail is drafted anew
    forced = ops.skip.forces(executed, state)
    trusted = ops.skip.trusts(forecast, state, forced)
    return replace(merged(ops, seen, draft, forecast, trusted), skipped=trusted, forced=forced)


@decoder(DRAFT_FIRST, one_pass=False, drafts=True, visual=True, remembers=True)
def draft_first(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The visual drafter acts at once. The target looks at the same observation while the chunk is executed: it judges
    the drafted tokens, and what it has seen is what the drafter remembers at the next chunk."""
    return replace(unverified(*proposed(ops, seen, state.memory)), pending=True)


@decoder(RSD_ASYNC, one_pass=False, drafts=True, visual=True, remembers=True, corrects=True)
def rsd_async(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """As `draft-first`, but what the target finds overrules the rest of the draft: see `correction` and
    `evaluation.delay`, for only the robot knows how far it has come meanwhile."""
    return draft_first(ops, seen, state)


@decoder("coarse-only")
def coarse_only(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The feature drafter's coarse levels and nothing more: what acceptance without verification would give."""
    drafted = ops.draft_from(ops.prefill(ops.embed(seen), False).features[0])
    return DecodeResult(drafted.prefixes[-1], drafted.gripper, drafted.motion)


@decoder("drafter-only", one_pass=False, visual=True)
def drafter_only(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
    """The visual drafter as a policy of its own: the target never runs, nothing is remembered (an ablation)."""
    return replace(unverified(*proposed(ops, seen, None)), skipped=(True,) * len(seen.pixels))


# what they share


@primitive("draft", whole=True)
def proposed(ops: Primitives, seen: PolicyInput, memory: Memory | None) -> tuple[Draft, Forecast]:
    """The visual drafter's tokens, and what acting on them alone takes."""
    drafted = ops.draft(seen, memory)
    return drafted, ops.forecast(drafted)


@primitive("target", whole=True)
def look(ops: Primitives, seen: PolicyInput, draft: Draft) -> DecodeResult:
    """The target looks, with the draft in its prefill."""
    return verified_in_prefill(ops, ops.embed(seen), draft)


def unverified(draft: Draft, forecast: Forecast) -> DecodeResult:
    """The draft as the chunk, without the target."""
    return DecodeResult(forecast.value, draft.gripper, prefills=0, draft=draft, forecast=forecast)


def verified_in_prefill(ops: Primitives, prefix: Tensor, draft: Draft) -> DecodeResult:
    """`look` from the target's prefix tokens [B, N, D] on; refreshes what the drafter remembers."""
    looked, passes = ops.prefill_with(prefix, draft), 0
    if ops.fine == "sequential" and not gripper_stands(ops, looked, draft):
        # every token is to be the target's own: the blocks have to know its gripper
        assert looked.cache is not None
        looked.cache.truncate(prefix.shape[1] + ops.target.horizon)
        looked, passes = ops.verify(draft, looked), 1
    return replace(judged(ops, draft, looked, passes), draft=draft, memory=looked.memory)


def gripper_stands(ops: Primitives, looked: Blocks, draft: Draft) -> bool:
    """Whether the target would switch the gripper as drafted."""
    if ops.rule.synthetic is not None:
        return bool(made_up(draft, ops.rule.synthetic, ops.turn)[:, 0].all())
    return torch.equal(looked.gripper, draft.gripper)


def judged(ops: Primitives, draft: Draft, blocks: Blocks, passes: int) -> DecodeResult:
    """The target has read the draft -> the chunk; `fine` says how its fine levels come."""
    if ops.fine == "regress":
        verified = ops.accept(draft, blocks.features)
        result = DecodeResult(verified.value, blocks.gripper, verified.motion)
        accepted, levels = verified.accepted, verified.levels
    else:
        found = judge(ops, draft, torch.stack(blocks.features, dim=1))
        accepted, levels = found.accepted, found.levels
        following = ops.choose(ops.target.logits(blocks.features[-1], len(blocks.features))).unsqueeze(1)
        tokens = torch.cat([found.tokens, following], dim=1)[:, : single(levels) + 1]
        assert blocks.cache is not None
        blocks.cache.truncate(blocks.cache.length - (len(blocks.features) - tokens.shape[1]) * ops.target.horizon)
        result = continued(ops, tokens, blocks)
    return replace(
        result,
        target_passes=result.target_passes + passes,
        num_draft_tokens=[draft.motion.shape[2]] * draft.motion.shape[1],
        accepted=accepted,
        accepted_levels=levels,
        accepted_gripper=draft.gripper == blocks.gripper,  # zero tolerance: the target's own is executed
    )


def continued(ops: Primitives, motion: Tensor, blocks: Blocks) -> DecodeResult:
    """The levels that `motion` [B, k, P] lacks, one pass of the target each."""
    assert blocks.cache is not None
    tokens, value = ops.extend(motion, blocks.gripper, blocks.cache)
    return DecodeResult(value, blocks.gripper, tokens, target_passes=tokens.shape[1] - motion.shape[1])


def merged(
    ops: Primitives, seen: PolicyInput, draft: Draft, forecast: Forecast, trusted: tuple[bool, ...]
) -> DecodeResult:
    """Trusted rows as drafted, the others by `look`."""
    alone = unverified(draft, forecast)
    asked = [row for row, go in enumerate(trusted) if not go]
    if not asked:
        return alone
    looked = replace(look(ops, rows_of(seen, asked), rows_of(draft, asked)), draft=None)
    if len(asked) == len(trusted):
        return replace(looked, draft=draft, forecast=forecast)
    whole = scattered(looked, asked, len(trusted))
    rows = torch.tensor(trusted, device=draft.gripper.device)[:, None]
    value = torch.where(rows, alone.value, whole.value)
    gripper = torch.where(rows, alone.gripper, whole.gripper)
    return replace(whole, value=value, gripper=gripper, draft=draft, forecast=forecast)
