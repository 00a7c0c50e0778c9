"""Any LeRobot policy with its pre- and post-processors, as RSD-VLA's server takes a policy.

A session's episode is a copy of the policy that shares its weights: LeRobot keeps an episode's queues inside.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from lerobot.utils.import_utils import register_third_party_plugins
from torch import nn

from lerobot_policy_rsd.continuing import inference_steps, steps_left
from rsd import hub
from rsd.checks import ImageSize, checked, told
from rsd.chunks import environment_ready
from rsd.manifest import file_sha256
from rsd.types import ACTION_DIM, STATE_DIM, TARGET_ONLY, ActionChunk, ChunkStats, Observation, RsdError
from rsd.words import FLAGS, word_flags

RENDERED = 256  # pixels a side, of a policy without cameras
FILES = ["*.json", "*.safetensors"]
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
SHARED = ("_parameters", "_buffers", "_modules", "config")  # of a policy's attributes: no episode's


@dataclass
class Episode:
    """policy: the episode's copy; passes: predictions so far."""

    policy: PreTrainedPolicy
    passes: int = 0


class HostedPolicy:
    """predict(observations, states) -> chunks, states, None, as `SpeculativePolicy` has it.

    A policy of one observation gives its whole chunk, of which LeRobot executes `n_action_steps`. One that looks at
    several steps, or averages over time, is asked before every action, unless `execute` says how many of its actions
    to take: its history is then the present observation."""

    decode, cameras = TARGET_ONLY, 2

    def __init__(self, name: str, device: str, execute: int | None = None) -> None:
        register_third_party_plugins()
        self.name, self.directory = name, hub.locate(name, "policy", "a LeRobot policy's directory", FILES)
        for needed in ("config.json", *PROCESSORS):
            if not (self.directory / needed).is_file():
                migrate = "python -m lerobot.processor.migrate_policy_normalization brings older policies up to date"
                raise RsdError(f"policy {name}: expected {needed} in it, found none; {migrate}")
        try:
            self.policy, self.config = load(self.directory, device)
            moved = {"device_processor": {"device": device}}
            self.before, self.after = make_pre_post_processors(
                self.config, str(self.directory), preprocessor_overrides=moved
            )
        except RsdError:
            raise
        except Exception as error:
            raise RsdError(f"policy {name}: LeRobot cannot load it ({type(error).__name__}: {told(error)})") from error
        self.keys, self.image_size = camera_keys(self.config, name), image_size(self.config, name)
        check_features(self.config, name)
        self.whole = not has_queue(self.policy)
        most = int(getattr(self.config, "n_action_steps", 1))
        self.horizon = execute or (1 if needs_every_step(self.policy) else most)
        self.execute = self.horizon
        self.num_inference_steps = inference_steps(self.policy) if self.horizon > 1 else 0  # of one action no draft
        longest = int(getattr(self.config, "chunk_size", most)) if self.whole else most
        if self.execute > longest:
            raise RsdError(f"--execute {execute}: expected at most {longest}, all that policy {name} gives")
        self.begin()  # a policy that cannot be copied is one that cannot be served

    def begin(self) -> Episode:
        """A new episode: the attributes that LeRobot keeps of one are its own, weights are shared."""
        policy = copy.copy(self.policy)
        for key, value in vars(self.policy).items():
            if key not in SHARED and not isinstance(value, nn.Module):
                policy.__dict__[key] = copy.deepcopy(value)
        policy.reset()
        episode = Episode(policy)
        inner = policy.predict_action_chunk

        def counted(*arguments: Any, **named: Any) -> Any:
            episode.passes += 1
            return inner(*arguments, **named)

        policy.predict_action_chunk = counted
        return episode

    def predict(
        self,
        observations: Sequence[Observation],
        states: Sequence[Episode | None],
        draft: tuple[np.ndarray, int] | None = None,
    ) -> tuple[list[ActionChunk], list[Episode], None]:
        """One observation, and its episode or None at its start. draft: actions [H, 7] to continue from, and how many
        denoising steps to take. latency_ms: `total`, processors included."""
        (observation,), (episode,) = observations, states
        if draft is not None and draft[1] > self.num_inference_steps:
            found = f"expected at most {self.num_inference_steps}, the denoising steps of {self.name}, found {draft[1]}"
            raise RsdError(f"steps: {found}")
        episode = episode or self.begin()
        start, asked = time.perf_counter(), episode.passes
        actions = self.actions(episode.policy, observation, draft)
        latency = {"total": 1e3 * (time.perf_counter() - start)}
        if not observation.images.any():  # nobody's view: the server's own warm-up, whose actions nobody executes
            actions = np.clip(np.nan_to_num(actions), -1, 1)
        stats = ChunkStats(self.decode, prefills=episode.passes - asked, latency_ms=latency)
        return [ActionChunk(environment_ready(actions, self.name), stats, self.execute)], [episode], None

    def verify_pending(self, pending: Any) -> Any:
        raise RsdError("a LeRobot policy leaves nothing pending")

    @torch.inference_mode()
    def actions(
        self, policy: PreTrainedPolicy, observation: Observation, draft: tuple[np.ndarray, int] | None = None
    ) -> np.ndarray:
        """[n, 7] as the post-processor gives them. The pre-processor normalises a draft by the policy's statistics."""
        seen: dict[str, Any] = {
            key: torch.from_numpy(np.ascontiguousarray(view)).permute(2, 0, 1)[None].float() / 255
            for key, view in zip(self.keys, observation.images, strict=True)
            if key
        }
        seen |= {OBS_STATE: torch.from_numpy(observation.state.copy())[None], "task": [observation.instruction]}
        if OBS_ENV_STATE in self.config.input_features:
            seen[OBS_ENV_STATE] = torch.from_numpy(word_flags(observation.instruction))[None]
        if draft is None:
            chosen = self.chosen(policy, self.before(seen))
        else:
            batch = self.before({**seen, ACTION: torch.from_numpy(draft[0].copy())[None]})
            with steps_left(policy, batch.pop(ACTION), draft[1]) as noise:
                chosen = self.chosen(policy, batch, noise=noise)
        return self.after(chosen).float().cpu().numpy()

    def chosen(self, policy: PreTrainedPolicy, batch: dict[str, Any], **noise: torch.Tensor) -> torch.Tensor:
        """Normalised actions [n, 7]. noise: of a policy that denoises, where to begin."""
        if self.whole:
            return policy.predict_action_chunk(batch, **noise)[0]
        if self.horizon == 1:
            return policy.select_action(batch)
        policy.reset()
        return torch.cat([policy.select_action(dict(batch), **noise) for _ in range(self.horizon)])

    @property
    def identity(self) -> dict[str, Any]:
        """What names the policy beyond doubt."""
        paths = sorted(path for pattern in FILES for path in self.directory.glob(pattern))
        hashes = {path.name: file_sha256(path) for path in paths}
        return {"policy": self.name, "type": self.config.type, "execute": self.execute, "sha256": hashes}


