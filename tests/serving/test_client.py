"""What a policy server sends is checked when it arrives: a wrong one costs an episode, never a run or its numbers."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from rsd.chunks import checked_chunk
from rsd.targets.remote.client import RemotePolicy
from rsd.targets.remote.wire import pack
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

ACTIONS = np.zeros((8, 7), np.float32)
STATS = {
    "decode": "rsd-fused",
    "acceptance": "margin",
    "prefills": 1,
    "num_draft_tokens": [48, 48, 48],
    "num_accepted_tokens": [48, 48, 40],
    "accepted_levels": 2,
    "latency_ms": {"total": 0.01},
}
WELCOME = {
    "decode": "rsd-fused",
    "image_size": 32,
    "images": ["observation/image", "observation/wrist_image"],
    "chunk": [8, 7],
    "policy": {"policy": "fake"},
    "versions": {"rsd": "0"},
    "execute": 8,
}
ANSWER = {"actions": ACTIONS, "server_timing": {"infer_ms": 0.01, "queue_ms": 0.001}, "stats": STATS}


@contextmanager
def server(welcome: Any, answer: Any = None, then: Any = None) -> Iterator[str]:
    """A server that says these, whatever it is asked; texts and bytes as they are. then: unasked, after the answer."""

    def packed(content: Any) -> bytes | str:
        return content if isinstance(content, bytes | str) else pack(content)

    def converse(connection: ServerConnection) -> None:
        connection.send(packed(welcome))
        for _ in connection:
            if (found := answer() if callable(answer) else answer) is None:
                return
            connection.send(packed(found))
            if then is not None:
                connection.send(packed(then))

    with serve(converse, "127.0.0.1", 0, compression=None) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{listening.socket.getsockname()[1]}"
        listening.shutdown()
        thread.join()


def stats(**changes: Any) -> dict[str, Any]:
    return {**ANSWER, "stats": {**STATS, **changes}}


def actions(changed: Any) -> dict[str, Any]:
    return {**ANSWER, "actions": changed}


def timing(**changes: Any) -> dict[str, Any]:
    return {**ANSWER, "server_timing": {**ANSWER["server_timing"], **changes}}  # type: ignore[dict-item]


WRONG: dict[str, tuple[Any, str]] = {
    "more-levels": (stats(accepted_levels=99), "impossible statistics: 99 accepted levels of 3"),
    "more-accepted": (stats(num_accepted_tokens=[48, 60, 40]), "more accepted than drafted tokens"),
    "fewer-levels": (stats(num_accepted_tokens=[48, 48]), "2 levels of accepted tokens for 3 of drafted ones"),
    "negative-tokens": (stats(num_accepted_tokens=[-5, 48, 40]), r"field num_accepted_tokens\[0\] of its statistics"),
    "negative-prefills": (stats(prefills=-3), "prefills of its statistics: expected an integer from 0"),
    "negative-latency": (stats(latency_ms={"total": -50.0}), "latency_ms.total of its statistics: expected a num"),
    "nan-latency": (stats(latency_ms={"total": float("nan")}), "field latency_ms.total of its statistics"),
    "infinite-deviation": (stats(expected_deviation_mm=float("inf")), "field expected_deviation_mm of its statistics"),
    "text-latency": (stats(latency_ms={"total": "fast"}), "field latency_ms.total of its statistics"),
    "fractional-count": (stats(prefills=1.5), "field prefills of its statistics"),
    "true-count": (stats(target_passes=True), "field target_passes of its statistics"),
    "share-of-three": (stats(gripper_acceptance=3.0), "field gripper_acceptance of its statistics"),
    "no-list": (stats(num_draft_tokens=48), "field num_draft_tokens of its statistics"),
    "decode-a-list": (stats(decode=["ar"]), "field decode of its statistics"),
    "an-older-versions": (stats(main_passes=0), "not the answer of this version.* argument 'main_passes'"),
    "unknown-statistic": (stats(mood="good"), "unexpected keyword argument 'mood'"),
    "nan-action": (actions(np.full((8, 7), np.nan, np.float32)), "policy: actions: expected finite numbers"),
    "action-out-of-range": (actions(ACTIONS + 1.5), "found one of 1.5"),
    "actions-of-14": (actions(np.zeros((8, 14), np.float32)), r"actions float32 \[8, 14\] in the place of"),
    "one-action": (actions(ACTIONS[:1]), r"actions float32 \[1, 7\]"),
    "no-action": (actions(ACTIONS[:0]), r"actions float32 \[0, 7\]"),
    "float64": (actions(ACTIONS.astype(np.float64)), r"actions float64 \[8, 7\]"),
    "integers": (actions(ACTIONS.astype(np.int64)), r"actions int64 \[8, 7\]"),
    "lists": (actions(ACTIONS.tolist()), "not the answer of this version"),
    "nan-timing": (timing(queue_ms=float("nan")), "queue_ms: expected a number from 0 to 1000000000000, found nan"),
    "negative-timing": (timing(infer_ms=-5.0), "infer_ms: expected a number from 0 to 1000000000000, found -5.0"),
    "longer-than-it-took": (timing(infer_ms=1e9), "0.001 and 1000000000.0 ms of"),
    "text-timing": (timing(infer_ms="x"), "not the answer of this version"),
    "negative-queue": (timing(queue_ms=-0.001), "queue_ms: expected a number from 0"),
    "true-timing": (timing(queue_ms=True), "queue_ms: expected a number from 0"),
    "negative-deviation": (stats(deviation_mm=-5.0), "field deviation_mm of its statistics"),
    "decode-with-controls": (stats(decode="\x1b[2J"), "field decode of its statistics: expected text of at most 200"),
    "long-stage": (stats(latency_ms={"k" * 10_000: 1.0}), "of its statistics: expected text of at most 200"),
    "stages-without-end": (stats(latency_ms={f"k{i}": 0.0 for i in range(1000)}), "impossible statistics: 1000 stages"),
    "skipped-and-ran": (stats(skipped=True), "impossible statistics: a chunk that skipped the target, with prefills"),
    "skipped-and-forced": (stats(prefills=0, skipped=True, forced=True), "skipped the target, with forced"),
    "stage-longer": (stats(latency_ms={"total": 0.01, "draft": 9.0}), "the stage draft of latency_ms longer than its"),
    "stage-without-total": (stats(latency_ms={"draft": 9.0}), "a stage of 9 ms in the 0.01 ms that it took"),
    "another-decoder": (stats(decode="ar"), "decoded with ar, announced was rsd-fused"),
    "no-stats": ({"actions": ACTIONS}, "not the answer of this version"),
    "a-list": ([1], "not the answer of this version"),
    "no-msgpack": (b"\xc1", "expected msgpack"),
    "text": ("rsd serve: something odd\n\x1b[31mred\x1b[0m", "something odd"),
    "traceback": (
        'Traceback (most recent call last):\n  File "x", line 3\n    y()\nKeyError: "state"',
        '[0-9]: KeyError: "state"$',
    ),
    "long-text": ("x" * 100_000, "x" * 100),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_an_error_of_a_few_words(case: str, make_observation: Callable[..., Observation]) -> None:
    answer, expected = WRONG[case]
    with server(WELCOME, answer) as address, closing(RemotePolicy(address)) as remote:
        with pytest.raises(RsdError, match=expected) as error:
            remote.predict(make_observation())
        assert len(str(error.value)) < 1200


@pytest.mark.parametrize(("mode", "expected"), [("die", "the connection was lost"), ("hang", "no answer for 0.3 s")])
def test_a_server_that_dies_or_hangs_costs_an_episode(
    mode: str, expected: str, make_observation: Callable[..., Observation]
) -> None:
    left = iter([ANSWER])  # the first is answered

    def answer() -> Any:
        if (found := next(left, None)) is not None:
            return found
        time.sleep(1.0 if mode == "hang" else 0.0)
        return None

    with server(WELCOME, answer) as address, closing(RemotePolicy(address, 3.0 if mode == "die" else 0.3)) as remote:
        remote.predict(make_observation())
        with pytest.raises(RsdError, match=f"^{address}: .*{expected}"):
            remote.predict(make_observation())
        with pytest.raises(RsdError, match="a new episode"):
            remote.predict(make_observation())


def test_a_second_answer_is_not_taken_for_that_of_the_next_request(
    make_observation: Callable[..., Observation],
) -> None:
    with server(WELCOME, ANSWER, then=ANSWER) as address, closing(RemotePolicy(address)) as remote:
        remote.predict(make_observation())
        time.sleep(0.1)  # it arrives
        with pytest.raises(RsdError, match="expected one answer to each message, found a second one"):
            remote.predict(make_observation())
        remote.reset()
        remote.predict(make_observation())


def test_a_right_answer_is_none(make_observation: Callable[..., Observation]) -> None:
    with server(WELCOME, ANSWER) as address, closing(RemotePolicy(address)) as remote:
        assert remote.predict(make_observation()).stats.accepted_levels == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"decode": 3},
        {"image_size": 0},
        {"image_size": "32"},
        {"image_size": 10**9},
        {"images": None},
        {"images": ["observation/other"]},
        {"images": [["observation/image"]]},
        {"chunk": [8]},
        {"chunk": [8, 14]},
        {"chunk": [0, 7]},
        {"chunk": [10**9, 7]},
        {"chunk": ["8", 7]},
        {"chunk": 8},
        {"execute": 0},
        {"execute": 9},
        {"policy": None},
        {"versions": ["0"]},
        {"more": 1},
    ],
)
def test_a_wrong_welcome_is_refused(changes: dict[str, Any]) -> None:
    expected = "expected this version's `rsd serve`"
    with server({**WELCOME, **changes}) as address, pytest.raises(RsdError, match=expected):
        RemotePolicy(address)


@pytest.mark.parametrize("welcome", ["hello", b"", b"\xc1", [1], {}, {b"__ndarray__": True}])
def test_another_servers_welcome_is_refused(welcome: Any) -> None:
    with server(welcome) as address, pytest.raises(RsdError):
        RemotePolicy(address)


def test_a_users_own_policy_is_held_to_the_same() -> None:
    checked_chunk(ActionChunk(ACTIONS, ChunkStats("mine")))
    for wrong in (ChunkStats("mine", prefills=-1), ChunkStats("mine", latency_ms={"total": float("nan")})):
        with pytest.raises(RsdError, match="policy: "):
            checked_chunk(ActionChunk(ACTIONS, wrong))
    with pytest.raises(RsdError, match=r"H from 1 to 1000, found \[1000000, 7\]"):
        checked_chunk(ActionChunk(np.zeros((1_000_000, 7), np.float32), ChunkStats("mine")))
