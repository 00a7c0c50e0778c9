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
from rsd.decoding.strategies import DECODERS
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
        return RsdPolicy.of(make_steady_model(), tokenizer, tiny_config, decode=decode, **options)

    return make


def episode(policy: RsdPolicy, make_observation: MakeObservation, chunks: int = 6) -> list[ActionChunk]:
    policy.reset()
    found = []
    for seed in range(chunks):
        found.append(policy.predict(make_observation(seed)))
        policy.follow_up()
    return found


@pytest.mark.parametrize("decode", DECODERS)
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
    monkeypatch.setattr(onnx_graph, "_export", lambda path, *rest: names.append(path.name) or export(path, *rest))
    return names


def test_a_graph_is_exported_once_and_anew_for_other_weights(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = exports(monkeypatch)
    for _ in range(2):
        found = record(decoder)
        assert torch.equal(found.value, torch.ones(2, 11))
        assert torch.equal(found.gripper, torch.tensor([2, 2]))
        assert found.main_passes == 3
    assert len(names) == 1
    decoder.main.state_mean += 5.0
    assert torch.equal(record(decoder).value, torch.full((2, 11), 6.0))
    assert len(set(names)) == 2
    decoder.rule = acceptance_rule("exact", decoder.main.code)
    record(decoder)
    record(decoder, "another")
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("off", "said"), [((0.1, 0), "output 0 is 0.1 away"), ((0.0, 1), "output 1 is 1 away")], ids=["values", "symbols"]
)
def test_a_graph_that_gives_something_else_is_refused(
    off: tuple[float, int], said: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnx_graph._session

    class Off:
        def __init__(self, path: Path, threads: int) -> None:
            self.inner = session(path, threads)
            self.get_inputs = self.inner.get_inputs

        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            value, symbols = self.inner.run(names, feed)
            return [value + off[0], symbols + off[1]]

    monkeypatch.setattr(onnx_graph, "_session", Off)
    with pytest.raises(RsdError, match=rf"ONNX graph of sum: {said} from PyTorch's; .* 'eager'"):
        record(decoder)


def test_a_folder_that_cannot_be_written_to_is_named(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RsdError, match=r"file/rsd-vla/graphs/sum-.* not written .*XDG_CACHE_HOME.* 'eager'"):
        record(decoder)


def test_a_failed_export_leaves_nothing_behind(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def broken(*rest: object, **options: object) -> None:
        raise RuntimeError("no such operator")

    record(decoder)
    before = set(folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", broken)
        with pytest.raises(RsdError, match=r"fresh.*: not exported \(no such operator\); take the engine 'eager'"):
            record(decoder, "fresh")
    assert set(folder.iterdir()) == before
    assert torch.equal(record(decoder, "fresh").value, torch.ones(2, 11))


def test_a_damaged_graph_is_named(decoder: Decoder, folder: Path) -> None:
    record(decoder, "damaged")
    (path,) = folder.glob("damaged-*.onnx")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RsdError, match=rf"{path}: cannot be loaded .*; delete it"):
        record(decoder, "damaged")
    path.unlink()
    assert torch.equal(record(decoder, "damaged").value, torch.ones(2, 11))


def test_graphs_used_longest_ago_give_way(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(onnx_graph, "KEPT", 2)
    names = exports(monkeypatch)
    for key in ("first", "second", "first", "third"):
        record(decoder, key)
    assert {path.name for path in folder.glob("*.onnx")} == {names[0], names[2]}
