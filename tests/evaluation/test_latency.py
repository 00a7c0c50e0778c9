"""The latency table and its configuration; the measurement itself runs once, on one observation."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rsd.evaluation import latency
from rsd.evaluation.latency import LatencyConfig, LatencyRecord, measure_latency, print_latencies
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.output import refuse_to_replace
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import VERIFY_PENDING, ChunkStats, Observation, RsdError
from studies import scaling
from studies.scaling import SKIPPED, ScalingConfig, ScalingRecord, measure_scaling


def printed(record: LatencyRecord) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_latencies(console, record)
    return console.export_text()


def test_the_ratio_is_that_of_the_medians() -> None:
    def stages(total: float) -> dict[str, list[float]]:
        return {"prefill": [1.0, 1.0, 1.0], "total": [total, 2 * total, 100.0]}

    record = LatencyRecord(1, {}, {}, {"device": "cpu"}, {"ar": stages(3.0), "rsd": stages(2.0)})
    text = printed(record)
    assert "1.50x" in text
    assert "6.0 / " in text


@pytest.mark.parametrize(
    "bad", [{"decode": ("ar", "fast")}, {"decode": ()}, {"decode": ("ar", "ar")}, {"rounds": 0}, {"warmup": -1}]
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(RsdError, match=r"decode|rounds|warmup"):
        LatencyConfig(**bad)  # type: ignore[arg-type]


def test_another_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(RsdError, match="exists already; choose another --output, or --overwrite"):
        measure_latency(LatencyConfig(output=tmp_path / "notes.json"))
    assert (tmp_path / "notes.json").read_text() == "{}"


def one_observation(suite: str, tasks: int, policy: RsdPolicy) -> list[Observation]:
    images = np.full((2, policy.image_size, policy.image_size, 3), 90, np.uint8)
    state = np.array([-0.2, 0, 1.17, 3.14, 0, 0, 0.04, -0.04], np.float32)
    return [Observation(images, state, "pick up the black bowl")]


def test_every_decoder_is_timed_equally_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "observations", one_observation)
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "libero"
    output = tmp_path / "latency.json"
    record = measure_latency(LatencyConfig(policy=str(checkpoint), rounds=2, warmup=1, threads=1, output=output))
    assert {name: len(by_stage["total"]) for name, by_stage in record.milliseconds.items()} == dict.fromkeys(
        ("ar", "l1", "parallel", "rsd", "rsd-fused"), 2
    )
    stored = json.loads(output.read_text())
    assert stored["milliseconds"] == record.milliseconds
    refuse_to_replace(output, False, latency.MARK)  # the next measurement may
    for by_stage in record.milliseconds.values():
        parts = [sum(values[i] for stage, values in by_stage.items() if stage != "total") for i in range(2)]
        assert all(0 < part <= total * 1.01 for part, total in zip(parts, by_stage["total"], strict=True))
    # one pass and its visual drafter do more than one pass, and less than eight
    assert record.work["l1"]["flops"] < record.work["rsd-fused"]["flops"] < record.work["ar"]["flops"]
    assert record.work["l1"]["weight_bytes"] < record.work["rsd"]["weight_bytes"] < record.work["ar"]["weight_bytes"]
    assert all(ideal > 0 for ideal in record.ideal_ms().values())


@pytest.mark.parametrize(("rate", "length", "passes"), [(0.0, 1.0, 1 + 7), (1.0, 4.0, 4)])
def test_made_up_acceptance_sets_how_many_passes_are_timed(
    rate: float, length: float, passes: int, make_model: Callable[[int], RsdModel], tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
) -> None:  # fmt: skip
    options = {"acceptance": f"synthetic({rate:g})", "timed_only": True}
    policies = {
        name: RsdPolicy.of(make_model(0), tokenizer, tiny_config, decode=name, **options)
        for name in ("l1", "rsd", "rsd-fused")
    }
    seen = one_observation("", 1, policies["l1"])
    drafted: dict[str, list[ChunkStats]] = {}
    times = latency.take_turns(policies, seen, 1, 2, drafted)
    assert set(drafted) == {"rsd", "rsd-fused"}
    # rejected: all of the eight levels, but the one that was corrected, and once more for the gripper
    assert {chunk.target_passes for chunk in drafted["rsd-fused"]} == {passes}
    found = {name: asdict(latency.acceptance_of("synthetic(0,0)", chunks)) for name, chunks in drafted.items()}
    assert {one["mean_acceptance_length"] for one in found.values()} == {length}
    record = LatencyRecord(2, {"acceptance": options["acceptance"]}, {}, {"device": "cpu"}, times, acceptance=found)
    assert f"SYNTHETIC acceptance, {options['acceptance']}: what stands is made up" in printed(record)
    assert "mean acceptance length" in printed(record)


def test_the_roofline_is_of_the_work_that_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "observations", one_observation)
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "libero"
    config = LatencyConfig(
        policy=str(checkpoint), decode=("l1", "draft-first", "drafter-only"), engine="eager", rounds=2, threads=1
    )
    record = measure_latency(replace(config, warmup=1, output=tmp_path / "latency.json"))
    # what comes after the chunk, the target's pass, is in neither the time nor the work of draft-first
    assert VERIFY_PENDING in record.milliseconds["draft-first"]
    assert record.work["draft-first"]["flops"] < 0.5 * record.work["l1"]["flops"]
    assert record.work["draft-first"]["flops"] == pytest.approx(record.work["drafter-only"]["flops"], rel=0.2)
    shares = {name: ideal / np.median(record.milliseconds[name]["total"]) for name, ideal in record.ideal_ms().items()}
    assert set(shares) == set(config.decode)
    assert all(0 < share < 1.05 for share in shares.values()), shares
    assert f"{VERIFY_PENDING}, after the chunk" in printed(record)


def test_an_older_record_has_no_share_where_its_work_was_of_more_than_its_time() -> None:
    work = {"flops": 1e9, "weight_bytes": 1e6}
    times = {"l1": {"total": [4.0]}, "draft-first": {"total": [1.0], VERIFY_PENDING: [4.0]}}
    ceiling = {"flops": 1e12, "bandwidth": 1e12}
    works = dict.fromkeys(times, work)
    old, new = (LatencyRecord(form, {}, {}, {"device": "cpu"}, times, ceiling, works) for form in (1, 2))
    assert set(old.ideal_ms()) == {"l1"}
    assert set(new.ideal_ms()) == {"l1", "draft-first"}
    assert "100%" not in printed(old)
    assert "100%" in printed(new)


def test_a_larger_main_takes_longer_and_its_draft_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "observations", one_observation)
    monkeypatch.setattr(scaling, "available_cores", lambda: 1)  # two threads wait for each other on a busy machine
    checkpoint, output = Path(__file__).parents[2] / "checkpoints" / "libero", tmp_path / "scaling.json"
    config = ScalingConfig(str(checkpoint), sizes=("10M", "32M"), rounds=3, warmup=1, output=output)
    record = measure_scaling(config)
    small, large = record.sizes.values()
    assert 9e6 < small.parameters < 11e6 < 30e6 < large.parameters < 35e6
    assert large.p50("ar") > small.p50("ar")
    assert large.p50(SKIPPED) < large.p50("l1")
    assert large.skipping(1.0) == large.p50(SKIPPED) < large.skipping(0.5) < large.skipping(0.0)
    stored = ScalingRecord.from_json(json.loads(output.read_text()))
    assert stored.sizes["32M"].milliseconds == large.milliseconds
    with pytest.raises(RsdError, match="expected some of 10M"):
        ScalingConfig(sizes=("7B",))


def test_scaling_verifies_as_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "observations", one_observation)
    monkeypatch.setattr(scaling, "available_cores", lambda: 1)  # two threads wait for each other on a busy machine
    verified: dict[str, str] = {}

    def turns(policies: dict[str, RsdPolicy], *options: Any) -> dict[str, dict[str, list[float]]]:
        verified.update((name, policy.acceptance) for name, policy in policies.items())
        return latency.take_turns(policies, *options)

    monkeypatch.setattr(scaling, "take_turns", turns)
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "libero"
    config = ScalingConfig(str(checkpoint), sizes=("10M",), rounds=1, warmup=1, output=tmp_path / "scaling.json")
    assert measure_scaling(replace(config, acceptance="residual")).config["engine"] == "eager"
    assert verified == {"ar": "", "l1": "", "rsd": "residual", "rsd-fused": "residual", SKIPPED: "residual"}


def test_more_tasks_than_the_suite_has_are_refused() -> None:
    with pytest.raises(RsdError, match="--num-tasks 11: expected 1 to 10, as libero_spatial has no more"):
        latency.observations("libero_spatial", 11, None)  # type: ignore[arg-type]
