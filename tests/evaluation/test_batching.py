"""What batching changes in a prediction, and what it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rsd.decoding.gate import SkipRule
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.target import TargetModel
from rsd.policy import RsdPolicy, SpeculativePolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import ActionChunk, Observation, RsdError


@pytest.fixture
def make_policy(
    make_steady_model: Callable[[], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> Callable[..., RsdPolicy]:
    def make(device: str = "cpu", **options: Any) -> RsdPolicy:
        return RsdPolicy.of(make_steady_model().to(device), tokenizer, tiny_config, **options)

    return make


@pytest.mark.parametrize("decode", ["ar", "l1", "rsd", "parallel", "coarse-only"])
def test_a_row_does_not_depend_on_its_batch(
    decode: str, make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy = make_policy(decode=decode)
    batched = make_policy(decode=decode, batch=4).core
    seen = [make_observation(seed, instruction=f"task {seed}") for seed in range(4)]
    together = predict_new(batched, seen)
    for row, observation in enumerate(seen):
        (alone,) = predict_new(batched, [observation])
        others = predict_new(batched, [seen[row - 1], observation])[1]
        assert np.abs(alone.actions - together[row].actions).max() < 1e-5
        assert np.abs(others.actions - together[row].actions).max() < 1e-5
        single = policy.predict(observation)
        # another shape of the matrices rounds otherwise; a token on the edge of two may even fall the other way
        assert np.abs(single.actions - together[row].actions).mean() < 1e-3
        assert alone.stats.num_accepted_tokens == together[row].stats.num_accepted_tokens
        assert (single.stats.target_passes, single.stats.num_draft_tokens) == (
            together[row].stats.target_passes,
            together[row].stats.num_draft_tokens,
        )


def predict_new(batched: SpeculativePolicy, observations: list[Observation]) -> list[ActionChunk]:
    return batched.predict(observations).chunks


def predict_and_verify(
    batched: SpeculativePolicy, observations: list[Observation], states: list[Any]
) -> tuple[list[ActionChunk], list[Any]]:
    """As a batch's server does."""
    chunks, after, pending = batched.predict(observations, states)
    if pending is None:
        return chunks, after
    return tuple(batched.verify_pending(pending))


EPISODES = ([0, 2, 3, 4], [1, 2], [0, 1, 2, 4, 5])  # in which rounds each of three episodes asks


def single_episode(policy: RsdPolicy, observations: list[Observation]) -> list[ActionChunk]:
    policy.reset()
    chunks = []
    for observation in observations:
        chunk = policy.predict(observation)
        chunks.append(policy.complete() or chunk)
    return chunks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decode", ["rsd-fused", "rsd-skip", "draft-first", "rsd-async", "drafter-only"])
def test_episodes_that_remember_are_those_of_a_policy_of_their_own(
    decode: str,
    device: str,
    make_policy: Callable[..., RsdPolicy],
    make_observation: Callable[..., Observation],
) -> None:
    """They begin and ask at different times; in a batch some remember, some skip and some need the target."""
    seen = [[make_observation(10 * e + i) for i in range(len(rounds))] for e, rounds in enumerate(EPISODES)]
    scores = sorted(
        chunk.stats.expected_deviation_mm or 0.0
        for observations in seen
        for chunk in single_episode(make_policy(decode="rsd-fused", audit=True), observations)
    )
    skip = SkipRule((scores[5] + scores[6]) / 2, 2)
    policy = make_policy(decode=decode, skip=skip, device=device, audit=True)
    expected = [single_episode(policy, observations) for observations in seen]
    batched = make_policy(decode=decode, skip=skip, device=device, audit=True, batch=3).core
    states: list[Any] = [None] * len(EPISODES)
    found: list[list[ActionChunk]] = [[] for _ in EPISODES]
    for turn in range(6):
        asking = [e for e, rounds in enumerate(EPISODES) if turn in rounds]
        if asking:
            asked = [seen[e][len(found[e])] for e in asking]
            chunks, after = predict_and_verify(batched, asked, [states[e] for e in asking])
            for e, chunk, states[e] in zip(asking, chunks, after, strict=True):
                found[e].append(chunk)
    flat = [pair for alone, together in zip(expected, found, strict=True) for pair in zip(alone, together, strict=True)]
    for one, other in flat:
        assert np.abs(one.actions - other.actions).mean() < 1e-3
        assert (one.answer is not None) == (other.answer is not None) == (decode == "rsd-async")
        if one.answer is not None and other.answer is not None:
            assert np.abs(one.answer - other.answer).mean() < 1e-3
        counts = [(s.prefills, s.skipped, s.forced, s.accepted_levels) for s in (one.stats, other.stats)]
        assert counts[0] == counts[1]
        close = 1e-3 if device == "cpu" else 2e-2  # a GPU multiplies in TF32, a batch by other kernels
        assert other.stats.expected_deviation_mm == pytest.approx(one.stats.expected_deviation_mm, rel=close)
        assert other.stats.deviation_mm == pytest.approx(one.stats.deviation_mm, rel=1e-2, abs=1e-2)
    if decode == "rsd-skip":
        assert 0 < sum(bool(chunk.stats.skipped) for _, chunk in flat) < len(flat)


def test_an_audit_takes_what_the_main_made_of_the_batch(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, look = [], TargetModel.prefill_blocks  # observations in each pass of the target

    def counted(target: TargetModel, prefix: Tensor, *drafted: Any) -> Any:
        passes.append(len(prefix))
        return look(target, prefix, *drafted)

    monkeypatch.setattr(TargetModel, "prefill_blocks", counted)
    policy = make_policy(decode="draft-first", audit=True)
    batched = make_policy(decode="draft-first", audit=True, batch=4).core
    seen = [[make_observation(10 * e + turn) for turn in range(2)] for e in range(3)]
    states, rounds = [None] * len(seen), []
    for observations in zip(*seen, strict=True):
        chunks, states = predict_and_verify(batched, list(observations), states)
        rounds.append(chunks)
    assert passes == [4, 4]
    for observations, together in zip(seen, zip(*rounds, strict=True), strict=True):
        for one, other in zip(single_episode(policy, observations), together, strict=True):
            assert other.stats.deviation_mm == pytest.approx(one.stats.deviation_mm, rel=1e-2, abs=1e-2)
            assert other.stats.deviation_mm > 0.1  # of the executed chunk from the target's, not from itself
            assert other.stats.gripper_differs == one.stats.gripper_differs
    assert passes == [4, 4, *[1] * 6]


def test_what_cannot_be_batched_is_refused(make_policy: Callable[..., RsdPolicy]) -> None:
    with pytest.raises(RsdError, match=r"--acceptance exact .* leave --batch out"):
        make_policy(decode="rsd", acceptance="exact", batch=4)
    with pytest.raises(RsdError, match=r"--acceptance exact .* leave --batch out"):
        make_policy(decode="rsd-fused", acceptance="exact", batch=4)
    with pytest.raises(RsdError, match=r"--batch 4: --temperature 0.5 .* leave --batch out"):
        make_policy(decode="ar", temperature=0.5, batch=4)


def test_a_batch_has_a_size(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    batched = make_policy(batch=2).core
    for count in (0, 3):
        with pytest.raises(RsdError, match=f"expected 1 to 2 observations .* found {count} with"):
            predict_new(batched, [make_observation(i) for i in range(count)])
    with pytest.raises(RsdError, match="2 with 1 states"):
        batched.predict([make_observation(0)] * 2, [None])
