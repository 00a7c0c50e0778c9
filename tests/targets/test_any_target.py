"""Policies of somebody else's: a class, any openpi server, and a drafter and a proxy in front of it."""

import functools
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection

from foreign_server import CHUNK, foreign, proxied, running
from openvla_checkpoint import block_image
from rsd.chunks import environment_ready
from rsd.cli.serve import ServeArguments
from rsd.cli.serve import run as serve
from rsd.decoding.state import EpisodeState
from rsd.evaluation.cautions import cautions
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.foreign import check_foreign
from rsd.targets.black_box import Drafter, SpeculatingPolicy, load_drafter
from rsd.targets.custom import CustomPolicy, identity
from rsd.targets.drafter_files import check_belongs, read_drafter
from rsd.targets.remote import connection
from rsd.targets.remote.openpi import OpenpiPolicy, served_at
from rsd.targets.remote.wire import pack, unpack
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError, WrongOption

PAGE = Path(__file__).parents[2] / "docs/your_policy.md"
SEEN = Observation(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(8, np.float32), "pick up the bowl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("page_policy", "other_policy"):
        sys.modules.pop(name, None)


def test_the_class_of_the_page_is_a_policy(here: Path) -> None:
    snippet = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    (here / "sub").mkdir()
    (here / "page_policy.py").write_text(snippet)
    (here / "sub/other_policy.py").write_text(snippet)
    for spec in ("page_policy:MyPolicy", "sub/other_policy.py:MyPolicy"):
        policy = CustomPolicy(spec)
        policy.reset(3)
        chunk = policy.predict(SEEN)
        assert chunk.actions.shape == (8, 7)
        assert policy.image_size == 256
    before = identity("page_policy:MyPolicy")["source_sha256"]
    (here / "page_policy.py").write_text(snippet + "\n")
    assert identity("page_policy:MyPolicy")["source_sha256"] != before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"policy": "no_such:My"}, "cannot be imported"),
        ({"policy": "no/such.py:My"}, "expected a file, found none"),
        ({"policy": "json:loads"}, "expected a class loads"),
        ({"policy": "json:JSONDecoder"}, "found no reset"),
        ({"policy": "json:JSONDecoder", "decode": "rsd"}, "decodes its own way, target-only; with a --drafter"),
        ({"policy": "json:JSONDecoder", "temperature": 1.0}, "--temperature: not with --policy json:JSONDecoder"),
        ({"policy": "json:JSONDecoder", "drafter": "nowhere", "decode": "rsd-skip"}, "found no reset"),
        ({"policy": "ws://x:1", "drafter": "nowhere", "decode": "rsd-skip"}, "expected a directory with drafter.json"),
        ({"policy": "ws://x:1", "drafter": "nowhere", "decode": "draft-first"}, "also rsd-skip, rsd-async, rsd-f"),
        ({"policy": "ws://x:1", "drafter": "nowhere", "decode": "rsd-async", "audit": True}, "--audit: not with"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(RsdError, match=expected):
        check_foreign(EvalConfig(**{"decode": "target-only", **options}))


OWN = "class P:\n    def reset(self): pass\n    def predict(self, observation): return {}\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (OWN.format(0) + "import sys; sys.exit(0)", r"cannot be imported \(SystemExit: 0\)"),
        (OWN.format(0) + "raise SystemExit", r"cannot be imported \(SystemExit: \)"),
        (OWN.replace("self, observation", "self"), r"predict\(observation\), found predict\(self\)"),
        (OWN.replace("observation", "a, b"), r"found predict\(self, a, b\)"),
        (OWN.replace("reset(self)", "reset(self, a)"), r"found reset\(self, a\)"),
        (OWN + "    image_size = 'big'\n", r"P: image_size: expected an integer from 1 to 4096, found 'big'"),
        (OWN + "    image_size = 0\n", r"P: image_size: expected an integer from 1 to 4096, found 0"),
    ],
)
def test_a_file_that_is_no_policy_is_found_at_once(here: Path, source: str, expected: str) -> None:
    (here / "page_policy.py").write_text(source)
    with pytest.raises(RsdError, match=expected):
        check_foreign(EvalConfig(policy="page_policy.py:P", decode="target-only"))


