"""A policy of residual tokens on an OpenVLA checkpoint: what training added, and a reference to what it was added to.

The directory: `config.json` (sizes, the base and its fingerprint, hashes, provenance), `model.safetensors` (heads,
proprioception, drafts), `lora_adapter/` (PEFT's format, merged on load), `tokenizer.json` (the action code) and, for
`rsd-skip`, `skip_calibration.json`. The base's 15 GB stay where they are; a directory or link `base` inside the
policy's own says where that is on another machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsd.checkpoint import BACKBONE, OPENVLA, WEIGHTS_FILE, load_weights, parse_config, require_finite, write_content
from rsd.checks import Rules
from rsd.decoding.state import PolicyInput
from rsd.manifest import BASE_LINK
from rsd.models.bundle import RsdModel, code_sizes
from rsd.models.config import OwnDecoding
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.models.target import STATE_FEATURES, state_features
from rsd.models.text import word_ids
from rsd.models.visual_drafter import VisualDrafterConfig
from rsd.options import Checkpoint, DecodeOptions, RuntimeOptions
from rsd.policy import SpeculativePolicy, TextCache
from rsd.pt_files import save_tensors
from rsd.targets.openvla.images import tower_pixels
from rsd.targets.openvla.loading import load_openvla, merge_adapter, tensors
from rsd.targets.openvla.lora import Adapter
from rsd.targets.openvla.model import OpenVlaModel, ProprioProjector
from rsd.targets.openvla.policy import PREPROCESSOR_FILE, RENDER_SIZE, read_normalisation
from rsd.targets.openvla.prompt import TOKENIZER_FILE as PROMPT_FILE
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.published import (
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    fingerprint,
    locate_openvla,
    locate_under,
)
from rsd.targets.openvla.statistics import Bounds
from rsd.targets.openvla.target import OpenVlaTarget, OpenVlaVisualDrafter
from rsd.tokenizer.action_tokenizer import FILE_NAME as TOKENIZER_FILE
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import STATE_DIM, Observation, RsdError

BASE_FILES = (
    *(CONFIG_FILE, "model*.safetensors", "model.safetensors.index.json", PROMPT_FILE, PREPROCESSOR_FILE),
    f"{ADAPTER_DIR}/*",
)
"""What of the base a prediction depends on: other files may come and go."""


@dataclass(frozen=True)
class OpenVlaRsdConfig(OwnDecoding):
    """Sizes and decoding defaults, as `PolicyConfig`, and how observations are scaled.

    state_low, state_high: what becomes -1 and 1 in the 8 numbers of the state for the target; state_mean, state_std: of
    the 11 state features for the visual drafter."""

    cameras: int = 2
    center_crop: bool = True
    state_low: tuple[float, ...] = (-1.0,) * STATE_DIM
    state_high: tuple[float, ...] = (1.0,) * STATE_DIM
    state_mean: tuple[float, ...] = (0.0,) * STATE_FEATURES
    state_std: tuple[float, ...] = (1.0,) * STATE_FEATURES
    feature_drafter: DrafterConfig = field(default_factory=lambda: DrafterConfig(dim=256))
    visual_drafter: VisualDrafterConfig | None = field(default_factory=VisualDrafterConfig)

    def rules(self) -> Rules:
        yield from super().rules()
        sizes = tuple(map(len, (self.state_low, self.state_high, self.state_mean, self.state_std)))
        fits = sizes == (STATE_DIM, STATE_DIM, STATE_FEATURES, STATE_FEATURES) and self.cameras in (1, 2)
        expected = f"state_low and _high of {STATE_DIM}, state_mean and _std of {STATE_FEATURES}, cameras 1 or 2"
        yield fits, expected, f"{sizes} numbers, cameras {self.cameras}"

    @property
    def bounds(self) -> Bounds:
        low, high = np.array(self.state_low), np.array(self.state_high)
        return Bounds(low, high, np.ones(len(low), dtype=bool))

    @property
    def views(self) -> int:
        """Cameras that any reader needs: the visual drafter always has both."""
        return 2 if self.visual_drafter else self.cameras


class OpenVlaRsdModel(RsdModel):
    """Target on OpenVLA's trunk, and drafts, in the base's precision and on its device.

    The base loses its own action head and, where it has none, gets a fresh proprioception projector."""

    target: OpenVlaTarget
    visual_drafter: OpenVlaVisualDrafter | None

    def __init__(self, openvla: OpenVlaModel, config: OpenVlaRsdConfig, tokenizer: ActionTokenizer) -> None:
        sizes, dim, visual = code_sizes(tokenizer), openvla.config.llama.dim, config.visual_drafter
        openvla.action_head = None
        openvla.proprio_projector = openvla.proprio_projector or ProprioProjector(dim)
        target = OpenVlaTarget(openvla, *sizes, config.cameras)
        feature_drafter = FeatureDrafter(config.feature_drafter, *sizes, dim)
        super().__init__(target, feature_drafter, OpenVlaVisualDrafter(visual, *sizes, dim) if visual else None)
        self.to(openvla.device)
        for part in (openvla.proprio_projector, self.feature_drafter, self.visual_drafter):
            if part is not None:
                part.to(openvla.dtype)
        self.target.state_mean.copy_(torch.tensor(config.state_mean))
        self.target.state_std.copy_(torch.tensor(config.state_std))

    def added(self) -> nn.ModuleDict:
        """Everything that the base does not have, and its proprioception: what `model.safetensors` holds."""
        names = ("block", "level_head", "parallel_head", "gripper_head", "residual_head")
        parts: dict[str, nn.Module] = {name: getattr(self.target, name) for name in names}
        assert self.target.openvla.proprio_projector is not None
        parts |= {"proprio": self.target.openvla.proprio_projector, "feature_drafter": self.feature_drafter}
        return nn.ModuleDict(parts | ({"visual_drafter": self.visual_drafter} if self.visual_drafter else {}))


class OpenVlaBody:
    """How observations become OpenVLA's input: pixels [B, views, 6, 224, 224], state [B, 19], prompt ids [B, T] and the
    drafter's condition [B, Dt]. What a drafter remembers was read under one prompt."""

    compact, prompted, image_size = False, True, RENDER_SIZE

    def __init__(
        self,
        model: OpenVlaRsdModel,
        config: OpenVlaRsdConfig,
        prompt: Prompt,
        normalisation: tuple[Tensor, Tensor],
        directory: Path | None = None,
    ) -> None:
        """normalisation: see `OpenVlaPolicy`; directory: where the policy was loaded from."""
        self.model, self.config, self.directory = model, config, directory
        self.cameras = config.views
        self._mean, self._std = (value.to(model.target.state_mean.device) for value in normalisation)
        self._texts = TextCache(partial(read_text, model, prompt))

    def __call__(self, observations: Sequence[Observation]) -> PolicyInput:
        if len({observation.instruction for observation in observations}) > 1:
            raise RsdError("OpenVLA: expected one instruction in a batch, prompts of several lengths do not fit one")
        config, device, count = self.config, self.model.target.state_mean.device, len(observations)
        images = np.concatenate([observation.images[: config.views] for observation in observations])
        pixels = tower_pixels(images, self._mean, self._std, center_crop=config.center_crop)
        raw = np.stack([observation.state for observation in observations])
        given = torch.from_numpy(config.bounds.normalise(raw)).float()
        state = torch.cat([given, state_features(torch.from_numpy(raw))], dim=1).to(device)
        prompt, words = self._texts(observations[0].instruction)
        text = prompt.expand(count, -1), words.expand(count, -1)
        return PolicyInput(pixels.unflatten(0, (count, -1)), state, text)

    def save(self, directory: Path) -> None:
        """Copy the directory that the policy was loaded from: its adapter is merged and cannot be taken out again."""
        if self.directory is None:
            raise RsdError("OpenVLA: this policy was not loaded from a directory; `save_openvla_rsd` writes one")
        ignored = shutil.ignore_patterns(BASE_LINK)
        shutil.copytree(self.directory, directory, ignore=ignored, dirs_exist_ok=True)


