"""Several connections share a policy and never an episode."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import content_of

from openvla_checkpoint import block_image, write_checkpoint, write_heads, write_rsd_policy
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import DecodeResult, EpisodeState, PolicyInput
from rsd.models.visual_drafter import Memory
from rsd.policy import TEXT_CACHE, CompactBody, RsdPolicy
from rsd.serving.service import Memoryless, PolicyService, Session
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.targets.remote.wire import pack, unpack
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import Observation, RsdError

EPISODE = 6  # chunks: under rsd-skip the target rests in two of three
ORDER = (0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1)  # who asks: both wait for the other, and for nobody


def ask(service: PolicyService, session: Session, content: dict[str, Any]) -> dict[str, Any]:
    answer = service.answer(session, pack(content), time.perf_counter())
    assert isinstance(answer, bytes), answer
    found: dict[str, Any] = unpack(answer)
    return found


def check_interleaved(
    policy: RsdPolicy | OpenVlaPolicy, first: list[Observation], second: list[Observation]
) -> list[dict[str, Any]]:
    """Two episodes in turns give bit for bit what each gives alone; returns the first one's statistics."""
    served = policy.core if isinstance(policy, RsdPolicy) else Memoryless(policy)
    alone = []
    for episode in (first, second):
        policy.reset()
        alone.append([policy.predict(observation) for observation in episode])
    service, sessions = PolicyService(served), (Session(), Session())
    stats = []
    order = ORDER[: 2 * len(first)]
    asked = [iter(zip(*pair, strict=True)) for pair in zip((first, second), alone, strict=True)]
    for who in order:
        observation, expected = next(asked[who])
        answer = ask(service, sessions[who], content_of(observation))
        service.verify(sessions[who])
        assert np.array_equal(answer["actions"], expected.actions)
        assert answer["stats"]["skipped"] == expected.stats.skipped
        assert answer["stats"]["num_accepted_tokens"] == expected.stats.num_accepted_tokens
        if who == 0:
            stats.append(answer["stats"])
    assert order.count(0) == order.count(1) == len(stats) == len(first) == len(second)
    return stats


@pytest.mark.parametrize("decode", ["l1", "rsd", "rsd-fused", "rsd-skip", "draft-first"])
@pytest.mark.parametrize("instruction", ["pick up the bowl", "open the drawer"])  # the other client's, or its own
def test_two_clients_get_what_each_would_get_alone(
    decode: str,
    instruction: str,
    make_policy: Callable[..., RsdPolicy],
    make_observation: Callable[..., Observation],
) -> None:
    first = [make_observation(seed) for seed in range(EPISODE)]
    second = [make_observation(10 + seed, instruction=instruction) for seed in range(EPISODE)]
    stats = check_interleaved(make_policy(decode), first, second)
    if decode == "rsd-skip":
        assert [chunk["skipped"] for chunk in stats] == [False, True, True, False, True, True]


