"""A target that is told the actions that will be executed before its answer is there (real-time chunking)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd.data.demonstrations import load_demonstrations
from rsd.evaluation.backend import ready
from rsd.evaluation.config import EvalConfig
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.target import STATE_FEATURES, committed_features
from rsd.options import DecodeOptions, RuntimeOptions
from rsd.policy import RsdPolicy, SpeculativePolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import LossConfig, TrainPolicyConfig
from rsd.training.dataset import Batch, FrameDataset
from rsd.training.losses import policy_losses, with_committed
from rsd.types import EAGER, ONNX, Observation, RsdError

HORIZON = 8
CPU = torch.device("cpu")
MakeObservation = Callable[..., Observation]


def told(observation: Observation, count: int, seed: int = 0) -> Observation:
    drawn = np.random.default_rng(seed).uniform(-1, 1, (count, 7))
    return replace(observation, committed=drawn.astype(np.float32))


@pytest.fixture(scope="module")
def config(tiny_config: PolicyConfig) -> PolicyConfig:
    return replace(tiny_config, target=replace(tiny_config.target, committed=True))


@pytest.fixture(scope="module")
def model(config: PolicyConfig, tokenizer: ActionTokenizer) -> RsdModel:
    """As after some training: a new one makes nothing of what it is told."""
    torch.manual_seed(0)
    model = RsdModel.of(config, tokenizer)
    assert model.target.committed_in is not None
    torch.nn.init.normal_(model.target.committed_in.weight, std=0.3)
    return model.eval()


@given(st.lists(st.integers(0, HORIZON), min_size=1, max_size=4), st.integers(0, 1000))
def test_features_say_the_committed_actions_and_which_they_are(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    actions = torch.rand(len(counts), HORIZON, 7) * 2 - 1
    rows = committed_features(actions, torch.tensor(counts)).unflatten(1, (HORIZON, 8))
    for row, action, count in zip(rows, actions, counts, strict=True):
        assert row[:, 7].tolist() == [1.0] * count + [0.0] * (HORIZON - count)
        assert torch.equal(row[:count, :7], action[:count])
        assert not row[count:].any()


def test_a_policy_that_knew_nothing_of_it_begins_as_it_was(
    make_model: Callable[[int], RsdModel],
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    config: PolicyConfig,
    make_observation: MakeObservation,
) -> None:
    before, fresh = make_model(0), RsdModel.of(config, tokenizer).eval()
    missing = fresh.load_state_dict(before.state_dict(), strict=False).missing_keys
    assert missing == ["target.committed_in.weight"]
    plain = RsdPolicy.of(before, tokenizer, tiny_config, decode="l1")
    given_it = RsdPolicy.of(fresh, tokenizer, config, decode="l1")
    observation = make_observation()
    expected = plain.predict(observation).actions
    for seen in (observation, told(observation, 3)):
        assert np.array_equal(given_it.predict(seen).actions, expected)
    assert np.array_equal(plain.predict(told(observation, 3)).actions, expected)  # reads nothing of it


@pytest.mark.parametrize("engine", [EAGER, ONNX])
def test_the_chunk_depends_on_what_is_committed_and_each_row_on_its_own(
    model: RsdModel, tokenizer: ActionTokenizer, config: PolicyConfig, make_observation: MakeObservation, engine: str
) -> None:
    alone = SpeculativePolicy(model, tokenizer, config, DecodeOptions("l1"), RuntimeOptions(engine=engine))
    three = SpeculativePolicy(model, tokenizer, config, DecodeOptions("l1"), RuntimeOptions(engine=engine, batch=3))
    seen = make_observation()
    rows = [told(seen, 3), seen, told(seen, 3, seed=1)]
    chunks = [alone.predict([row]).chunks[0].actions for row in rows]
    assert np.array_equal(alone.predict([told(seen, 0)]).chunks[0].actions, chunks[1])
    assert len({chunk.tobytes() for chunk in chunks}) == 3
    for found, expected in zip(three.predict(rows).chunks, chunks, strict=True):
        assert np.abs(found.actions - expected).max() < 1e-4


def test_more_than_can_be_committed_is_refused(
    model: RsdModel, tokenizer: ActionTokenizer, config: PolicyConfig, make_observation: MakeObservation
) -> None:
    policy = RsdPolicy.of(model, tokenizer, config, decode="l1")
    with pytest.raises(RsdError, match="committed: expected fewer actions than a chunk has, found 8 of chunks of 8"):
        policy.predict(told(make_observation(), HORIZON))
    with pytest.raises(RsdError, match=r"observation committed: expected \[n, 7\], found \[2, 6\]"):
        replace(make_observation(), committed=np.zeros((2, 6), np.float32))


@pytest.fixture(scope="module")
def batch(demonstrations: Path) -> Batch:
    dataset = FrameDataset(load_demonstrations(demonstrations), HORIZON, CPU)
    frames = torch.arange(0, len(dataset) - 13, 13)
    return dataset.batch(torch.cat([frames + 8, frames]), paired=True)


def test_a_chunk_begins_with_what_it_is_told_and_drafters_learn_from_others(model: RsdModel, batch: Batch) -> None:
    torch.manual_seed(0)
    batch = replace(batch, done=batch.chunk.roll(1, 0))  # as of a driver who does otherwise
    assert batch.done is not None
    half, drawn = len(batch.chunk) // 2, set[int]()
    for _ in range(10):
        found = with_committed(model.target, batch, 0.7)
        features = found.state[:, STATE_FEATURES:].unflatten(1, (HORIZON, 8))
        counts = features[:, :, 7].sum(1).long().tolist()
        assert not any(counts[:half])
        assert torch.equal(found.chunk[:half], batch.chunk[:half])
        for row, count in enumerate(counts):
            assert torch.equal(features[row, :count, :7], batch.done[row, :count])
            assert torch.equal(found.chunk[row, :count], batch.done[row, :count])
            assert torch.equal(found.chunk[row, count:], batch.chunk[row, count:])
        assert torch.equal(found.state[:, :STATE_FEATURES], batch.state)
        drawn |= set(counts[half:])
    assert drawn == set(range(HORIZON))  # never the whole chunk


def test_what_is_told_is_what_was_executed_not_what_the_expert_would_have_done(demonstrations: Path) -> None:
    driven = [replace(each, actions=-each.labels) for each in load_demonstrations(demonstrations)]
    dataset = FrameDataset(driven, HORIZON, CPU)
    assert torch.equal(dataset.done, -dataset.chunk)
    assert torch.equal(dataset.batch(torch.tensor([5, 2])).done, -dataset.chunk[[5, 2]])  # type: ignore[arg-type]


def test_a_drafter_reads_nothing_of_the_chunk_that_it_is_to_draft(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    """The earlier moment of a pair may have been told what was executed later, in the drafter's own chunk."""

    def drafted(done: Tensor) -> float:
        torch.manual_seed(0)
        config = LossConfig(committed=1.0, blind=0.0)
        return float(policy_losses(model, tokenizer, replace(batch, done=done), config)["visual"])

    assert batch.done is not None
    assert drafted(batch.done) == drafted(-batch.done)


