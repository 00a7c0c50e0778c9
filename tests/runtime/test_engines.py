"""Which engine decodes, and what is said where one cannot be had."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rsd import devices
from rsd.decoding.decoders import DECODERS
from rsd.decoding.gate import SkipRule
from rsd.decoding.primitives import Primitives, Step
from rsd.devices import multiplies_int8
from rsd.environment import ENGINE
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.nested import tensors_of, with_tensors
from rsd.policy import RsdPolicy
from rsd.runtime import engines
from rsd.runtime.engines import Call, Recordings, choose_engine, make_engine
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import AUTO, COMPILED, CUDA_GRAPHS, EAGER, ONNX, ONNX_INT8, Observation, RsdError


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE)


def test_auto_takes_graphs_where_they_can_be_had() -> None:
    assert choose_engine(AUTO, "cpu", recordable=True) == ONNX
    assert choose_engine(AUTO, "cuda:1", recordable=True) == CUDA_GRAPHS
    assert choose_engine(AUTO, "cpu", recordable=False) == choose_engine(AUTO, "cuda", recordable=False) == EAGER
    assert choose_engine(EAGER, "cpu", recordable=True) == choose_engine(AUTO, "mps", recordable=True) == EAGER


def test_the_variable_says_what_auto_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE, EAGER)
    assert choose_engine(AUTO, "cpu", recordable=True) == EAGER
    assert choose_engine(AUTO, "cuda", recordable=True) == CUDA_GRAPHS
    assert choose_engine(ONNX, "cpu", recordable=True) == ONNX
    monkeypatch.setenv(ENGINE, "fast")
    with pytest.raises(RsdError, match="RSD_ENGINE='fast': expected one of auto, eager, onnx, onnx-int8; set"):
        choose_engine(AUTO, "cpu", recordable=True)


@pytest.mark.parametrize(
    ("asked", "device", "recordable", "message"),
    [
        ("tensorrt", "cpu", True, "'tensorrt': expected one of auto, eager, cuda-graphs, compiled, onnx, onnx-int8"),
        (COMPILED, "cpu", True, "'compiled': expected device cuda, found cpu; take auto or eager"),
        (ONNX, "cuda", True, "'onnx': expected device cpu, found cuda; take auto or eager"),
        (CUDA_GRAPHS, "cpu", True, "'cuda-graphs': expected device cuda, found cpu; take auto or eager"),
        (ONNX, "cpu", False, "not for drawn tokens, acceptance 'exact' (fine='sequential'), or OpenVLA on"),
    ],
)
def test_what_cannot_be_had_is_an_error(asked: str, device: str, recordable: bool, message: str) -> None:
    with pytest.raises(RsdError, match=re.escape(message)):
        choose_engine(asked, device, recordable)


def test_8_bit_products_are_refused_where_the_cpu_is_no_faster_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"avx2 avx512_vnni sse": True, "avx2 avx_vnni": True, "fp asimd asimddp": True, "avx2 avx512f": False}
    for line, able in flags.items():
        monkeypatch.setattr(devices, "_cpu_lines", partial(list, ["model name : Old CPU", f"flags : {line}"]))
        assert multiplies_int8() == able
    with pytest.raises(RsdError, match=r"expected a CPU with AVX-512 VNNI, .*, found Old CPU; take onnx"):
        choose_engine(ONNX_INT8, "cpu", recordable=True)
    monkeypatch.setattr(devices, "_cpu_lines", lambda: ["flags : avx_vnni"])
    assert choose_engine(ONNX_INT8, "cpu", recordable=True) == ONNX_INT8
    assert choose_engine(AUTO, "cpu", recordable=True) == ONNX


def test_openvla_is_not_compiled() -> None:
    with pytest.raises(RsdError, match="engine 'compiled': not for OpenVLA"):
        choose_engine(COMPILED, "cuda", recordable=True, compact=False)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engines, "missing_packages", lambda: ["onnx", "onnxruntime"])
    assert choose_engine(AUTO, "cpu", recordable=True) == EAGER
    assert "onnx, onnxruntime not installed: engine eager" in caplog.text
    with pytest.raises(RsdError, match="expected onnx, onnxruntime; pip install onnx onnxruntime"):
        choose_engine(ONNX, "cpu", recordable=True)


class Overwriting:
    """A recorder that behaves as a CUDA graph does: its results are the same tensors every time."""

    def __init__(self, recorded: list[str], step: Step, call: Call, inputs: Sequence[Tensor]) -> None:
        recorded.append(step.name)
        self.call, self.inputs = call, [tensor.clone() for tensor in inputs]
        self.result = with_tensors(call(inputs), (tensor.clone() for tensor in tensors_of(call(inputs))))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        for mine, new in zip(tensors_of(self.result), tensors_of(self.call(self.inputs)), strict=True):
            mine.copy_(new)
        return self.result


@pytest.mark.parametrize("whole", [False, True], ids=["primitives", "compositions"])
@pytest.mark.parametrize("decode", DECODERS)
def test_all_that_episodes_need_is_recorded_by_the_first_prediction_and_nothing_of_it_is_kept_where_it_is_overwritten(
    decode: str,
    whole: bool,
    make_steady_model: Callable[[], RsdModel],
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    make_observation: Callable[..., Observation],
) -> None:
    """Two episodes in turns give what each gives alone."""
    recorded: list[str] = []

    def record(step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor]) -> Call:
        return Overwriting(recorded, step, call, inputs)

    plain, graphs = (
        RsdPolicy.of(make_steady_model(), tokenizer, tiny_config, decode=decode, skip=SkipRule(1e9, 2), engine=EAGER)
        for _ in range(2)
    )
    core = graphs.core
    core.ops.engine, core._rehearsed = Recordings(record, whole), False
    states: list[Any] = [None, None]
    counts = []
    for turn in range(6):
        found, pending = [], []
        for episode in range(2):
            chunks, (states[episode],), left = core.predict([make_observation(10 * episode + turn)], [states[episode]])
            found.append(chunks[0].actions)
            pending.append(left)
            counts.append(len(recorded))
        for episode, left in enumerate(pending):
            if left is not None:
                _, (states[episode],) = core.verify_pending(left)
        assert all(np.isfinite(actions).all() for actions in found)
        chunks_of = expected_chunks(plain, decode, turn, make_observation)
        for actions, expected in zip(found, chunks_of, strict=True):
            assert np.allclose(actions, expected, atol=1e-6)
    assert counts == [counts[0]] * 12
    if whole and decode not in ("rsd-skip", "rsd-async", "draft-first", "drafter-only"):
        assert set(recorded) == {decode}  # all of it as one


def expected_chunks(
    plain: RsdPolicy, decode: str, turn: int, make_observation: Callable[..., Observation]
) -> list[np.ndarray]:
    """The chunk of that turn in each of two episodes by themselves."""
    found = []
    for episode in range(2):
        plain.reset()
        for at in range(turn + 1):
            chunk = plain.predict(make_observation(10 * episode + at))
        found.append(chunk.actions)
    return found


def test_eager_runs_primitives_as_they_are() -> None:
    assert make_engine(EAGER) is None
    on_cpu, on_gpu = make_engine(ONNX), make_engine(CUDA_GRAPHS)
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_cpu.whole, on_gpu.whole) == (False, True)
