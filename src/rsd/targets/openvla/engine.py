"""Decoders of an OpenVLA model, each captured once per prompt length: pixels and prompt in, normalised actions out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rsd.decoding.timing import Stopwatch
from rsd.runtime.cuda_graph import Captured
from rsd.targets.openvla.llama import StaticCache
from rsd.targets.openvla.model import OpenVlaModel
from rsd.types import ACTION_DIM

PROMPT_LENGTHS = 16  # captured lengths kept; a suite of ten tasks has fewer


@dataclass(frozen=True)
class Decision:
    """actions: normalised float32 [B, H, 7]; hidden: [B, n, D] of the positions they were read from.

    passes: of the trunk after its prefill.
    """

    actions: Tensor
    hidden: Tensor
    passes: int


@dataclass(frozen=True)
class Length:
    """What is captured for one prompt length. `ar` has its own second part, over the first's cache."""

    first: Captured[tuple[Tensor, Tensor]]
    rest: Captured[tuple[Tensor, Tensor]] | None = None


class Engine:
    """decode: one of `published.DECODERS`: `ar` (OpenVLA's 7 tokens), `l1` or `discrete` (OFT).

    graphs: capture in CUDA graphs; without effect on a CPU.
    """

    def __init__(self, model: OpenVlaModel, decode: str, *, graphs: bool = True) -> None:
        self.model, self.decode = model, decode
        self.graphs = graphs and model.device.type == "cuda"
        self._vision: dict[torch.Size, Captured[Tensor]] = {}
        self._lengths: dict[tuple[object, ...], Length] = {}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, prompt: Tensor, state: Tensor | None, watch: Stopwatch) -> Decision:
        """pixels [B, cameras, 6, 224, 224], prompt ids [B, T], normalised state [B, 8] or None."""
        with watch.stage("vision"):
            images = self._embed_images(pixels)
        inputs = [images, prompt] + ([] if state is None else [state])
        parts = self._captured(inputs)
        with watch.stage("prefill"):
            result, hidden = parts.first(*inputs)
        passes = 0
        with watch.stage("decode"):
            if parts.rest is not None:
                more, more_hidden = parts.rest(result)
                result, hidden = torch.cat([result, more], 1), torch.cat([hidden, more_hidden], 1)
                passes = ACTION_DIM - 1
            actions = result if self.decode == "l1" else self.model.token_values(result)
            actions = actions.reshape(len(actions), -1, ACTION_DIM).float()
        return Decision(actions, hidden, passes)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        if not self.graphs:
            return self.model.embed_images(pixels)
        if pixels.shape not in self._vision:
            self._vision[pixels.shape] = Captured(self.model.embed_images, [pixels])
        return self._vision[pixels.shape](pixels)

    def _captured(self, inputs: list[Tensor]) -> Length:
        if not self.graphs:
            return self._make(inputs)
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self._lengths:
            if len(self._lengths) >= PROMPT_LENGTHS:
                self._lengths.pop(next(iter(self._lengths)))  # the oldest
            self._lengths[shapes] = self._make(inputs)
        return self._lengths[shapes]

    def _make(self, inputs: list[Tensor]) -> Length:
        captured = inputs if self.graphs else []
        if self.decode != "ar":
            return Length(Captured(self._parallel, captured))
        caches: list[StaticCache] = []

        def first(*values: Tensor) -> tuple[Tensor, Tensor]:
            hidden, cache = self.model.prefill(self.model.embed_prefix(*values), ACTION_DIM - 1)
            caches[:] = [cache]
            return self.model.language_model.logits(hidden).argmax(-1), hidden

        def rest(token: Tensor) -> tuple[Tensor, Tensor]:
            cache, tokens, hiddens = caches[0], [token], []
            cache.truncate(prefilled)
            for _ in range(ACTION_DIM - 1):
                hiddens.append(self.model.next_token(tokens[-1], cache))
                tokens.append(self.model.language_model.logits(hiddens[-1]).argmax(-1))
            return torch.cat(tokens[1:], 1), torch.cat(hiddens, 1)

        prefilled = inputs[0].shape[1] + inputs[1].shape[1] + (len(inputs) > 2)
        part = Captured(first, captured)
        token = inputs[1][:, :1]
        return Length(part, Captured(rest, [token] if self.graphs else []))

    def _parallel(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.model.embed_prefix(*inputs)
        hidden = self.model.action_hidden(prefix)
        if self.decode == "l1":
            return self.model.head(hidden), hidden
        return self.model.language_model.logits(hidden).argmax(-1), hidden
