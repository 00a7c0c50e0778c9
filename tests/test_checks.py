"""What a value has to be stands in its annotation: what fits is taken, what does not is one line that says where."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsd import manifest
from rsd.checks import (
    Checked,
    Count,
    Rules,
    Share,
    Time,
    above,
    between,
    checked,
    checked_later,
    from_json,
    multiple,
    told,
    within,
)
from rsd.chunks import checked_chunk
from rsd.conventions import openvla_gripper_to_env, rotate_180, state_vector
from rsd.data.demonstrations import action_episodes
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.calibration import SkipCalibration, fingertip_deviation
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.merging import merge_shards
from rsd.evaluation.results import read_run
from rsd.evaluation.workers import failed
from rsd.json_files import read_object
from rsd.models.bundle import RsdModel
from rsd.policy import RsdPolicy
from rsd.reporting.tables import load_runs
from rsd.targets.custom import CustomPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer, ChunkTokens
from rsd.tokenizer.rfsq import Rfsq
from rsd.types import ActionChunk, Observation, RsdError

MakeObservation = Callable[..., Observation]


@dataclass(frozen=True)
class Inner(Checked):
    count: Annotated[int, between(1, 64), multiple(2)] = 4
    rate: Annotated[float, above(0, 1)] = 1.0

    def rules(self) -> Rules:
        yield self.count > self.rate, "a count above the rate", self.count


@dataclass(frozen=True)
class Outer(Checked):
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    share: Share | None = None
    kind: Literal["x", "y"] = "x"
    path: Path = Path("a")
    table: dict[str, list[Count]] = field(default_factory=dict)
    pairs: tuple[tuple[float, float], ...] = ()
    inside: Annotated[float, within(0, 1)] = 0.5
    free: Any = None


FINE = ({"path": "b"}, {"pairs": [[1, 2.5]]}, {"share": 1}, {"inner": {"count": 6}}, {"free": 1 + 2j}, {"maybe": None})
ODD = [
    ({"share": 2}, "share: expected a number from 0 to 1 or null, found 2"),
    ({"share": float("nan")}, "share: expected a number from 0 to 1 or null, found nan"),
    ({"share": True}, "share: expected a number from 0 to 1 or null, found True"),
    ({"kind": "z"}, "kind: expected one of x, y, found 'z'"),
    ({"kind": ["x"]}, r"kind: expected one of x, y, found \['x'\]"),
    ({"path": 3}, "path: expected a path, found 3"),
    ({"path": "a\0b"}, r"path: expected text without the character NUL, found 'a\\x00b'"),
    ({"path": Path("a\0b")}, "path: expected text without the character NUL"),
    ({"table": {"a": [1, -1]}}, r"table.a\[1\]: expected an integer from 0 to 1000000000, found -1"),
    ({"table": {"a": 7}}, "table.a: expected a list, each of it an integer from 0 to 1000000000, found 7"),
    ({"table": {"a": [10**25]}}, r"table.a\[0\]: expected an integer"),
    ({"pairs": ((1, 2, 3),)}, r"pairs\[0\]: expected 2 values, each a number, found \(1, 2, 3\)"),
    ({"pairs": ((1, "2"),)}, r"pairs\[0\]\[1\]: expected a number, found '2'"),
    ({"pairs": ((1, 10**5000),)}, r"pairs\[0\]\[1\]: expected a number, found int"),
    ({"inside": 1.0}, "inside: expected a number between 0 and 1, found 1.0"),
    ({"inner": {"count": 66}}, "inner.count: expected an integer from 1 to 64 that is a multiple of 2, found 66"),
    ({"inner": {"count": 5}}, "inner.count: expected an integer from 1 to 64 that is a multiple of 2, found 5"),
    ({"inner": {"count": 2.0}}, "inner.count: expected an integer .*, found 2.0"),
    ({"inner": {"rate": 0}}, "inner.rate: expected a number above 0, at most 1, found 0"),
    ({"inner": {"colour": 1}}, r"unknown or missing field of inner: missing \[\], unknown \['colour'\]"),
    ({"inner": None}, "inner: expected Inner, found None"),
    ({"maybe": 3}, "maybe: expected Inner or null, found 3"),
]


@pytest.mark.parametrize("given", FINE, ids=str)
def test_what_fits_is_taken(given: dict[str, Any]) -> None:
    made = Outer(**given)
    assert from_json(Outer, given, "file") == made
    assert replace(made, share=0.5) == Outer(**{**given, "share": 0.5})
    if "free" not in given:
        assert pickle.loads(pickle.dumps(made)) == made
        assert from_json(Outer, asdict(made), "file") == made


@pytest.mark.parametrize(("given", "message"), ODD, ids=[message[:20] for _, message in ODD])
def test_what_does_not_fit_is_one_line(given: dict[str, Any], message: str) -> None:
    for make, where in ((lambda: Outer(**given), ""), (lambda: from_json(Outer, given, "f.json"), "f.json: (field )?")):
        with pytest.raises(RsdError, match=f"^{where}{message}") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_values_are_checked_together_and_by_whoever_knows_where_they_stand() -> None:
    with pytest.raises(RsdError, match=r"^expected a count above the rate, found 1$"):
        replace(OneToo(), count=1)
    with pytest.raises(RsdError, match=r"^f: field maybe: expected a count above the rate, found 1$"):
        from_json(Holder, {"maybe": {"count": 1}}, "f")
    with checked_later():
        odd = Inner(count=65)
    with pytest.raises(RsdError, match=r"^inner.count: expected"):
        Outer(inner=odd)


@dataclass(frozen=True)
class OneToo(Checked):
    count: Count = 4

    def rules(self) -> Rules:
        yield self.count > 1, "a count above the rate", self.count


@dataclass(frozen=True)
class Holder(Checked):
    maybe: OneToo | None = None


ODD_NUMBERS: st.SearchStrategy[Any] = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.integers(0, 1), st.floats(0, 1), st.text(max_size=2)),
    st.sampled_from([np.float64(0.5), np.int64(1), np.bool_(True), [1], 10**400, -0.0]),
)


@given(st.lists(ODD_NUMBERS, max_size=4))
@pytest.mark.parametrize("kind", [int, float, Count, Share, Time, float | None, Count | None, bool, str, Any])
def test_a_list_is_taken_if_and_as_each_of_it_is(kind: Any, values: list[Any]) -> None:
    expected, message = [], ""
    for index, value in enumerate(values):
        try:
            expected.append(checked(kind, value, f"list[{index}]"))
        except RsdError as error:
            message = message or str(error)
    if message:
        with pytest.raises(RsdError, match=f"^{re.escape(message)}$"):
            checked(list[kind], values, "list")
        return
    found = checked(list[kind], values, "list")
    assert found is not values
    assert [(type(one), repr(one)) for one in found] == [(type(one), repr(one)) for one in expected]


def test_numbers_of_numpy_become_pythons() -> None:
    made = Inner(count=np.int64(6), rate=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(made.count), type(made.rate)) == (int, float)
    assert checked(list[int], [np.int32(1)], "list") == [1]
    with pytest.raises(RsdError, match=r"list.1.: expected an integer, found .*2.5"):
        checked(list[int], [1, np.float64(2.5)], "list")


def odd_arguments(policy: RsdPolicy, tokenizer: ActionTokenizer, seen: Observation) -> Iterator[tuple[Any, str]]:
    core, zeros, gripper = policy.core, torch.zeros(1, tokenizer.scalars), torch.zeros(1, 8, dtype=torch.long)
    tokens = tokenizer.encode(torch.zeros(1, 8, 7))
    yield lambda: core.predict([seen], [5]), r"predict: states\[0\]: expected EpisodeState or null, found 5"  # type: ignore[list-item]
    yield lambda: core.predict([seen], 5), "predict: states: expected a list"  # type: ignore[arg-type]
    yield lambda: core.predict(seen), "predict: expected a list of observations, found Observation"  # type: ignore[arg-type]
    yield lambda: core.verify_pending(None), "verify_pending: expected Pending, found None"  # type: ignore[arg-type]
    yield lambda: policy.reset("x"), "reset: seed: expected an integer from 0 to .* or null, found 'x'"  # type: ignore[arg-type]
    yield lambda: policy.reset(-1), "reset: seed: expected an integer from 0"
    yield lambda: RsdPolicy.from_pretrained(3), "policy: expected text or a path, found 3"  # type: ignore[arg-type]
    yield lambda: tokenizer.decode(None), "tokens: expected ChunkTokens"  # type: ignore[arg-type]
    yield lambda: tokenizer.decode(ChunkTokens(None, gripper)), "motion tokens: expected a tensor"  # type: ignore[arg-type]
    yield lambda: tokenizer.decode(tokens, 99), "levels: expected an integer from 0 to"
    yield lambda: tokenizer.to_actions(zeros * float("nan"), gripper), "coefficients: expected finite numbers"
    yield lambda: tokenizer.to_actions(zeros[:, 1:], gripper), r"coefficients: expected \[B, 48\], found \[1, 47\]"
    yield lambda: tokenizer.to_actions(zeros[0], gripper), r"coefficients: expected \[B, 48\], found \[48\]"
    yield lambda: tokenizer.to_actions(zeros, gripper + 5), "gripper tokens: expected numbers from 0 to 1, found 5..5"
    yield lambda: tokenizer.to_actions(zeros, gripper[:, 1:]), r"gripper tokens: expected \[1, 8\], found \[1, 7\]"
    yield lambda: tokenizer.gripper_symbols(torch.zeros(1, 8, 6)), r"action chunk: expected \[B, 8, 7\]"
    yield lambda: tokenizer.gripper_symbols(torch.zeros(1, 8, 7) * np.nan), "action chunk: expected finite numbers"
    yield lambda: tokenizer.encode(torch.zeros(1, 8, 7, device="meta")), "action chunk: expected .* found .* on meta"
    yield lambda: tokenizer.encode(torch.zeros(1, 8, 7).to_sparse()), "action chunk: expected .* found torch.sparse_coo"
    yield lambda: tokenizer.to("abacus"), "device 'abacus': expected cpu"
    yield lambda: tokenizer.save(None), "tokenizer directory: expected a path, found None"  # type: ignore[arg-type]
    yield lambda: tokenizer.save(Path("/dev/null/x")), "/dev/null/x: cannot be written"
    yield lambda: ActionTokenizer.load(3), "tokenizer directory: expected a path, found 3"  # type: ignore[arg-type]
    yield lambda: ActionTokenizer.fit(np.zeros((9, 8, 7)), {"horizn": 8}), "tokenizer config"  # type: ignore[arg-type]
    yield lambda: policy.save_pretrained("/dev/null/x"), "/dev/null/x: cannot be written"
    yield lambda: RsdPolicy.from_pretrained("x" * 5000), "policy 'xxx.*expected a checkpoint directory or a hub id"
    yield lambda: replace(seen, images=np.zeros((2, 32, 16, 3), np.uint8)), "observation images: expected"
    yield lambda: replace(seen, images=np.zeros((2, 0, 0, 3), np.uint8)), "observation images: expected pixels"
    yield lambda: tokenizer.normalise(torch.zeros(1, 8, 7) * np.nan), "action chunk: expected finite numbers"
    yield lambda: tokenizer.to_coefficients(torch.zeros(1, 8, 7) + np.inf), "action chunk: expected finite numbers"
    yield lambda: tokenizer.to_normalised(zeros * np.nan), "coefficients: expected finite numbers"
    yield lambda: tokenizer.rfsq.quantise(zeros - np.inf), "scalars: expected finite numbers"
    yield lambda: tokenizer.rfsq.quantise(zeros[0, 0]), r"scalars: expected \[..., P\], found \[\]"
    yield lambda: tokenizer.rfsq.dequantise(tokens.motion + 7), "tokens: expected numbers from 0 to 6, found"
    yield lambda: tokenizer.rfsq.dequantise(tokens.motion[0, 0]), r"tokens: expected \[..., levels, P\], found \[48\]"
    yield lambda: tokenizer.rfsq.value(tokens.motion - 9, 1), "tokens: expected numbers from 0 to 6, found"
    yield lambda: tokenizer.rfsq.digit(zeros * np.nan, 1), "residual: expected finite numbers"
    yield lambda: tokenizer.rfsq.digit(zeros > 0, 1), "residual: expected a tensor or an array of real numbers"
    yield lambda: tokenizer.rfsq.step(99), "RFSQ: expected a level from 1 to 8, found 99"
    yield lambda: Rfsq(None), "RFSQ: expected RfsqConfig, found NoneType"  # type: ignore[arg-type]
    yield lambda: Rfsq(tokenizer.config.rfsq, True), "RFSQ: expected a positive finite step size, found True"
    yield lambda: RsdModel.of(None, tokenizer), "RsdModel.of: config: expected PolicyConfig, found None"  # type: ignore[arg-type]
    yield lambda: RsdModel.of(policy.config, 3), "policy: tokenizer: expected ActionTokenizer, found 3"  # type: ignore[arg-type]
    yield lambda: RsdPolicy.from_pretrained("a\0b"), "policy: expected text without the character NUL"
    yield lambda: read_run(Path("a\0b")), ".*: (not a results directory|expected text without)"
    yield lambda: merge_shards("x", 3), "merge: (shards|output): expected"  # type: ignore[arg-type]
    yield lambda: load_runs(None), "runs: expected a list"  # type: ignore[arg-type]
    yield lambda: list(action_episodes(3)), "demonstrations: expected text or a path, found 3"  # type: ignore[arg-type]
    yield lambda: tokenizer.encode(np.ma.masked_all((1, 8, 7))), "action chunk: .* found a masked array"  # type: ignore[arg-type]
    for wrist in (None, np.zeros((16, 16, 3), np.uint8), seen.images[0].tolist()):
        given = {"agentview": seen.images[0], "wrist": wrist, "state": seen.state, "instruction": "pick up the bowl"}
        yield partial(policy.predict, given), "predict: wrist: expected uint8"  # type: ignore[arg-type]
    yield lambda: rotate_180(np.zeros(3, np.uint8)), r"image: expected \[..., H, W, C\], found \[3\]"
    yield lambda: openvla_gripper_to_env(np.array([np.nan])), "gripper: expected finite numbers"
    yield lambda: state_vector(np.zeros(2), np.array([0, 0, 0, 1.0]), np.zeros(2)), r"position: expected \[3\]"
    yield lambda: replace(seen, state=np.ma.masked_all(8)), "observation state: expected real numbers, found masked"
    yield lambda: checked_chunk(ActionChunk(np.zeros((8, 7)), None)), "policy: expected its statistics to be"  # type: ignore[arg-type]
    yield lambda: evaluate(None), "evaluate: config: expected EvalConfig, found None"  # type: ignore[arg-type]
    yield lambda: evaluate(EvalConfig(), overwrite="no"), "evaluate: overwrite: expected true"  # type: ignore[arg-type]
    yield lambda: evaluate(EvalConfig(), time_limit_s=float("nan")), "evaluate: time_limit_s: expected a number"
    yield lambda: checked(dict[str, int], {"a": "x"}, "options"), r"options\.a: expected an integer, found 'x'"
    yield lambda: manifest.verify(None), "checkpoint directory: expected a path, found None"  # type: ignore[arg-type]
    yield lambda: SkipCalibration.load(None), "skip calibration's directory: expected a path"  # type: ignore[arg-type]
    yield lambda: manifest.seal(Path("nosuch")), "nosuch: expected a checkpoint directory, found none"
    yield lambda: CustomPolicy("json:JSONDecoder", steps=0), "steps: expected an integer from 1 to 1000 or null"
    yield lambda: CustomPolicy(None), "policy: expected text, found None"  # type: ignore[arg-type]
    yield lambda: fingertip_deviation(None, None), "chunk: expected real numbers, found object"  # type: ignore[type-var]
    yield lambda: acceptance_rule("exact", None), "acceptance: code: expected RfsqConfig"  # type: ignore[arg-type]


def test_odd_arguments_are_one_line(
    policy: RsdPolicy, tokenizer: ActionTokenizer, make_observation: MakeObservation
) -> None:
    for call, message in odd_arguments(policy, tokenizer, make_observation()):
        with pytest.raises(RsdError, match=f"^{message}"):
            call()


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(RsdError, match=r"expected a file, found a (directory|device or a pipe)"):
            read_object(path, "a folder")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "No such file or directory: '/x'"),
        (OSError("Multiple exceptions: [Errno 111] a, [Errno -2] b"), "Multiple exceptions: a, b"),
        (RuntimeError("IoError: No space left on device (os error 28)"), "IoError: No space left on device"),
        (ValueError("a\n  b"), "a b"),
        (ValueError("\x1b[31mred"), "?[31mred"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=str,
)
def test_what_a_library_says_is_told_without_numbers_of_the_system(error: Exception, said: str) -> None:
    assert told(error) == said


def test_a_worker_that_cannot_begin_says_what_helps() -> None:
    assert failed(OSError(28, "No space left on device", "/x")).message == (
        "/x: No space left on device; make room and run the same command again"
    )
    assert failed(RsdError("a line")).message == "a line"
