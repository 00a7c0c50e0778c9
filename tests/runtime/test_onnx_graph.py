"""ONNX graphs give what PyTorch gives, are exported once, and nothing wrong comes out of them unseen."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.gate import SkipRule
from rsd.decoding.primitives import Primitives, Step
from rsd.decoding.state import DecodeResult
from rsd.devices import multiplies_int8
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.policy import RsdPolicy
from rsd.runtime import onnx_graph
from rsd.runtime.onnx_graph import WEIGHTS, OnnxGraphs, graph_folder
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import EAGER, ONNX, ONNX_INT8, ActionChunk, Observation, RsdError, WrongOption

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
        chunk = policy.predict(make_observation(seed))
        found.append(replace(chunk, stats=policy.verify() or chunk.stats))
    return found


def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graphs exported from now on."""
    paths: list[Path] = []
    export = onnx_graph.export
    monkeypatch.setattr(onnx_graph, "export", lambda path, *rest: paths.append(path) or export(path, *rest))
    return paths


def test_decoders_and_rules_share_graphs_and_all_graphs_the_weights(
    make_policy: MakePolicy, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first test of this file, so that nothing is there yet; the others find these graphs."""
    mine, paths = make_policy("l1"), exports(monkeypatch)

    def run(decode: str, **options: object) -> list[str]:
        before = len(paths)
        policy = RsdPolicy.of(mine.model, mine.tokenizer, mine.config, decode=decode, engine=ONNX, **options)
        policy.predict(make_observation(0))
        return [path.name.rsplit("-", 1)[0] for path in paths[before:]]

    assert run("l1") == ["embed", "prefill", "regress"]
    assert run("parallel") == ["all_levels"]
    first = run("rsd-fused")
    assert sorted(set(first)) == ["accept", "draft", "prefill_with"]
    assert run("rsd-fused") == []
    assert run("rsd-fused", acceptance="distance(1)") == ["accept"]
    assert run("draft-first") == ["forecast"]
    folder = paths[0].parent
    graphs = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    weights = [path.stat().st_size for path in (folder / WEIGHTS).iterdir()]
    parameters = sum(4 * p.numel() for p in mine.model.parameters())
    assert sum(weights) < 1.1 * parameters
    assert graphs < 5e6


@pytest.mark.parametrize("decode", DECODERS)
def test_a_graph_acts_and_counts_as_pytorch_does(
    decode: str, make_policy: MakePolicy, make_observation: MakeObservation
) -> None:
    plain, graph = make_policy(decode, engine=EAGER), make_policy(decode)
    assert graph.engine == ONNX
    pairs = list(zip(episode(plain, make_observation), episode(graph, make_observation), strict=True))
    for expected, found in pairs:
        assert np.allclose(found.actions, expected.actions, atol=1e-5)
        for name in ("prefills", "target_passes", "skipped", "forced", "num_draft_tokens", "num_accepted_tokens"):
            assert getattr(found.stats, name) == getattr(expected.stats, name)
    if decode == "rsd-skip":
        assert [chunk.stats.skipped for _, chunk in pairs] == [False, True, True, True, False, True]


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no fast products of 8-bit integers")
def test_8_bit_graphs_act_nearly_as_pytorch_does(make_policy: MakePolicy, make_observation: MakeObservation) -> None:
    plain, rounded = make_policy("l1", engine=EAGER), make_policy("l1", engine=ONNX_INT8)
    for expected, found in zip(episode(plain, make_observation), episode(rounded, make_observation), strict=True):
        assert 1e-5 < np.abs(found.actions - expected.actions).max() < 0.2  # random weights
    proto = onnx.load(next(graph_folder().rglob("prefill*-int8.onnx")), load_external_data=False)
    assert "MatMulInteger" in {node.op_type for node in proto.graph.node}


def test_a_batch_of_graphs_acts_as_pytorch_does(make_policy: MakePolicy, make_observation: MakeObservation) -> None:
    found = {}
    for engine in (EAGER, ONNX):
        core = make_policy("draft-first", engine=engine, batch=2).core
        states: list[Any] = [None, None]
        found[engine] = list[np.ndarray]()
        for turn in range(2):
            chunks, states, pending = core.predict([make_observation(2 * turn + i) for i in range(2)], states)
            assert pending is not None
            _, states = core.verify_pending(pending)
            found[engine] += [chunk.actions for chunk in chunks]
    np.testing.assert_allclose(found[ONNX], found[EAGER], atol=1e-5)


@pytest.mark.parametrize("engine", [EAGER, ONNX])
def test_a_draft_that_is_corrected_anyway_is_not_completed(
    make_policy: MakePolicy, make_observation: MakeObservation, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rsd-fused` needs the coarse tokens alone; its chunks are those of a policy that has the rest as well."""
    plain, audited = (make_policy("rsd-fused", audit=audit, engine=engine) for audit in (False, True))
    forecast = list[bool]()
    remainder = VisualDrafter.remainder
    monkeypatch.setattr(VisualDrafter, "remainder", lambda *a: forecast.append(True) or remainder(*a))
    chunks = [plain.predict(make_observation(seed)) for seed in range(3)]
    assert not forecast
    for seed, chunk in enumerate(chunks):
        complete = audited.predict(make_observation(seed))
        assert np.allclose(chunk.actions, complete.actions, atol=1e-5)
        assert chunk.stats.num_accepted_tokens == complete.stats.num_accepted_tokens
        assert chunk.stats.expected_deviation_mm is None
        assert complete.stats.expected_deviation_mm is not None
    assert forecast


def test_what_is_not_finite_is_noticed(make_policy: MakePolicy, make_observation: MakeObservation) -> None:
    policy, odd = make_policy("l1"), make_observation(0)
    odd.state[0] = np.inf
    policy.predict(make_observation(1))
    with pytest.raises(RsdError, match="non-finite"):
        policy.predict(odd)


# one small call in the place of a strategy


@pytest.fixture
def decoder(make_policy: MakePolicy) -> Primitives:
    return make_policy("l1").core.ops


def record(decoder: Primitives, key: str = "sum") -> DecodeResult:
    """What a graph of a small call, which reads a weight, gives on other inputs than it was made with."""

    def call(inputs: Sequence[Tensor]) -> DecodeResult:
        values, symbols = inputs
        return DecodeResult(values + decoder.target.state_mean, symbols + 1, target_passes=3)

    step = Step(key, "target", by="rule")
    graph = OnnxGraphs()(step, decoder, call, [torch.zeros(2, 11), torch.zeros(2, dtype=torch.int64)])
    return graph([torch.ones(2, 11), torch.ones(2, dtype=torch.int64)])


def test_a_graph_is_exported_once_and_anew_for_other_weights(
    decoder: Primitives, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = exports(monkeypatch)
    for _ in range(2):
        found = record(decoder)
        assert torch.equal(found.value, torch.ones(2, 11))
        assert torch.equal(found.gripper, torch.tensor([2, 2]))
        assert found.target_passes == 3
    assert len(paths) == 1
    assert capfd.readouterr().err.count("exporting sum for ONNX Runtime") == 1  # nobody waits without knowing for what
    decoder.target.state_mean += 5.0
    assert torch.equal(record(decoder).value, torch.full((2, 11), 6.0))
    assert len({path.parent for path in paths}) == 2  # another policy's folder
    decoder.rule = acceptance_rule("exact", decoder.target.code)
    record(decoder)
    record(decoder, "another")
    assert len(set(paths)) == 4


@pytest.mark.parametrize(
    ("off", "said"), [((0.1, 0), "output 0 is 0.1 away"), ((0.0, 1), "output 1 is 1 away")], ids=["values", "symbols"]
)
def test_a_graph_that_gives_something_else_is_refused(
    off: tuple[float, int], said: str, decoder: Primitives, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = onnx_graph._compare

    def spoilt(name: str, expected: Iterable[Tensor], found: list[Tensor], tolerance: float) -> None:
        value, symbols = found
        compare(name, expected, [value + off[0], symbols + off[1]], tolerance)

    monkeypatch.setattr(onnx_graph, "_compare", spoilt)
    with pytest.raises(RsdError, match=rf"ONNX graph of sum: {said} from PyTorch's; .* 'eager'"):
        record(decoder)


def test_a_folder_that_cannot_be_written_to_is_named(
    decoder: Primitives, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(WrongOption, match=r"file/rsd-vla/graphs/.* not written .*XDG_CACHE_HOME.* 'eager'"):
        record(decoder)


def test_a_failed_export_leaves_nothing_behind(
    decoder: Primitives, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def broken(*rest: object, **options: object) -> None:
        raise RuntimeError("no such operator")

    record(decoder)
    before = set(folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", broken)
        with pytest.raises(RsdError, match=r"fresh.*: not exported \(no such operator\); take the engine 'eager'"):
            record(decoder, "fresh")
    assert set(folder.rglob("*")) == before
    assert torch.equal(record(decoder, "fresh").value, torch.ones(2, 11))


def test_a_damaged_graph_is_made_anew(
    decoder: Primitives, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = record(decoder, "damaged").value
    (path,) = folder.rglob("damaged-*.onnx")
    whole = path.stat().st_size
    for length in (0, 100):
        path.write_bytes(path.read_bytes()[:length])
        assert torch.equal(record(decoder, "damaged").value, expected)
        assert f"{path}: cannot be loaded" in caplog.text
        assert path.stat().st_size == whole
    path.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "export", lambda *rest: None)  # what is made anew is damaged as well
        with pytest.raises(RsdError, match=rf"{path}: cannot be loaded"):
            record(decoder, "damaged")
    path.unlink()
    assert torch.equal(record(decoder, "damaged").value, torch.ones(2, 11))


def test_policies_used_longest_ago_give_way(
    decoder: Primitives, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths, now = exports(monkeypatch), time.time()
    for offset in (101.0, 102.0, 101.0, 103.0):
        decoder.target.state_mean.fill_(offset)
        used_bytes = sum(path.stat().st_size for path in graph_folder().rglob("*") if path.is_file())
        monkeypatch.setattr(onnx_graph, "LIMIT_BYTES", used_bytes if offset == 103.0 else 2e9)
        record(decoder)
        used = graph_folder() / onnx_graph.policy_name(decoder)
        now += 1.0
        os.utime(used, (now, now))
    first, second, third = (path.parent for path in paths)
    assert first.exists()
    assert third.exists()
    assert not second.exists()
