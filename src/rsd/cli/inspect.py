"""`rsd inspect`: what a checkpoint or a run holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console

from rsd.cli.parsing import parse


@dataclass(frozen=True)
class InspectArguments:
    """Show what a checkpoint holds (sizes, tokenizer, training data), or one run or several (tasks, failures)."""

    path: tyro.conf.Positional[str]
    """Checkpoint directory, hub id, directory written by `rsd eval`, or a folder of such."""
    keys: bool = False
    """List every tensor of the checkpoint with its shape."""
    provenance: bool = False
    """Show all that the checkpoint knows of its making: data, settings, versions, validation."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(InspectArguments, arguments, prog)
    from rsd.reporting.inspection import inspect

    inspect(options.path, Console(highlight=False), options.keys, options.provenance)
    return 0
