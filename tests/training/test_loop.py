import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from rsd.training.loop import STATE_FILE, LoopConfig, describe, learning_rate, train
from rsd.training.policy import TrainPolicyConfig
from rsd.types import RsdError

CPU = torch.device("cpu")
CONFIG = LoopConfig(steps=40, learning_rate=0.2, warmup=2, ema=0.9, save_every=10, log_every=1)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("seen", torch.zeros(1))


def fit_line(model: Line, stop_at: int = 0, drawn: list[float] | None = None) -> Callable[[], dict[str, Tensor]]:
    """Losses of y = 3 x + 1; an interruption at call `stop_at`."""

    def losses() -> dict[str, Tensor]:
        model.seen += 1
        if stop_at and int(model.seen) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(64, 1)
        if drawn is not None:
            drawn.append(float(x[0]))
        error = (model.linear(x) - 3 * x - 1).square().mean()
        return {"error": error, "total": error}

    return losses


def logged(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_loss_falls_and_the_average_is_returned(tmp_path: Path) -> None:
    model = Line()
    ema = train(model, fit_line(model), CONFIG, tmp_path, CPU, describe(CONFIG))
    curve = logged(tmp_path, "loss/total")
    assert [step for step, _ in curve] == list(range(1, 41))
    assert curve[-1][1] < 0.3 * curve[0][1]
    assert isinstance(ema, Line)
    assert not ema.training
    assert not torch.equal(ema.linear.weight, model.linear.weight)
    assert float(ema.linear.weight) == pytest.approx(float(model.linear.weight), abs=0.5)
    assert torch.equal(ema.frozen, torch.ones(1))
    assert float(ema.seen) == float(model.seen) == 40


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    model, first, second = Line(), list[float](), list[float]()
    with pytest.raises(KeyboardInterrupt):
        train(model, fit_line(model, 17, first), CONFIG, tmp_path, CPU, describe(CONFIG))
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 10

    model = Line()
    train(model, fit_line(model, drawn=second), CONFIG, tmp_path, CPU, describe(CONFIG))
    assert len(second) == 30
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 40
    assert float(model.seen) == 40
    assert second[:6] == first[10:]
    whole, drawn = Line(), list[float]()
    train(whole, fit_line(whole, drawn=drawn), CONFIG, tmp_path / "whole", CPU, describe(CONFIG))
    assert first[:10] + second == drawn
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_state(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model, drawn = replace(CONFIG, save_every=0), Line(), list[float]()
    losses = fit_line(model, drawn=drawn)

    def signalled() -> dict[str, Tensor]:
        if len(drawn) == 6:
            os.kill(os.getpid(), number)
        return losses()

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(model, signalled, config, tmp_path, CPU, describe(config))
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert f"stopped after step 7 of 40: {tmp_path / STATE_FILE} is written; the same command goes on" in said
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 7
    model, rest, whole = Line(), list[float](), list[float]()
    train(model, fit_line(model, drawn=rest), config, tmp_path, CPU, describe(config))
    again = Line()
    train(again, fit_line(again, drawn=whole), config, tmp_path / "whole", CPU, describe(config))
    assert drawn + rest == whole
    assert torch.equal(model.linear.weight, again.linear.weight)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    model = Line()

    def losses() -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        train(model, losses, CONFIG, tmp_path, CPU, describe(CONFIG))


def test_the_bar_moves_at_the_first_step_and_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = list[int]()
    update = Progress.update

    def watched(bar: Progress, task: Any, **changes: Any) -> None:
        moves.append(changes["completed"])
        update(bar, task, **changes)

    monkeypatch.setattr(Progress, "update", watched)
    model = Line()
    losses = fit_line(model)

    def slow() -> dict[str, Tensor]:
        time.sleep(0.3)
        return losses()

    config = replace(CONFIG, steps=9, log_every=50)
    train(model, slow, config, tmp_path, CPU, describe(config))
    assert moves[0] == 1
    assert moves[-1] == 9
    assert len(moves) >= 3


def test_a_disk_that_is_full_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    model = Line()
    with pytest.raises(RsdError, match=r"training_state.pt: cannot be written \(PytorchStreamWriter failed"):
        train(model, fit_line(model), CONFIG, tmp_path, CPU, describe(CONFIG))


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    batches = torch.randn(3, 2, 64, 1)
    ends = []
    for accumulate in (1, 2):
        model, waiting = Line(), list(batches.flatten(1, 2) if accumulate == 1 else batches.flatten(0, 1))

        def losses(model: Line = model, waiting: list[Tensor] = waiting) -> dict[str, Tensor]:
            x = waiting.pop(0)
            return {"total": (model.linear(x) - 3 * x - 1).square().mean()}

        config = replace(CONFIG, steps=3, accumulate=accumulate)
        train(model, losses, config, tmp_path / str(accumulate), CPU, describe(config))
        ends.append(model.linear.weight.item())
        assert not waiting
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
    totals = [logged(tmp_path / str(accumulate), "loss/total") for accumulate in (1, 2)]
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-4)
    with pytest.raises(RsdError, match="accumulate: expected an integer from 1 to"):
        replace(CONFIG, accumulate=0)


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    model = Line()
    before = train(model, fit_line(model), CONFIG, tmp_path, CPU, describe(CONFIG))
    model = Line()
    after = train(model, fit_line(model, stop_at=41), CONFIG, tmp_path, CPU, describe(CONFIG))
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    model = Line()
    train(model, fit_line(model), CONFIG, tmp_path, CPU, {"dim": 64})
    with pytest.raises(RsdError, match=r"belongs to a run with other settings \(dim\); choose another --output"):
        train(model, fit_line(model), CONFIG, tmp_path, CPU, {"dim": 65})
    whole = torch.load(tmp_path / STATE_FILE, weights_only=True)
    for change, said in (
        ({"model": {}}, "not the state of this training .RuntimeError: .*linear.weight"),
        ({"step": None}, "not the state of this training .TypeError"),
        ({"config": "{"}, "not the state of this training .JSONDecodeError"),
    ):
        torch.save({**whole, **change}, tmp_path / STATE_FILE)
        with pytest.raises(RsdError, match=said):
            train(model, fit_line(model), CONFIG, tmp_path, CPU, {"dim": 64})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("log_every", 0), ("steps", -1), ("minutes", -0.5), ("ema", 1.5), ("learning_rate", 0.0)],
)
def test_a_loop_that_cannot_run_is_refused(name: str, value: float) -> None:
    with pytest.raises(RsdError, match=rf"^{name}: expected an? .*, found {value}$"):
        replace(CONFIG, **{name: value})


