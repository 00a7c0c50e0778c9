"""`rsd serve --policy module:Class`: a class of one's own behind a port, alone and with a drafter."""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from rsd.cli import main
from rsd.cli.serve import ServeArguments
from rsd.decoding.state import EpisodeState
from rsd.evaluation.backend import describe_checkpoint, settle
from rsd.serving.server import PolicyServer, reserve
from rsd.serving.service import PolicyService, Session, load_served
from rsd.targets.black_box import Drafter, load_drafter
from rsd.targets.custom import identity
from rsd.targets.drafter_files import save_models
from rsd.targets.remote.client import RemotePolicy
from rsd.targets.remote.openpi import served_at
from rsd.targets.remote.wire import pack, unpack
from rsd.types import Observation, RsdError
from serving.messages import content_of, serving

SEEN = Observation(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(8, np.float32), "count")
COUNTING = """
import sys
import numpy as np

MOST = 9

class Counting:
    image_size, made = 64, 0

    def __init__(self):
        Counting.made += 1
        if Counting.made > MOST:
            raise RuntimeError("only one")
        self.number = Counting.made

    def reset(self):
        self.calls = 0

    def predict(self, seen):
        self.calls += 1
        if seen.instruction == "nan":
            return np.full((8, 7), np.nan)
        if seen.instruction == "shape":
            return np.zeros((8, 14))
        if seen.instruction == "raise":
            raise KeyError("no such thing")
        if seen.instruction == "exit":
            sys.exit("enough")
        steps = 9 if seen.instruction == "longer" else 8
        return np.full((steps, 7), self.calls / 8)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "counting.py").write_text(COUNTING)
    yield tmp_path
    sys.modules.pop("counting", None)


def server_of(**options: Any) -> PolicyServer:
    config = settle(ServeArguments(**{"policy": "counting:Counting", **options}).evaluated)[0]
    return PolicyServer(load_served(config), describe_checkpoint(config), {}, reserve("127.0.0.1", 0))


def ask(client: ClientConnection, prompt: str = "count", **more: Any) -> Any:
    client.send(pack({**content_of(SEEN), "prompt": prompt, **more}))
    answer = client.recv(30)
    return unpack(answer) if isinstance(answer, bytes) else answer


def counted(client: ClientConnection, **more: Any) -> int:
    """How many predictions the instance has given in its episode."""
    return round(8 * float(ask(client, **more)["actions"][0, 0]))


def test_each_connection_has_an_instance_and_reset_begins_its_episode(here: Path) -> None:
    with serving(server_of()) as address, ExitStack() as clients:
        one, other = (clients.enter_context(connect(address, compression=None)) for _ in range(2))
        welcome = unpack(one.recv())  # type: ignore[arg-type]
        other.recv()
        assert (welcome["decode"], welcome["chunk"], welcome["execute"]) == ("target-only", [8, 7], None)
        assert welcome["policy"] == identity("counting:Counting")
        assert [counted(client) for client in (one, one, other, one, other)] == [1, 2, 1, 3, 2]
        assert counted(one, reset=True) == 1
        assert ask(other, reset=True)["actions"].shape == (8, 7)
        assert counted(one, prompt="again") == 1
        assert sys.modules["counting"].Counting.made == 2
    with serving(server_of(execute=3)) as address, closing(served_at(address)) as remote:
        assert remote.predict(SEEN).executed.shape == (3, 7)


def test_an_instance_is_free_once_its_client_is_gone_and_a_class_that_can_be_made_once_has_one_client(
    here: Path,
) -> None:
    server = server_of()
    sys.modules["counting"].MOST = 1
    with serving(server) as address:
        with connect(address, compression=None) as one, connect(address, compression=None) as other:
            one.recv()
            other.recv()
            assert counted(one) == 1
            refused = "counting:Counting: cannot be made (RuntimeError: only one); another client has the one"
            assert ask(other).startswith(f"rsd serve: {refused}")
            one.send(pack({"reset": True}))
            one.recv()
            assert counted(other) == 1
        with closing(RemotePolicy(address)) as remote:
            assert remote.predict(SEEN).actions[0, 0] == 1 / 8


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("nan", "rsd serve: counting:Counting: actions: expected finite numbers"),
        ("shape", "rsd serve: counting:Counting: actions: expected"),
        ("raise", "rsd serve: the policy failed: KeyError: 'no such thing'"),
        ("exit", "rsd serve: the policy failed: SystemExit: enough"),
    ],
)
def test_what_the_class_does_wrong_is_a_text_and_everything_goes_on(here: Path, prompt: str, expected: str) -> None:
    with serving(server_of()) as address, ExitStack() as clients:
        one, other = (clients.enter_context(connect(address, compression=None)) for _ in range(2))
        one.recv()
        other.recv()
        assert [counted(one), counted(other)] == [1, 1]
        assert ask(one, prompt).startswith(expected)
        assert [counted(one), counted(other)] == [1, 2]
        assert ask(one, reset=np.ones(3)).startswith("rsd serve: reset: expected true or false, found ndarray")
        assert counted(one) == 2


def test_chunks_of_another_length_are_the_classes_right(here: Path) -> None:
    with serving(server_of(policy="counting.py:Counting")) as address, closing(served_at(address)) as remote:
        assert remote.predict(SEEN).executed.shape == (8, 7)
        longer = Observation(SEEN.images, SEEN.state, "longer")
        assert remote.predict(longer).executed.shape == (9, 7)


@pytest.fixture
def own_drafter(here: Path, drafter: Drafter) -> Drafter:
    """Distilled from that class."""
    drafter.stored.__dict__["target"] = identity("counting:Counting")
    save_models(drafter.model, drafter.tokenizer, drafter.stored, here / "own")
    return load_drafter(here / "own")


def test_with_a_drafter_the_gate_decides_in_each_episode(here: Path, own_drafter: Drafter) -> None:
    server = server_of(drafter="own", skip_threshold_mm=1e9, max_skips=2)
    with serving(server) as address, ExitStack() as clients:
        one, other = (clients.enter_context(connect(address, compression=None)) for _ in range(2))
        welcome = unpack(one.recv())  # type: ignore[arg-type]
        other.recv()
        assert (welcome["decode"], welcome["chunk"]) == ("rsd-skip", [8, 7])
        assert welcome["policy"]["drafter"] == "own"
        for client in (one, other):
            answer = ask(client)
            assert (answer["stats"]["forced"], answer["stats"]["prefills"]) == (True, 1)
            assert answer["actions"][0, 0] == 1 / 8
    drafted = own_drafter.propose(SEEN, EpisodeState(), own_drafter.skip_rule()).actions
    served = load_served(settle(ServeArguments("counting:Counting", drafter="own", decode="drafter-only").evaluated)[0])
    (answered,) = served.predict([SEEN], [None])[0]
    np.testing.assert_array_equal(answered.actions, drafted)
    (here / "counting.py").write_text(COUNTING + "\n")
    with pytest.raises(RsdError, match="own: distilled from another target"):
        server_of(drafter="own")


def test_two_speculating_instances_share_the_drafter(here: Path, own_drafter: Drafter) -> None:
    served = load_served(settle(ServeArguments("counting:Counting", drafter="own").evaluated)[0])
    service, sessions = PolicyService(served), (Session(), Session())
    for session in sessions:
        assert isinstance(service.answer(session, pack(content_of(SEEN)), 0.0), bytes)
    one, other = (session.state.func.__self__ for session in sessions)
    assert one.drafter is other.drafter
    assert one.target is not other.target


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["counting:Nobody"], "expected a class Nobody in counting, found no such name"),
        (["counting:Counting", "--acceptance", "exact"], "--acceptance: not with --policy counting:Counting"),
        (["counting:Counting", "--drafter", "none"], "drafter none: expected"),
        (["here", "--drafter", "there"], r"--drafter there: expected --policy ws://HOST:PORT, .* found here;"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    here: Path, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--port", "0", "--policy", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert re.search(error, said)
    assert said.count("\n") == 1
