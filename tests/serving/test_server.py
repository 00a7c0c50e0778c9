"""The server over a real socket, the package's own client, and the command."""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets.sync.client as websocket
from messages import content_of, serving
from websockets.exceptions import InvalidStatus

from evaluation.scripted import SCRIPTED, CountingEnv
from rsd.cli import main
from rsd.evaluation.backend import LIBERO, describe_checkpoint, rsd_policy, worker_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.realtime import RealTime
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from rsd.evaluation.rollout import run_episode
from rsd.policy import Prediction, RsdPolicy
from rsd.serving.server import PolicyServer, reserve
from rsd.targets.remote.client import RemotePolicy
from rsd.targets.remote.wire import pack, unpack
from rsd.types import Observation, RsdError


def server_of(policy: RsdPolicy, name: str = "tiny", port: int = 0) -> PolicyServer:
    description = {"policy": name, "checkpoint_sha256": "0"}
    return PolicyServer(policy.core, description, {"torch": "any"}, reserve("127.0.0.1", port))


@pytest.fixture
def address(make_policy: Callable[..., RsdPolicy]) -> Iterator[str]:
    with serving(server_of(make_policy())) as address:
        yield address


def test_health_is_told_over_http_and_a_web_page_is_kept_out(address: str) -> None:
    url = address.replace("ws", "http")
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as response:
        assert (response.status, response.read()) == (200, b"OK\n")
    with pytest.raises(urllib.error.HTTPError, match="426"):
        urllib.request.urlopen(url, timeout=10)
    with pytest.raises(InvalidStatus, match="403"):
        websocket.connect(address, origin="http://example.org")  # type: ignore[arg-type]


