"""What flows through a decoder: the policy's input, what an episode left behind, a draft, and what comes out.

Everything is immutable and has its rows (observations, one of each robot) in the first dimension of every tensor, so
that rows can be taken, put together and filled up by one function each. Values of motion scalars are in units of the
tokenizer's first step D_1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from rsd.models.trunk import KVCache
from rsd.models.vision import unit_images
from rsd.models.visual_drafter import Memory
from rsd.nested import tensors_of, with_tensors

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class PolicyInput:
    """pixels: uint8 [B, 2, S, S, 3] as the cameras give them, or what the models take; state features [B, 11]; text:
    language tokens [B, n, Dt] and condition [B, Dt] (see the models for OpenVLA's)."""

    pixels: Tensor
    state: Tensor
    text: tuple[Tensor, Tensor]

    @property
    def images(self) -> Tensor:
        """[B, 2, 3, S, S] in [-0.5, 0.5], or what else the models take.

        Made anew by each reader, so that a graph holds it: outside one, PyTorch shares a hundred thousand numbers out
        to threads, which wait for each other where cores are busy."""
        return unit_images(self.pixels) if self.pixels.dtype == torch.uint8 else self.pixels


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes: coarse tokens `motion` int [B, c, P], `gripper` int [B, H] (1 = close), what the levels
    1..k decode to, k = 1..c, each [B, P]. probs: [B, c, P, K] that the tokens were drawn with, None if they are the
    likeliest. features [B, H, d]: of the visual drafter, for `Primitives.forecast`."""

    motion: Tensor
    gripper: Tensor
    prefixes: list[Tensor]
    probs: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Forecast:
    """What acting on a draft without the target needs: its whole chunk [B, P], and how many mm it is expected to lead
    the fingertip away from the target's chunk [B]."""

    value: Tensor
    deviation_mm: Tensor


@dataclass(frozen=True)
class Blocks:
    """Features [B, H, D] of blocks that the target has read in one pass, the gripper int [B, H] that the first of them
    gives, 1 = close, and the cache after it (None: not kept). memory: what the visual drafter will attend to of it."""

    features: list[Tensor]
    gripper: Tensor
    cache: KVCache | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Verification:
    """What the target makes of a draft: value [B, P], tokens [B, L, P], accepted bool [B, c, P] and how many leading
    levels stand whole, int [B]."""

    value: Tensor
    motion: Tensor
    accepted: Tensor
    levels: Tensor


@dataclass(frozen=True)
class DecodeResult:
    """value [B, P]: chunk coefficients; gripper: int [B, H]; motion: tokens [B, L, P], None where a decoder has none.

    prefills, target_passes: the target's passes, of the rows that are not `skipped`; num_draft_tokens: by level;
    accepted, accepted_gripper, accepted_levels: bool [B, c, P], bool [B, H], int [B], None without a verification.
    draft, forecast: the visual drafter's; memory: what the target's pass leaves for it. skipped: rows executed without
    the target; forced: rows for which the target had to run whatever was forecast; pending: the target has yet to look.
    """

    value: Tensor
    gripper: Tensor
    motion: Tensor | None = None
    target_passes: int = 0
    prefills: int = 1
    num_draft_tokens: list[int] = field(default_factory=list)
    accepted: Tensor | None = None
    accepted_gripper: Tensor | None = None
    accepted_levels: Tensor | None = None
    draft: Draft | None = None
    forecast: Forecast | None = None
    memory: Memory | None = None
    skipped: tuple[bool, ...] | None = None
    forced: tuple[bool, ...] | None = None
    pending: bool = False

    def stood(self) -> Tensor | None:
        """Whether each draft stood whole, every level and the gripper, bool [B]; None without a verification."""
        if self.accepted_levels is None or self.accepted_gripper is None:
            return None
        return (self.accepted_levels == len(self.num_draft_tokens)) & self.accepted_gripper.all(-1)


@dataclass(frozen=True)
class EpisodeState:
    """What the chunks so far of B episodes leave behind; nothing else is kept between two predictions.

    memory: the drafter's view of the target's last run, with `known` in a batch of which some rows have none. By row:
    skipped, chunks since then without the target; gripper, the symbol executed last (an episode begins open); seen,
    whether there has been a chunk; stood, at how many of the target's last runs in a row the draft stood whole.
    instruction: what `memory` was read under, "" where that is no matter."""

    memory: Memory | None = None
    skipped: tuple[int, ...] = (0,)
    gripper: tuple[int, ...] = (0,)
    seen: tuple[bool, ...] = (False,)
    stood: tuple[int, ...] = (0,)
    instruction: str = ""

    def looked(self, memory: Memory | None, gripper: int, stood: bool = False) -> EpisodeState:
        """After the target ran for one episode: its view, the gripper symbol that was executed last, and whether
        the draft stood."""
        row = self.stood[0] + 1 if stood else 0
        return replace(self, memory=kept(memory), skipped=(0,), gripper=(gripper,), seen=(True,), stood=(row,))

    def went_without(self, memory_chunks: int) -> EpisodeState:
        """After one more chunk without the target, whose run is remembered for `memory_chunks` of them."""
        skipped = self.skipped[0] + 1
        memory = self.memory if skipped < memory_chunks else None
        return replace(self, memory=memory, skipped=(skipped,), seen=(True,))


def stacked(states: Sequence[EpisodeState]) -> EpisodeState:
    """States of one episode each -> that of a batch, which says whose memory is `known` if anybody has one."""
    memories, memory = [state.memory for state in states], None
    if (some := next((each for each in memories if each is not None), None)) is not None:
        blank = with_tensors(some, (torch.zeros_like(tensor) for tensor in tensors_of(some)))
        known = torch.tensor([each is not None for each in memories], device=some.keys[0].device)
        memory = joined([blank if each is None else each for each in memories])._replace(known=known)
    return EpisodeState(
        memory,
        tuple(state.skipped[0] for state in states),
        tuple(state.gripper[0] for state in states),
        tuple(state.seen[0] for state in states),
        tuple(state.stood[0] for state in states),
        states[0].instruction,
    )


def joined(parts: Sequence[Tree]) -> Tree:
    """Trees of the same kind, their rows one after another."""
    columns = zip(*(tensors_of(part) for part in parts), strict=True)
    return with_tensors(parts[0], (torch.cat(column) for column in columns))


def rows_of(tree: Tree, rows: Sequence[int]) -> Tree:
    """Those rows of every tensor."""
    tensors = list(tensors_of(tree))
    if not tensors or (len(rows) == len(tensors[0]) and list(rows) == list(range(len(rows)))):
        return tree
    if len(rows) == 1:
        return with_tensors(tree, (tensor[rows[0] : rows[0] + 1] for tensor in tensors))
    index = torch.tensor(list(rows), device=tensors[0].device)
    return with_tensors(tree, (tensor.index_select(0, index) for tensor in tensors))


def scattered(tree: Tree, rows: Sequence[int], total: int) -> Tree:
    """The inverse of `rows_of`: the tree's rows at those places of `total`, zeros elsewhere."""

    def place(part: Tensor) -> Tensor:
        whole = part.new_zeros(total, *part.shape[1:])
        whole[torch.tensor(list(rows), device=part.device)] = part
        return whole

    return with_tensors(tree, map(place, tensors_of(tree)))


def kept(tree: Tree) -> Tree:
    """A copy to keep: a recording's next run writes where its last results stand."""
    return with_tensors(tree, (tensor.clone() for tensor in tensors_of(tree)))


def filled(tensors: Iterable[Tensor], size: int) -> list[Tensor]:
    """Tensors [n, ...] with their last row repeated up to `size` rows."""
    return [t if len(t) == size else torch.cat([t, t[-1:].expand(size - len(t), *t.shape[1:])]) for t in tensors]
