"""Policies that are none of this package's checkpoints: a class of one's own, any openpi server, and either of them, or
any target, with a drafter that `rsd drafter distil` made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsd.evaluation.config import OF_THE_RULE, EvalConfig, option
from rsd.types import BEST, DRAFTER_ONLY, TARGET_ONLY, Policy, RsdError

if TYPE_CHECKING:
    from rsd.options import Choice
    from rsd.targets.remote.client import RemotePolicy
    from rsd.targets.remote.openpi import OpenpiPolicy

SKIPPING = "rsd-skip"
WITH_DRAFTER = (TARGET_ONLY, SKIPPING, DRAFTER_ONLY)
MINE = ("acceptance", "temperature", "engine", "batch")  # of this package's own models
OF_THE_GATE = ("skip_threshold_mm", *OF_THE_RULE, "target_at_reset", "audit")


def is_foreign(config: EvalConfig) -> bool:
    """As far as the options tell; of a server only its metadata do."""
    return config.custom or bool(config.drafter) or config.decode == TARGET_ONLY


def check_foreign(config: EvalConfig) -> None:
    """Raises RsdError for what cannot be asked of such a policy, and for a class or a drafter that is not there."""
    allowed = WITH_DRAFTER if config.drafter else (TARGET_ONLY,)
    if config.decode not in (*allowed, BEST):
        hint = "" if config.drafter else f"; with a --drafter (rsd drafter distil) also {SKIPPING}, {DRAFTER_ONLY}"
        found = f"--decode {config.decode}: {config.policy} decodes its own way, {TARGET_ONLY}"
        raise RsdError(f"{found}{hint if not config.drafter else f', expected one of {chr(44).join(allowed)}'}")
    refused = MINE if config.decode == SKIPPING else (*MINE, *OF_THE_GATE)
    if given := [option(name) for name in refused if getattr(config, name) != getattr(EvalConfig, name)]:
        raise RsdError(f"{', '.join(given)}: not with --policy {config.policy} --decode {config.decode}; leave it out")
    if config.custom:
        from rsd.targets.custom import find_class

        find_class(config.policy)
    if config.drafter:
        from rsd.targets.drafter_files import read_drafter

        read_drafter(Path(config.drafter))


def served(config: EvalConfig) -> RemotePolicy | OpenpiPolicy:
    """The policy at `config.policy`; `RsdError` where the options ask for another one."""
    from rsd.targets.remote.openpi import OpenpiPolicy, served_at  # of an extra

    remote = served_at(config.policy, config.num_open_loop_steps)
    own = () if isinstance(remote, OpenpiPolicy) else OF_THE_GATE
    mine = () if config.drafter else (*own, *MINE, "device")
    given = [option(name) for name in mine if getattr(config, name) != getattr(EvalConfig, name)]
    if given and isinstance(remote, OpenpiPolicy):
        remote.close()
        raise RsdError(f"{config.policy}: {', '.join(given)} cannot be chosen here: that server does not know of it")
    if given:
        remote.close()
        raise RsdError(f"{config.policy}: {', '.join(given)} cannot be chosen here; give it to `rsd serve`")
    if remote.decode != config.decode and not config.drafter:
        remote.close()
        raise RsdError(f"{config.policy}: decodes with {remote.decode}, asked for is --decode {config.decode}")
    return remote


def custom(config: EvalConfig) -> Policy:
    from rsd.targets.custom import CustomPolicy

    return CustomPolicy(config.policy, config.device, config.num_open_loop_steps)


def choice(config: EvalConfig) -> Choice | None:
    """What --decode best is for such a policy; None for others."""
    from rsd.options import Choice

    if config.drafter:
        return Choice(SKIPPING, "a drafter is given")
    if config.custom:
        return Choice(TARGET_ONLY, "it is a policy of one's own")
    if not config.served:
        return None
    from rsd.targets.remote.openpi import served_at

    remote = served_at(config.policy, config.num_open_loop_steps)
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


def alone(config: EvalConfig, horizon: int | None = None) -> EvalConfig:
    """The same target without its drafter, decoding as it does best; horizon: the drafter's, of whose steps a chunk is
    to be."""
    if None not in (horizon, config.num_open_loop_steps) and config.num_open_loop_steps != horizon:
        found = f"--num-open-loop-steps {config.num_open_loop_steps}"
        raise RsdError(f"{found}: {config.drafter} drafts {horizon} at once; leave it out, or distil another")
    given: dict[str, Any] = {name: getattr(EvalConfig, name) for name in OF_THE_GATE}
    given["num_open_loop_steps"] = horizon if config.custom or config.served else None
    return replace(config, drafter="", decode=BEST, **given)
