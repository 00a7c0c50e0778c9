"""RSD-VLA's policies as a LeRobot plugin: importing it registers the policy type `rsd`."""

from lerobot_policy_rsd.configuration_rsd import RsdConfig
from lerobot_policy_rsd.modeling_rsd import RsdPolicy
from lerobot_policy_rsd.processor_rsd import make_rsd_pre_post_processors

__all__ = ["RsdConfig", "RsdPolicy", "make_rsd_pre_post_processors"]
