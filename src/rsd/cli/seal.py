"""`rsd checkpoint seal`: what a checkpoint's files hold now is what they should hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.cli.parsing import parse


@dataclass(frozen=True)
class SealArguments:
    """Write a checkpoint's manifest.json anew, after its files were edited on purpose.

    The files are read as for a prediction first; what would not load is not sealed.
    """

    directory: tyro.conf.Positional[Path]
    """The checkpoint directory."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(SealArguments, arguments, prog)
    from rsd.checkpoint import seal

    changed = seal(options.directory)
    print(f"{options.directory}: sealed; other than before or new: {', '.join(changed) or 'nothing'}")
    return 0
