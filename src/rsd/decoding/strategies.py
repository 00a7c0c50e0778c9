"""Decoding strategies: what is seen in, one action chunk out. Each is one short function; see `steps` for the parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rsd.decoding.acceptance import accepted_prefix, leading
from rsd.decoding.sampling import Verified, verify_block
from rsd.decoding.steps import (
    Decoded,
    Decoder,
    Drafted,
    EpisodeMemory,
    Proposal,
    Scene,
    Stopwatch,
    as_drafted,
    choose,
    extend,
    greedy_gripper,
    propose,
    regress_fine,
    requantise,
    scout,
    single,
    verify,
    verify_in_prefill,
)
from rsd.models.fusing import fusible
from rsd.models.streams import fork
from rsd.models.trunk import KVCache
from rsd.types import RsdError


def ar(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The baseline: level by level, one pass of the main a level (the first rides in the prefill)."""
    main, code, prefix = decoder.main, decoder.code, scene.prefix(decoder.main, watch)
    with watch.stage("prefill"):
        features, cache = main.prefill(prefix)
    with watch.stage("decode"):
        gripper = greedy_gripper(decoder, features)
        motion = choose(decoder, main.logits(features, 1)).unsqueeze(1)
        motion, passes = extend(decoder, motion, gripper, cache)
        return Decoded(code.dequantise(motion), gripper, motion, passes)


