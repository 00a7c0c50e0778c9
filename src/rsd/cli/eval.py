"""`rsd eval`: run a policy in LIBERO, or with --compare target, best and drafter on the same states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from rsd.cli.parsing import UsageError, check_choice, parse
from rsd.evaluation.config import OF_THE_RULE, EvalConfig, asked_rule, option, stored_config
from rsd.output import terminal
from rsd.types import BEST, DRAFTER_ONLY, TARGET_ONLY, RsdError

BASELINE = "ar"
TARGET_ALONE, DRAFTER_ALONE = "l1", DRAFTER_ONLY  # what --compare runs beside the checkpoint's best
IDLE = {"batch_wait_ms": "batch", "max_videos": "videos"}
COMPARISON_FILE = "comparison.md"


@dataclass(frozen=True)
class EvalArguments:
    """Run a policy in closed loop in LIBERO.

    Results are written episode by episode; the same command continues an interrupted run.
    """

    config: Annotated[EvalConfig, tyro.conf.arg(name="")]
    use_speculative_decoding: Annotated[bool | None, tyro.conf.FlagConversionOff] = None
    """True is --decode best, False is --decode ar."""
    resume: Path | None = None
    """Continue the run in this directory, with the options it was begun with."""
    compare: bool = False
    """Run the target alone (--decode l1, with a --drafter target-only), best and the drafter alone (drafter-only, if
    there is a visual drafter) on the same initial states; print their table."""
    report: bool = False
    """Also write the HTML report, as `rsd report` does."""
    overwrite: bool = False
    """Delete what --output holds of an earlier run and start from nothing."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(EvalArguments, arguments, prog)
    planned = [(resumed(options.resume, arguments), "")] if options.resume is not None else plan_runs(options)
    for config, _ in planned:
        check_names(config)

    from rsd.evaluation.evaluate import ERRORS_FILE, evaluate
    from rsd.evaluation.pools import Crew
    from rsd.evaluation.results import write_atomically
    from rsd.evaluation.tables import plural, say
    from rsd.reporting.tables import load_runs, markdown_table, print_runs

    console = terminal(stderr=True)
    summaries = []
    warned: set[str] = set()
    with Crew([config for config, _ in planned]) as crew:
        for config, note in planned:
            summary = evaluate(
                config, overwrite=options.overwrite, console=console, note=note, warned=warned, crew=crew
            )
            summaries.append(summary)
            if summary.errors:
                again = " without --overwrite" if options.overwrite else ""
                counted = f"{summary.errors} of {plural(summary.episodes, 'episode')} ended in an error, not counted"
                missing = f"the same command{again} runs what is missing"
                say(console, f"{counted}: see {config.output_dir / ERRORS_FILE}; {missing}", "red")
    directories = [config.output_dir for config, _ in planned]
    if all(summary.success.n for summary in summaries):
        runs = load_runs(directories)
        print_runs(terminal(), runs)
        if options.compare and options.config.output:
            write_atomically(options.config.output_dir / COMPARISON_FILE, markdown_table(runs))
    console.print("results: " + ", ".join(map(str, directories)), soft_wrap=True, highlight=False)
    if options.report and all(summary.success.n for summary in summaries):
        from rsd.reporting.html_report import write_report

        console.print(f"report: {write_report(directories)}", soft_wrap=True, highlight=False)
    return 1 if any(summary.errors for summary in summaries) else 0


def plan_runs(options: EvalArguments) -> list[tuple[EvalConfig, str]]:
    """The runs that a command line asks for, each with a note on how its decoder was chosen ("" if by name): one, or
    with --compare the target alone, the best and the drafter alone."""
    from rsd.decoding.decoders import DECODERS, names
    from rsd.evaluation.backend import settle
    from rsd.evaluation.foreign import is_foreign

    config, speculative = options.config, options.use_speculative_decoding
    check_idle(config)
    if options.compare and (config.decode != BEST or speculative is not None):
        runs_all = f"--compare runs {TARGET_ALONE}, the checkpoint's best and {DRAFTER_ALONE}"
        raise UsageError(f"{runs_all}: leave --decode and --use-... out")
    if speculative is not None and config.decode != BEST and (config.decode in names(drafts=True)) != speculative:
        raise UsageError(
            f"--use-speculative-decoding {speculative} contradicts --decode {config.decode}; leave one out"
        )
    if is_foreign(config):
        check_names(config)
    if speculative is False and config.decode == BEST:
        config = replace(config, decode=TARGET_ONLY if config.drafter or config.custom or config.lerobot else BASELINE)
    best, note = settle(config)
    if (options.compare or speculative) and best.decode not in names(drafts=True):
        wanted = "--compare" if options.compare else "--use-speculative-decoding True"
        raise UsageError(
            f"{wanted}: {config.policy} decodes by {best.decode} alone, without a draft; "
            "`rsd drafter distil` makes one for any policy, rsd train policy --backbone openvla for OpenVLA"
        )
    if not options.compare:
        return [(best, note)]
    # of one alone nothing is accepted or skipped, and the target's own chunks have no draft to audit
    without = ("acceptance", "skip_threshold_mm", *OF_THE_RULE, "target_at_reset", "continue_steps")
    alone = replace(config, **{name: getattr(EvalConfig, name) for name in without})
    target = TARGET_ONLY if config.drafter else TARGET_ALONE
    runs = [(replace(alone, decode=target, audit=False, drafter_delay=0), ""), (best, note)]
    if DECODERS[best.decode].visual:
        runs.append((replace(alone, decode=DRAFTER_ALONE), ""))
    if not config.output:
        return runs
    return [(replace(run, output=str(config.output_dir / run.decode)), note) for run, note in runs]