def load(directory: Path, device: str) -> tuple[PreTrainedPolicy, PreTrainedConfig]:
    """The policy with all of its weights: what is missing in the file is an error."""
    config = PreTrainedConfig.from_pretrained(directory)
    if config.type == "rsd" or getattr(config, "use_peft", False):
        remedy = "rsd eval --policy DIR/rsd" if config.type == "rsd" else "merge it into its policy first"
        raise RsdError(f"{directory}: a policy of type {config.type}, or an adapter, is not for this; {remedy}")
    config.device, config.pretrained_path = device, directory
    if hasattr(config, "pretrained_backbone_weights"):
        config.pretrained_backbone_weights = None  # to be downloaded, and then overwritten by the policy's own
    policy = get_policy_class(config.type).from_pretrained(directory, config=config, strict=True)
    return policy, config


def needs_every_step(policy: PreTrainedPolicy) -> bool:
    """Whether it has to see every control step: it looks at several, or averages."""
    config = policy.config
    return getattr(config, "temporal_ensemble_coeff", None) is not None or getattr(config, "n_obs_steps", 1) > 1


def has_queue(policy: PreTrainedPolicy) -> bool:
    """Whether it predicts from what its own queue keeps of the observations."""
    queues = getattr(policy, "_queues", None) or {}
    return needs_every_step(policy) or any(key != ACTION for key in queues)


def camera_keys(config: PreTrainedConfig, name: str) -> tuple[str, str]:
    """The keys of the scene's camera and of the wrist's; "" for one that the policy does not look at."""
    keys = [key for key in config.image_features if "empty" not in key]
    wrist = [key for key in keys if "wrist" in key or "hand" in key or key.endswith("2")]
    main = [key for key in keys if key not in wrist]
    if len(main) > 1 or len(wrist) > 1:
        expected = "at most two cameras, that of the wrist named with wrist, hand or a 2 at its end"
        raise RsdError(f"policy {name}: expected {expected}, found {', '.join(keys)}")
    return ("".join(main), "".join(wrist))


def image_size(config: PreTrainedConfig, name: str) -> int:
    """Pixels a side, as the policy was trained on them."""
    shapes = {tuple(feature.shape) for key, feature in config.image_features.items() if "empty" not in key}
    if len(shapes) > 1 or any(shape[1] != shape[2] for shape in shapes):
        raise RsdError(f"policy {name}: expected square images of one size, found {sorted(shapes)}")
    return checked(ImageSize, next((shape[1] for shape in shapes), RENDERED), f"policy {name}: images")


def check_features(config: PreTrainedConfig, name: str) -> None:
    """`RsdError` for what LIBERO does not have."""
    known, mine = config.input_features or {}, {OBS_STATE: (STATE_DIM,), OBS_ENV_STATE: (FLAGS,)}
    numbers = {key: tuple(feature.shape) for key, feature in known.items() if feature.type is not FeatureType.VISUAL}
    others = [f"{key} {list(shape)}" for key, shape in numbers.items() if mine.get(key) != shape]
    action = (config.output_features or {}).get(ACTION)
    if others or not action or tuple(action.shape) != (ACTION_DIM,):
        found = f"{', '.join(others) or 'no others'}, and actions {action and list(action.shape)}"
        words = f"words [{FLAGS}] ({OBS_ENV_STATE}, of `rsd demos export --words`)"
        expected = f"cameras, a state [{STATE_DIM}] and {words} at most, actions [{ACTION_DIM}]"
        raise RsdError(f"policy {name}: expected {expected}, found {found}")