def test_what_only_an_instance_knows_is_not_asked_of_its_class(here: Path) -> None:
    made = "    image_size = None\n    def __init__(self): self.image_size = 96\n"
    told = "    @property\n    def image_size(self): return 96\n"
    for name, more in (("page_policy", made), ("other_policy", told)):
        (here / f"{name}.py").write_text(OWN + more)
        assert CustomPolicy(f"{name}.py:P").image_size == 96


def test_actions_are_clipped_or_in_other_units() -> None:
    assert environment_ready([1.5] * 7, "x").tolist() == [[1.0] * 7]
    assert environment_ready(torch.zeros(9, 7), "x", 4).shape == (9, 7)
    with pytest.raises(WrongOption, match=r"^x: expected chunks of the 9 steps .* found 8; --execute 8 executes as"):
        environment_ready(np.zeros((8, 7)), "x", 9)
    for odd in (np.full((8, 7), 30.0), np.zeros((8, 14)), np.zeros((0, 7)), np.full((1, 7), np.nan)):
        with pytest.raises(RsdError, match=r"^x"):
            environment_ready(odd, "x")


@pytest.mark.parametrize("name", ["numpy", "rsd"])
def test_a_file_that_would_hide_a_package_is_to_be_renamed(here: Path, name: str) -> None:
    (here / f"{name}.py").write_text(OWN)
    with pytest.raises(RsdError, match=f"would hide the package {name} from whatever imports it; rename the file"):
        CustomPolicy(f"{name}.py:P")


@pytest.mark.parametrize("name", ["json", "wave"])  # one that is loaded already, one that is not
def test_a_file_named_like_a_module_of_python_hides_nothing(here: Path, name: str) -> None:
    (here / f"{name}.py").write_text(OWN)
    assert CustomPolicy(f"{name}.py:P").policy is not CustomPolicy(f"{name}.py:P").policy
    code = f"import sys; sys.path[:] = {sys.path}; import {name}; print({name}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(here) not in done.stdout
    assert getattr(sys.modules.get(name), "__file__", None) != str(here / f"{name}.py")


async def awaited() -> None: ...


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (awaited, r"a coroutine \(of an `async def`\)"),
        (lambda: (row for row in []), "a generator"),
        (lambda: {"actions": np.zeros((8, 7))}, "a dictionary with 'actions'"),
        (dict, "a dictionary with nothing"),
        (lambda: None, "nothing"),
        (lambda: "up", "text"),
        (lambda: np.float32(0), "one number"),
    ],
)
def test_what_predict_returned_instead_of_actions(answer: Callable[[], Any], found: str) -> None:
    with pytest.raises(RsdError, match=rf"^x: expected actions \[n, 7\], found {found}; predict has to return"):
        environment_ready(answer(), "x")


def test_any_openpi_server_is_asked_as_its_own_client_asks() -> None:
    with foreign({}) as (address, asked):
        policy = served_at(address)
        assert isinstance(policy, OpenpiPolicy)
        policy.reset()
        assert policy.predict(SEEN).executed.shape == (5, 7)
        policy.reset()
        policy.predict(SEEN)
        policy.close()
    assert set(asked[0]) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert asked[0]["observation/image"].shape == (224, 224, 3)
    for nonsense in (b"\xc1", b"\x81" * 3000):  # msgpack's errors say nothing
        say: Callable[[ServerConnection], None] = functools.partial(ServerConnection.send, message=nonsense)
        with running(say) as address, pytest.raises(RsdError, match=f"^{address}: expected msgpack .*Error\\)$"):
            served_at(address)
    with foreign(["a list"]) as (address, _), pytest.raises(RsdError, match="says its metadata first"):
        served_at(address)


