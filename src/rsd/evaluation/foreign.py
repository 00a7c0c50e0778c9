"""Policies that are none of this package's checkpoints: a class of one's own, any openpi server, and either of them, or
any target, with a drafter that `rsd drafter distil` made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsd.evaluation.config import EvalConfig, option
from rsd.types import BEST, DRAFTER_ONLY, RSD_ASYNC, TARGET_ONLY, Policy, RsdError

if TYPE_CHECKING:
    from rsd.options import Choice
    from rsd.targets.remote.client import RemotePolicy
    from rsd.targets.remote.openpi import OpenpiPolicy

SKIPPING, FUSED = "rsd-skip", "rsd-fused"
WITH_DRAFTER = (TARGET_ONLY, SKIPPING, RSD_ASYNC, FUSED, DRAFTER_ONLY)
MINE = ("acceptance", "temperature", "engine", "batch")  # of this package's own models
OF_THE_GATE = ("skip_threshold_mm", "max_skips", "skips_per_agreement")  # of a distilled drafter's, and an audit
OF_A_MACHINE = ("device", "threads")  # a server has its own
OF_A_MEMORY = ("memory_chunks", "max_skips_held", "target_at_reset")  # a distilled drafter always looks at reset


def is_foreign(config: EvalConfig) -> bool:
    """As far as the options tell; of a server only its metadata do."""
    return config.custom or bool(config.drafter) or (config.served and config.decode == TARGET_ONLY) or config.lerobot


def check_foreign(config: EvalConfig) -> None:
    """Raises RsdError for what cannot be asked of such a policy, and for a class or a drafter that is not there."""
    allowed = WITH_DRAFTER if config.drafter else (TARGET_ONLY,)
    if config.decode not in (*allowed, BEST):
        more = f"with a --drafter (rsd drafter distil) also {', '.join(WITH_DRAFTER[1:])}"
        found = f"--decode {config.decode}: {config.policy} decodes its own way, {TARGET_ONLY}; {more}"
        raise RsdError(found)
    fused = config.decode == FUSED or config.continue_steps
    gated = config.decode == SKIPPING or (config.drafter and config.decode == BEST and not fused)
    refused = (*MINE, *OF_A_MEMORY) if gated else (*MINE, *OF_A_MEMORY, *OF_THE_GATE, "audit")
    if given := [option(name) for name in refused if getattr(config, name) != getattr(EvalConfig, name)]:
        raise RsdError(f"{', '.join(given)}: not with --policy {config.policy} --decode {config.decode}; leave it out")
    can = config.served  # its metadata tell
    if config.custom:
        from rsd.targets.custom import find_class

        can = hasattr(kind := find_class(config.policy), "continue_from")
        if fused and can and isinstance(getattr(kind, "num_inference_steps", None), int):  # else it is its instance's
            steps_left(config, kind)
    if fused and not can:
        raise cannot_continue(config)
    if config.drafter:
        from rsd.targets.drafter_files import read_drafter

        read_drafter(Path(config.drafter))


def cannot_continue(config: EvalConfig) -> RsdError:
    expected = "a target by diffusion or flow matching that continues from a draft (docs/your_policy.md)"
    return RsdError(f"--decode {FUSED}: expected {expected}, found {config.policy}; choose --decode {SKIPPING}")


def steps_left(config: EvalConfig, target: Any) -> int:
    """Denoising steps that a target takes from a draft, by default half of its own; `RsdError` where it cannot."""
    most = getattr(target, "num_inference_steps", 0)
    if not most:
        raise cannot_continue(config)
    steps = config.continue_steps or (most + 1) // 2
    if steps > most:
        raise RsdError(f"--continue-steps {steps}: expected at most {most}, all that {config.policy} takes")
    return int(steps)


def served(config: EvalConfig) -> RemotePolicy | OpenpiPolicy:
    """The policy at `config.policy`; `RsdError` where the options ask for another one."""
    from rsd.targets.remote.openpi import OpenpiPolicy, served_at  # of an extra

    remote = served_at(address(config), config.execute)
    theirs = isinstance(remote, OpenpiPolicy)
    mine = MINE if theirs else (*MINE, *OF_THE_GATE, *OF_A_MEMORY, "audit")
    mine = mine if config.lerobot else (*mine, *OF_A_MACHINE)
    if given := [option(name) for name in mine if getattr(config, name) != getattr(EvalConfig, name)]:
        remote.close()
        remedy = "that server does not know of it" if theirs or config.lerobot else "give it to `rsd serve`"
        raise RsdError(f"{config.policy}: {', '.join(given)} cannot be chosen here; {remedy}")
    if remote.decode != config.decode:
        remote.close()
        raise RsdError(f"{config.policy}: decodes with {remote.decode}, asked for is --decode {config.decode}")
    return remote


def address(config: EvalConfig) -> str:
    """Where the policy is served; LeRobot's process is started for it."""
    if not config.lerobot:
        return config.policy
    from rsd.targets.remote.lerobot import Asked, address_of

    return address_of(Asked(config.policy, config.device, config.execute, config.threads))


def custom(config: EvalConfig) -> Policy:
    from rsd.targets.custom import CustomPolicy

    return CustomPolicy(config.policy, config.device, config.execute)


def choice(config: EvalConfig) -> Choice | None:
    """What --decode best is for such a policy; None for others."""
    from rsd.options import Choice

    if config.drafter:
        return Choice(FUSED if config.continue_steps else SKIPPING, "a drafter is given")
    if config.custom or config.lerobot:
        return Choice(TARGET_ONLY, "it is LeRobot's" if config.lerobot else "it is a policy of one's own")
    if not config.served:
        return None
    from rsd.targets.remote.openpi import served_at

    remote = served_at(address(config), config.execute)
    remote.close()
    return Choice(remote.decode, "what it is served with")


def identity(config: EvalConfig) -> dict[str, Any] | None:
    """What names such a policy beyond doubt; None for others."""
    if config.custom:
        from rsd.targets.custom import identity as of_class

        return of_class(config.policy)
    if not config.served:
        return None
    from rsd.targets.remote.openpi import OpenpiPolicy, identity_of

    remote = served(config)
    remote.close()
    if isinstance(remote, OpenpiPolicy):
        return {"policy": config.policy, **identity_of(remote.metadata)}
    return {**remote.welcome.policy, "policy": config.policy, "server": remote.welcome.versions}


def alone(config: EvalConfig) -> EvalConfig:
    """The target of a drafter without it, decoding as it does best, with as many steps a chunk as are drafted."""
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

    horizon = ActionTokenizer.load(Path(config.drafter)).config.horizon
    if config.execute not in (None, horizon):
        found = f"--execute {config.execute}: {config.drafter} drafts {horizon} at once"
        raise RsdError(f"{found}; leave it out, or distil another")
    mine = [*OF_THE_GATE, "audit", "continue_steps", "delay", "drafter_delay", "meanwhile", "control_hz"]
    if config.served and not config.lerobot:  # a server has its own
        mine += OF_A_MACHINE
    given: dict[str, Any] = {name: getattr(EvalConfig, name) for name in mine}
    return replace(config, drafter="", decode=BEST, execute=horizon, **given)