def read_text(model: OpenVlaRsdModel, prompt: Prompt, instruction: str) -> tuple[Tensor, Tensor]:
    """Prompt ids [1, T] and the drafter's condition [1, Dt]."""
    device, drafter = model.target.state_mean.device, model.visual_drafter
    words = word_ids([instruction]).to(device)
    ids = torch.tensor([prompt.ids(instruction)], device=device)
    return ids, words if drafter is None else drafter.encode(words)


def check_files(directory: Path, content: dict[str, Any]) -> None:
    """`RsdError` for odd sizes and for a base that is not there, or is another one; no weights are read."""
    parse_config(directory, content, OpenVlaRsdConfig)
    find_base(directory, content["base"])


def parts(directory: Path, content: dict[str, Any]) -> tuple[OpenVlaRsdConfig, dict[str, Tensor]]:
    """Configuration, and the weights that were added to the base, which is not looked at."""
    added = dict(tensors(directory / WEIGHTS_FILE, "cpu"))
    adapter = dict(tensors(directory / ADAPTER_DIR / ADAPTER_WEIGHTS, "cpu"))
    named = {f"{ADAPTER_DIR}.{name.removeprefix('base_model.model.')}": value for name, value in adapter.items()}
    return parse_config(directory, content, OpenVlaRsdConfig), {**added, **named}


