"""`python -m studies.openvla`: every way to run a 7B policy beside the published one, in one run, on random weights.

What fails is a row that says so and hides no other. All variants are timed alike: device synchronised at both ends,
warm-up thrown away, whole decisions from pixels on the device.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rsd.devices import check_device
from rsd.evaluation.roofline import Ceiling, measure_ceiling
from rsd.evaluation.tables import print_table
from rsd.runtime.cuda_graph import Captured
from rsd.targets.openvla.model import OpenVlaModel
from studies.openvla.bench_cases import (
    Case,
    Inputs,
    full_config,
    generate,
    ideal_ms,
    openvla_cases,
    random_model,
    rfsq_cases,
)
from studies.openvla.config import CASES, OpenVlaBenchConfig
from studies.openvla.precision import compile_layers, use_fp8

FORMAT = 1


@dataclass
class Row:
    """One number of the table. milliseconds: p50, p95, min; share: of the device's roofline (bfloat16)."""

    section: str
    case: str
    cameras: int
    batch: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    ideal_ms: float | None = None
    share: float | None = None
    peak_gib: float | None = None
    prepare_s: float | None = None
    error: str = ""


@dataclass
class Bench:
    config: OpenVlaBenchConfig
    start: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    ceiling: Ceiling | None = None

    # timing

    def sync(self) -> None:
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize(self.config.device)

    def run_row(
        self,
        row: Row,
        prepare: Callable[[], Callable[[], Any]],
        ideal: Callable[[], float] | None,
        repeats: int | None = None,
    ) -> None:
        """Time what prepare() returns; anything that goes wrong becomes the row's error.

        ideal: the roofline's milliseconds; None takes those of the same case in another section (`share_ideals`).
        repeats: where not the configured number.
        """
        self.rows.append(row)
        if time.perf_counter() - self.start > self.config.max_seconds:
            row.error = f"not run: more than --max-seconds {self.config.max_seconds:.0f} had passed"
            return
        try:
            cuda = self.config.device.startswith("cuda")
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.config.device)
            begin = time.perf_counter()
            call = prepare()
            times = []
            for _ in range(self.config.warmup):
                call()
            self.sync()
            row.prepare_s = round(time.perf_counter() - begin, 2)
            for _ in range(repeats or self.config.repeats):
                self.sync()
                begin = time.perf_counter()
                call()
                self.sync()
                times.append(1e3 * (time.perf_counter() - begin))
            values = torch.tensor(times, dtype=torch.float64)
            row.p50_ms, row.p95_ms = (round(float(values.quantile(q)), 3) for q in (0.5, 0.95))
            row.min_ms = round(min(times), 3)
            if cuda:
                row.peak_gib = round(torch.cuda.max_memory_allocated(self.config.device) / 2**30, 2)
            if ideal is not None:
                row.ideal_ms = round(ideal(), 3)
                row.share = round(row.ideal_ms / row.p50_ms, 3)
        except Exception as error:  # a row must not hide the others
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.free()

    def share_ideals(self) -> None:
        """Rows that were timed without a roofline take it from the same case, cameras and batch elsewhere."""
        known = {(row.case, row.cameras, row.batch): row.ideal_ms for row in self.rows if row.ideal_ms}
        for row in self.rows:
            ideal = known.get((row.case, row.cameras, row.batch))
            if row.p50_ms and row.ideal_ms is None and ideal:
                row.ideal_ms, row.share = ideal, round(ideal / row.p50_ms, 3)

    def free(self) -> None:
        gc.collect()
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def measure_ceiling(self) -> None:
        """What the device reaches, in the precision of the benchmark."""
        device = torch.device(self.config.device)
        self.ceiling = measure_ceiling(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.notes["ceiling"] = {k: f"{v:.4g}" for k, v in asdict(self.ceiling).items()}

    # sections

    def run_native(self, section: str, model: OpenVlaModel) -> None:
        """All cases of one section on the native model as it now is."""
        graphs = section != "eager"
        for batch in self.config.batches:
            first = batch == self.config.batches[0]
            if not first and section not in ("graph", "fp8"):
                continue
            every_camera = first and section in ("graph", "fp8")
            for cameras in self.config.cameras if every_camera else self.config.cameras[:1]:
                self.run_cases(section, model, cameras, batch, graphs, first)
            self.free()

    def run_cases(
        self, section: str, model: OpenVlaModel, cameras: int, batch: int, graphs: bool, first: bool
    ) -> None:
        try:
            inputs = Inputs(model, cameras, batch, self.config.prompt_tokens)
            cases = [*openvla_cases(model, inputs), *rfsq_cases(model, inputs)]
        except Exception as error:
            self.rows.append(Row(section, "all", cameras, batch, error=f"{type(error).__name__}: {error}"[:300]))
            self.free()
            return
        for case in cases:
            if case.name in self.config.cases and (first or case.name in ("prefill", "l1", "rsd")):

                def prepare(case: Case = case) -> Callable[[], Any]:
                    call = Captured(case.fn, case.inputs) if graphs else case.fn
                    return lambda: call(*case.inputs)

                def ideal(case: Case = case) -> float:
                    assert self.ceiling is not None
                    return ideal_ms(model, case, self.ceiling, batch, cameras)

                known = ideal if case.passes or case.vision else None  # of the visual drafter none is worth stating
                self.run_row(Row(section, case.name, cameras, batch), prepare, known)

    def decide(self, model: OpenVlaModel, graphs: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk and the seven tokens, to compare sections on: actions, hidden states, tokens."""
        inputs = Inputs(model, self.config.cameras[0], 1, self.config.prompt_tokens).all()

        def both(pixels: Tensor, prompt: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            prefix = model.embed_prefix(model.embed_images(pixels), prompt, state)
            hidden = model.action_hidden(prefix)
            return model.head(hidden), hidden.float(), generate(model, prefix)

        call = Captured(both, inputs) if graphs else both
        actions, hidden, tokens = call(*inputs)
        return actions.clone(), hidden.clone(), tokens.clone()

    def note_error(self, section: str, exact: tuple[Tensor, Tensor, Tensor], model: OpenVlaModel) -> None:
        """How far a section's outputs are from those of the bfloat16 eager model on the same input."""
        try:
            actions, hidden, tokens = self.decide(model, graphs=True)
        except Exception as error:
            self.notes[f"{section}_deviation"] = f"not measured: {type(error).__name__}: {error}"[:300]
            return
        spread = exact[0].abs().mean()
        self.notes[f"{section}_deviation"] = {
            "hidden_relative": round(float((hidden - exact[1]).norm() / exact[1].norm()), 5),
            "actions_mean_abs": round(float((actions - exact[0]).abs().mean()), 5),
            "actions_max_abs": round(float((actions - exact[0]).abs().max()), 5),
            "actions_own_mean_abs": round(float(spread), 5),
            "ar7_tokens_equal": int((tokens == exact[2]).sum()),
            "remark": "random weights: a trained model is less sensitive, or more; measure yours with `rsd eval`",
        }


def measure_openvla(config: OpenVlaBenchConfig) -> Bench:
    """Run the sections, print the table, write the JSON."""
    check_device(config.device)
    bench = Bench(config)
    dtype = torch.bfloat16 if config.device.startswith("cuda") else torch.float32
    with torch.inference_mode():
        bench.measure_ceiling()
        native = [name for name in ("eager", "graph", "compiled", "fp8") if name in config.sections]
        for section in config.sections:  # the cheapest to lose last
            if section == "reference":
                from studies.openvla.bench_reference import run_reference

                run_reference(bench, dtype)
            elif section == "load":
                from studies.openvla.bench_load import run_load

                run_load(bench, dtype)
            elif section == "train":
                from studies.openvla.bench_train import run_train

                run_train(bench, dtype)
            elif section == native[0]:  # one model for all of them
                run_native_sections(bench, native, dtype)
            bench.share_ideals()
            write(bench)
    if any(row.case in CASES for row in bench.rows):
        print_bench(Console(), bench)
    for note in notes(bench):
        Console().print(note, soft_wrap=True, highlight=False, markup=False)
    return bench


def run_native_sections(bench: Bench, sections: Sequence[str], dtype: torch.dtype) -> None:
    """One model for all: as it is, then with compiled layers, then with FP8 matrices in their place."""
    if "fp8" in sections:
        dtype = torch.bfloat16
    begin = time.perf_counter()
    model = random_model(full_config(bench.config.size), bench.config.device, dtype)
    bench.sync()
    bench.notes["random_weights_s"] = round(time.perf_counter() - begin, 2)
    exact = bench.decide(model, graphs=False)
    for section in ("eager", "graph", "compiled", "fp8"):
        if section not in sections:
            continue
        try:
            if section == "fp8":
                use_fp8(model, vision=True)
            if section in ("compiled", "fp8") and "compiled_layers" not in bench.notes:
                compile_layers(model)
                bench.notes["compiled_layers"] = True
        except Exception as error:
            bench.rows.append(Row(section, "all", 0, 0, error=f"{type(error).__name__}: {error}"[:300]))
            continue
        bench.run_native(section, model)
        if section != "eager":
            bench.note_error(section, exact, model)
        write(bench)
    del model
    bench.free()


# reporting


def write(bench: Bench) -> None:
    """After every section: what is measured stays if the next one kills the process."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(bench.config).items()}
    cuda = bench.config.device.startswith("cuda")
    content = {
        "format": FORMAT,
        "config": config,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(bench.config.device) if cuda else "cpu",
        "seconds": round(time.perf_counter() - bench.start, 1),
        "notes": bench.notes,
        "rows": [asdict(row) for row in bench.rows],
    }
    bench.config.output.parent.mkdir(parents=True, exist_ok=True)
    bench.config.output.write_text(json.dumps(content, indent=1) + "\n")


def print_bench(console: Console, bench: Bench) -> None:
    """p50 in milliseconds (share of the roofline) by case and section."""
    sections = list(dict.fromkeys(row.section for row in bench.rows if row.case in CASES))
    cells = {(row.case, row.cameras, row.batch, row.section): row for row in bench.rows}
    rows = []
    for case, cameras, batch in dict.fromkeys(key[:3] for key in cells if key[0] in CASES):
        found = [cells.get((case, cameras, batch, section)) for section in sections]
        rows.append([case, str(cameras), str(batch), *(cell(row) for row in found)])
    header = ["decoder", "cameras", "batch", *sections]
    print_table(console, "milliseconds per decision, p50 (share of the bfloat16 roofline)", header, rows, "rows")


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.p50_ms is None:
        return "not run" if row.error.startswith("not run") else "error"
    return f"{row.p50_ms:.2f}" + (f" ({row.share:.0%})" if row.share is not None else "")


def notes(bench: Bench) -> list[str]:
    found = [f"{key}: {json.dumps(value)}" for key, value in bench.notes.items()]
    peaks = {row.section: row.peak_gib for row in bench.rows if row.peak_gib is not None and row.batch == 1}
    if peaks:
        found.append(f"peak memory at batch 1, GiB: {json.dumps(peaks)}")
    failed = [row for row in bench.rows if row.error and not row.error.startswith("not run")]
    found += [f"{row.section} {row.case} ({row.cameras} cameras, batch {row.batch}): {row.error}" for row in failed]
    return [*found, f"written to {bench.config.output}"]
