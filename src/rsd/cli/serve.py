"""`rsd serve`: a policy behind a network port."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from rsd.checks import between
from rsd.cli.eval import check_names
from rsd.cli.parsing import UsageError
from rsd.evaluation.config import EvalConfig, PolicyOptions, option
from rsd.output import terminal
from rsd.targets.remote.lerobot import Asked, address_of, command
from rsd.types import LEROBOT, Steps, Threads

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeArguments(PolicyOptions):
    """Serve a policy over a WebSocket in openpi's protocol: its published client works unchanged.

    There is no authentication: who reaches the port drives the robot. Ctrl-C stops.
    """

    policy: str = PolicyOptions.policy
    """Everything that `rsd eval --policy` takes; ws://HOST:PORT, which is served already, with a --drafter."""
    drafter: str = ""
    """With --policy ws://HOST:PORT, anybody's server in openpi's protocol, or lerobot:DIR_OR_ID: a speculating proxy in
    front of it with this drafter (`rsd drafter distil`); with module:Class or file.py:Class that policy with it."""
    execute: Steps | None = PolicyOptions.execute
    """Steps of a chunk that its client executes, as of `rsd eval`; an answer holds the whole chunk."""
    statistics: str = EvalConfig.task_suite
    """Data set whose statistics scale a published OpenVLA checkpoint's actions, where its own files do not say."""
    threads: Threads = 0
    """Torch's threads on a CPU; 0 takes its own default, about one per core."""
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    """vla-eval: a model server of that harness (pip install 'rsd-vla[vla-eval]')."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is this machine only, 0.0.0.0 every machine that can reach it."""
    port: Annotated[int, between(0, (1 << 16) - 1)] = 8000
    """Port to listen at; 0 takes a free one."""

    @property
    def evaluated(self) -> EvalConfig:
        """The evaluation whose policy this is."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(PolicyOptions)}
        config = EvalConfig(**own, task_suite=self.statistics, drafter=self.drafter)
        if config.served:
            remedy = "expected a checkpoint, hub id or module:Class, or a --drafter to speculate in front of it"
            raise UsageError(f"--policy {self.policy}: is served already; {remedy}")
        if self.drafter and not config.custom:
            expected = "expected --policy ws://HOST:PORT, lerobot:DIR_OR_ID, module:Class or file.py:Class"
            remedy = "serve that alone, and a proxy with the drafter in front of it"
            raise UsageError(f"--drafter {self.drafter}: {expected}, found {self.policy}; {remedy}")
        return config


def run(options: ServeArguments) -> None:
    if options.policy.startswith(LEROBOT) and not options.drafter:
        refuse_others(options, ("execute", "device", "threads"), f"with --policy {options.policy}")
        line = command(Asked(options.policy, options.device, options.execute, options.threads))
        os.execv(line[0], [*line, "--host", options.host, "--port", str(options.port)])
    if options.drafter and options.policy.startswith(("ws://", "wss://", LEROBOT)):
        run_proxy(options)
        return
    asked = options.evaluated

    import torch

    from rsd.evaluation.backend import describe_checkpoint, settle
    from rsd.evaluation.cautions import cautions
    from rsd.serving.server import PolicyServer, reserve, until_signal
    from rsd.serving.service import load_served, versions_on
    from rsd.targets.openvla.published import locate_openvla

    door = reserve(options.host, options.port)
    config, note = settle(asked)
    check_names(config)
    if options.statistics != ServeArguments.statistics and locate_openvla(config.policy) is None:
        expected = "expected a checkpoint in OpenVLA's format beside it"
        raise UsageError(f"--statistics: {expected}, found {config.policy}, which has its own; leave it out")
    if options.threads:
        torch.set_num_threads(options.threads)
    console = terminal(stderr=True, highlight=False, soft_wrap=True)
    if note:
        console.print(note)
    for caution in cautions(config, suites=False):
        console.print(f"warning: {caution}", style="yellow", markup=False)
    what = f"{config.policy} decoding with {config.decode} on {config.device}"
    listening = partial(announce, console, options.host, what)
    policy = load_served(config)
    if options.protocol == "vla-eval":
        from rsd.serving.vla_eval import RsdModelServer, serve_vla_eval  # of an extra

        (host, port), server = door.getsockname()[:2], RsdModelServer(policy)
        door.close()  # vla-eval opens its own
        until_signal(lambda stop: serve_vla_eval(server, host, port, stop, listening))
    else:
        described = PolicyServer(policy, describe_checkpoint(config), versions_on(config.device), door)
        until_signal(lambda stop: described.run(stop, listening))
    console.print("stopped")


def announce(console: Console, host: str, what: str, address: str) -> None:
    """host: the address that was asked for; address: what is listened at."""
    console.print(f"{what} at {address}; Ctrl-C stops")
    if host not in LOCAL:
        console.print("no authentication: who reaches this port drives the robot", style="yellow")


def refuse_others(options: ServeArguments, known: Sequence[str], where: str) -> None:
    """`UsageError` for a given option that has no meaning there."""
    for entry in fields(options):
        if entry.name not in ("policy", *known, "host", "port") and getattr(options, entry.name) != entry.default:
            raise UsageError(f"{option(entry.name)}: not {where}; leave it out")


def run_proxy(options: ServeArguments) -> None:
    """Speculate in front of somebody else's server."""
    from rsd.evaluation.foreign import OF_THE_GATE

    refuse_others(options, ("drafter", *OF_THE_GATE, "device", "threads"), "of a proxy with --drafter")

    import torch

    from rsd.devices import check_device
    from rsd.serving.proxy import SpeculatingProxy
    from rsd.serving.server import reserve, until_signal
    from rsd.targets.black_box import load_drafter
    from rsd.targets.drafter_files import check_belongs, nameless
    from rsd.targets.remote.openpi import identity_of, metadata_at

    check_device(options.device)
    door = reserve(options.host, options.port)
    if options.threads:
        torch.set_num_threads(options.threads)
    drafter = load_drafter(Path(options.drafter), options.device)
    address = options.policy
    if address.startswith(LEROBOT):
        address = address_of(Asked(options.policy, options.device, drafter.horizon, options.threads))
    metadata = metadata_at(address)
    check_belongs(drafter.stored, identity_of(metadata), options.drafter)
    skip = drafter.skip_rule(*(getattr(options, name) for name in OF_THE_GATE))
    console = terminal(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"a draft has {drafter.horizon} actions: clients execute no more, or rsd drafter distil --execute N")
    for caution in nameless(options.drafter, options.policy):
        console.print(f"warning: {caution}", style="yellow", markup=False)
    listening = partial(announce, console, options.host, f"{options.drafter} drafts for {options.policy}")
    proxy = SpeculatingProxy(address, metadata, drafter, skip, door)
    until_signal(lambda stop: proxy.serve(stop, listening))
    console.print("stopped")
