"""Strategies without PyTorch's cost of every single operation: recorded once as graphs, run for every observation.

On a GPU a graph is a CUDA graph, on a CPU one of ONNX Runtime. Every strategy gets the same treatment. What the host
has to decide (skip the main or not) lies between two graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rsd.decoding.steps import Decoded, Decoder, EpisodeMemory, Proposal, Scene, Stopwatch, proposed, scout, sketch
from rsd.decoding.strategies import LIGHT, STRATEGIES, check_in_prefill, in_prefill, unverified
from rsd.models.light_draft import Memory
from rsd.models.streams import fork


class Silent(Stopwatch):
    """Takes no time: a recording must not wait for the device."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield


Call = Callable[[Sequence[Tensor]], Any]


class Recorder(Protocol):
    """Makes of a call on tensors of fixed shapes another one that gives the same; see `CudaGraph` and `OnnxGraph`."""

    def __call__(self, key: str, decoder: Decoder, call: Call, inputs: Sequence[Tensor]) -> Call:
        """key: names the call among all calls with the models and the rule of this decoder."""
        ...


class RecordedStrategy:
    """A strategy of `STRATEGIES` (with regressed fine levels, which need no decision of the host) run as graphs.

    Recorded once for every number of observations; their other sizes must not change. Stages: `main`, in which, on a
    GPU, the light draft works beside the main's vision; `draft` where the main waits for what the draft says.
    """

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self.recorder = name, recorder
        self._recordings: dict[tuple[str, int], Call] = {}

    def __call__(self, decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
        if self.name not in LIGHT:
            strategy = STRATEGIES[self.name]
            with watch.stage("main"):
                return self._replay(
                    self.name, decoder, seen(scene), lambda x: strategy(decoder, scene_of(x), silent(x))
                )
        if self.name == "light-alone":
            with watch.stage("draft"):
                return unverified(self._scout(decoder, scene_of(seen(scene))))
        if self.name == "rsd-fused" and scene.pixels.device.type == "cuda":
            with watch.stage("main"):
                decoded, memory = self._remembering("both", decoder, scene, lambda x: side_by_side(decoder, x))
            scene.memory.renew(memory, decoded.gripper)
            return decoded
        if not self._recordings:
            self._record_all(decoder, scene)
        return (self._act_first if self.name == "rsd-ahead" else self._ask_first)(decoder, scene, watch)

    def _record_all(self, decoder: Decoder, scene: Scene) -> None:
        """Everything that an episode will need, so that no later chunk has to wait for a recording."""
        first = replace(scene, memory=EpisodeMemory())
        self._look(decoder, first, self._scout(decoder, first), silent(seen(scene)))
        self._scout(decoder, first)  # which remembers now

    def _act_first(self, decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
        with watch.stage("draft"):
            proposal = self._scout(decoder, scene)
        decoded = unverified(proposal)
        decoded.follow_up = partial(self._look, decoder, scene, proposal)
        return decoded

    def _ask_first(self, decoder: Decoder, scene: Scene, watch: Stopwatch) -> Decoded:
        with watch.stage("draft"):
            proposal = self._scout(decoder, scene)
            if self.name == "rsd-skip" and decoder.skip.may_skip(scene.memory, proposal):
                decoder.skip.skip(scene.memory)
                return unverified(proposal)
        return self._look(decoder, scene, proposal, watch)

    def _look(self, decoder: Decoder, scene: Scene, proposal: Proposal, watch: Stopwatch) -> Decoded:
        """The main's pass after the draft's, with its tokens; renews the memory."""
        decoded: Decoded
        with watch.stage("main"):
            decoded, memory = self._replay(
                "fused", decoder, [*seen(scene), proposal.motion, proposal.gripper], lambda x: fused(decoder, x)
            )
        scene.memory.renew(memory, decoded.gripper)
        decoded.proposal = proposal
        return decoded

    def _scout(self, decoder: Decoder, scene: Scene) -> Proposal:
        proposal: Proposal = self._remembering("scout", decoder, scene, lambda x: scout(decoder, scene_of(x)))
        return proposal

    def _remembering(self, key: str, decoder: Decoder, scene: Scene, call: Call) -> Any:
        """`call` on what is remembered; without a memory it is another graph, of fewer inputs."""
        blind = " blind" if scene.memory.main is None else ""
        return self._replay(f"{key}{blind}", decoder, remembered(scene), call)

    def _replay(self, key: str, decoder: Decoder, inputs: Sequence[Tensor], call: Call) -> Any:
        part = key, len(inputs[0])
        if part not in self._recordings:
            pending, decoder.checks = decoder.checks, []  # of a call before this one: not part of the recording
            self._recordings[part] = self.recorder(key, decoder, lambda x: (call(x), sound(decoder)), inputs)
            decoder.checks = pending
        result, finite = self._recordings[part](inputs)
        decoder.checks.append(finite)
        return result


def seen(scene: Scene) -> list[Tensor]:
    return [scene.pixels, scene.state, *scene.text]


def remembered(scene: Scene) -> list[Tensor]:
    """`seen`, and the memory's keys and values if there is one."""
    memory = scene.memory.main
    return seen(scene) + ([*memory.keys, *memory.values] if memory is not None else [])


def scene_of(tensors: Sequence[Tensor]) -> Scene:
    """The inverse of `seen` and of `remembered`."""
    pixels, state, tokens, condition, *rest = tensors
    half = len(rest) // 2
    memory = Memory(list(rest[:half]), list(rest[half:])) if rest else None
    return Scene(pixels, state, (tokens, condition), EpisodeMemory(memory))


def side_by_side(decoder: Decoder, tensors: Sequence[Tensor]) -> tuple[Decoded, Memory | None]:
    """`rsd_fused` on what is remembered -> the chunk and the new memory; the draft works while the main looks.

    What only acting without the main needs of the draft is computed beside the main's pass."""
    scene, watch, memory = scene_of(tensors), silent(tensors), EpisodeMemory()
    prefix = fork(lambda: scene.prefix(decoder.main, watch), watch.device)
    sketched = sketch(decoder, scene)
    proposal = fork(lambda: proposed(decoder, sketched), watch.device)
    decoded = check_in_prefill(decoder, prefix(), sketched.drafted, memory, watch)
    decoded.proposal = proposal()
    return decoded, memory.main


def fused(decoder: Decoder, tensors: Sequence[Tensor]) -> tuple[Decoded, Memory | None]:
    """`in_prefill` on seen + drafted tokens and gripper -> the chunk and the new memory."""
    *visible, motion, gripper = tensors
    scene = scene_of(visible)
    decoded = in_prefill(decoder, scene, Proposal(motion, gripper), silent(tensors))
    return decoded, scene.memory.main


def silent(tensors: Sequence[Tensor]) -> Silent:
    return Silent(tensors[0].device)


def sound(decoder: Decoder) -> Tensor:
    """A number that is finite if all outputs noted so far were; takes them off the decoder's list."""
    checks, decoder.checks = decoder.checks, []
    return torch.stack(checks).sum()
