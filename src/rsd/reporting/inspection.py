"""`rsd inspect`: what a checkpoint or a results directory holds, without running anything."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from rsd.evaluation.cautions import trained_on
from rsd.evaluation.results import CONFIG_FILE as RUN_CONFIG
from rsd.evaluation.results import EPISODES_FILE, by_task
from rsd.evaluation.summary import summarize_tasks
from rsd.evaluation.tables import ABSENT, print_table, say
from rsd.json_files import section
from rsd.reporting.tables import load_runs, print_runs, run_directories, task_labels
from rsd.types import RsdError

Rows = list[tuple[str, str]]


def inspect(path: str, console: Console, keys: bool = False, provenance: bool = False) -> None:
    """A checkpoint (directory or hub id), a run or a folder of runs, told apart by their files. Raises RsdError for
    anything else. keys, provenance: of a checkpoint, every tensor and all that is known of its making."""
    runs = run_directories([Path(path)]) if Path(path).is_dir() else []
    if all((run / RUN_CONFIG).is_file() and (run / EPISODES_FILE).is_file() for run in runs) and runs:
        if asked := [option for option, given in (("--keys", keys), ("--provenance", provenance)) if given]:
            raise RsdError(f"{' and '.join(asked)}: expected a checkpoint beside it, found the run {path}")
        show_runs(runs, console)
        return
    from rsd.checkpoint import WEIGHTS_FILE, locate_checkpoint

    directory = locate_checkpoint(path)
    if not (directory / WEIGHTS_FILE).is_file():
        missing = f"({WEIGHTS_FILE} is missing) nor a results directory ({EPISODES_FILE} is) nor a folder of such"
        raise RsdError(f"{path}: neither a checkpoint {missing}")
    show_checkpoint(directory, console, keys, provenance)


def print_rows(console: Console, heading: str, rows: Rows) -> None:
    if not rows:
        return
    say(console, f"\n{heading}", "bold")
    width = max(len(name) for name, _ in rows)
    room = max(20, console.width - width - 4)
    for name, value in rows:
        lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
        for label, line in zip([name, *[""] * len(lines)], lines, strict=False):
            say(console, f"  {label.ljust(width)}  {line}")


def show_checkpoint(directory: Path, console: Console, keys: bool, provenance: bool) -> None:
    """Sizes, decoding, tokenizer, training data. The weights are read, so that damage is found."""
    from rsd.checkpoint import CONFIG_FILE, backbone_of, checkpoint_hash, load_model, read_content
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

    print(f"reading {directory}", file=sys.stderr)
    content = read_content(directory)
    tokenizer, made = ActionTokenizer.load(directory), section(content, "provenance")
    if (backbone := backbone_of(content)) is not None:
        config, weights = backbone.parts(directory, content)
    else:
        model, config = load_model(directory, content, tokenizer)
        weights = model.state_dict()
    code = tokenizer.config.rfsq
    say(console, str(directory), "bold")
    say(console, f"sha256 of {CONFIG_FILE}:\n  {checkpoint_hash(directory)}")
    sizes: Counter[str] = Counter()
    for name, value in weights.items():
        sizes[name.split(".")[0]] += value.numel()
    rows = [(name, f"{count:,}") for name, count in sizes.items()]
    print_rows(console, "parameters", [*rows, ("total", f"{sum(sizes.values()):,}")])
    print_rows(console, "decoding", decoding_rows(directory, content, config))
    rows = [
        ("chunk", f"{tokenizer.config.horizon} steps, {tokenizer.motion_dim} motion dimensions and a gripper"),
        ("transform over time", tokenizer.config.transform),
        ("levels x symbols", f"{code.levels} x {code.symbols}, steps shrink by rho = {code.rho:g}"),
        ("correctable digit errors, by level", ", ".join(str(code.margin(n + 1)) for n in range(code.levels))),
    ]
    print_rows(console, "tokenizer", rows)
    print_rows(console, "trained on", training_rows(content))
    if keys:
        shapes = [(name, str(list(value.shape))) for name, value in weights.items()]
        print_rows(console, f"{len(shapes)} keys", shapes)
    if not provenance:
        say(console, "\n--provenance shows all that is known of its making, --keys every tensor")
        return
    print_rows(console, "policy", flatten(content["policy"]))
    reach = zip(tokenizer.centre.tolist(), tokenizer.scale.tolist(), strict=True)
    print_rows(console, "reach of each dimension", [(str(i), f"{c:+.2f}+-{s:.2f}") for i, (c, s) in enumerate(reach)])
    validation = section(made, "validation").items()
    measured = [(name, v.items() if isinstance(v, dict) else [("", v)]) for name, v in validation]
    rows = [(name, ", ".join(f"{key} {value}".strip() for key, value in values)) for name, values in measured]
    print_rows(console, "validation during training", rows)
    base = {"base": content["base"]} if "base" in content else {}
    print_rows(console, "provenance", flatten(base | {k: v for k, v in made.items() if k != "validation"}))


def decoding_rows(directory: Path, content: dict[str, Any], config: Any) -> Rows:
    """What it decodes by, and what its calibration promises."""
    from rsd.checkpoint import CALIBRATION_FILE, load_calibration, schedule_of

    visual_drafter = "yes" if content["policy"].get("visual_drafter") else "no"
    execute = f"{config.execute} steps" if config.execute else "all of it"
    rows = [("acceptance rule", str(config.acceptance)), ("visual drafter", visual_drafter)]
    rows.append(("executed of a chunk", execute))
    if (directory / CALIBRATION_FILE).is_file():
        found = load_calibration(directory)
        rows.append(("rsd-skip calibrated for", f"{found.suites.replace(',', ', ')}: {found.words}"))
    elif schedule := schedule_of(content):
        rows.append(("rsd-skip", schedule))
    return rows


def training_rows(content: dict[str, Any]) -> Rows:
    """Suites, tasks, image size, how much of it, and by which versions; without what the record does not say."""
    data, versions = section(content, "provenance", "data"), section(content, "provenance", "versions")
    suites, instructions, sizes = trained_on(content)
    rows = [
        ("suites", ", ".join(sorted(suites))),
        ("tasks", str(len(instructions) or "")),
        ("demonstrations", str(data.get("episodes", ""))),
        ("frames", str(data.get("frames", ""))),
        ("pixels", ", ".join(map(str, sorted(sizes)))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, value) for name, value in rows if value]


def flatten(values: dict[str, Any], prefix: str = "") -> Rows:
    """Nested provenance as dotted lines; equal entries of a list, which data of several sources has many of, once."""
    rows: Rows = []
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += flatten(value, f"{label}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            distinct = {str(item): item for item in value}
            for number, (text, item) in enumerate(distinct.items()):
                times = sum(str(other) == text for other in value)
                suffix = f"[{number}]" if len(distinct) > 1 else ""
                rows.append((f"{label}{suffix}", f"{times} x" if times > 1 else ""))
                rows += flatten(item, f"{label}{suffix}.")
        else:
            rows.append((label, str(value)))
    return rows


def show_runs(directories: list[Path], console: Console) -> None:
    """The table of the runs, success per task, and what failures look like; of a single one its options, too."""
    runs = load_runs(directories)
    print_runs(console, runs)
    labels = task_labels(runs)
    console.print()
    if len(runs) > 1:
        by_run = [{s.task: s.success for s in summarize_tasks(run.episodes)} for run in runs]
        cells = [
            [label, *(f"{found[task].successes}/{found[task].n}" if task in found else ABSENT for found in by_run)]
            for task, label in sorted(labels.items())
        ]
        print_table(console, "success by task", ["task", *(run.name for run in runs)], cells, "rows")
        say(console, f"\nof one alone: rsd inspect {directories[0]}")
        return
    (run,) = runs
    rows, failed = [], []
    episodes = by_task(run.episodes)
    for task in summarize_tasks(run.episodes):
        failures = Counter(e.failure_detail or e.failure for e in episodes[task.task] if not e.success)
        label, rate = labels[task.task], task.success
        steps = ABSENT if task.mean_success_steps is None else f"{task.mean_success_steps:.0f}"
        rows.append([label, f"{rate.successes}/{rate.n}", f"{100 * rate.low:.0f} to {100 * rate.high:.0f} %", steps])
        if failures:
            failed.append((label, ", ".join(f"{count} x {reason}" for reason, count in failures.most_common())))
    print_table(console, "tasks", ["task", "success", "95 % interval", "steps"], rows, "rows")
    print_rows(console, "failures", failed)
    for episode in run.broken:
        where = f"{episode.suite} task {episode.task_id}, initial state {episode.init_state}"
        say(console, f"error: {where}: {episode.failure}", "red")
    options = run.record.config
    print_rows(console, "options", [(name, str(value)) for name, value in options.items() if value != ""])
    print_rows(console, "versions", list(run.record.versions.items()))
    policy = {name: value for name, value in run.record.policy.items() if name != "provenance"}
    print_rows(console, "policy", flatten(policy))