def parallel(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """All levels at once from the prefill (the original RFSQ head)."""
    prefix = scene.prefix(decoder.main, watch)
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("decode"):
        motion = choose(decoder, decoder.main.parallel_logits(features))
        return Decoded(decoder.code.dequantise(motion), greedy_gripper(decoder, features), motion)


def l1(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """Continuous regression in one pass, the bar that OpenVLA-OFT's L1 head sets (arXiv 2502.19645)."""
    prefix = scene.prefix(decoder.main, watch)
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("decode"):
        value = decoder.finite(decoder.main.residual(features, 1))
        return Decoded(value, greedy_gripper(decoder, features))


def draft(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The draft's coarse levels and nothing more: what acceptance without verification would give."""
    prefix = scene.prefix(decoder.main, watch)
    with watch.stage("prefill"):
        features, _ = decoder.main.prefill(prefix)
    with watch.stage("draft"):
        drafted = propose(decoder, features)
        return Decoded(drafted.prefixes[-1], drafted.gripper, drafted.motion)


def rsd(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The draft proposes the coarse levels 1..c; ONE pass verifies them and yields the fine ones.

    `fine="regress"`: block k+1 has seen just the levels 1..k, so the continuous estimate of what they miss is at
    hand however many are accepted: never more than one pass. k counts a scalar's own accepted levels under a
    rule that judges single tokens, the accepted levels of the chunk under the others.
    `fine="sequential"`: the main corrects the first level that does not stand (if all do, it adds the next),
    the rest takes one pass a level; with the rule `exact` the tokens are those of `ar`, and distributed as those of
    `ar` where they are drawn.
    """
    prefix = scene.prefix(decoder.main, watch)
    with watch.stage("prefill"):
        features, cache = decoder.main.prefill(prefix)
        gripper = greedy_gripper(decoder, features)  # zero tolerance: the main's own, free with the prefill
    with watch.stage("draft"):
        drafted = propose(decoder, features)
    with watch.stage("verify"):
        blocks = [features, *verify(decoder, drafted, gripper, cache)]
    with watch.stage("decode"):
        decoded = accept(decoder, drafted, blocks, gripper, cache)
    decoded.main_passes += 1
    decoded.accepted_gripper = drafted.gripper == gripper
    return decoded


def rsd_fused(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The light draft proposes before the main looks; its tokens ride in the prefill: one pass in all."""
    with watch.stage("draft"):
        proposal = scout(decoder, scene)
    return in_prefill(decoder, scene, proposal, watch)


def rsd_skip(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """As `rsd_fused`, but where the calibrated rule allows it the draft's chunk is executed and the main stays idle."""
    with watch.stage("draft"):
        proposal = scout(decoder, scene)
    if not decoder.skip.may_skip(scene.memory, proposal):
        return in_prefill(decoder, scene, proposal, watch)
    decoder.skip.skip(scene.memory)
    return unverified(proposal)


def rsd_ahead(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The light draft acts at once. The main looks at the same observation while the chunk is executed: it judges the
    drafted tokens, and what it has seen is what the draft remembers at the next chunk."""
    with watch.stage("draft"):
        proposal = scout(decoder, scene)
    decoded = unverified(proposal)
    decoded.follow_up = partial(in_prefill, decoder, scene, proposal)
    return decoded


def light_alone(decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
    """The light draft as a policy of its own: the main never runs, nothing is remembered (an ablation)."""
    with watch.stage("draft"):
        return unverified(scout(decoder, replace(scene, memory=EpisodeMemory())))


Strategy = Callable[[Decoder, Scene, Stopwatch], Decoded]
STRATEGIES: dict[str, Strategy] = {
    "ar": ar,
    "parallel": parallel,
    "l1": l1,
    "rsd": rsd,
    "rsd-fused": rsd_fused,
    "rsd-skip": rsd_skip,
    "rsd-ahead": rsd_ahead,
    "draft": draft,
    "light-alone": light_alone,
}
LIGHT = ("rsd-fused", "rsd-skip", "rsd-ahead", "light-alone")  # need a light draft; all but the last remember
SAMPLING = ("ar", "parallel", "rsd", "rsd-fused")  # execute motion tokens of the main, which can be drawn


def check_sampling(temperature: float, decode: str, acceptance: str | None, fine: str | None) -> None:
    """Raise unless tokens can be drawn that way; acceptance, fine: None where the default is taken."""
    if not 0.0 <= temperature < math.inf:
        raise RsdError(f"temperature {temperature}: expected a finite number >= 0, 0 takes the likeliest tokens")
    if temperature == 0.0:
        return
    if decode not in SAMPLING:
        found = f"temperature {temperature:g}: expected decode {', '.join(SAMPLING)}, found {decode!r}"
        raise RsdError(f"{found}, which executes no tokens that the main chose; take one of them, or temperature 0")
    if decode.startswith("rsd") and (acceptance not in (None, "exact") or fine not in (None, "sequential")):
        found = " and ".join(x for x in (acceptance and f"acceptance {acceptance!r}", fine and f"fine {fine!r}") if x)
        raise RsdError(
            f"temperature {temperature:g}: expected acceptance 'exact' and fine 'sequential' (the defaults), "
            f"found {found}, which does not keep the distribution of ar; leave it out, or take temperature 0"
        )


def in_prefill(decoder: Decoder, scene: Scene, proposal: Proposal, watch: Stopwatch) -> Decoded:
    """The main looks, with the proposal's blocks in its prefill; refreshes the episode's memory."""
    drafted = as_drafted(decoder, proposal.motion, proposal.gripper, proposal.probs)
    decoded = check_in_prefill(decoder, scene.prefix(decoder.main, watch), drafted, scene.memory, watch)
    decoded.proposal = proposal
    return decoded


def check_in_prefill(
    decoder: Decoder, prefix: Tensor, drafted: Drafted, memory: EpisodeMemory, watch: Stopwatch
) -> Decoded:
    """`in_prefill` from the main's prefix tokens [B, N, D] on."""
    main = decoder.main
    with watch.stage("prefill"):
        blocks, cache = verify_in_prefill(decoder, prefix, drafted)
        gripper = greedy_gripper(decoder, blocks[0])
    again = decoder.fine == "sequential" and not torch.equal(gripper, drafted.gripper)
    if again:  # every token is to be the main's own: the blocks have to know its gripper
        with watch.stage("verify"):
            cache.truncate(prefix.shape[1] + main.horizon)
            blocks = [blocks[0], *verify(decoder, drafted, gripper, cache)]
    light, memorised = decoder.light, None
    if light is not None:
        with watch.stage("draft"):  # on a GPU beside the decoding, which may cut the cache, but no memory off it
            whole = KVCache(list(cache.keys), list(cache.values))
            memorised = fork(lambda: light.remember(whole, main.remembered(prefix.shape[1])), prefix.device)
    with watch.stage("decode"):
        decoded = accept(decoder, drafted, blocks, gripper, cache)
        decoded.main_passes += int(again)
        decoded.accepted_gripper = drafted.gripper == gripper
    if memorised is not None:
        memory.renew(memorised(), gripper)
    return decoded


def unverified(proposal: Proposal) -> Decoded:
    """The proposal as the chunk, without the main."""
    assert proposal.value is not None
    return Decoded(proposal.value, proposal.gripper, prefills=0, proposal=proposal)


@fusible
def accept(
    decoder: Decoder, drafted: Drafted, blocks: list[Tensor], gripper: Tensor, cache: KVCache
) -> Decoded:
    """What was drafted and the main's features of block 1 and of those that were told it -> the chunk."""
    if decoder.rule.as_a_whole:
        return accept_as_a_whole(decoder, drafted, blocks, gripper)
    main, code, motion, passes = decoder.main, decoder.code, drafted.motion, 0
    features = torch.stack(blocks, dim=1)  # [B, c+1, H, D]
    logits = decoder.finite(main.level_head.first_levels(features[:, :-1]))  # [B, c, P, K]
    verified = judge(decoder, drafted, logits)
    accepted, prefix_levels = verified.accepted, verified.levels
    if decoder.fine == "regress":
        kept = prefix_levels[:, None].expand_as(motion[:, 0])
        if decoder.rule.per_scalar:
            kept = leading(accepted)
        wanted = regress_fine(decoder, drafted.prefixes, features, kept)
        tokens, value = requantise(code, wanted, motion, kept)
    else:
        following = choose(decoder, main.logits(blocks[-1], len(blocks))).unsqueeze(1)
        tokens = torch.cat([verified.tokens, following], dim=1)[:, : single(prefix_levels) + 1]
        cache.truncate(cache.length - (len(blocks) - tokens.shape[1]) * main.horizon)
        tokens, passes = extend(decoder, tokens, gripper, cache)
        value = code.dequantise(tokens)
    decoded = Decoded(value, gripper, tokens, passes)
    decoded.num_draft_tokens = [motion.shape[2]] * motion.shape[1]
    decoded.accepted, decoded.accepted_levels = accepted, prefix_levels
    return decoded


def accept_as_a_whole(decoder: Decoder, drafted: Drafted, blocks: list[Tensor], gripper: Tensor) -> Decoded:
    """One block was told all that was drafted: a scalar's draft stands if what the main finds missing after it is
    within what the finer levels take out, and that is added; else block 1's own estimate takes its place, or, if there
    is no block 1, the tokens follow the correction and not the draft."""
    count, scalars = drafted.motion.shape[1:]
    missing = decoder.finite(decoder.main.residual(blocks[-1], count + 1))
    stands = missing.abs() <= decoder.main.code.reach(count)  # [B, P]
    wanted = drafted.prefixes[-1] + missing
    if len(blocks) > 1:
        wanted = torch.where(stands, wanted, decoder.finite(decoder.main.residual(blocks[0], 1)))
    tokens, value = requantise(decoder.code, wanted, drafted.motion, count * stands.long())
    accepted = stands[:, None].expand(-1, count, -1)
    return Decoded(
        value,
        gripper,
        tokens,
        num_draft_tokens=[scalars] * count,
        accepted=accepted,
        accepted_levels=accepted_prefix(accepted),
    )


def judge(decoder: Decoder, drafted: Drafted, logits: Tensor) -> Verified:
    """The main's logits [B, c, P, K] given what was drafted -> what stands, and the level after that corrected.

    Tokens are compared by the rule, drawn ones kept so often that the main's distribution comes out."""
    sampler = decoder.sampler
    if sampler is not None:
        assert drafted.probs is not None
        decoder.check()  # now: a NaN makes no probabilities
        return verify_block(drafted.motion, drafted.probs, sampler.probs(logits), sampler.generator)
    assert decoder.rule.accept is not None  # else it is judged as a whole
    accepted = decoder.rule.accept(drafted.motion, logits)
    return Verified(torch.where(accepted, drafted.motion, logits.argmax(-1)), accepted, accepted_prefix(accepted))