def test_health_is_told_and_another_client_connects_while_a_chunk_is_decided(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, begun, go_on = make_policy(), threading.Event(), threading.Event()
    predict = policy.core.predict

    def slow(*given: Any) -> Prediction:
        begun.set()
        assert go_on.wait(20)
        return predict(*given)

    with serving(server_of(policy)) as address, closing(RemotePolicy(address)) as remote:
        monkeypatch.setattr(policy.core, "predict", slow)
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(remote.predict, make_observation())
            assert begun.wait(20)
            with urllib.request.urlopen(f"{address.replace('ws', 'http')}/healthz", timeout=10) as response:
                assert response.read() == b"OK\n"
            RemotePolicy(address).close()
            assert not asked.done()
            go_on.set()
            assert asked.result(20).actions.shape == (8, 7)


def test_a_client_of_openpi_is_told_what_is_served_and_keeps_its_connection_through_errors(
    address: str, make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    observation = make_observation(3)
    with websocket.connect(address, compression=None, max_size=None) as connection:
        welcome = unpack(connection.recv(10))
        assert (welcome["decode"], welcome["image_size"], welcome["chunk"]) == ("rsd-skip", 32, [8, 7])
        assert welcome["execute"] == 8
        assert welcome["images"] == ["observation/image", "observation/wrist_image"]
        connection.send(pack(content_of(make_observation(3, size=8))))
        assert "expected 32 x 32 pixels" in connection.recv(10)
        connection.send("hello")
        assert "expected msgpack in a binary frame" in connection.recv(10)
        connection.send(pack(content_of(observation)))
        first = unpack(connection.recv(10))
        connection.send(pack({"reset": True}))
        assert unpack(connection.recv(10)) == {"reset": True}
        connection.send(pack(content_of(observation)))
        second = unpack(connection.recv(10))
    assert np.array_equal(first["actions"], make_policy().predict(observation).actions)
    assert np.array_equal(first["actions"], second["actions"])
    assert first["actions"].dtype == np.float32
    assert first["server_timing"]["prev_total_ms"] > 0


def test_two_robots_over_the_network_do_not_share_an_episode(
    address: str, make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    episodes = [[make_observation(10 * who + step) for step in range(4)] for who in range(2)]
    alone = [make_policy(), make_policy()]
    with closing(RemotePolicy(address)) as one, closing(RemotePolicy(address)) as other:
        for step in range(4):
            for who, remote in enumerate((one, other)):
                expected, found = alone[who].predict(episodes[who][step]), remote.predict(episodes[who][step])
                assert np.array_equal(found.actions, expected.actions)
                assert replace(found.stats, latency_ms={}) == replace(expected.stats, latency_ms={})
                latency = found.stats.latency_ms
                assert latency["total"] > latency["network"] > 0
        one.reset()
        alone[0].reset()
        again = one.predict(episodes[0][0])
        assert np.array_equal(again.actions, alone[0].predict(episodes[0][0]).actions)
        with pytest.raises(RsdError, match="expected 32 x 32 pixels, or from 24 to 2048 to be resized, found 8 x 8"):
            one.predict(make_observation(size=8))


def test_a_lost_connection_is_an_error_and_the_next_episode_connects_anew_to_the_same_policy(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy, observation = make_policy(), make_observation()
    with serving(server_of(policy)) as address:
        remote = RemotePolicy(address)
        expected = remote.predict(observation)
    port = int(address.rpartition(":")[2])
    with pytest.raises(RsdError, match="the connection was lost"):
        remote.predict(observation)
    with pytest.raises(RsdError, match=r"a new episode .* connects anew"):
        remote.predict(observation)
    with pytest.raises(RsdError, match="found none that answers"):
        remote.reset()
    with serving(server_of(policy, port=port)):
        remote.reset()
        assert np.array_equal(remote.predict(observation).actions, expected.actions)
    with serving(server_of(policy, "retrained", port)):
        with pytest.raises(RsdError, match="the connection was lost"):
            remote.predict(observation)
        with pytest.raises(RsdError, match="another policy is served there now"):
            remote.reset()


def test_of_two_that_load_for_one_port_the_slower_is_told(make_policy: Callable[..., RsdPolicy]) -> None:
    with socket.socket() as quicker:
        quicker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `reserve`: bound, not listening yet
        quicker.bind(("127.0.0.1", 0))
        slower = server_of(make_policy(), port=quicker.getsockname()[1])
        quicker.listen()
        with pytest.raises(RsdError, match="Address already in use; choose another --host or"), serving(slower):
            pass


def test_what_cannot_be_reached_or_listened_at_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["serve", "--policy", "not read before the port is there", "--port", str(port)])
        assert f"error: cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    with pytest.raises(RsdError, match=r"cannot listen at no\.such\.host\.invalid, port 80"):
        reserve("no.such.host.invalid", 80)
    with reserve("127.0.0.1", 0) as door, pytest.raises(RsdError, match="found none that answers"):
        RemotePolicy(f"ws://127.0.0.1:{door.getsockname()[1]}")  # not open yet
    for wrong in (f"ws://127.0.0.1:{port}", "ws://", "ws://no.such.host.invalid:1"):
        with pytest.raises(RsdError, match="expected an `rsd serve` at ws://HOST:PORT"):
            RemotePolicy(wrong)


@pytest.fixture
def checkpoint(make_policy: Callable[..., RsdPolicy], tmp_path: Path) -> Path:
    make_policy().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def command(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rsd serve` as its users start it, and its address."""
    words = [sys.executable, "-m", "rsd", "serve", "--policy", str(checkpoint), "--decode", "l1", "--port", "0"]
    words += ["--threads", "1"]  # as many as here
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"})
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        assert "decoding with l1 on cpu at ws://127.0.0.1:" in line, line + process.stderr.read()
        yield process, line.split(" at ")[1].split(";")[0]
    finally:
        process.kill()
        process.wait()


def timeless(result: EpisodeResult) -> EpisodeResult:
    return replace(result, wall_s=0.0, latency_ms={})


def test_an_evaluation_of_a_served_policy_has_the_episodes_of_a_local_one_and_ctrl_c_ends_the_server(
    command: tuple[subprocess.Popen[str], str], checkpoint: Path, tmp_path: Path
) -> None:
    process, address = command
    simulator = replace(SCRIPTED, make_policy=worker_policy, describe_policy=describe_checkpoint)
    local = EvalConfig(num_trials=2, tasks="0,2", policy=str(checkpoint), decode="l1", num_workers="1")
    alone = {}
    policy = LIBERO.make_policy(local)
    for task in (0, 2):
        for state in (0, 1):
            env = CountingEnv("libero_spatial", task, policy.image_size)
            names = {"suite": "libero_spatial", "task_id": task, "task_name": f"task_{task}", "init_state": state}
            result = run_episode(env, policy, **names, seed=7, decode="l1").result  # type: ignore[arg-type]
            alone[result.key] = timeless(result)
    run = replace(local, policy=address, output=str(tmp_path / "run"))
    summary = evaluate(run, backend=simulator)
    assert summary.errors == 0
    assert {k: timeless(r) for k, r in read_episodes(tmp_path / "run" / EPISODES_FILE).items()} == alone
    assert summary.policy["checkpoint_sha256"] == describe_checkpoint(local)["checkpoint_sha256"]
    assert summary.policy["policy"] == address
    assert summary.policy["server"]["torch_threads"] == "1"

    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert (process.returncode, rest.strip()) == (0, "stopped")


def test_in_real_time_a_served_policy_follows_up_by_itself(make_policy: Callable[..., RsdPolicy]) -> None:
    names = {"suite": "any", "task_id": 3, "task_name": "", "init_state": 0, "seed": 7, "decode": "draft-first"}
    with serving(server_of(make_policy("draft-first"))) as address, closing(RemotePolicy(address)) as remote:
        env = CountingEnv("any", 3, remote.image_size)
        turns, real = (
            run_episode(env, remote, **names, pace=pace)  # type: ignore[arg-type]
            for pace in (None, RealTime(1000.0))
        )
    assert all(np.array_equal(a, b) for a, b in zip(real.actions, turns.actions, strict=True))
    same = replace(real.result, chunk_stats=turns.result.chunk_stats, sources=[])
    assert timeless(same) == timeless(turns.result)
    assert real.result.chunk_stats["pause_ms"][0] is None
    assert all(pause is not None and pause > 0 for pause in real.result.chunk_stats["pause_ms"][1:])
    assert "waited" not in real.result.chunk_stats


def test_options_that_belong_to_the_server_are_refused(address: str, tmp_path: Path) -> None:
    served = EvalConfig(policy=address, decode="rsd-skip", output=str(tmp_path))
    assert rsd_policy(served).image_size == 32
    with pytest.raises(RsdError, match="decodes with rsd-skip, asked for is --decode ar"):
        rsd_policy(replace(served, decode="ar"))
    others = ({"acceptance": "exact"}, {"audit": True}, {"skip_threshold_mm": 5.0}, {"device": "cuda"}, {"threads": 2})
    for changes in others:
        named = "--" + next(iter(changes)).replace("_", "-")
        with pytest.raises(RsdError, match=f"{named} cannot be chosen here; give it to `rsd serve`"):
            rsd_policy(replace(served, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--policy", "ws://127.0.0.1:1"], "is served already; expected a checkpoint, hub id or module:Class"),
        (["--port", "70000"], "--port: expected an integer from 0 to 65535, found 70000"),
        (["--threads", "-1"], "--threads: expected an integer from 0 to 4096, found -1"),
        (["--decode", "rsd-fast"], "--decode 'rsd-fast': expected one of"),
        (["--decode", "l1", "--acceptance", "exact"], "--decode l1 accepts nothing; expected --decode rsd, rsd-fused"),
        (["--device", "tpu"], "--device 'tpu': expected cpu, cuda, or cuda with a number"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert error in said
    assert said.count("\n") == 1


@pytest.mark.simulator
def test_an_episode_in_libero_is_the_same_behind_a_port(make_policy: Callable[..., RsdPolicy]) -> None:
    env = LIBERO.make_env("libero_spatial", 3, 32)
    env.max_steps = 24
    names = {"suite": "libero_spatial", "task_id": 3, "task_name": "", "init_state": 4, "seed": 7, "decode": "rsd-skip"}
    local = run_episode(env, make_policy(), **names)  # type: ignore[arg-type]
    with serving(server_of(make_policy())) as address, closing(RemotePolicy(address)) as remote:
        served = run_episode(env, remote, **names)  # type: ignore[arg-type]
    env.close()
    assert local.result.steps == 24
    assert timeless(served.result) == timeless(local.result)
    assert all(np.array_equal(a, b) for a, b in zip(served.actions, local.actions, strict=True))