def test_a_time_limit_ends_the_run(tmp_path: Path) -> None:
    model = Line()
    config = LoopConfig(steps=10**9, minutes=0.005, warmup=2, log_every=10**9)
    train(model, fit_line(model), config, tmp_path, CPU, describe(config))
    assert 0 < torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] < 10**6


def test_divergence_is_an_error(tmp_path: Path) -> None:
    model = Line()

    def losses() -> dict[str, Tensor]:
        return {"total": model.linear(torch.full((1, 1), math.nan)).sum()}

    with pytest.raises(RsdError, match="training diverged at step 1"):
        train(model, losses, CONFIG, tmp_path, CPU, describe(CONFIG))
    assert not (tmp_path / STATE_FILE).exists()


def test_schedule_warms_up_then_falls_to_one_percent() -> None:
    config = LoopConfig(steps=100, warmup=10, learning_rate=2.0)
    rates = [learning_rate(config, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) <= 2.0
    assert rates[-1] == pytest.approx(0.02)


def test_describe_gives_plain_json_values() -> None:
    described = describe(TrainPolicyConfig(data=(Path("a"), Path("b"))))
    assert json.loads(json.dumps(described)) == described
    assert described["data"] == ["a", "b"]
    assert described["policy"]["target"]["channels"] == [32, 64, 128, 256]
