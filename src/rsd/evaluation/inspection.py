"""`rsd inspect`: what a checkpoint or a results directory holds, without running anything."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsd.evaluation.results import CONFIG_FILE as RUN_CONFIG
from rsd.evaluation.results import EPISODES_FILE
from rsd.types import RsdError

Rows = list[tuple[str, str]]


def inspect(path: str, console: Console, keys: bool = False) -> None:
    """A checkpoint (directory or hub id) or a run, told apart by their files. Raises RsdError for anything else."""
    if (Path(path) / RUN_CONFIG).is_file() and (Path(path) / EPISODES_FILE).is_file():
        show_run(Path(path), console)
        return
    from rsd.checkpoint import WEIGHTS_FILE, locate_checkpoint

    directory = locate_checkpoint(path)
    if not (directory / WEIGHTS_FILE).is_file():
        raise RsdError(
            f"{path}: neither a checkpoint ({WEIGHTS_FILE} is missing) nor a results directory ({EPISODES_FILE} is)"
        )
    show_checkpoint(directory, console, keys)


def print_rows(console: Console, heading: str, rows: Rows) -> None:
    if not rows:
        return
    console.print(f"\n[bold]{escape(heading)}[/bold]")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"  {name.ljust(width)}  {escape(value)}", soft_wrap=True)


def show_checkpoint(directory: Path, console: Console, keys: bool) -> None:
    """Sizes, tokenizer, weights, validation, provenance. The weights are read, so that damage is found."""
    from rsd.checkpoint import BACKBONE, CONFIG_FILE, checkpoint_hash, read_content
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

    content = read_content(directory)
    tokenizer, provenance = ActionTokenizer.load(directory), content.get("provenance", {})
    config, weights = (openvla_parts if BACKBONE in content else compact_parts)(directory, content, tokenizer)
    code = tokenizer.config.rfsq
    console.print(f"[bold]{directory}[/bold], sha256 of {CONFIG_FILE} {checkpoint_hash(directory)}")
    print_rows(console, "policy", [(name, str(value)) for name, value in vars(config).items()])
    print_rows(
        console,
        "tokenizer",
        [
            ("chunk", f"{tokenizer.config.horizon} steps, {tokenizer.motion_dim} motion dimensions and a gripper"),
            ("transform over time", tokenizer.config.transform),
            ("levels x symbols", f"{code.levels} x {code.symbols}, steps shrink by rho = {code.rho:g}"),
            ("steps", ", ".join(f"{tokenizer.first_step * code.weight(i):.3g}" for i in range(1, code.levels + 1))),
            ("digit errors that finer levels take out", ", ".join(map(str, margins(code)))),
            ("reach of each dimension", ", ".join(f"{c:+.2f}+-{s:.2f}" for c, s in reach(tokenizer))),
        ],
    )
    sizes: Counter[str] = Counter()
    for name, value in weights.items():
        sizes[".".join(name.split(".")[:2])] += value.numel()
    rows = [(name, f"{count:,}") for name, count in sizes.items()]
    print_rows(console, "parameters", [*rows, ("total", f"{sum(sizes.values()):,}")])
    if keys:
        shapes = [(name, str(list(value.shape))) for name, value in weights.items()]
        print_rows(console, f"{len(shapes)} keys", shapes)
    print_rows(console, "validation during training", validation_rows(provenance.get("validation", {})))
    base = {"base": content["base"]} if "base" in content else {}
    rest = {**base, **{name: value for name, value in provenance.items() if name != "validation"}}
    print_rows(console, "provenance", list(flatten(rest)))


def compact_parts(directory: Path, content: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Configuration, and all weights by name."""
    from rsd.checkpoint import load_model

    model, config = load_model(directory, content, tokenizer)
    return config, model.state_dict()


def openvla_parts(directory: Path, content: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Configuration, and the weights that were added to the base, which is not looked at."""
    from rsd.checkpoint import WEIGHTS_FILE, parse_config
    from rsd.models.openvla_files import ADAPTER_DIR, ADAPTER_WEIGHTS
    from rsd.models.openvla_loading import tensors
    from rsd.openvla.rsd_policy import OpenVlaRsdConfig

    added = dict(tensors(directory / WEIGHTS_FILE, "cpu"))
    adapter = dict(tensors(directory / ADAPTER_DIR / ADAPTER_WEIGHTS, "cpu"))
    named = {f"{ADAPTER_DIR}.{name.removeprefix('base_model.model.')}": value for name, value in adapter.items()}
    return parse_config(directory, content, OpenVlaRsdConfig), {**added, **named}


def margins(code: Any) -> list[int]:
    return [code.margin(level) for level in range(1, code.levels + 1)]


def reach(tokenizer: Any) -> list[tuple[float, float]]:
    return list(zip(tokenizer.centre.tolist(), tokenizer.scale.tolist(), strict=True))


def validation_rows(validation: dict[str, Any]) -> Rows:
    rows = []
    for name, values in validation.items():
        if isinstance(values, dict):
            rows.append((name, ", ".join(f"{key} {value}" for key, value in values.items())))
        else:
            rows.append((name, str(values)))
    return rows


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


def show_run(directory: Path, console: Console) -> None:
    """The run's table, its success per task, and what its failures look like."""
    from rsd.evaluation.report import load_run, rich_table, task_labels
    from rsd.evaluation.summary import summarize_tasks

    run = load_run(directory)
    console.print(rich_table([run]))
    table = Table(title="tasks", title_justify="left")
    for column in ("task", "success", "95 % interval", "steps per success", "failures"):
        table.add_column(column, justify="left" if column in ("task", "failures") else "right")
    labels = task_labels([run])
    for task in summarize_tasks(run.episodes):
        failures = Counter(
            episode.failure_detail or episode.failure
            for episode in run.episodes
            if (episode.suite, episode.task_id) == (task.suite, task.task_id) and not episode.success
        )
        table.add_row(
            labels[task.suite, task.task_id],
            f"{task.success.successes}/{task.success.n}",
            f"{100 * task.success.low:.0f} to {100 * task.success.high:.0f} %",
            "-" if task.mean_success_steps is None else f"{task.mean_success_steps:.0f}",
            ", ".join(f"{count} x {reason}" for reason, count in failures.most_common()),
        )
    console.print(table)
    for episode in run.broken:
        where = f"{episode.suite} task {episode.task_id}, initial state {episode.init_state}"
        console.print(f"error: {where}: {episode.failure}", style="red", soft_wrap=True)
    options = run.record.config
    print_rows(console, "options", [(name, str(value)) for name, value in options.items() if value != ""])
    print_rows(console, "versions", list(run.record.versions.items()))
    policy = {name: value for name, value in run.record.policy.items() if name != "provenance"}
    print_rows(console, "policy", list(flatten(policy)))
