"""The `rsd` command. A command is one module, imported only when called: `rsd --help` loads no torch."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from rich.markup import escape

from rsd import former
from rsd.checks import one_line
from rsd.cli.parsing import UsageError, parse
from rsd.environment import DEBUG, check_environment
from rsd.output import Unfinished, reason, terminal, warn_in_one_line
from rsd.types import RsdError


@dataclass(frozen=True)
class Command:
    """What to call: `module:function`, with the options of the dataclass `config` (`module:name`, or a name of the same
    module). An integer that it returns is the exit status. The module of a config loads no torch, so that help and
    mistakes in the command line are quick. Without one, `function(arguments, prog)` reads its command line itself.
    """

    help: str
    function: str
    config: str = ""
    writes: bool = True  # see `parse`

    def run(self, arguments: list[str], prog: str) -> int:
        module = self.function.partition(":")[0]
        if not self.config:
            return int(resolve_name(self.function)(arguments, prog))
        config = self.config if ":" in self.config else f"{module}:{self.config}"
        options = parse(resolve_name(config), arguments, prog, self.writes)  # before the function's module
        status = resolve_name(self.function)(options)
        return status if isinstance(status, int) else 0


COMMANDS = {
    "eval": Command("run a policy in LIBERO and measure success, latency and acceptance", "rsd.cli.eval:run"),
    "compare": Command("one table from several results directories", "rsd.cli.runs:compare", "CompareArguments"),
    "report": Command(
        "one HTML page about runs: success, latency, acceptance, failures", "rsd.cli.runs:report", "ReportArguments"
    ),
    "merge": Command("bring shards of one run together", "rsd.cli.runs:merge", "MergeArguments"),
    "submit": Command("run an evaluation as SLURM jobs, a shard each", "rsd.cli.submit:run", "SubmitArguments"),
    "inspect": Command(
        "what a checkpoint or a results directory holds", "rsd.cli.checkpoints:inspect", "InspectArguments"
    ),
    "checkpoint seal": Command(
        "vouch for a checkpoint that was edited on purpose", "rsd.cli.checkpoints:seal", "SealArguments"
    ),
    "checkpoint average": Command(
        "the mean of the weights of several policies", "rsd.cli.checkpoints:average", "AverageArguments"
    ),
    "doctor": Command(
        "check this machine and a checkpoint before an evaluation",
        "rsd.evaluation.doctor:run_doctor",
        "DoctorConfig",
        writes=False,  # it tells of outputs itself
    ),
    "serve": Command("put a policy behind a network port, in openpi's protocol", "rsd.cli.serve:run", "ServeArguments"),
    "bench latency": Command(
        "milliseconds per chunk of several decoders, in one run",
        "rsd.evaluation.latency:measure_latency",
        "rsd.evaluation.bench_config:LatencyConfig",
    ),
    "calibrate": Command(
        "fit when rsd-skip may skip the target",
        "rsd.evaluation.calibrate:calibrate",
        "rsd.evaluation.bench_config:CalibrateConfig",
    ),
    "tokenizer fit": Command(
        "calibrate the residual action tokenizer",
        "rsd.training.tokenizer:train_tokenizer",
        "rsd.training.config:TrainTokenizerConfig",
    ),
    "tokenizer inspect": Command(
        "plot a chunk from 1..L levels, symbols, entropy and utilisation",
        "rsd.reporting.tokenizer_plots:inspect_tokenizer",
        "rsd.reporting.config:InspectConfig",
    ),
    "expert run": Command("the scripted expert on placements of one task", "rsd.cli.expert:run", "ExpertRunConfig"),
    "demos collect": Command(
        "record demonstrations of the scripted expert", "rsd.collection.collect:collect", "CollectConfig"
    ),
    "demos render": Command(
        "add camera images to demonstrations recorded without them", "rsd.collection.render:render", "RenderConfig"
    ),
    "demos export": Command(
        "write demonstrations as a LeRobot data set", "rsd.data.lerobot_export:export", "ExportConfig"
    ),
    "train policy": Command("train the target and its drafts, compact or on OpenVLA", "rsd.cli.train_policy:run"),
    "train drafter": Command(
        "train a drafter alone", "rsd.training.policy:train_drafter", "rsd.training.config:TrainDrafterConfig"
    ),
    "train corrector": Command(
        "train a head that corrects a policy's late chunks",
        "rsd.training.corrector:train_corrector",
        "rsd.training.config:TrainCorrectorConfig",
    ),
    "drafter distil": Command(
        "distil a drafter for any policy, from its rollouts",
        "rsd.evaluation.distil:distil",
        "rsd.evaluation.distil_config:DistilConfig",
    ),
}
EXAMPLES = """\
  rsd eval --task-suite libero_spatial --num-trials 3 --use-speculative-decoding True
  rsd eval --compare --num-trials 50 --output results/spatial
  rsd compare results/spatial/l1 results/spatial/rsd-fused --markdown
  rsd report results/spatial/l1 results/spatial/rsd-fused"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `rsd`. Exit status: 1 where the work was done and some of it failed (an episode, a file, a
    check of `rsd doctor`), 2 for a command that could not be done, 130 for Ctrl-C."""
    sys.exit(dispatch(list(sys.argv[1:] if argv is None else argv)))


def dispatch(arguments: list[str], study: Command | None = None, prog: str = "rsd") -> int:
    """Find the command (or take the given study), run it, turn an error into one line on stderr (RSD_DEBUG=1 shows the
    traceback)."""
    try:
        with all_printed(), warnings_of_one_line():
            if study is not None:
                check_environment()
                return study.run(arguments, prog)
            if not arguments or arguments[0] in ("-h", "--help"):
                print_help()
                return 0
            if arguments[0] == "--version":
                import rsd

                print(f"rsd {rsd.__version__}")
                return 0
            name, rest = find_command(arguments)
            if name is None:
                print_help(group=arguments[0])
                return 0
            prog = f"rsd {name}"
            check_environment()
            return COMMANDS[name].run(rest, prog)
    except (RsdError, UsageError, OSError, ValueError) as error:
        if os.environ.get(DEBUG) == "1":
            raise
        say(f"{prog}: error: {error if isinstance(error, UsageError) else reason(error)}")
        return 1 if isinstance(error, Unfinished) else 2
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the program, silently
            say(f"{prog}: error: {reason(stop.__context__)}")
            return 2
        raise
    except KeyboardInterrupt:
        say(f"{prog}: interrupted")
        return 130


@contextlib.contextmanager
def all_printed() -> Iterator[None]:
    """Leaves with nothing in stdout's buffer: a full disk or a closed pipe is found out while it can be reported."""
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:  # as where the shell closed it
                sys.stdout.flush()
        except OSError:
            # else the interpreter tries once more as it ends (Python's documentation, "Note on SIGPIPE")
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


@contextlib.contextmanager
def warnings_of_one_line() -> Iterator[None]:
    before = warnings.formatwarning
    warn_in_one_line()
    try:
        yield
    finally:
        warnings.formatwarning = before


def say(text: str) -> None:
    """One line on stderr without control characters, which files and servers could send to a terminal."""
    with contextlib.suppress(OSError):  # stderr itself may be closed or full
        print(one_line(text), file=sys.stderr)


def find_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(command, its arguments); the command is None for the help of a group such as `rsd train`."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in former.COMMANDS:
            raise UsageError(f"'{name}': it is called `{former.COMMANDS[name]}` now")
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
    console = terminal(highlight=False, soft_wrap=True)
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
