"""The `rsd` command. A command is one module, imported only when called: `rsd --help` loads no torch."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from rsd.cli.parsing import UsageError, parse
from rsd.evaluation.config import OptionError
from rsd.types import RsdError


@dataclass(frozen=True)
class Command:
    """A module and what to call in it.

    With `config`, the name of a dataclass there, the command line fills that and `function` gets it. Without,
    the module is a command's own and `function(arguments, prog)` returns the exit status.
    """

    help: str
    module: str
    function: str = "run"
    config: str = ""

    def run(self, arguments: list[str], prog: str) -> int:
        module = importlib.import_module(self.module)
        function = getattr(module, self.function)
        if not self.config:
            return int(function(arguments, prog))
        function(parse(getattr(module, self.config), arguments, prog))
        return 0


COMMANDS = {
    "eval": Command("run a policy in LIBERO and measure success, latency and acceptance", "rsd.cli.eval"),
    "compare": Command("one table from several results directories", "rsd.cli.compare"),
    "report": Command("one HTML page about runs: success, latency, acceptance, failures", "rsd.cli.report"),
    "merge": Command("bring shards of one run together", "rsd.cli.merge"),
    "submit": Command("run an evaluation as SLURM jobs, a shard each", "rsd.cli.submit"),
    "inspect": Command("what a checkpoint or a results directory holds", "rsd.cli.inspect"),
    "doctor": Command("check this machine and a checkpoint before an evaluation", "rsd.cli.doctor"),
    "serve": Command("put a policy behind a network port, in openpi's protocol", "rsd.cli.serve"),
    "bench latency": Command(
        "milliseconds per chunk of every decoder, in one run",
        "rsd.evaluation.latency",
        "measure_latency",
        "LatencyConfig",
    ),
    "bench scaling": Command(
        "milliseconds per chunk against the size of the main model",
        "rsd.evaluation.scaling",
        "measure_scaling",
        "ScalingConfig",
    ),
    "bench deviation": Command(
        "how far every decoder's chunks are from the baseline's, on held-out frames",
        "rsd.evaluation.deviation",
        "measure_deviation",
        "DeviationConfig",
    ),
    "bench openvla": Command(
        "milliseconds per decision of OpenVLA 7B on random weights, beside the published way to run it",
        "rsd.openvla.bench",
        "measure_openvla",
        "OpenVlaBenchConfig",
    ),
    "bench serving": Command(
        "milliseconds that a network port adds to a chunk", "rsd.serving.bench", "measure_serving", "ServingBenchConfig"
    ),
    "calibrate": Command(
        "fit when rsd-skip may leave the main model idle",
        "rsd.evaluation.calibrate",
        "calibrate",
        "CalibrateConfig",
    ),
    "bench eval": Command(
        "episodes per minute of `rsd eval` against a plain loop",
        "rsd.evaluation.throughput",
        "measure_throughput",
        "ThroughputConfig",
    ),
    "tokenizer fit": Command(
        "calibrate the residual action tokenizer",
        "rsd.training.tokenizer",
        "train_tokenizer",
        "TrainTokenizerConfig",
    ),
    "tokenizer bench": Command(
        "compare action tokenizers at matched bits", "rsd.tokenizer.bench.study", "bench", "BenchConfig"
    ),
    "tokenizer inspect": Command(
        "plot a chunk from 1..L levels, symbols, entropy and utilisation",
        "rsd.tokenizer.inspection",
        "inspect_tokenizer",
        "InspectConfig",
    ),
    "demos collect": Command(
        "record demonstrations of the scripted expert", "rsd.data.collect", "collect", "CollectConfig"
    ),
    "demos render": Command(
        "add camera images to demonstrations recorded without them",
        "rsd.data.render",
        "render",
        "RenderConfig",
    ),
    "train policy": Command("train the main model and its drafts, compact or on OpenVLA", "rsd.cli.train_policy"),
    "train draft": Command("train a draft alone", "rsd.training.draft", "train_draft", "TrainDraftConfig"),
    "import-legacy": Command(
        "read the original experiment's checkpoints", "rsd.openvla.legacy", "import_legacy", "ImportLegacyConfig"
    ),
}
EXAMPLES = """\
  rsd eval --task-suite libero_spatial --num-trials 3 --use-speculative-decoding True
  rsd eval --compare --num-trials 50 --output results/spatial
  rsd compare results/spatial/ar results/spatial/rsd-ahead --markdown
  rsd report results/spatial/ar results/spatial/rsd-ahead"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `rsd`. Exit status: 1 for an error at work, 2 for a bad command line, 130 for Ctrl-C."""
    sys.exit(dispatch(list(sys.argv[1:] if argv is None else argv)))


def dispatch(arguments: list[str]) -> int:
    """Find the command, run it, turn an error into one line on stderr (RSD_DEBUG=1 shows the traceback)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print_help()
        return 0
    if arguments[0] == "--version":
        import rsd

        print(f"rsd {rsd.__version__}")
        return 0
    prog = "rsd"
    try:
        name, rest = find_command(arguments)
        if name is None:
            print_help(group=arguments[0])
            return 0
        prog = f"rsd {name}"
        return COMMANDS[name].run(rest, prog)
    except (RsdError, UsageError) as error:
        if os.environ.get("RSD_DEBUG") == "1":
            raise
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | OptionError) else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def find_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(command, its arguments); the command is None for the help of a group such as `rsd train`."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    members = [command.split()[1] for command in COMMANDS if command.startswith(arguments[0] + " ")]
    if members:
        if len(arguments) == 1 or arguments[1] in ("-h", "--help"):
            return None, []
        raise UsageError(f"'{arguments[0]} {arguments[1]}': expected {arguments[0]} {' or '.join(members)}")
    first_words = list(dict.fromkeys(command.split()[0] for command in COMMANDS))
    near = difflib.get_close_matches(arguments[0], first_words, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"unknown command '{arguments[0]}': expected one of {', '.join(first_words)}{hint}")


def print_help(group: str = "") -> None:
    console = Console(highlight=False, soft_wrap=True)
    names = [name for name in COMMANDS if not group or name.startswith(group + " ")]
    width = max(len(name) for name in names)
    if not group:
        console.print("Residual speculative decoding for vision-language-action policies.\n")
    console.print(f"usage: rsd {group or 'COMMAND'} {escape('[options]') if not group else '...'}\n")
    for name in names:
        console.print(f"  [bold]rsd {name.ljust(width)}[/bold]  {COMMANDS[name].help}")
    console.print("\n`rsd COMMAND --help` lists a command's options.")
    if not group:
        console.print(f"\nexamples:\n{escape(EXAMPLES)}")
