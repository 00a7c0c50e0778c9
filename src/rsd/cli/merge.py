"""`rsd merge`: shards of one run into one results directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from rsd.cli.parsing import parse


@dataclass(frozen=True)
class MergeArguments:
    """Bring shards (`rsd eval --shard i/n`, `rsd submit`) together; may be called again as they go on."""

    output: tyro.conf.Positional[Path]
    """Results directory of the whole run."""
    shards: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The shards' directories; default all shard-i-of-n in the output."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(MergeArguments, arguments, prog)
    from rsd.evaluation.merging import merge_shards, missing_parts
    from rsd.reporting.tables import load_runs, print_runs

    summary = merge_shards(options.output, options.shards)
    if summary.success.n:
        print_runs(Console(), load_runs([options.output]))
    print(f"results: {options.output}")
    if missing := missing_parts(options.output):
        print(f"warning: {missing}; run them and merge again", file=sys.stderr)
    return 1 if summary.errors or missing else 0
