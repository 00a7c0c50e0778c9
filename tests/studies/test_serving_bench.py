"""`python -m studies.serving`, and what is said where the extra is missing."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rsd.policy import RsdPolicy
from rsd.types import RsdError
from studies.proxying import ADDED, ASKED, DIRECT, JUDGED
from studies.serving import CORRECTION, CPU, LOCAL, NETWORK, ROUND_TRIP, ServingBenchConfig, measure_serving


def test_the_port_is_timed_and_the_raw_numbers_are_kept(
    make_policy: Callable[..., RsdPolicy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = "rsd-async"  # which has all the rows
    make_policy().save_pretrained(tmp_path / "checkpoint")
    config = ServingBenchConfig(
        str(tmp_path / "checkpoint"), (decode,), rounds=5, warmup=1, threads=1, output=tmp_path / "serving.json"
    )
    record = measure_serving(config)
    times = record.milliseconds[decode]
    assert [len(times[name]) for name in (LOCAL, ROUND_TRIP, NETWORK)] == [5, 5, 5]
    assert all(0 < way < whole for way, whole in zip(times[NETWORK], times[ROUND_TRIP], strict=True))
    assert all(draft < whole for draft, whole in zip(times[ROUND_TRIP], times[CORRECTION], strict=True))
    assert times[CPU][0] >= 0
    assert json.loads(config.output.read_text())["milliseconds"] == {decode: times}
    assert ROUND_TRIP in capsys.readouterr().out


def test_what_a_proxy_adds_is_timed_and_the_raw_numbers_are_kept(
    make_policy: Callable[..., RsdPolicy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy().save_pretrained(tmp_path / "checkpoint")
    config = ServingBenchConfig(
        str(tmp_path / "checkpoint"),
        rounds=3,
        warmup=1,
        threads=1,
        proxy=True,
        target_ms=20.0,
        output=tmp_path / "proxy.json",
    )
    times = measure_serving(config).milliseconds["proxy"]
    assert list(times) == [DIRECT, ASKED, JUDGED, ADDED + ASKED, ADDED + JUDGED]
    assert all(len(found) == 3 for found in times.values())
    assert min(times[DIRECT]) >= 20.0
    differences = [through - alone for through, alone in zip(times[JUDGED], times[DIRECT], strict=True)]
    assert times[ADDED + JUDGED] == differences
    assert json.loads(config.output.read_text())["milliseconds"] == {"proxy": times}
    assert ADDED + ASKED in capsys.readouterr().out
    with pytest.raises(RsdError, match="target_ms from 0 to 1e5"):
        ServingBenchConfig(target_ms=-1.0)


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="expected a checkpoint directory or a hub id"):
        measure_serving(ServingBenchConfig(str(tmp_path / "none"), output=tmp_path / "serving.json"))
    with pytest.raises(RsdError, match="expected rounds >= 1"):
        ServingBenchConfig(rounds=0)


@pytest.mark.parametrize(
    ("missing", "module"),
    [
        ("msgpack", "rsd.targets.remote.wire"),
        ("websockets.asyncio.server", "rsd.serving.server"),
        ("websockets.sync.client", "rsd.targets.remote.connection"),
    ],
)
def test_a_missing_extra_is_named(missing: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(RsdError, match=r"pip install 'rsd-vla\[serve\]'"):
        importlib.import_module(module)
