"""The options of the policy type `rsd`, each also `--policy.NAME=...` of LeRobot's commands."""

from dataclasses import dataclass
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature

from rsd.types import AUTO, BEST, RsdError

STATE = "observation.state"
RENDERED = 256  # pixels a side, what LeRobot's LIBERO draws


@PreTrainedConfig.register_subclass("rsd")
@dataclass
class RsdConfig(PreTrainedConfig):
    """A checkpoint of RSD-VLA. Image keys: the camera that looks at the scene, and that of the wrist."""

    image_key: str = "observation.images.image"
    wrist_image_key: str = "observation.images.image2"
    decode: str = BEST
    """A decoder of RSD-VLA, as `rsd eval --decode`."""
    acceptance: str = ""
    """A rule for drafted levels, as `rsd eval --acceptance`; "": the checkpoint's."""
    execute: int = 0
    """Steps of a chunk before the next one; 0: the checkpoint's."""
    engine: str = AUTO
    """As `rsd eval --engine`."""
    max_batch: int = 1
    """Rows decoded at once, good on a GPU; 1 decodes row by row, which gives what `rsd eval` gives bit for bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.input_features = self.input_features or {
            self.image_key: PolicyFeature(FeatureType.VISUAL, (3, RENDERED, RENDERED)),
            self.wrist_image_key: PolicyFeature(FeatureType.VISUAL, (3, RENDERED, RENDERED)),
            STATE: PolicyFeature(FeatureType.STATE, (8,)),
        }
        self.output_features = self.output_features or {"action": PolicyFeature(FeatureType.ACTION, (7,))}

    def validate_features(self) -> None:
        """Raises RsdError where a camera or the state is missing."""
        known = self.input_features or {}
        if missing := [key for key in (self.image_key, self.wrist_image_key, STATE) if key not in known]:
            raise RsdError(f"input features: expected {', '.join(missing)}, found {', '.join(known)}; name the cameras")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise RsdError("policy type rsd: trained by `rsd train policy`, not by LeRobot")

    def get_scheduler_preset(self) -> Any:
        return None