def test_it_is_learnt(model: RsdModel, tokenizer: ActionTokenizer, batch: Batch) -> None:
    losses = policy_losses(model, tokenizer, batch, LossConfig(committed=1.0))
    losses["total"].backward()
    assert model.target.committed_in is not None
    assert model.target.committed_in.weight.grad is not None
    assert model.target.committed_in.weight.grad.any()
    model.zero_grad()


def test_as_many_steps_may_be_late_as_a_chunk_has_beyond_those_executed(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    config: PolicyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rsd.evaluation.backend.preflight", lambda config: None)
    RsdPolicy.of(model, tokenizer, replace(config, execute=6)).save_pretrained(tmp_path / "policy")
    run = EvalConfig(policy=str(tmp_path / "policy"), decode="l1", delay=2, meanwhile="rtc")
    ready(run)
    with pytest.raises(RsdError, match="expected a --delay of at most 2, what 6 executed steps leave of a chunk of 8"):
        ready(replace(run, delay=3))
    ready(replace(run, delay=3, execute=5))


def test_what_cannot_be_told_is_refused(
    checkpoint: Path, make_model: Callable[[int], RsdModel], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RsdError, match=r"--loss\.committed: expected a target that is --policy\.target\.committed"):
        with_committed(make_model(0).target, batch, 0.5)
    with pytest.raises(RsdError, match=r"expected --policy\.target\.committed and --loss\.committed together"):
        TrainPolicyConfig(loss=LossConfig(committed=0.5))
    monkeypatch.setattr("rsd.evaluation.backend.preflight", lambda config: None)
    run = EvalConfig(policy=str(checkpoint), decode="l1", delay=2, meanwhile="rtc")
    with pytest.raises(RsdError, match=r"rtc: expected a compact checkpoint, trained with --policy\.target\.com"):
        ready(run)
    for policy in ("ws://localhost:8000", "my_policy:MyPolicy"):
        with pytest.raises(RsdError, match="expected --meanwhile rtc with --decode l1 of a checkpoint, without"):
            replace(run, policy=policy)
