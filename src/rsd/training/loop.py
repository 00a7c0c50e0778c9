"""One training loop for everything that is trained: schedule, EMA, resume, logging."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from rsd.data.schema import FILE_SUFFIX
from rsd.environment import variable
from rsd.extras import extra
from rsd.locks import exclusive
from rsd.models.fusing import fusing
from rsd.output import replacing, writing
from rsd.processes import on_signals
from rsd.pt_files import read_pt
from rsd.runtime.cuda_graph import capture
from rsd.training import parallel
from rsd.training.config import LoopConfig
from rsd.types import RsdError
from rsd.versions import versions

STATE_FILE, CHECKPOINT = "training_state.pt", "checkpoint"
OF_OTHERS = ("tokenizer.json", "config.json", "manifest.json", "episodes.jsonl")  # the first one: but to fit one
CLOCK_STEPS = 20  # how often the processes ask the first one for its clock, and whether it was told to stop
SHOW_SECONDS, LINE_SECONDS = 1.0, 60.0  # between updates of the bar, and between lines of the log


class Trains(Protocol):
    """What a training's configuration has, whatever is trained."""

    @property
    def loop(self) -> LoopConfig: ...
    @property
    def output(self) -> Path: ...


def train_and_save(
    config: Trains,
    model: nn.Module,
    losses: Callable[[], dict[str, Tensor]],
    device: torch.device,
    save: Callable[[Any, dict[str, Any], Path], None],
    check: Callable[[Any], dict[str, object]],
    data: dict[str, object],
    **also: object,
) -> Path:
    """Train; then write the checkpoint; then validate, which may fail, and write it again with the report.

    save(ema, provenance, directory), check(ema) -> report, where ema is what `train` makes of the model; data: its
    provenance; also: what else a state of the training belongs to. Returns the checkpoint's directory."""
    resolved, directory = {**describe(config), **also}, config.output / CHECKPOINT
    ema = train(model, losses, config.loop, config.output, device, resolved)
    if parallel.rank() > 0:
        return directory
    made = {"data": data, "training": resolved, "processes": parallel.world_size(), "versions": versions()}

    def write(report: dict[str, object]) -> None:
        with writing(directory, SafetensorError):
            save(ema, {**made, "validation": report}, directory)

    write({})
    print(f"checkpoint: {directory}; now validating it on the held-out demonstrations", file=sys.stderr)
    report = check(ema)
    print(json.dumps(report, indent=1))
    write(report)
    whole = (directory / "config.json").exists()  # a drafter alone is no policy
    print(f"checkpoint: {directory}{f'; next: rsd eval --policy {directory} --num-trials 3' if whole else ''}")
    return directory


