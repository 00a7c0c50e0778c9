"""`rsd inspect` and `rsd checkpoint seal`: what a checkpoint holds, and that this is what it should hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.output import terminal


@dataclass(frozen=True)
class InspectArguments:
    """Show what a checkpoint holds (sizes, tokenizer, training data), or one run or several (tasks, failures)."""

    path: tyro.conf.Positional[str]
    """Checkpoint directory, hub id, directory written by `rsd eval`, or a folder of such."""
    keys: bool = False
    """List every tensor of the checkpoint with its shape."""
    provenance: bool = False
    """Show all that the checkpoint knows of its making: data, settings, versions, validation."""


def inspect(options: InspectArguments) -> None:
    from rsd.reporting import inspection

    inspection.inspect(options.path, terminal(highlight=False), options.keys, options.provenance)


@dataclass(frozen=True)
class SealArguments:
    """Write a checkpoint's manifest.json anew, after its files were edited on purpose.

    The files are read as for a prediction first; what would not load is not sealed.
    """

    directory: tyro.conf.Positional[Path]
    """The checkpoint directory."""


def seal(options: SealArguments) -> None:
    from rsd import checkpoint

    changed = checkpoint.seal(options.directory)
    print(f"{options.directory}: sealed; other than before or new: {', '.join(changed) or 'nothing'}")


@dataclass(frozen=True)
class AverageArguments:
    """Write the mean of the weights of several policies that were trained on from the same one (docs/training.md)."""

    policies: tyro.conf.Positional[tuple[str, ...]]
    """Checkpoint directories or hub ids, two or more; one that is named twice counts twice."""
    output: Path
    """The new checkpoint directory."""


def average(options: AverageArguments) -> None:
    from rsd.training.average import average

    print(f"{average(options.policies, options.output)}: the mean of {len(options.policies)} policies")