def test_a_server_that_says_nothing_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "SILENCE", 0.05)
    done = threading.Event()
    with running(lambda _: done.wait() and None) as address:
        with pytest.raises(RsdError, match=f"{address}: the connection was lost \\(no answer for 0.2 s\\)"):
            OpenpiPolicy(address, timeout_s=0.2)
        done.set()
        assert capsys.readouterr().err == f"{address}: connected; waiting for it to say what it serves\n"
    with foreign({}) as (address, _):
        assert OpenpiPolicy(address, 10).predict(SEEN).actions.shape == (10, 7)
        with pytest.raises(WrongOption, match="expected chunks of the 11 steps"):
            OpenpiPolicy(address, 11).predict(SEEN)


@pytest.fixture(scope="module")
def frames() -> dict[str, bytes]:
    with np.load(Path(__file__).parents[1] / "fixtures/openpi/exchange.npz") as recorded:
        return {name: recorded[name].tobytes() for name in recorded}


def replay(frames: dict[str, bytes], asked: list[Any]) -> Callable[[ServerConnection], None]:
    """openpi's server as it was recorded; after its text it closes with 1011."""

    def converse(connection: ServerConnection) -> None:
        connection.send(frames["0_server"])
        for message in connection:
            asked.append(message)
            if unpack(message)["prompt"] == "bad":  # type: ignore[arg-type]
                connection.send(frames["6_server"].decode())
                connection.close(1011)
                break
            connection.send(frames["2_server"])

    return converse


def test_openpis_own_client_and_server_as_recorded(frames: dict[str, bytes], drafter: Drafter) -> None:
    asked, sent = list[Any](), unpack(frames["1_client"])
    view = np.stack([block_image(1, 256), block_image(2, 256)])
    state = sent["observation/state"].astype(np.float32)
    answer = unpack(frames["2_server"])
    with running(replay(frames, asked)) as address:
        policy = served_at(address)
        chunk = policy.predict(Observation(view, state, sent["prompt"]))
        ours = unpack(asked.pop())
        assert ours.keys() == sent.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, state if name == "observation/state" else sent[name])
        np.testing.assert_array_equal(chunk.executed, answer["actions"][:5].astype(np.float32))
        np.testing.assert_array_equal(chunk.actions, answer["actions"].astype(np.float32))  # a tail for late answers
        assert chunk.stats.latency_ms["total"] - chunk.stats.latency_ms["network"] == pytest.approx(0.25)
        with pytest.raises(RsdError, match="ValueError: no such prompt"):
            policy.predict(Observation(view, state, "bad"))
        policy.reset()  # that server closes after a text
        assert len(policy.predict(Observation(view, state, "again")).executed) == 5
        policy.close()

        asked.clear()
        with proxied(address, drafter) as place, connect(place, compression=None, max_size=None) as client:
            client.recv()
            for number in (1, 5, 1):
                client.send(frames[f"{number}_client"])
                found = client.recv()
                if number == 5:
                    assert "ValueError: no such prompt" in found  # type: ignore[operator]
                else:
                    read = unpack(found)  # type: ignore[arg-type]
                    assert read.pop("speculation")["forced"] is True
                    assert pack(read) == frames["2_server"]
    assert asked == [frames[f"{number}_client"] for number in (1, 5, 1)]


class Agreeing:
    """A target that answers what the drafter drafts."""

    image_size = 64

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.calls = drafter, 0

    def reset(self, seed: int | None = None) -> None:
        self.calls = 0

    def predict(self, observation: Observation) -> ActionChunk:
        self.calls += 1
        drafted = self.drafter.propose(observation, EpisodeState(), self.drafter.skip_rule()).actions
        return ActionChunk(drafted, ChunkStats("target-only"))


def test_the_target_is_asked_at_reset_and_until_a_draft_stood(drafter: Drafter) -> None:
    target = Agreeing(drafter)
    skip = drafter.skip_rule(1e9, 2)
    policy = SpeculatingPolicy(drafter, target, skip, "rsd-skip")
    policy.reset()
    found = [policy.predict(SEEN) for _ in range(4)]
    closes = bool((found[0].actions[:, -1] > 0).any())
    if not closes:  # at a switch of the gripper the target is asked, too
        assert [chunk.stats.skipped for chunk in found] == [False, True, True, False]
    assert found[0].stats.forced
    assert found[0].stats.deviation_mm == pytest.approx(0.0, abs=1e-3)
    assert found[0].stats.num_draft_tokens == [48, 48]  # scalars of a level
    drafter.stored.__dict__["epsilon_mm"] = 1e-9
    target.predict = lambda observation: ActionChunk(CHUNK, ChunkStats("target-only"))  # type: ignore[method-assign]
    policy.reset()
    assert [policy.predict(SEEN).stats.skipped for _ in range(3)] == [False] * 3