def train(
    model: nn.Module,
    losses: Callable[[], dict[str, Tensor]],
    config: LoopConfig,
    run: Path,
    device: torch.device,
    resolved: dict[str, Any],
) -> nn.Module:
    """Minimise `losses()["total"]` over the parameters of `model` that need a gradient; returns the EMA copy.

    `losses` draws its own batch. Interrupted, the same call continues from `run/training_state.pt`, with the batches
    that were to come unless a CUDA graph draws them; a state of another configuration is refused. bf16 autocast on
    CUDA, float32 on the CPU. Started by `torchrun`, the processes average their gradients and the first one writes.
    Ctrl-C or SIGTERM: the step at hand is finished and the state written before KeyboardInterrupt is raised.
    """
    with extra("train"):
        from torch.utils.tensorboard import SummaryWriter

    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(run / "tensorboard"))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    parallel.broadcast_parameters(model)
    first = parallel.rank() == 0
    ema = copy.deepcopy(model).eval()
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averaged: list[Tensor] = [average for average, parameter in pairs if parameter.requires_grad]
    optimiser = optimiser_of(trained, config, device)
    state = State(run / STATE_FILE, {"model": model, "ema": ema, "optimiser": optimiser}, resolved)
    step, spent = state.resume()
    # resumed, it must not draw the batches of its first steps again; each process draws its own
    torch.manual_seed(step_seed(config, step))
    model.train()

    def forward_backward() -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        cuda = device.type == "cuda"
        for _ in range(config.accumulate):
            # no cache of cast weights: one made for a detached use would cut the gradient of a later one
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)
            with autocast, fusing() if config.compiled and cuda else contextlib.nullcontext():
                values = losses()
            (values["total"] / config.accumulate).backward()
            for name, value in values.items():
                part = value.detach() / config.accumulate
                sums[name] = sums[name] + part if name in sums else part
        return sums

    graphed = config.cuda_graph and device.type == "cuda"
    compute = forward_backward
    if graphed:  # one CUDA graph: the same tensors and gradients at every replay, with new contents and random numbers
        compute = capture(forward_backward, warm_up=3, between=optimiser.zero_grad)
    start, begun, done = time.monotonic() - spent, step, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not first) as progress, stop_asked() as stop, told_once():
        bar = progress.add_task("training", total=config.steps, completed=step)
        moved = printed = -math.inf
        values = dict[str, Tensor]()
        while step < config.steps:
            if parallel.world_size() == 1 or step % CLOCK_STEPS == 0 or step == begun:
                elapsed = parallel.from_first(time.monotonic() - start, device)
                done = elapsed / (60 * config.minutes) if config.minutes else 0.0
                if parallel.from_first(float(stop.is_set()), device):
                    break
            done = max(done, step / config.steps)
            if done >= 1.0:
                break
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step, done)
            if not graphed:  # a step's batches do not depend on where the run was interrupted
                torch.manual_seed(step_seed(config, step))
            values = compute()
            parallel.average_gradients(trained)
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            if not graphed:  # a replayed graph writes its gradients anew
                optimiser.zero_grad(set_to_none=True)
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(averaged, trained, 1 - min(config.ema, (1 + step) / (10 + step)))
            if not first:
                continue
            now = time.monotonic()
            if step % config.log_every == 0 or step == config.steps:
                _log(writer, values, norm, step, now - start)
            if now - moved > SHOW_SECONDS or step == config.steps:
                moved = now
                progress.update(bar, completed=step, description=f"loss {values['total'].item():.4f}")
            if now - printed > LINE_SECONDS:
                printed = now
                numbers = ", ".join(f"{name} {float(value.detach()):.4f}" for name, value in values.items())
                progress.print(f"step {step}, {now - start:.0f} s: {numbers}")
            if config.save_every and step % config.save_every == 0:
                _require_finite(values, step)
                state.save(step, now - start)
        stopped = parallel.from_first(float(stop.is_set() and step < config.steps), device)
        if first:
            _require_finite(values, step)  # a good state is not replaced by one that diverged
            state.save(step, time.monotonic() - start)
    if stopped:
        if first:
            kept = f"stopped after step {step} of {config.steps}: {run / STATE_FILE} is written"
            print(f"{kept}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    for buffer, value in zip(ema.buffers(), model.buffers(), strict=True):
        buffer.copy_(value)
    with writing(run / "tensorboard"), told_once():
        writer.close()
    return ema


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """TensorBoard's thread prints a traceback where the disk fails it, which the next line logged raises again."""
    before = threading.excepthook
    threading.excepthook = lambda found: None if isinstance(found.exc_value, OSError) else before(found)
    try:
        yield
    finally:
        threading.excepthook = before


def optimiser_of(trained: Sequence[Tensor], config: LoopConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )


def step_seed(config: LoopConfig, step: int) -> int:
    """Seed of a step's batches and noise in this process."""
    return config.seed + step + 1_000_003 * parallel.rank()


def learning_rate(config: LoopConfig, step: int, done: float) -> float:
    """Linear warm-up, then cosine over the share `done` of the run, down to 1 %."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _require_finite(values: dict[str, Tensor], step: int) -> dict[str, float]:
    """The losses as numbers; raises RsdError where their total is none."""
    numbers = {name: float(value.detach()) for name, value in values.items()}
    if not math.isfinite(numbers.get("total", 0.0)):
        raise RsdError(f"training diverged at step {step}: losses {numbers}; lower --loop.learning-rate")
    return numbers


def _log(writer: Any, values: dict[str, Tensor], norm: Tensor, step: int, seconds: float) -> None:
    numbers = _require_finite(values, step)
    numbers = {f"loss/{name}": number for name, number in numbers.items()}
    numbers |= {"gradient_norm": float(norm), "steps_per_second": step / seconds}
    with writing(Path(writer.log_dir)):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)


@dataclass(frozen=True)
class State:
    """A training's file to go on from. parts: what is restored, by name; resolved: the settings that it belongs to."""

    path: Path
    parts: dict[str, Any]
    resolved: dict[str, Any]

    def save(self, step: int, spent: float) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "spent": spent, "config": json.dumps(self.resolved, sort_keys=True)}
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def resume(self) -> tuple[int, float]:
        """Restore the parts, where there is a file -> steps done and seconds spent."""
        if not (state := self.read()):
            return 0, 0.0
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            return int(state["step"]), float(state["spent"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what torch makes of it
            raise self._odd(error) from error

    def read(self) -> dict[str, Any]:
        """What the file holds, nothing where there is none; `RsdError` for the state of another run."""
        if not self.path.exists():
            return {}
        state = read_pt(self.path)
        if missing := {"config", "step", "spent", *self.parts} - state.keys():
            found = f"found one without {', '.join(sorted(missing))}"
            raise RsdError(f"{self.path}: expected the state of a training, {found}; choose another --output")
        try:
            changed = differing(json.loads(state["config"]), json.loads(json.dumps(self.resolved)))
        except (TypeError, ValueError) as error:
            raise self._odd(error) from error
        if changed:
            found = f"belongs to a run with other settings ({', '.join(changed[:5])})"
            raise RsdError(f"{self.path}: {found}; choose another --output, or the settings of that run")
        return state

    def _odd(self, error: Exception) -> RsdError:
        found = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        return RsdError(f"{self.path}: not the state of this training ({found}); choose another --output")


def differing(there: Any, here: Any, at: str = "") -> list[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [name for key in keys for name in differing(there.get(key), here.get(key), f"{at}.{key}".strip("."))]
    return [at or "all"] * (there != here)


def check_state(config: Trains, **also: object) -> None:
    """`RsdError` for a run folder with the state of another run, or with what is none, before anything is loaded; also:
    as to `train_and_save`."""
    State(config.output / STATE_FILE, {}, {**describe(config), **also}).read()


def describe(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (paths and tuples as text and lists)."""
    return json.loads(json.dumps(asdict(config), default=str))


Config = TypeVar("Config")
P = ParamSpec("P")
Result = TypeVar("Result")


@contextlib.contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that work ends where it can be taken up again; a second one ends it at
    once. In another thread than the main one, nothing sets it."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; once more to stop at once, without saving", file=sys.stderr)

    with on_signals(ask, signal.SIGINT, signal.SIGTERM):
        yield asked


def one_run_a_folder(train: Callable[Concatenate[Config, P], Result]) -> Callable[Concatenate[Config, P], Result]:
    """A training that has its `config.output` for itself; of the processes of `torchrun` the first one holds it."""

    @functools.wraps(train)
    def alone(config: Config, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        output: Path = config.output  # type: ignore[attr-defined]
        first = not parallel.launched() or int(variable("RANK", "0")) == 0
        names, others = sorted(path.name for path in output.glob("*")), OF_OTHERS[hasattr(config, "overwrite") :]
        if found := next((name for name in names if name in others or name.endswith(FILE_SUFFIX)), None):
            what = f"expected a folder of its own, found {found} in it, of something else"
            raise RsdError(f"--output {output}: {what}; choose another one")
        with exclusive(output) if first else contextlib.nullcontext():
            if (output / CHECKPOINT).exists() and not (output / STATE_FILE).exists():
                raise RsdError(f"{output / CHECKPOINT}: a checkpoint of another run; choose another --output")
            return train(config, *args, **kwargs)

    return alone
