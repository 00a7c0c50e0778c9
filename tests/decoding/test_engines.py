"""Which engine decodes, and what is said where one cannot be had."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from torch import Tensor

from rsd.decoding import engines
from rsd.decoding.engines import VARIABLE, choose_engine, strategy_on
from rsd.decoding.recorded import Call, RecordedStrategy
from rsd.decoding.steps import Decoder, SkipRule
from rsd.decoding.strategies import DECODERS
from rsd.models.light_draft import LightDraft
from rsd.models.rsd_model import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import AUTO, COMPILED, CUDA_GRAPHS, EAGER, ONNX, Observation, RsdError


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)


def test_auto_takes_graphs_where_they_can_be_had() -> None:
    assert choose_engine(AUTO, "cpu", recordable=True) == ONNX
    assert choose_engine(AUTO, "cuda:1", recordable=True) == CUDA_GRAPHS
    assert choose_engine(AUTO, "cpu", recordable=False) == choose_engine(AUTO, "cuda", recordable=False) == EAGER
    assert choose_engine(EAGER, "cpu", recordable=True) == choose_engine(AUTO, "mps", recordable=True) == EAGER


def test_the_variable_says_what_auto_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, EAGER)
    assert choose_engine(AUTO, "cpu", recordable=True) == EAGER
    assert choose_engine(AUTO, "cuda", recordable=True) == CUDA_GRAPHS
    assert choose_engine(ONNX, "cpu", recordable=True) == ONNX
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(RsdError, match="RSD_ENGINE=fast: expected auto, eager or onnx; set it anew"):
        choose_engine(AUTO, "cpu", recordable=True)


@pytest.mark.parametrize(
    ("asked", "device", "recordable", "message"),
    [
        ("tensorrt", "cpu", True, "'tensorrt': expected one of auto, eager, cuda-graphs, compiled, onnx"),
        (COMPILED, "cpu", True, "'compiled': expected device cuda, found cpu; take auto or eager"),
        (ONNX, "cuda", True, "'onnx': expected device cpu, found cuda; take auto or eager"),
        (CUDA_GRAPHS, "cpu", True, "'cuda-graphs': expected device cuda, found cpu; take auto or eager"),
        (ONNX, "cpu", False, "not for drawn tokens, acceptance 'exact' (fine='sequential'), or OpenVLA on"),
    ],
)
def test_what_cannot_be_had_is_an_error(asked: str, device: str, recordable: bool, message: str) -> None:
    with pytest.raises(RsdError, match=re.escape(message)):
        choose_engine(asked, device, recordable)


def test_openvla_is_not_compiled() -> None:
    with pytest.raises(RsdError, match="engine 'compiled': not for OpenVLA"):
        choose_engine(COMPILED, "cuda", recordable=True, compact=False)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engines, "missing_packages", lambda: ["onnx", "onnxscript"])
    assert choose_engine(AUTO, "cpu", recordable=True) == EAGER
    assert "onnx, onnxscript not installed: engine eager" in caplog.text
    with pytest.raises(RsdError, match="expected onnx, onnxscript; pip install onnx onnxscript"):
        choose_engine(ONNX, "cpu", recordable=True)


@pytest.mark.parametrize("decode", DECODERS)
def test_all_that_an_episode_needs_is_recorded_by_its_first_prediction(
    decode: str,
    make_steady_model: Callable[[], RsdModel],
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    make_observation: Callable[..., Observation],
) -> None:
    recorded: list[str] = []

    def record(key: str, decoder: Decoder, call: Call, inputs: Sequence[Tensor]) -> Call:
        recorded.append(key)
        return call

    plain, graphs = (
        RsdPolicy.of(make_steady_model(), tokenizer, tiny_config, decode=decode, skip=SkipRule(1e9, 3), engine=EAGER)
        for _ in range(2)
    )
    graphs._strategy = RecordedStrategy(decode, record)
    counts = []
    for seed in range(6):
        expected, found = (policy.predict(make_observation(seed)) for policy in (plain, graphs))
        assert np.array_equal(found.actions, expected.actions)
        counts.append(len(recorded))
    assert counts == [counts[0]] * 6
    assert len(set(recorded)) == counts[0]


def test_eager_is_the_plain_strategy() -> None:
    assert strategy_on(EAGER, "rsd") is DECODERS["rsd"]
    assert isinstance(strategy_on(ONNX, "rsd"), RecordedStrategy)


@pytest.mark.parametrize("engine", [EAGER, ONNX])
def test_a_draft_that_is_corrected_anyway_is_not_completed(
    policy: RsdPolicy, make_observation: Callable[..., Observation], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rsd-fused` needs the coarse tokens alone; its chunks are those of a policy that has the rest as well."""
    plain, audited = (
        RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="rsd-fused", audit=audit, engine=engine)
        for audit in (False, True)
    )
    foreseen = list[bool]()
    remainder = LightDraft.remainder
    monkeypatch.setattr(LightDraft, "remainder", lambda *a: foreseen.append(True) or remainder(*a))
    chunks = [plain.predict(make_observation(seed)) for seed in range(3)]
    assert not foreseen
    for seed, chunk in enumerate(chunks):
        complete = audited.predict(make_observation(seed))
        assert np.allclose(chunk.actions, complete.actions, atol=1e-5)
        assert chunk.stats.num_accepted_tokens == complete.stats.num_accepted_tokens
        assert chunk.stats.expected_deviation_mm is None
        assert complete.stats.expected_deviation_mm is not None
    assert foreseen
