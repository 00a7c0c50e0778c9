"""`rsd serve --decode rsd-async`: who gets the draft at once, who waits, and what the target says of it, when."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets.sync.client as websocket
from messages import content_of, serving
from test_client import ACTIONS, STATS, WELCOME, server
from test_server import server_of
from test_service import ask

from evaluation.scripted import CountingEnv
from rsd.evaluation.backend import rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.delay import VirtualDelay
from rsd.evaluation.episodes import pace_of
from rsd.evaluation.realtime import Pace
from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.rollout import run_episode
from rsd.evaluation.wall_clock import WallClock
from rsd.policy import RsdPolicy
from rsd.serving.service import PolicyService, Session, load_served
from rsd.targets.remote.client import CorrectedPolicy, RemotePolicy
from rsd.targets.remote.openpi import served_at
from rsd.targets.remote.wire import pack, unpack
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

ASYNC = "rsd-async"
DUE = 4  # of a chunk's 8 steps


class Scripted:
    """A draft is -0.5, the target's answer 0.5 everywhere. stood: what it makes of each draft, in turn; switches:
    number of an observation -> step from which on its draft's gripper is closed."""

    decode, execute, image_size, cameras = ASYNC, DUE, 32, 2

    def __init__(self, stood: Sequence[bool], switches: dict[int, int] | None = None) -> None:
        self.stood, self.switches, self.asked, self.looked = stood, switches or {}, 0, list[int]()

    def predict(self, observations: Sequence[Observation], states: Any) -> tuple[list[ActionChunk], list[int], Any]:
        actions = np.full((8, 7), -0.5, np.float32)
        actions[:, 6] = -1.0
        if (step := self.switches.get(self.asked)) is not None:
            actions[step:, 6] = 1.0
        stats = ChunkStats(ASYNC, latency_ms={"total": 0.0})
        chunk, self.asked = ActionChunk(actions, stats, DUE), self.asked + 1
        return [chunk], list(states), (self.asked - 1, chunk)

    def verify_pending(self, pending: Any) -> tuple[list[ActionChunk], list[int]]:
        number, chunk = pending
        self.looked.append(number)
        answer = np.full((8, 7), 0.5, np.float32)
        answer[:, 6] = -1.0
        stats = replace(chunk.stats, prefills=1, stood=self.stood[number])
        return [replace(chunk, answer=answer, stats=stats)], [number]


@pytest.mark.parametrize(
    ("stood", "switches", "expected"),
    [
        ([True] * 4, {}, "tddd"),  # an episode begins with what the target says
        ([True, False, False, True], {}, "tddd"),  # what fell is not waited for
        ([True] * 4, {2: 3}, "tddd"),  # its switch is waited for, and stands
        ([True, True, False, True], {2: 3}, "tdtd"),
        ([True, True, False, True], {2: 6}, "tddd"),  # beyond what is executed
    ],
)
def test_a_client_that_knows_of_nothing_gets_drafts_that_may_begin(
    stood: list[bool], switches: dict[int, int], expected: str, make_observation: Callable[..., Observation]
) -> None:
    policy = Scripted(stood, switches)
    service, session, answers = PolicyService(policy), Session(), []
    for number in range(4):
        answers.append(ask(service, session, content_of(make_observation(number))))
        assert service.verify(session) is None
    assert "".join("d" if answer["actions"][0, 0] < 0 else "t" for answer in answers) == expected
    assert policy.looked == [0, 1, 2, 3]
    assert "previous" not in answers[0]
    for answer, before in zip(answers[1:], stood, strict=False):
        assert (answer["previous"]["actions"][:, :6] == 0.5).all()
        assert answer["previous"]["stats"]["stood"] is before
    ask(service, session, {"reset": True})
    assert session.found is None


