"""The speculating proxy: what a client is told of the server behind, and of its own messages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection

from foreign_server import CHUNK, foreign, proxied, running
from rsd.cli import dispatch
from rsd.serving import server
from rsd.targets.black_box import Drafter
from rsd.targets.remote.wire import pack, unpack

VIEW = np.zeros((224, 224, 3), np.uint8)
REQUEST = {"observation/image": VIEW, "observation/wrist_image": VIEW, "prompt": "pick up the bowl"}


@contextmanager
def client_of(address: str, drafter: Drafter) -> Iterator[ClientConnection]:
    """A client that a proxy in front of that server has welcomed."""
    with proxied(address, drafter) as place, connect(place, compression=None) as client:
        client.recv()
        yield client


def ask(client: ClientConnection, number: float = 0.0, **more: Any) -> Any:
    """What is answered to an observation, unpacked, or the text."""
    client.send(pack({**REQUEST, "observation/state": np.full(8, number), **more}))
    answer = client.recv(30)
    return unpack(answer) if isinstance(answer, bytes) else answer


def echo(message: Any) -> np.ndarray:
    """Actions that tell which message they answer."""
    return np.full((10, 7), message["observation/state"][0], np.float32)


def answering(*times: Callable[[Any], bytes]) -> Callable[[ServerConnection], None]:
    """A server that sends each of those for a message."""

    def converse(connection: ServerConnection) -> None:
        connection.send(pack({}))
        for message in connection:
            for answer in times:
                connection.send(answer(unpack(message)))  # type: ignore[arg-type]

    return converse


def test_a_second_answer_to_one_message_is_never_that_of_the_next(drafter: Drafter) -> None:
    twice = [lambda message: pack({"actions": echo(message)})] * 2
    with running(answering(*twice)) as address, client_of(address, drafter) as client:
        assert ask(client, 0.125)["actions"][0, 0] == 0.125
        lost = f"{address}: the target's server is lost (expected one answer to each message, found a second one)"
        assert lost in ask(client, 0.25)
        assert ask(client, 0.5)["actions"][0, 0] == 0.5  # of a new connection


def test_garbage_of_the_server_behind_is_told_with_its_address(drafter: Drafter) -> None:
    with running(answering(lambda _: b"\xc1")) as address, client_of(address, drafter) as client:
        assert ask(client).startswith(f"rsd serve: {address}: expected msgpack")


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ({"reset": np.ones(3)}, "reset: expected true or false, found ndarray"),
        ({"reset": "yes"}, "reset: expected true or false, found 'yes'"),
        ({"prompt": np.ones(3)}, "prompt: expected text, found ndarray"),
        ({"observation/state": np.full(8, np.nan)}, "observation/state: expected finite numbers"),
    ],
)
def test_an_odd_field_of_a_client_is_one_line_and_the_connection_goes_on(
    drafter: Drafter, odd: dict[str, Any], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with foreign({}) as (address, _), client_of(address, drafter) as client:
        assert ask(client, **odd).startswith(f"rsd serve: {expected}")
        assert ask(client)["actions"].shape == CHUNK.shape
    assert "Traceback" not in capfd.readouterr().err


def test_the_proxy_says_how_many_actions_a_client_may_execute(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "until_signal", lambda serving: None)
    with foreign({}) as (address, _):
        assert dispatch(["serve", "--policy", address, "--drafter", drafter.where, "--port", "0"]) == 0
    told = "a draft has 8 actions: clients execute no more, or rsd drafter distil --execute N\n"
    assert told in capsys.readouterr().err
