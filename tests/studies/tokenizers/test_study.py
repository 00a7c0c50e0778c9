"""`python -m studies.tokenizers` and `inspect` from demonstrations on disk to document and pictures, in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from rsd.cli import dispatch
from rsd.reporting.tokenizer_plots import InspectConfig, entropy, inspect_tokenizer, level_statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.types import RsdError
from studies.command import run_study
from studies.tokenizers.config import TIMING
from studies.tokenizers.learned import LearnConfig
from studies.tokenizers.methods import METHODS, Effort
from studies.tokenizers.report import READING, write_report
from studies.tokenizers.study import BenchConfig, bench
from studies.tokenizers.tables import envelope, rmse_at, verdict

FAST_ONES = ("ours-dct", "bins", "fast", "layernorm-rfsq")


def make_small(patch: pytest.MonkeyPatch) -> None:
    """What a study does, with less of everything."""
    methods, timing = "studies.tokenizers.methods", "studies.tokenizers.timing"
    for name, value in {
        f"{methods}.LEVELS": 3,
        f"{methods}.BUDGETS": (100,),
        f"{methods}.CODES": ((5, 3.0, 2),),
        f"{timing}.ROUNDS": 2,
        f"{timing}.WARMUP": 1,
        "studies.tokenizers.entropy.CANDIDATES": 4,
        "studies.tokenizers.vector.VQ_BATCH": 64,
        "studies.tokenizers.study.QUICK": Effort(LearnConfig(hidden=16, steps=5), 2, (2, 2)),
    }.items():
        patch.setattr(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("data"))


def write_demonstrations(folder: Path, seed: int = 0, count: int = 20) -> Path:
    """Episodes of 40 steps, smooth random motion."""
    rng = np.random.default_rng(seed)
    with h5py.File(folder / "pick_up_the_bowl_demo.hdf5", "w") as file:
        group = file.create_group("data")
        for episode in range(count):
            time = np.linspace(0, 1, 40)[:, None]
            motion = np.sin(rng.normal(size=6) * 4 * time + rng.normal(size=6))
            demo = group.create_group(f"demo_{episode}")
            demo.create_dataset("actions", data=np.hstack([motion, np.where(time < 0.5, -1.0, 1.0)]))
            demo.create_dataset("obs/ee_states", data=motion)
            demo.create_dataset("obs/gripper_states", data=np.hstack([time, -time]))
    return folder


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    folder = tmp_path_factory.mktemp("study")
    document = folder / "doc" / "codes.md"
    config = BenchConfig((data,), methods=FAST_ONES, output=folder / "json", document=document, quick=True)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        bench(config)
    return config


def test_a_study_writes_a_file_per_method_a_document_and_plots(study: BenchConfig) -> None:
    assert {path.stem for path in study.output.iterdir()} == set(FAST_ONES)
    record = json.loads((study.output / "fast.json").read_text())
    assert record["data"]["train_episodes"] == 16
    assert record["data"]["held_out_episodes"] == 4
    assert record["quick"]
    assert record["versions"]["tokenizers"] != "not installed"
    assert all(0 <= point["extra"]["undecodable_after_one_error"] <= 1 for point in record["points"])
    text = study.document.read_text()
    assert "Not a result: measured with `--quick`" in text
    assert "| FAST |" in text
    assert "Per-sample LayerNorm RFSQ" in text
    for plot in ("coded.svg", "nominal.svg", "prefixes.svg"):
        assert (study.document.parent / "codes" / plot).stat().st_size < 300_000
        assert f"(codes/{plot})" in text


def test_the_document_is_made_again_from_the_files_alone(study: BenchConfig, tmp_path: Path) -> None:
    before = study.document.read_text()
    plot = study.document.parent / "codes" / "coded.svg"
    drawn = plot.read_bytes()
    written = before.replace(READING[0], READING[0] + "\nWhat I make of it.")
    study.document.write_text(written)
    assert run_study(
        "tokenizers", f"--report-only --output {study.output} --document {study.document} --data /nowhere".split()
    ) == 0
    assert study.document.read_text() == written  # what was written by hand is kept
    assert plot.read_bytes() == drawn
    study.document.write_text(before)


def test_the_same_codes_are_measured_on_suites_they_were_not_fitted_on(
    study: BenchConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    (tmp_path / "wild").mkdir()
    wild = write_demonstrations(tmp_path / "wild", seed=1, count=3)
    (tmp_path / "json").mkdir()
    for name in ("fast", "bins"):
        (tmp_path / "json" / f"{name}.json").write_bytes((study.output / f"{name}.json").read_bytes())
    document = tmp_path / "codes.md"
    methods = ("ours-dct", "bins")
    others = BenchConfig(
        (data,), (wild,), methods, output=tmp_path / "json", document=document, train_chunks=200, quick=True
    )
    bench(others)
    assert {path.name for path in (tmp_path / "json").iterdir()} == {"fast.json", "bins.json", "suites"}
    assert {path.stem for path in (tmp_path / "json" / "suites").iterdir()} == set(methods)
    record = json.loads((tmp_path / "json" / "suites" / "bins.json").read_text())
    assert record["data"]["train_chunks"] == 214
    assert record["data"]["others"]["wild"]["chunks"] == 30
    assert 0 <= record["data"]["others"]["wild"]["chunks_beyond_train_range"] <= 1
    own, there = record["points"], record["others"]["wild"]
    assert [p["setting"] for p in own] == [p["setting"] for p in there]
    assert all(p["rmse"] != q["rmse"] for p, q in zip(own, there, strict=True))
    text = document.read_text()
    assert "| FAST |" in text  # of the study beside it
    assert "### wild: entropy-coded bits, order 1" in text
    assert "Codes and entropy models fitted on 214 chunks" in text
    with pytest.raises(RsdError, match="expected folders of different names"):
        BenchConfig((data,), (wild, wild))


def test_results_are_not_replaced_unless_asked_for(
    study: BenchConfig, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_small(monkeypatch)
    before = {path: path.read_bytes() for path in study.output.iterdir()}
    with pytest.raises(RsdError, match=r"json: exists already; choose another --output, or --overwrite"):
        bench(study)
    (tmp_path / "else").mkdir()
    other = replace(study, data=(write_demonstrations(tmp_path / "else", seed=2, count=10),), overwrite=True)
    with pytest.raises(RsdError, match=r"holds results of .* on other data or settings; choose another --output"):
        bench(replace(other, methods=("bins",)))
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    with pytest.raises(RsdError, match=r"notes.md: exists already"):
        bench(replace(study, output=tmp_path, document=notes))
    assert {path: path.read_bytes() for path in study.output.iterdir()} == before
    assert BenchConfig().output.parts[0] == BenchConfig().document.parts[0] == "runs"


def test_a_method_that_fails_costs_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)

    def failing(*_: object) -> None:
        raise RsdError("no code fits")

    monkeypatch.setitem(METHODS, "fast", failing)
    config = BenchConfig((data,), methods=("fast", "bins"), output=tmp_path, document=tmp_path / "d.md", quick=True)
    with pytest.raises(RsdError, match=r"1 of 2 methods failed, the first of them fast .no code fits.; the results of"):
        bench(config)
    assert [path.name for path in tmp_path.glob("*.json")] == ["bins.json"]
    assert "bins" in config.document.read_text()


def test_results_of_different_data_are_not_mixed(study: BenchConfig, tmp_path: Path) -> None:
    for name, change in (("fast", {}), ("bins", {"data": {"tasks": []}})):
        record = json.loads((study.output / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(RsdError, match="measured on different data"):
        write_report(tmp_path, tmp_path / "doc.md")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no results"),
        ("{", "not valid JSON"),
        ('{"format": 7}', "of format 1, found 7"),
        ("[]", "found None"),
    ],
)
def test_odd_results_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "fast.json").write_text(content)
    with pytest.raises(RsdError, match=message):
        write_report(tmp_path, tmp_path / "doc.md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods fsat", "--methods fsat: expected some of ours-dct"),
        ("--methods fast fast", "each once"),
        ("--horizon 0", "--horizon >= 1"),
        ("--held-out-every 1", "--held-out-every >= 2"),
    ],
)
def test_impossible_studies_are_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("tokenizers", [*arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_few_demonstrations_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="at least 21 demonstrations, found 20"):
        bench(BenchConfig((data,), held_out_every=21, output=tmp_path, document=tmp_path / "doc.md"))


def test_every_method_and_the_timing_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    methods = tuple(name for name in (*METHODS, TIMING) if name not in FAST_ONES)
    config = BenchConfig((data,), methods=methods, output=tmp_path, document=tmp_path / "doc.md", quick=True)
    bench(config)
    text = config.document.read_text()
    assert "ours, chunk-autoencoder*" in text
    assert "RVQ 1024 + refiner*" in text
    assert "| FAST, scale 10 | 256 |" in text
    times = json.loads((tmp_path / f"{TIMING}.json").read_text())["times"]
    assert all(0 < each["encode_p50"] <= each["encode_p95"] for each in times)
    for path in tmp_path.glob("ours-*.json"):
        for point in json.loads(path.read_text())["points"]:
            assert point["bits_order_0"] < point["nominal_bits"]


def point(bits: float, rmse: float) -> dict[str, float]:
    return {"nominal_bits": bits, "rmse": rmse}


def test_curves_are_interpolated_on_their_best_points() -> None:
    curve = [point(100, 0.1), point(50, 0.4), point(80, 0.9), point(200, 0.2)]
    assert list(envelope(curve, "nominal_bits")[0]) == [50, 100]
    assert rmse_at(curve, "nominal_bits", 75) == pytest.approx(0.2)
    assert rmse_at(curve, "nominal_bits", 40) is None
    assert rmse_at(curve, "nominal_bits", 450) == pytest.approx(0.1)


def test_the_verdict_says_where_ours_is_and_is_not_lowest() -> None:
    curves = {"ours, dct": [point(60, 0.2), point(100, 0.01)], "FAST": [point(60, 0.1), point(450, 0.05)]}
    said = verdict(curves, "nominal_bits")
    assert "NOT lowest at 60 (FAST: 2.00x)" in said
    assert "Ours is lowest at 80" in said
    assert "450 (5.00x)" in said


# inspect


def test_inspect_draws_and_counts(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(f"tokenizer fit --data {data} --output {tmp_path} --tokenizer.levels 3".split()) == 0
    output = tmp_path / "pictures" / "chunk.svg"
    assert dispatch(f"tokenizer inspect --tokenizer {tmp_path} --data {data} --output {output}".split()) == 0
    assert output.read_text().count("level 3") or output.stat().st_size > 10_000
    assert "800 chunks" in capsys.readouterr().out


def test_level_statistics_are_those_of_the_tokens(chunks: np.ndarray) -> None:
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig(symbols=3, rho=3.0, levels=4))
    batch = torch.from_numpy(chunks)
    statistics = level_statistics(tokenizer, batch)
    tokens = tokenizer.encode(batch).motion
    for each in statistics:
        cells = tokens[:, each.level - 1]
        assert each.counts == [int((cells == symbol).sum()) for symbol in range(3)]
        assert 0.0 <= each.entropy <= np.log2(3)
        assert 0.0 <= each.utilisation <= 1.0
    errors = [each.mean_error for each in statistics]
    assert errors == sorted(errors, reverse=True)


def test_entropy_of_known_counts() -> None:
    assert entropy(np.array([[5, 5, 0, 0], [7, 0, 0, 0]])) == pytest.approx(0.5)
    assert entropy(np.zeros((0, 4), np.int64)) == 0.0


def test_odd_inspections_are_refused(data: Path, chunks: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="that ends in"):
        InspectConfig(output=tmp_path / "picture.bmp")
    ActionTokenizer.fit(chunks).save(tmp_path)
    with pytest.raises(RsdError, match="--chunk 800: expected a number below 800"):
        inspect_tokenizer(InspectConfig(str(tmp_path), (data,), 800))
    ActionTokenizer.fit(chunks[..., 2:]).save(tmp_path)
    with pytest.raises(RsdError, match="expected actions of 5 numbers, found 7"):
        inspect_tokenizer(InspectConfig(str(tmp_path), (data,)))
