"""ONNX graphs give what PyTorch gives, are exported once, and nothing wrong comes out of them unseen."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rsd.decoding import onnx_graph
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.onnx_graph import OnnxGraph, graph_folder
from rsd.decoding.steps import Decoded, Decoder, SkipRule
from rsd.decoding.strategies import STRATEGIES
from rsd.evaluation.batched_policy import BatchedRsdPolicy
from rsd.models.rsd_model import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import EAGER, ONNX, ActionChunk, Observation, RsdError

MakePolicy = Callable[..., RsdPolicy]
MakeObservation = Callable[..., Observation]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield graph_folder()


@pytest.fixture
def make_policy(
    make_steady_model: Callable[[], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> MakePolicy:
    def make(decode: str, **options: object) -> RsdPolicy:
        options = {"engine": ONNX, "skip": SkipRule(1e9, 3), **options}
        return RsdPolicy(make_steady_model(), tokenizer, tiny_config, decode=decode, **options)

    return make


def episode(policy: RsdPolicy, make_observation: MakeObservation, chunks: int = 6) -> list[ActionChunk]:
    policy.reset()
    found = []
    for seed in range(chunks):
        found.append(policy.predict(make_observation(seed)))
        policy.follow_up()
    return found


@pytest.mark.parametrize("decode", STRATEGIES)
def test_a_graph_acts_and_counts_as_pytorch_does(
    decode: str, make_policy: MakePolicy, make_observation: MakeObservation
) -> None:
    plain, graph = make_policy(decode, engine=EAGER), make_policy(decode)
    assert graph.engine == ONNX
    pairs = list(zip(episode(plain, make_observation), episode(graph, make_observation), strict=True))
    for expected, found in pairs:
        assert np.allclose(found.actions, expected.actions, atol=1e-5)
        for name in ("prefills", "main_passes", "skipped", "forced", "num_draft_tokens", "num_accepted_tokens"):
            assert getattr(found.stats, name) == getattr(expected.stats, name)
    if decode == "rsd-skip":
        assert [chunk.stats.skipped for _, chunk in pairs] == [True, True, True, False, True, True]


def test_a_batch_of_graphs_acts_as_pytorch_does(make_policy: MakePolicy, make_observation: MakeObservation) -> None:
    found = {}
    for engine in (EAGER, ONNX):
        batched = BatchedRsdPolicy(make_policy("rsd-ahead", engine=engine), 2)
        memories = [batched.new_memory() for _ in range(2)]
        found[engine] = [
            chunk.actions
            for turn in range(2)
            for chunk in batched.predict_batch([make_observation(2 * turn + i) for i in range(2)], memories)
        ]
    np.testing.assert_allclose(found[ONNX], found[EAGER], atol=1e-5)


def test_what_is_not_finite_is_noticed(make_policy: MakePolicy, make_observation: MakeObservation) -> None:
    policy, odd = make_policy("l1"), make_observation(0)
    odd.state[0] = np.inf
    policy.predict(make_observation(1))
    with pytest.raises(RsdError, match="non-finite"):
        policy.predict(odd)


# one small call in the place of a strategy


@pytest.fixture
def decoder(make_policy: MakePolicy) -> Decoder:
    return make_policy("l1").decoder


def record(decoder: Decoder, key: str = "sum") -> Decoded:
    """What a graph of a small call, which reads a weight, gives on other inputs than it was made with."""

    def call(inputs: Sequence[Tensor]) -> Decoded:
        values, symbols = inputs
        return Decoded(values + decoder.main.state_mean, symbols + 1, main_passes=3)

    graph = OnnxGraph(key, decoder, call, [torch.zeros(2, 11), torch.zeros(2, dtype=torch.int64)])
    return graph([torch.ones(2, 11), torch.ones(2, dtype=torch.int64)])


def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the graphs exported from now on."""
    names: list[str] = []
    export = onnx_graph._export
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "_export", lambda *rest: None)  # what is made anew is damaged as well
        with pytest.raises(RsdError, match=rf"{path}: cannot be loaded"):
            record(decoder, "damaged")
    path.unlink()
    assert torch.equal(record(decoder, "damaged").value, expected)


def test_graphs_used_longest_ago_give_way(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(onnx_graph, "KEPT", 2)
    names = exports(monkeypatch)
    for key in ("first", "second", "first", "third"):
        record(decoder, key)
    assert {path.name for path in folder.glob("*.onnx")} == {names[0], names[2]}
