"""Decoders of an OpenVLA model, each captured once per prompt length: pixels and prompt in, normalised actions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rsd.decoding.timing import Stopwatch
from rsd.runtime.cuda_graph import Captured
from rsd.targets.openvla.llama import StaticCache
from rsd.targets.openvla.model import OpenVlaModel
from rsd.types import ACTION_DIM

T = TypeVar("T")
PROMPT_LENGTHS = 16  # captured lengths kept; a suite of ten tasks has fewer


@dataclass(frozen=True)
class Decision:
    """actions: normalised float32 [B, H, 7]; hidden: [B, n, D] of the positions they were read from.

    passes: of the trunk after its prefill.
    """

    actions: Tensor
    hidden: Tensor
    passes: int


class Engine:
    """decode: one of `published.DECODERS`: `ar` (OpenVLA's 7 tokens), `l1` or `discrete` (OFT).

    graphs: capture in CUDA graphs; without effect on a CPU.
    """

    def __init__(self, model: OpenVlaModel, decode: str, *, graphs: bool = True) -> None:
        self.model, self.decode = model, decode
        self.graphs = graphs and model.device.type == "cuda"
        self._vision: dict[Any, Captured[Tensor]] = {}
        self._lengths: dict[Any, list[Captured[tuple[Tensor, Tensor]]]] = {}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, prompt: Tensor, state: Tensor | None, watch: Stopwatch) -> Decision:
        """pixels [B, cameras, 6, 224, 224], prompt ids [B, T], normalised state [B, 8] or None."""
        with watch.stage("vision"):
            embed = self._kept(self._vision, [pixels], lambda: self._captured(self.model.embed_images, [pixels]))
            images = embed(pixels)
        inputs = [images, prompt] + ([] if state is None else [state])
        make = self._token_by_token if self.decode == "ar" else self._at_once
        first, *rest = self._kept(self._lengths, inputs, lambda: make(inputs))
        with watch.stage("prefill"):
            result, hidden = first(*inputs)
        with watch.stage("decode"):
            for part in rest:
                more, more_hidden = part(result)
                result, hidden = torch.cat([result, more], 1), torch.cat([hidden, more_hidden], 1)
            actions = result if self.decode == "l1" else self.model.token_values(result)
            actions = actions.reshape(len(actions), -1, ACTION_DIM).float()
        return Decision(actions, hidden, len(rest) * (ACTION_DIM - 1))

    def _captured(self, call: Callable[..., T], inputs: Sequence[Tensor]) -> Captured[T]:
        return Captured(call, inputs if self.graphs else [])

    def _kept(self, graphs: dict[Any, T], inputs: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What is made for inputs of these shapes: once, where there are graphs."""
        if not self.graphs:
            return make()
        shapes = tuple(value.shape for value in inputs)
        if shapes not in graphs:
            if len(graphs) >= PROMPT_LENGTHS:
                graphs.pop(next(iter(graphs)))  # the oldest
            graphs[shapes] = make()
        return graphs[shapes]

    def _token_by_token(self, inputs: Sequence[Tensor]) -> list[Captured[tuple[Tensor, Tensor]]]:
        """The prefill with the first token, and the tokens after it, over the prefill's cache."""
        model, kept = self.model, list[tuple[StaticCache, int]]()

        def first(*values: Tensor) -> tuple[Tensor, Tensor]:
            hidden, cache = model.prefill(model.embed_prefix(*values), ACTION_DIM - 1)
            kept[:] = [(cache, cache.length)]
            return model.language_model.logits(hidden).argmax(-1), hidden

        def rest(token: Tensor) -> tuple[Tensor, Tensor]:
            (cache, length), tokens, hiddens = kept[0], [token], []
            cache.truncate(length)
            for _ in range(ACTION_DIM - 1):
                hiddens.append(model.next_token(tokens[-1], cache))
                tokens.append(model.language_model.logits(hiddens[-1]).argmax(-1))
            return torch.cat(tokens[1:], 1), torch.cat(hiddens, 1)

        return [self._captured(first, inputs), self._captured(rest, [inputs[1][:, :1]])]

    def _at_once(self, inputs: Sequence[Tensor]) -> list[Captured[tuple[Tensor, Tensor]]]:
        def every(*values: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.model.action_hidden(self.model.embed_prefix(*values))
            if self.decode == "l1":
                return self.model.head(hidden), hidden
            return self.model.language_model.logits(hidden).argmax(-1), hidden

        return [self._captured(every, inputs)]
