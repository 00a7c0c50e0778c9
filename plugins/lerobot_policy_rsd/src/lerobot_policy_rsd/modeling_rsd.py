"""A checkpoint of RSD-VLA as a LeRobot policy: batches row by row or together, a queue of actions, an episode's memory
for every row."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_rsd.configuration_rsd import STATE, RsdConfig
from rsd import hub
from rsd.checkpoint import locate_checkpoint
from rsd.decoding.state import EpisodeState
from rsd.options import DecodeOptions, RuntimeOptions
from rsd.policy import Prediction, load_policy
from rsd.targets.remote.request import resized
from rsd.types import RSD_ASYNC, ActionChunk, Observation, RsdError

CHECKPOINT = "rsd"  # the folder of RSD-VLA's own files in a LeRobot policy's directory
FILES = ["*.json", f"{CHECKPOINT}/**"]


class RsdPolicy(PreTrainedPolicy):
    """`reset` begins an episode in every row, as LeRobot's rollouts do. A row whose environment begins anew by itself
    goes on with the memory that it has; LeRobot does not count what comes after an episode's end."""

    config_class, name = RsdConfig, "rsd"

    def __init__(self, config: RsdConfig, checkpoint: Path | None = None, **_: Any) -> None:
        """checkpoint: RSD-VLA's directory; by default the folder `rsd` of `config.pretrained_path`."""
        super().__init__(config)
        config.validate_features()
        if checkpoint is None and not config.pretrained_path:
            raise RsdError("policy type rsd: expected a checkpoint, found none; python -m lerobot_policy_rsd makes one")
        self.checkpoint = checkpoint or located(str(config.pretrained_path)) / CHECKPOINT
        decode = DecodeOptions(config.decode, config.acceptance or None, execute=config.execute or None)
        runtime = RuntimeOptions(str(config.device), config.engine, config.max_batch)
        self.core = load_policy(self.checkpoint, decode, runtime)
        if self.core.decode == RSD_ASYNC:
            raise RsdError(f"decode {RSD_ASYNC}: LeRobot corrects no actions under way; choose another, rsd-fused say")
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> RsdPolicy:
        """A directory that `python -m lerobot_policy_rsd` made, or a hub id of one."""
        directory = located(str(pretrained_name_or_path))
        config = config or PreTrainedConfig.from_pretrained(directory)
        if not isinstance(config, RsdConfig):
            raise RsdError(f"{directory}: expected a policy of type rsd, found {config.type}")
        return cls(config, directory / CHECKPOINT, **kwargs).eval()

    def _save_pretrained(self, save_directory: Path, **_: Any) -> None:
        self.config._save_pretrained(save_directory)
        shutil.copytree(self.checkpoint, save_directory / CHECKPOINT, dirs_exist_ok=True)

    def reset(self) -> None:
        """An episode begins in every row."""
        self._states: list[EpisodeState | None] = []
        self._pending: list[Any] = []
        self._actions: deque[Tensor] = deque()

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action of every row [B, 7]; a new chunk where the last one is used up."""
        if not self._actions or len(self._actions[0]) != len(batch[STATE]):
            self._actions = deque(self.predict_action_chunk(batch)[:, : self.core.execute].transpose(0, 1))
        return self._actions.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Whole chunks [B, H, 7], environment-ready; the rows' episodes go on with them."""
        observations = self.observations(batch)
        if len(self._states) != len(observations):
            self._states, self._pending = [None] * len(observations), []
        self._verify()
        chunks: list[ActionChunk] = []
        states: list[EpisodeState | None] = []
        for begin in range(0, len(observations), self.core.ops.rows):
            rows = slice(begin, begin + self.core.ops.rows)
            found: Prediction = self.core.predict(observations[rows], self._states[rows])
            chunks, states = chunks + found.chunks, [*states, *found.states]
            self._pending.append((rows, found.pending))
        self._states = states
        return torch.from_numpy(np.stack([chunk.actions for chunk in chunks]))

    def _verify(self) -> None:
        """What `draft-first` left to be looked at of the chunks before."""
        for rows, pending in self._pending:
            if pending is not None:
                self._states[rows] = self.core.verify_pending(pending).states
        self._pending = []

    def observations(self, batch: dict[str, Any]) -> list[Observation]:
        """LeRobot's batch -> one observation a row: float [B, 3, H, W] in [0, 1] back to uint8 [S, S, 3]."""
        keys = (self.config.image_key, self.config.wrist_image_key)
        views = [pixels(key, batch, self.core.image_size) for key in keys]
        states, tasks = np.asarray(batch[STATE].cpu(), np.float32), batch.get("task")
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or len(tasks) != len(states):
            raise RsdError(f"task: expected {len(states)} instructions, one a row, found {tasks!r:.80}")
        rows = zip(*views, states, tasks, strict=True)
        return [Observation(np.stack([main, wrist]), state, task) for main, wrist, state, task in rows]

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        raise RsdError("policy type rsd: trained by `rsd train policy`, not by LeRobot")

    def get_optim_params(self) -> dict[str, Any]:
        raise RsdError("policy type rsd: trained by `rsd train policy`, not by LeRobot")


def pixels(key: str, batch: dict[str, Any], size: int) -> list[np.ndarray]:
    """Each row's image, uint8 [size, size, 3]."""
    if key not in batch:
        raise RsdError(f"{key}: expected an image, found {', '.join(batch)}; name the keys in the policy's options")
    images = batch[key].detach().cpu()
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise RsdError(f"{key}: expected float [B, 3, H, W] in [0, 1], found {images.dtype} {list(images.shape)}")
    if not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise RsdError(f"{key}: expected numbers in [0, 1], found {images.min():.3g} to {images.max():.3g}")
    whole = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [resized(key, image, size) for image in whole]


def located(name: str) -> Path:
    """The LeRobot policy's directory, here or from the hub."""
    directory = hub.locate(name, "policy", "a directory that `python -m lerobot_policy_rsd` made", FILES)
    if not (directory / CHECKPOINT).is_dir():
        raise RsdError(f"policy {name}: expected the folder {CHECKPOINT} in it; python -m lerobot_policy_rsd makes one")
    return directory


def export(checkpoint: str, directory: Path, **options: Any) -> None:
    """Write a LeRobot policy's directory of RSD-VLA's checkpoint; nothing that is there is overwritten."""
    from lerobot_policy_rsd.processor_rsd import make_rsd_pre_post_processors  # which is not needed to load one

    source = locate_checkpoint(checkpoint)
    if directory.exists():
        raise RsdError(f"{directory}: is there already; name another directory, or remove it")
    policy = RsdPolicy(RsdConfig(**options), source)
    directory.mkdir(parents=True)
    policy._save_pretrained(directory)
    for pipeline in make_rsd_pre_post_processors(policy.config):
        pipeline.save_pretrained(directory)
