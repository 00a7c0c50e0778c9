"""`python -m studies.openvla` on a tiny model: every decoder is timed, and what fails hides nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusals import check
from rsd.evaluation.roofline import Ceiling
from rsd.targets.openvla.lora import LoraConfig
from rsd.targets.openvla.rsd_policy import OpenVlaRsdConfig
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.training.openvla import prepare
from rsd.types import RsdError
from studies.command import run_study
from studies.openvla.bench import Bench, OpenVlaBenchConfig, Row, measure_openvla
from studies.openvla.bench_cases import Inputs, full_config, ideal_ms, openvla_cases, random_model
from studies.openvla.bench_train import training_step
from studies.openvla.config import CASES
from studies.openvla.precision import Fp8Linear, use_fp8


def tiny(tmp_path: Path, *sections: str) -> OpenVlaBenchConfig:
    return OpenVlaBenchConfig(
        sections=sections,
        cameras=(2,),
        batches=(1, 2),
        repeats=2,
        warmup=1,
        device="cpu",
        size="tiny",
        checkpoint=tmp_path / "checkpoint",
        output=tmp_path / "bench.json",
    )


def test_every_case_is_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = measure_openvla(tiny(tmp_path, "eager", "graph", "load"))
    timed = {(row.section, row.case, row.batch) for row in bench.rows if row.p50_ms}
    assert {("eager", case, 1) for case in CASES} <= timed
    assert ("graph", "l1", 2) in timed
    assert not [row for row in bench.rows if row.error]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert len(content["rows"]) == len(bench.rows)
    assert content["notes"]["load"]["parameters"] == sum(
        parameter.numel()
        for name, parameter in random_model(full_config("tiny"), "cpu", torch.float32).named_parameters()
        if not name.startswith(("action_head", "proprio"))
    )
    assert not (tmp_path / "checkpoint").exists()
    assert "rsd-fused" in capsys.readouterr().out


def test_a_training_step_is_timed(tmp_path: Path) -> None:
    bench = measure_openvla(replace(tiny(tmp_path, "train"), train_batches=(2, 4)))
    assert [(row.case, row.cameras, row.batch, row.error) for row in bench.rows] == [
        ("lora-step", 2, 2, ""),
        ("lora-step", 2, 4, ""),
    ]
    assert all(row.p50_ms and row.share and row.share < 1 for row in bench.rows)
    note = json.loads((tmp_path / "bench.json").read_text())["notes"]["train"]
    assert [step["batch"] for step in note["steps"]] == [2, 4]
    assert note["lora_rank"] == 32
    dim, mlp, layers, rank = 64, 128, 2, 32
    updates = layers * rank * (dim + 3 * dim + 2 * dim + dim + 2 * mlp + mlp + dim)
    assert note["trained_parameters"] > updates
    with pytest.raises(RsdError, match="expected even numbers for --train-batches, found 3"):
        replace(tiny(tmp_path, "train"), train_batches=(3,))


def test_training_steps_learn_the_batch_they_are_timed_on() -> None:
    """So what is timed is a whole step: gradients reach the updates, and the optimiser moves them."""
    tokenizer = ActionTokenizer(TokenizerConfig(), -torch.ones(6), torch.ones(6), 1.0)
    model = random_model(full_config("tiny"), "cpu", torch.float32)
    trainee = prepare(model, OpenVlaRsdConfig(), LoraConfig(), tokenizer, checkpointing=True)
    before = [parameter.detach().clone() for parameter in trainee.adapter.updates.parameters()]
    frozen = model.language_model.embed_tokens.weight.clone()
    step = training_step(trainee, tokenizer, 2, 10)
    for _ in range(2):  # A has no gradient before B has moved
        step()
    assert all(not torch.equal(x, y) for x, y in zip(before, trainee.adapter.updates.parameters(), strict=True))
    assert torch.equal(frozen, model.language_model.embed_tokens.weight)


def test_a_row_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    bench = Bench(tiny(tmp_path, "eager"))
    bench.measure_ceiling()
    model = random_model(full_config("tiny"), "cpu", torch.float32)
    model.action_head = None
    bench.run_native("eager", model)
    errors = {row.case: row.error for row in bench.rows}
    assert "no action head is loaded" in errors["l1"]
    assert not any(error for case, error in errors.items() if case != "l1")


def test_a_row_without_a_roofline_takes_the_same_cases(tmp_path: Path) -> None:
    bench = Bench(tiny(tmp_path, "eager"))
    bench.rows = [
        Row("reference", "l1", 2, 1, p50_ms=80.0),
        Row("reference", "l1", 1, 1, p50_ms=60.0),
        Row("graph", "l1", 2, 1, p50_ms=20.0, ideal_ms=10.0, share=0.5),
    ]
    bench.share_ideals()
    assert [row.share for row in bench.rows] == [0.125, None, 0.5]


def test_loading_leaves_a_directory_that_exists_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, "load")
    config.checkpoint.mkdir()
    (config.checkpoint / "mine.txt").write_text("mine")
    bench = measure_openvla(config)
    assert "exists; name a directory that does not" in bench.rows[0].error
    assert (config.checkpoint / "mine.txt").read_text() == "mine"


def test_a_library_that_is_missing_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    bench = measure_openvla(tiny(tmp_path, "reference"))
    assert "transformers" in bench.rows[0].error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--sections egaer", "expected --sections of reference, eager"),
        ("--repeats 0", "--repeats: expected an integer from 1 to 1000000000, found 0"),
        ("--cameras 9", "--cameras: expected an integer from 1 to 2, found 9"),
        ("--batches", "expected one or more of --batches, found none"),
        ("--train-batches 3", "expected even numbers for --train-batches, found 3"),
        ("--size 9b", "--size: expected one of 7b, tiny, found '9b'"),
        ("--max-seconds nan", "--max-seconds: expected a number from 0 to"),
    ],
)
def test_bad_options_are_one_line(
    options: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(["study", "openvla", *options.split()], expected, tmp_path, capsys)


def test_without_a_gpu_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert run_study("openvla", []) == 2
        assert "no CUDA device is visible here" in capsys.readouterr().err


def test_the_roofline_of_one_pass_is_what_the_sizes_say() -> None:
    model = random_model(full_config("tiny"), "cpu", torch.float32)
    cases = {case.name: case for case in openvla_cases(model, Inputs(model, 2, 1, 10))}
    dim, mlp, layers, new = 64, 128, 2, 2 * 16 + 10 + 1
    weights = layers * (4 * dim * dim + 3 * dim * mlp)
    compute_bound = Ceiling(flops=1e9, bandwidth=1e18)
    flops = 2 * weights * new + 4 * new * new * dim * layers
    assert ideal_ms(model, cases["prefill"], compute_bound, 1, 2) == pytest.approx(1e3 * flops / 1e9)
    memory_bound = Ceiling(flops=1e18, bandwidth=1e9)
    read = 2 * (weights + 2 * layers * dim * new)
    assert ideal_ms(model, cases["prefill"], memory_bound, 1, 2) == pytest.approx(1e3 * read / 1e9)


def test_fp8_is_close_and_needs_bfloat16() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).bfloat16()
    x = torch.randn(2, 5, 64).bfloat16()
    exact = linear(x).float()
    assert (Fp8Linear(linear)(x).float() - exact).norm() / exact.norm() < 0.06  # e4m3 has 3 bits of mantissa
    with pytest.raises(RsdError, match="FP8: expected a bfloat16 model"):
        use_fp8(random_model(full_config("tiny"), "cpu", torch.float32))
