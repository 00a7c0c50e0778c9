"""The policy for several simulators at once: one observation of each, and what its episode remembers.

A batch always has the same size: what is missing is filled up and thrown away. With one shape there is one way to
multiply the matrices, so an episode does not depend on how full its batches happened to be; its place in them can
still move the last bit (measured on a CPU: up to 7e-7 in the actions of `l1`, nothing where tokens come out).

Rows that take the same way go together: those that remember an earlier chunk and those that do not, those whose draft
may act alone and those that need the main.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rsd.decoding.recorded import RecordedStrategy, fused, scene_of, seen
from rsd.decoding.steps import Decoded, Decoder, EpisodeMemory, Proposal, Scene, Stopwatch, scout
from rsd.decoding.strategies import LIGHT, unverified
from rsd.models.light_draft import Memory
from rsd.policy import RsdPolicy
from rsd.types import ActionChunk, Observation, RsdError

Rows = TypeVar("Rows", Decoded, Proposal)


class BatchPolicy(Protocol):
    @property
    def image_size(self) -> int: ...

    def new_memory(self) -> Any:
        """What an episode remembers at its start."""
        ...

    def predict_batch(self, observations: Sequence[Observation], memories: Sequence[Any]) -> list[ActionChunk]:
        """One observation each of several episodes -> their chunks; what they remember goes on in `memories`."""
        ...


class BatchedRsdPolicy:
    """Predicts up to `size` observations in one go. Raises RsdError for a decoder that cannot be batched."""

    def __init__(self, policy: RsdPolicy, size: int) -> None:
        if policy.temperature:
            raise RsdError(
                f"--batch {size}: --temperature {policy.temperature:g} draws each episode from its own seed, one "
                "observation at a time; leave --batch out"
            )
        if policy.decoder.fine == "sequential" and policy.decode.startswith("rsd"):
            raise RsdError(
                f"--batch {size}: --acceptance {policy.acceptance} decodes the fine levels one after another, each "
                "observation at its own pace; leave --batch out"
            )
        self.policy, self.size = policy, size

    @property
    def image_size(self) -> int:
        return self.policy.image_size

    def new_memory(self) -> EpisodeMemory:
        return EpisodeMemory()

    @torch.inference_mode()
    def predict_batch(
        self, observations: Sequence[Observation], memories: Sequence[EpisodeMemory]
    ) -> list[ActionChunk]:
        """latency_ms is that of the whole batch."""
        if not 0 < len(observations) <= self.size or len(memories) != len(observations):
            found = f"{len(observations)} with {len(memories)} memories"
            raise RsdError(f"batch: expected 1 to {self.size} observations and a memory of each, found {found}")
        policy, watch = self.policy, Stopwatch(self.policy.device)
        with watch.stage("total"):
            with watch.stage("preprocess"):
                scene = Scene(*policy._preprocess(list(observations)))
            if policy.decode in LIGHT:
                rows = self._with_light_draft(scene, memories, watch)
            else:
                whole = policy._strategy(policy.decoder, self._take(scene, range(len(observations))), watch)
                rows = [row_of(whole, row) for row in range(len(observations))]
            policy.decoder.check()
            chosen = [executed(policy.decode, rows[i]) for i in self._filled(range(len(rows)))]
            values, grippers = (torch.cat([getattr(row, name) for row in chosen]) for name in ("value", "gripper"))
            actions = policy._to_actions(values, grippers)
        chunks = []
        for i, row in enumerate(rows):
            stats = replace(policy._stats(row, watch), latency_ms=dict(watch.ms))
            if policy.audit and row.proposal is not None:
                stats.deviation_mm, stats.gripper_differs = policy._deviation(alone(scene, i), row, row.proposal)
            chunks.append(ActionChunk(actions[i], stats))
        return chunks

    def _with_light_draft(self, scene: Scene, memories: Sequence[EpisodeMemory], watch: Stopwatch) -> list[Decoded]:
        """What the decoders of `LIGHT` make of each row, with `rsd-ahead` the main's own; renews the memories."""
        decode, decoder, count = self.policy.decode, self.policy.decoder, len(memories)
        proposals: dict[int, Proposal] = {}
        with watch.stage("draft"):
            for known in (False, True):
                rows = [i for i in range(count) if (memories[i].main is not None) == known]
                if rows:
                    proposal = self._scout(self._take(scene, rows), [memories[i].main for i in self._filled(rows)])
                    proposals.update((row, row_of(proposal, place)) for place, row in enumerate(rows))
            skips = [
                i for i in range(count) if decode == "rsd-skip" and decoder.skip.may_skip(memories[i], proposals[i])
            ]
        if decode == "light-alone":
            return [unverified(proposals[i]) for i in range(count)]
        decoded = {i: unverified(proposals[i]) for i in skips}
        for i in skips:
            decoder.skip.skip(memories[i])
        rows = [i for i in range(count) if i not in decoded]
        if rows:
            with watch.stage("main"):
                asked = [proposals[i] for i in self._filled(rows)]
                whole, memory = self._main(self._take(scene, rows), asked)
                for place, row in enumerate(rows):
                    # copies: a graph's results are the same tensors every time, a memory has to outlive them
                    remembered = Memory(*([t[place : place + 1].clone() for t in tensors] for tensors in memory))
                    memories[row].renew(remembered, whole.gripper[place : place + 1].clone())
                    decoded[row] = replace(row_of(whole, place), proposal=proposals[row])
        return [decoded[i] for i in range(count)]

    def _scout(self, scene: Scene, memories: Sequence[Memory | None]) -> Proposal:
        """The light draft's proposals for a full batch in which all remember something, or none does."""
        known = [memory for memory in memories if memory is not None]
        parts = [[*memory.keys, *memory.values] for memory in known]
        remembered = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        key = "scout" if known else "scout blind"
        proposal: Proposal = self._call(key, [*seen(scene), *remembered], lambda d, x: scout(d, scene_of(x)))
        return proposal

    def _main(self, scene: Scene, proposals: Sequence[Proposal]) -> tuple[Decoded, Memory]:
        """The main's pass over a full batch with the proposals in it, and what it leaves to remember."""
        drafted = [torch.cat([getattr(p, name) for p in proposals]) for name in ("motion", "gripper")]
        decoded, memory = self._call("fused", [*seen(scene), *drafted], fused)
        return decoded, memory

    def _call(self, key: str, inputs: list[Tensor], call: Callable[[Decoder, Sequence[Tensor]], Any]) -> Any:
        """As a graph where the policy uses them."""
        strategy, decoder = self.policy._strategy, self.policy.decoder
        if isinstance(strategy, RecordedStrategy):
            return strategy._replay(key, decoder, inputs, lambda x: call(decoder, x))
        return call(decoder, inputs)

    def _filled(self, rows: Sequence[int]) -> list[int]:
        return [*rows, *[rows[-1]] * (self.size - len(rows))]

    def _take(self, scene: Scene, rows: Sequence[int]) -> Scene:
        """A full batch of a scene's rows."""
        index = torch.tensor(self._filled(rows), device=scene.pixels.device)
        return scene_of([tensor.index_select(0, index) for tensor in seen(scene)])


def alone(scene: Scene, row: int) -> Scene:
    return scene_of([tensor[row : row + 1] for tensor in seen(scene)])


def executed(decode: str, row: Decoded) -> Decoded | Proposal:
    """What becomes the chunk: with `rsd-ahead` the proposal, which the main has judged meanwhile."""
    if decode != "rsd-ahead":
        return row
    assert row.proposal is not None
    return row.proposal


def row_of(batch: Rows, row: int) -> Rows:
    """The part of a batch's decoding, or of its proposals, that is about one observation."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    rows: dict[str, Any] = {name: part[row : row + 1] for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(batch, **rows)

