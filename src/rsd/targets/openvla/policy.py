"""OpenVLA checkpoints as a policy: observation in, action chunk out, with every published convention on the way.

A directory is what Hugging Face has: config.json, model*.safetensors, tokenizer.json, preprocessor_config.json,
dataset_statistics.json, and for OFT action_head--* and proprio_projector--*. What those files cannot say goes into
`rsd_openvla.json` beside them, for example {"cameras": 1, "decode": "discrete"} (see `Settings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd.conventions import openvla_gripper_to_env
from rsd.decoding.timing import Stopwatch
from rsd.devices import check_device
from rsd.options import executed_steps
from rsd.runtime.cuda_graph import Captured
from rsd.targets.openvla.images import tower_pixels
from rsd.targets.openvla.llama import StaticCache
from rsd.targets.openvla.loading import load_openvla
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.published import Settings, locate_openvla, locate_under, read_json
from rsd.targets.openvla.statistics import Statistics
from rsd.types import ACTION_DIM, CAMERAS, ActionChunk, ChunkStats, Observation, RsdError, check_observation

T = TypeVar("T")
PREPROCESSOR_FILE = "preprocessor_config.json"
RENDER_SIZE = 256  # pixels a side, what the published evaluation renders and then resizes to 224
PROMPT_LENGTHS = 16  # captured lengths kept; a suite of ten tasks has fewer


@dataclass(frozen=True)
class Decision:
    """actions: normalised float32 [B, H, 7]; hidden: [B, n, D] of the positions they were read from.

    passes: of the trunk after its prefill."""

    actions: Tensor
    hidden: Tensor
    passes: int


class Engine:
    """decode: one of `published.DECODERS`: `ar` (OpenVLA's 7 tokens), `l1` or `discrete` (OFT).

    graphs: capture in CUDA graphs; without effect on a CPU."""

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


class OpenVlaPolicy:
    """A loaded checkpoint. `predict` is the whole path of a control decision."""

    image_size = RENDER_SIZE

    def __init__(
        self,
        model: OpenVlaModel,
        prompt: Prompt,
        statistics: Statistics,
        normalisation: tuple[Tensor, Tensor],
        settings: Settings,
        *,
        graphs: bool = True,
        execute: int | None = None,
    ) -> None:
        """normalisation: means and standard deviations [6, 1, 1] of the two towers' channels; settings: resolved;
        execute: see `from_pretrained`."""
        self.model, self.prompt, self.statistics, self.settings = model, prompt, statistics, settings
        self.unnorm_key = statistics.key(settings.unnorm_key)
        self.decode = settings.decode or ""
        self.execute = executed_steps(execute, settings.chunk or 1)
        self.engine = Engine(model, self.decode, graphs=graphs)
        self._mean, self._std = (value.to(model.device) for value in normalisation)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def cameras(self) -> int:
        """How many of an observation's cameras are looked at, the first ones."""
        return self.settings.cameras or len(CAMERAS)

    def reset(self, seed: int | None = None) -> None:
        """A new episode begins; nothing is drawn, nor remembered from one prediction to the next."""

    def predict(self, observation: Observation, *, unnorm_key: str | None = None) -> ActionChunk:
        """Observation -> chunk float32 [H, 7], environment-ready: H = 8 with OFT (Bridge 5), 1 with `ar`.

        unnorm_key: another data set's statistics than the policy's own."""
        observation = check_observation(observation)
        watch = Stopwatch(self.device)
        with watch.stage("total"):
            decision = self._decide(observation, watch, unnorm_key)
            with watch.stage("decode"):
                actions = self._to_env(decision.actions[0], unnorm_key)
        stats = ChunkStats(self.decode, prefills=1, target_passes=decision.passes, latency_ms=watch.ms)
        return ActionChunk(actions, stats, self.execute)

    def features(self, observation: Observation) -> NDArray[np.float32]:
        """The trunk's final hidden states that the actions are read from: [56, D] with OFT, [7, D] with `ar`."""
        hidden = self._decide(observation, Stopwatch(self.device), None).hidden[0]
        return np.asarray(hidden.float().cpu().numpy())

    def _decide(self, observation: Observation, watch: Stopwatch, unnorm_key: str | None) -> Decision:
        with watch.stage("preprocess"), torch.inference_mode():
            pixels = self._pixels(observation.images)
            prompt = torch.tensor([self.prompt.ids(observation.instruction)], device=self.device)
            state = self._state(observation, unnorm_key)
        return self.engine(pixels, prompt, state, watch)

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """-> [1, cameras, 6, 224, 224], the same three channels normalised for either tower."""
        used = images[: self.settings.cameras]
        return tower_pixels(used, self._mean, self._std, center_crop=self.settings.center_crop).unsqueeze(0)

    def _state(self, observation: Observation, unnorm_key: str | None) -> Tensor | None:
        if self.model.proprio_projector is None:
            return None
        key = self.statistics.key(unnorm_key) if unnorm_key else self.unnorm_key
        state = self.statistics.state(key).normalise(observation.state)
        return torch.from_numpy(state[None]).float().to(self.device)

    def _to_env(self, actions: Tensor, unnorm_key: str | None) -> NDArray[np.float32]:
        """Normalised [H, 7] -> environment's units; the gripper from OpenVLA's 1 = open to -1 = open.

        Clipped to [-1, 1], as the simulator's controller does with what it is given."""
        key = self.statistics.key(unnorm_key) if unnorm_key else self.unnorm_key
        if not torch.isfinite(actions).all():
            raise RsdError("decoding gave non-finite actions: damaged weights or an odd precision for this checkpoint")
        restored = self.statistics.actions(key).restore(actions.double().cpu().numpy())
        restored[:, -1] = openvla_gripper_to_env(restored[:, -1])
        return np.clip(restored, -1.0, 1.0).astype(np.float32)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        decode: str | None = None,
        cameras: int | None = None,
        unnorm_key: str | None = None,
        suite: str | None = None,
        base: str | Path | None = None,
        dtype: torch.dtype | None = None,
        graphs: bool = True,
        execute: int | None = None,
        prepare: Callable[[OpenVlaModel], None] | None = None,
    ) -> OpenVlaPolicy:
        """Load a directory or hub repository in OpenVLA's format; `RsdError` names whatever is missing.

        decode, cameras, unnorm_key: see `Settings`; they come before what the directory's own file says.
        suite: names the statistics where nothing else does; like unnorm_key it is tried with `_no_noops`, too.
        base: the model under a LoRA adapter, needed only where the directory holds no merged weights.
        execute: steps of a chunk that are executed, None: all.
        graphs: CUDA graphs, on a GPU. prepare: is given the loaded model, to compile it or to quantise it."""
        check_device(device)
        directory = locate_openvla(path_or_hub_id)
        if directory is None:
            raise RsdError(f"{path_or_hub_id}: not in OpenVLA's format; load it with RsdPolicy")
        stored = Settings.load(directory)
        settings = replace(
            stored,
            decode=decode or stored.decode,
            cameras=cameras or stored.cameras,
            unnorm_key=unnorm_key or stored.unnorm_key or suite,
        ).resolve(directory)
        executed_steps(execute, settings.chunk or 1)
        statistics, prompt = Statistics.load(directory), Prompt(directory)  # before the 15 GB
        statistics.key(settings.unnorm_key)
        normalisation = read_normalisation(directory)
        under = locate_under(directory, base)
        model = load_openvla(directory, base=under, device=device, dtype=dtype, chunk=settings.chunk)
        if prepare is not None:
            prepare(model)
        return cls(model, prompt, statistics, normalisation, settings, graphs=graphs, execute=execute)


def read_normalisation(directory: Path) -> tuple[Tensor, Tensor]:
    """Means and standard deviations [6, 1, 1] from preprocessor_config.json.

    `tvf_normalize_params` comes first, as in the published code: its numbers were rounded to bfloat16."""
    path = directory / PREPROCESSOR_FILE
    content = read_json(path)
    tables = content.get("tvf_normalize_params")
    found: list[Any] = [
        [table[name] for table in tables] if tables else content.get(plural)
        for name, plural in (("mean", "means"), ("std", "stds"))
    ]
    values = [torch.tensor(value if value else [], dtype=torch.float32) for value in found]
    if any(value.shape != (2, 3) for value in values):
        raise RsdError(f"{path}: expected means and stds of two towers with three channels, found {found}")
    return values[0].reshape(6, 1, 1), values[1].reshape(6, 1, 1)