def test_two_clients_of_a_policy_whose_memory_lies_where_the_next_run_writes(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    """As with CUDA graphs, whose results are the same tensors every time."""
    policy = make_policy("rsd-fused")
    decide, places = policy.core._decode, []

    def overwriting(ops: Primitives, seen: PolicyInput, state: EpisodeState) -> DecodeResult:
        result = decide(ops, seen, state)
        assert result.memory is not None
        found = [*result.memory.keys, *result.memory.values]
        if not places:
            places.extend(torch.empty_like(tensor) for tensor in found)
        for place, tensor in zip(places, found, strict=True):
            place.copy_(tensor)
        half = len(places) // 2
        return replace(result, memory=Memory(places[:half], places[half:]))

    policy.core._decode = overwriting
    first, second = ([make_observation(start + seed) for seed in range(EPISODE)] for start in (0, 10))
    check_interleaved(policy, first, second)


@pytest.fixture(scope="module")
def openvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(write_checkpoint(tmp_path_factory.mktemp("openvla")))


def openvla_episode(seed: int, instruction: str) -> list[Observation]:
    rng, images = np.random.default_rng(seed), np.stack([block_image(seed, 256), block_image(seed + 1, 256)])
    states = rng.normal(0.0, 0.3, (EPISODE // 2, 8)).astype(np.float32)
    return [Observation(np.roll(images, step, axis=1), state, instruction) for step, state in enumerate(states)]


def test_two_clients_of_an_openvla_policy_with_instructions_of_their_own(
    openvla: Path, tokenizer: ActionTokenizer, tmp_path: Path
) -> None:
    directory = write_rsd_policy(tmp_path / "policy", openvla, tokenizer)
    policy = RsdPolicy.from_pretrained(directory, decode="rsd-fused")
    check_interleaved(policy, openvla_episode(1, "open the drawer"), openvla_episode(5, "pick up the black bowl"))


def test_a_published_openvla_checkpoint_is_served(openvla: Path) -> None:
    policy = OpenVlaPolicy.from_pretrained(openvla, suite="libero_spatial")
    check_interleaved(policy, openvla_episode(1, "open the drawer"), openvla_episode(5, "pick up the black bowl"))


def test_an_episode_begins_with_a_reset_a_new_instruction_or_a_failed_prediction(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy = make_policy("rsd-fused")
    service, session = PolicyService(policy.core), Session()
    one, other = make_observation(1), make_observation(2)
    policy.reset()
    fresh, later = (policy.predict(observation).actions for observation in (one, other))
    policy.reset()
    other_fresh = policy.predict(other).actions
    assert not np.array_equal(later, other_fresh)  # a memory makes a difference

    assert np.array_equal(ask(service, session, content_of(one))["actions"], fresh)
    assert np.array_equal(ask(service, session, content_of(other))["actions"], later)
    assert ask(service, session, {"reset": True}) == {"reset": True}
    assert np.array_equal(ask(service, session, content_of(other))["actions"], other_fresh)
    assert np.array_equal(ask(service, session, content_of(one, reset=True))["actions"], fresh)
    assert np.array_equal(ask(service, session, content_of(other, reset=False))["actions"], later)
    renamed = make_observation(2, instruction="another task")
    policy.reset()
    renamed_fresh = policy.predict(renamed).actions
    ask(service, session, content_of(one, reset=True))
    assert np.array_equal(ask(service, session, content_of(renamed))["actions"], renamed_fresh)
    assert np.array_equal(ask(service, session, content_of(one))["actions"], fresh)

    decide = policy.core._decode
    for error, said in ((RsdError("broken weights"), "broken weights"), (MemoryError("GPU"), "MemoryError: GPU")):

        def failing(*_: Any, error: Exception = error) -> DecodeResult:
            raise error

        ask(service, session, content_of(one))
        policy.core._decode = failing
        answer = service.answer(session, pack(content_of(other)), time.perf_counter())
        policy.core._decode = decide
        assert isinstance(answer, str)
        assert said in answer
        assert np.array_equal(ask(service, session, content_of(other))["actions"], other_fresh)


def test_a_bad_message_is_answered_by_a_text_and_changes_nothing(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    service, session = PolicyService(make_policy().core), Session()
    for seed, skipped in ((0, False), (1, True)):
        assert ask(service, session, content_of(make_observation(seed)))["stats"]["skipped"] is skipped
    small = content_of(make_observation(2, size=16))
    for message in ("hello", b"hello", pack({"prompt": "x"}), pack(small)):
        answer = service.answer(session, message, time.perf_counter())
        assert isinstance(answer, str)
        assert answer.startswith("rsd serve: ")
        assert "expected" in answer or "missing" in answer
    # the episode goes on: in a new one the target would look
    assert ask(service, session, content_of(make_observation(2)))["stats"]["skipped"] is True


def test_large_and_odd_fields_are_the_clients_fault_and_are_answered_at_once_in_few_words(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    service, session = PolicyService(make_policy().core), Session()
    good = content_of(make_observation(1))
    odd: list[dict[str, Any]] = [
        {"reset": b"\0" * 10_000_000},
        {"reset": "\0" * 60_000},
        {"reset": np.ones(10_000_000, np.uint8)},
        {**good, "prompt": "x" * 3_000_000},
        {**good, "prompt": "word " * 10_000},
        {**good, "prompt": "\0" * 60_000},
        {**good, "y" * 60_000: 1},
        {**good, **{f"key {number}": 1 for number in range(200)}},
        {**good, "observation/state": "7" * 60_000},
        {**good, "observation/state": np.zeros(1_000_000)},
        {**good, "observation/state": [[[0.0] * 50] * 50] * 50},
        {**good, "observation/state": {"a": [1] * 100}},
        {**good, "observation/image": "\0" * 60_000},
    ]
    for content in odd:
        message = pack(content)
        start = time.perf_counter()
        answer = service.answer(session, message, start)
        assert time.perf_counter() - start < 0.5
        assert isinstance(answer, str)
        assert answer.startswith("rsd serve: ")
        assert "the policy failed" not in answer
        assert len(answer) < 500
        assert "\n" not in answer
    ask(service, session, good)


def test_long_instructions_are_not_kept(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy = make_policy()
    for number in range(70):
        for length in (1, 60_000):
            policy.predict(make_observation(1, instruction=f"open{' ' * length}{number}"))
    assert isinstance(policy.core.body, CompactBody)
    kept = policy.core.body._texts._kept.cache_info()
    assert kept.misses == 70
    assert kept.currsize == TEXT_CACHE


def test_warming_up_leaves_no_memory_and_tells_the_shape(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    service = PolicyService(make_policy("rsd-fused").core)
    assert service.warm_up() == [8, 7]
    observation = make_observation(1, instruction="pick up the black bowl")  # the one it warms up with
    answer = ask(service, Session(), content_of(observation))
    assert np.array_equal(answer["actions"], make_policy("rsd-fused").predict(observation).actions)
    timing = answer["server_timing"]
    assert timing["infer_ms"] >= answer["stats"]["latency_ms"]["total"] > 0
    assert timing["queue_ms"] >= 0


def test_an_answer_that_no_robot_should_execute_is_not_given(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("l1").core
    predict = policy.predict

    def wild(*given: Any) -> Any:
        prediction = predict(*given)
        prediction.chunks[0].actions[0, 0] = 1.5
        return prediction

    monkeypatch.setattr(policy, "predict", wild)
    answer = PolicyService(policy).answer(Session(), pack(content_of(make_observation(1))), time.perf_counter())
    assert isinstance(answer, str)
    assert "actions are to lie in [-1, 1], found one of 1.5" in answer


def test_a_verification_that_fails_ends_its_own_episode_and_no_other(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy, one, other = make_policy("draft-first"), make_observation(1), make_observation(2)
    service, sessions = PolicyService(policy.core), (Session(), Session())
    fresh = [ask(service, session, content_of(one))["actions"] for session in sessions]
    assert np.array_equal(*fresh)
    bias = policy.model.target.level_head.bias
    with torch.no_grad():
        kept = bias.clone()
        bias.fill_(float("nan"))
        service.verify(sessions[0])
        bias.copy_(kept)
    service.verify(sessions[1])
    expected = make_policy("draft-first")
    expected.predict(one)
    assert np.array_equal(ask(service, sessions[1], content_of(other))["actions"], expected.predict(other).actions)
    expected.reset()
    assert np.array_equal(ask(service, sessions[0], content_of(other))["actions"], expected.predict(other).actions)