@pytest.mark.parametrize("stood", [True, False])
def test_who_asks_for_corrections_always_gets_the_draft_and_then_the_answer(
    stood: bool, make_observation: Callable[..., Observation]
) -> None:
    policy = Scripted([stood] * 3, {1: 0})
    service, session = PolicyService(policy), Session()
    for number in range(3):
        answer = ask(service, session, content_of(make_observation(number), corrections=True))
        assert answer["actions"][0, 0] == -0.5
        assert answer["stats"]["stood"] is None
        assert "previous" not in answer
        assert len(policy.looked) == number
        message = service.verify(session)
        assert isinstance(message, bytes)
        correction = unpack(message)["correction"]
        assert correction["actions"][0, 0] == 0.5
        assert correction["stats"]["stood"] is stood


def test_two_clients_get_the_drafts_and_answers_that_each_would_get_alone(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy = make_policy(ASYNC)
    service, sessions = PolicyService(policy.core), (Session(), Session())
    episodes = [[make_observation(10 * who + step) for step in range(4)] for who in range(2)]
    alone = []
    for episode in episodes:
        policy.reset()
        alone.append([(policy.predict(observation), policy.complete()) for observation in episode])
    for step in range(4):
        answers = [
            ask(service, session, content_of(episode[step], corrections=True))
            for session, episode in zip(sessions, episodes, strict=True)
        ]
        for who in (1, 0):  # what is pending of one waits for the other's
            message, (draft, whole) = service.verify(sessions[who]), alone[who][step]
            assert isinstance(message, bytes)
            assert whole is not None
            correction = unpack(message)["correction"]
            assert np.array_equal(answers[who]["actions"], draft.actions)
            assert np.array_equal(correction["actions"], whole.answer)
            timeless = {**asdict(whole.stats), "latency_ms": correction["stats"]["latency_ms"]}
            assert correction["stats"] == timeless


def paces() -> list[Pace]:
    return [VirtualDelay(0), VirtualDelay(3, 1), WallClock(100.0)]


@pytest.mark.parametrize("kind", range(3))
def test_an_episode_of_a_served_policy_is_that_of_a_local_one(kind: int, make_policy: Callable[..., RsdPolicy]) -> None:
    names: Any = {"suite": "any", "task_id": 3, "task_name": "", "init_state": 0, "seed": 7, "decode": ASYNC}
    with serving(server_of(make_policy(ASYNC))) as address, closing(served_at(address)) as remote:
        assert isinstance(remote, CorrectedPolicy)
        served = run_episode(CountingEnv("any", 3, 32), remote, **names, pace=paces()[kind], warmup=1)
    assert served.result.failure in ("", "step limit")
    assert {"draft", "verify-pending", "network", "queue", "total"} <= served.result.latency_ms.keys()
    if kind < 2:  # by the clock they differ
        local = run_episode(CountingEnv("any", 3, 32), make_policy(ASYNC), **names, pace=paces()[kind], warmup=1)
        assert timeless(served.result) == timeless(local.result)
        assert all(np.array_equal(a, b) for a, b in zip(served.actions, local.actions, strict=True))


def timeless(result: EpisodeResult) -> EpisodeResult:
    return replace(result, wall_s=0.0, latency_ms={})


def test_an_evaluation_drives_it_by_the_clock_or_with_delays(
    make_policy: Callable[..., RsdPolicy], tmp_path: Path
) -> None:
    make_policy(ASYNC).save_pretrained(tmp_path / "checkpoint")
    assert load_served(EvalConfig(policy=str(tmp_path / "checkpoint"), decode=ASYNC)).decode == ASYNC
    with serving(server_of(make_policy(ASYNC))) as address:
        asked = EvalConfig(policy=address)
        for timed, kind in (({"delay": 2}, VirtualDelay), ({"control_hz": 20.0}, WallClock)):
            config, why = settle(replace(asked, **timed))  # type: ignore[arg-type]
            assert (config.decode, "what it is served with" in why) == (ASYNC, True)
            assert type(pace_of(config)) is kind
            with closing(rsd_policy(config)) as remote:  # type: ignore[type-var]
                assert isinstance(remote, CorrectedPolicy)


def test_openpis_client_gets_one_answer_a_request(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    with (
        serving(server_of(make_policy(ASYNC))) as address,
        websocket.connect(address, compression=None, max_size=None) as connection,
    ):
        assert unpack(connection.recv(10))["decode"] == ASYNC
        for number in range(3):
            connection.send(pack(content_of(make_observation(number))))
            answer = unpack(connection.recv(10))
            assert answer["actions"].shape == (8, 7)
            assert ("previous" in answer) == (number > 0)
        with pytest.raises(TimeoutError):
            connection.recv(0.5)


def test_corrections_are_refused_where_there_are_none(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    for decode, wanted, said in (
        ("l1", True, "corrections: expected a server of --decode rsd-async, found l1"),
        (ASYNC, "yes", "corrections: expected true or false, found 'yes'"),
    ):
        service = PolicyService(make_policy(decode).core)
        message = pack(content_of(make_observation(1), corrections=wanted))
        assert said in str(service.answer(Session(), message, time.perf_counter()))


def test_a_correction_that_fails_is_told_and_ends_the_episode(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation], monkeypatch: Any
) -> None:
    policy = make_policy(ASYNC)

    def broken(pending: Any) -> Any:
        raise RuntimeError("the target broke")

    with serving(server_of(policy)) as address, closing(served_at(address)) as remote:
        first = remote.predict(make_observation(1)).actions
        assert remote.complete() is not None  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(policy.core, "verify_pending", broken)
            remote.predict(make_observation(2))
            with pytest.raises(RsdError, match="the policy failed: RuntimeError: the target broke"):
                remote.predict(make_observation(3))
            remote.predict(make_observation(2))
            remote.reset()  # what is on its way is not the next episode's
        assert np.array_equal(remote.predict(make_observation(1)).actions, first)


LOOKED = {**STATS, "decode": ASYNC, "stood": True, "latency_ms": {"total": 0.0, "verify-pending": 1.0}}
CORRECTION = {"actions": ACTIONS, "stats": LOOKED}


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ({"correction": CORRECTION}, ""),
        ({}, "KeyError: 'correction'"),
        ([1], "not the answer of this version"),
        ({"correction": {**CORRECTION, "actions": ACTIONS[:4]}}, r"actions float32 \[4, 7\] in the place of"),
        ({"correction": {**CORRECTION, "actions": ACTIONS + 2.0}}, "actions are to lie in"),
        ({"correction": {**CORRECTION, "stats": {**LOOKED, "stood": None}}}, "stood: expected true or false"),
        ({"correction": {**CORRECTION, "stats": {**LOOKED, "latency_ms": {"total": 0.0}}}}, "verify-pending"),
        ({"correction": {**CORRECTION, "stats": {**LOOKED, "decode": "ar"}}}, "decoded with ar"),
        ("rsd serve: the policy failed", "the policy failed"),
    ],
)
def test_a_wrong_correction_is_an_error(
    correction: Any, expected: str, make_observation: Callable[..., Observation]
) -> None:
    stats = {"decode": ASYNC, "latency_ms": {"total": 0.0}}
    answer = {"actions": ACTIONS, "server_timing": {"infer_ms": 0.01, "queue_ms": 0.001}, "stats": stats}
    answers = iter([answer])
    told = server({**WELCOME, "decode": ASYNC}, lambda: next(answers), correction)
    with told as address, closing(CorrectedPolicy(address)) as remote:
        remote.predict(make_observation())
        if expected:
            with pytest.raises(RsdError, match=expected):
                remote.complete()
        else:
            found = remote.complete()
            assert found is not None
            assert found.stats.stood
            assert found.answer is not None
            assert remote.complete() is None


def test_who_does_not_know_of_corrections_is_served_as_openpis_client(make_policy: Callable[..., RsdPolicy]) -> None:
    with serving(server_of(make_policy(ASYNC))) as address, closing(RemotePolicy(address)) as remote:
        names: Any = {"suite": "any", "task_id": 3, "task_name": "", "init_state": 0, "seed": 7, "decode": ASYNC}
        assert run_episode(CountingEnv("any", 3, 32), remote, **names).result.failure in ("", "step limit")