def check_idle(config: EvalConfig) -> None:
    """Raises UsageError for an option that does nothing without another one (older runs may have been given it)."""
    for name, needed in IDLE.items():
        given, without = getattr(config, name), getattr(config, needed) == getattr(EvalConfig, needed)
        if without and given != getattr(EvalConfig, name):
            raise UsageError(f"{option(name)} {given}: expected {option(needed)} with it, found none")


def resumed(directory: Path, arguments: Sequence[str]) -> EvalConfig:
    """The options that the run in `directory` was begun with.

    Raises UsageError for further options, which would make it another run, and RsdError where there is none.
    """
    from rsd.evaluation.results import read_run_record

    others = [text.split("=")[0] for text in arguments if text.startswith("--")]
    others = [name for name in others if name not in ("--resume", "--report")]
    if others:
        raise UsageError(f"--resume goes on with the options of {directory}: leave {', '.join(others)} out")
    config = stored_config(read_run_record(directory).config, str(directory))
    check_paths(config, directory)
    # a shard's directory lies in its run's
    return replace(config, output=str(directory.parent if config.shard else directory))


def check_paths(config: EvalConfig, directory: Path) -> None:
    """Raises RsdError where a path of the run in `directory` leads nowhere from here, but did where it was begun."""
    from rsd.hub import HUB_ID, local

    lies = directory.resolve()
    begun = Path(str(lies).removesuffix(f"/{config.output_dir}"))  # where it lies itself: not known
    for name in ("policy", "drafter", "corrector"):
        text = getattr(config, name)
        path = Path(text.rpartition(":")[0] if name == "policy" and config.custom else text)
        named = name == "policy" and (config.served or HUB_ID.fullmatch(text) or (config.custom and ".py:" not in text))
        there = not named if begun == lies else (begun / path).exists()
        if text and there and not (path.is_absolute() or path.exists() or local(text)):
            folder = "the folder in which it was begun" if begun == lies else begun
            raise RsdError(f"--resume {directory}: its {option(name)} {text} is relative to {folder}; go on from there")


def check_names(config: EvalConfig) -> None:
    """Raises UsageError for a decoder, rule or device that is not there, before anything is started."""
    from rsd.decoding import decoders as strategies
    from rsd.decoding.acceptance import acceptance_rule
    from rsd.decoding.decoders import names
    from rsd.devices import check_device
    from rsd.evaluation.foreign import check_foreign, is_foreign
    from rsd.options import check_sampling
    from rsd.targets.openvla.published import DECODERS, is_openvla
    from rsd.tokenizer.rfsq import RfsqConfig

    if is_foreign(config):
        check_foreign(config)
        check_device(config.device)
        return
    local = Path(config.policy)
    if local.is_dir() or config.decode not in DECODERS:  # of a hub's checkpoint the format is not known yet
        published = local.is_dir() and is_openvla(local)
        check_choice("--decode", config.decode, DECODERS if published else strategies.DECODERS)
    if asked_rule(config.acceptance) is not None and config.decode not in names(drafts=True):
        found = f"--acceptance {config.acceptance}: --decode {config.decode} accepts nothing"
        raise UsageError(f"{found}; expected --decode {', '.join(names(drafts=True))}, or leave it out")
    for name in ("skip_threshold_mm", "target_at_reset"):
        if getattr(config, name) != getattr(EvalConfig, name) and config.decode not in names(gated=True):
            raise UsageError(f"{option(name)} is of --decode rsd-skip, found --decode {config.decode}")
    if config.audit and config.decode not in names(visual=True):
        allowed = ", ".join(names(visual=True))
        raise UsageError(f"--audit is of the visual drafter, of --decode {allowed}; found {config.decode}")
    try:
        acceptance = asked_rule(config.acceptance)
        if acceptance is not None:
            acceptance_rule(acceptance, RfsqConfig())
        check_sampling(config.temperature, config.decode, acceptance, None)
        check_device(config.device)
    except RsdError as error:
        raise UsageError(f"--{error}") from error