def load(
    directory: Path, content: dict[str, Any], facts: Checkpoint, options: DecodeOptions, runtime: RuntimeOptions
) -> SpeculativePolicy:
    """What `rsd.policy.load_policy` calls for such a directory; content: its config.json."""
    config = parse_config(directory, content, OpenVlaRsdConfig)
    tokenizer = ActionTokenizer.load(directory)
    base = find_base(directory, content["base"])
    prompt, normalisation = Prompt(base), read_normalisation(base)
    openvla = load_openvla(base, base=locate_under(base), device=runtime.device)
    merge_adapter(openvla, directory / ADAPTER_DIR)
    model = OpenVlaRsdModel(openvla, config, tokenizer)
    load_weights(model.added(), directory / WEIGHTS_FILE)
    return SpeculativePolicy(
        model,
        tokenizer,
        config,
        options,
        runtime,
        body=OpenVlaBody(model, config, prompt, normalisation, directory),
        facts=facts,
        provenance={**content.get("provenance", {}), "base": content["base"]},
    )


def find_base(directory: Path, reference: dict[str, str]) -> Path:
    """The model that a policy was trained on: `base` in its directory, else the path or hub id of its config.json.

    `RsdError` if it is not there, or is another one."""
    link, named = directory / BASE_LINK, reference["path"]
    source = str(link) if link.is_dir() else named
    remedy = f"link or copy the directory that it was trained on to {link}"
    try:
        base = locate_openvla(source)
    except RsdError as error:
        raise RsdError(f"{directory}: its base model is not here ({error}); {remedy}") from None
    if base is None:
        raise RsdError(f"{directory}: its base model {source} is not in OpenVLA's format; {remedy}")
    found = fingerprint(base, BASE_FILES)
    if found != reference["fingerprint"]:
        raise RsdError(
            f"{directory}: was trained on another base model: expected the fingerprint {reference['fingerprint'][:12]} "
            f"({named}), found {found[:12]} ({base}); {remedy}"
        )
    return base


def save_openvla_rsd(
    added: nn.Module,
    adapter: Adapter,
    tokenizer: ActionTokenizer,
    config: OpenVlaRsdConfig,
    base: Path,
    named: str,
    provenance: dict[str, Any],
    directory: Path,
) -> None:
    """Write the directory. added: `OpenVlaRsdModel.added`; base: the base's directory; named: its path or hub id."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in added.state_dict().items()}
    updates = {f"{ADAPTER_DIR} {name}": value for name, value in adapter.updates.state_dict().items()}
    require_finite({**weights, **updates}, directory)
    save_tensors(weights, directory / WEIGHTS_FILE)
    adapter.save(directory / ADAPTER_DIR, named)
    tokenizer.save(directory)
    files = (WEIGHTS_FILE, TOKENIZER_FILE, f"{ADAPTER_DIR}/{ADAPTER_CONFIG}", f"{ADAPTER_DIR}/{ADAPTER_WEIGHTS}")
    reference = {"path": named, "fingerprint": fingerprint(base, BASE_FILES)}
    fields = {BACKBONE: OPENVLA, "policy": asdict(config), "base": reference}
    write_content(directory, fields, files, provenance)