def test_a_drafter_of_another_target_is_refused(drafter: Drafter) -> None:
    check_belongs(drafter.stored, {"policy": "ws://elsewhere", "metadata": {}}, "here")
    with pytest.raises(RsdError, match=r"^here: distilled from another target"):
        check_belongs(drafter.stored, {"policy": "ws://elsewhere", "metadata": {"name": "pi0"}}, "here")


def test_a_server_that_does_not_say_what_it_is_is_warned_of(
    drafter: Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "drafter"
    config = EvalConfig(policy="ws://x:1", drafter=str(place), decode="rsd-skip")
    (told,) = cautions(config)
    assert told.startswith("ws://x:1: its metadata are empty, so a drafter distilled for another such server is taken")
    monkeypatch.setattr("rsd.serving.server.until_signal", lambda main: None)
    with foreign({}) as (address, _):
        serve(ServeArguments(policy=address, drafter=str(place), port=0))
    assert f"warning: {address}: its metadata are empty" in capsys.readouterr().err
    replace(drafter.stored, target={"policy": "ws://y:1", "metadata": {"model": "pi0"}}).save(place)
    assert cautions(config) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "unsealed", "later"])
def test_a_damaged_drafter_is_made_anew_and_not_sealed(drafter: Drafter, tmp_path: Path, damage: str) -> None:
    place = tmp_path / "drafter"
    path = place / {"unsealed": "manifest.json", "later": "more.json"}.get(damage, "model.safetensors")
    path.write_bytes(b"{}") if damage in ("cut", "later") else path.unlink()
    with pytest.raises(RsdError, match=rf"{path.name}: .*; .*copy") as refused:
        read_drafter(place)
    assert "seal" not in str(refused.value)
    assert damage == "gone" or "make it anew: rsd drafter distil" in str(refused.value)


def test_a_drafters_folder_may_be_text_and_its_device_must_be_one(drafter: Drafter, tmp_path: Path) -> None:
    assert load_drafter(str(tmp_path / "drafter")).stored == drafter.stored  # type: ignore[arg-type]
    odd = (None, "cpu", "drafter directory: expected"), (tmp_path / "drafter", "tpu", "device 'tpu': expected")
    for folder, device, expected in odd:
        with pytest.raises(RsdError, match=expected):
            load_drafter(folder, device)  # type: ignore[arg-type]


def test_the_proxy_outlives_the_server_behind_it(drafter: Drafter) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    view = np.zeros((224, 224, 3), np.uint8)
    request = {"observation/image": view, "observation/wrist_image": view, "observation/state": np.zeros(8)}
    request |= {"prompt": "pick up the bowl", "extra": 3}
    behind = f"ws://127.0.0.1:{port}"
    with proxied(behind, drafter) as place, connect(place, compression=None, max_size=None) as client:
        assert "speculation" in unpack(client.recv())  # type: ignore[arg-type]

        def ask(**more: Any) -> Any:
            client.send(pack({**request, **more}))
            answer = client.recv()
            return unpack(answer) if isinstance(answer, bytes) else answer

        assert "server is lost" in ask()
        with foreign({}, port) as (_, asked):
            answer = ask()
            assert answer["actions"].shape == (10, 7)
            assert answer["speculation"]["forced"] is True
            assert asked[0]["extra"] == 3
        assert "server is lost" in ask(prompt="another")
        with foreign({"other": 1}, port):
            assert "another policy is served there now" in ask()
        client.send(pack({"prompt": "x"}))
        assert "the drafter needs observation/image" in client.recv()


@pytest.mark.simulator
def test_the_gymnasium_environment_of_the_page() -> None:
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    assert names["picture"].shape == (128, 128, 3)
    names["env"].close()
    from rsd.types import check_observation

    assert check_observation(names["observation"]).instruction
