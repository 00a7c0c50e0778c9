"""What an evaluation asks of a policy behind a port."""

from __future__ import annotations

from typing import Any

from rsd.evaluation.config import EvalConfig, option
from rsd.targets.remote.client import RemotePolicy
from rsd.types import RsdError


def policy_for(config: EvalConfig) -> RemotePolicy:
    """The policy served at `config.policy`; `RsdError` where the options ask for another one."""
    own = ("acceptance", "temperature", "skip_threshold_mm", "max_skips", "memory_chunks", "target_at_reset", "audit")
    mine = (*own, "device", "batch", "engine")  # of the server
    if given := [option(name) for name in mine if getattr(config, name) != getattr(EvalConfig, name)]:
        raise RsdError(f"{config.policy}: {', '.join(given)} cannot be chosen here; give it to `rsd serve`")
    remote = RemotePolicy(config.policy)
    if remote.decode != config.decode:
        remote.close()
        raise RsdError(f"{config.policy}: decodes with {remote.decode}, asked for is --decode {config.decode}")
    return remote


def describe(config: EvalConfig) -> dict[str, Any]:
    """What names the served policy beyond doubt, and what it runs on."""
    remote = policy_for(config)
    remote.close()
    return {**remote.welcome.policy, "policy": config.policy, "server": remote.welcome.versions}
