"""Bad files and bad options, for every command that reads them: one line, exit status 2, nothing written.

A case makes its input in an empty folder and returns the command line; what the line must say stands beside it. A new
fault of a kind is a new row. Demonstrations: `data/test_bad_demonstrations.py`.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refusals import check
from rsd.cli import COMMANDS, Command, dispatch
from rsd.environment import check_environment
from rsd.types import RsdError

DEEP = "[" * 100_000

# runs of `rsd eval`

CONFIG = {"format": 1, "config": {}, "config_hash": "x", "versions": {}, "policy": {}}
RUNS: dict[str, tuple[bytes, bytes, str]] = {
    "episodes-no-utf8": (b"", b'{"format": 1, "suite": "\xff"}\n', "episodes.jsonl:1: not valid JSON"),
    "episodes-deep": (b"", DEEP.encode() + b"\n", "episodes.jsonl:1: not valid JSON"),
    "episodes-list": (b"", b"[1]\n", "episodes.jsonl:1: expected a JSON object"),
    "episodes-long-number": (b"", b'{"format": ' + b"9" * 5000 + b"}\n", "episodes.jsonl:1: not valid JSON"),
    "episodes-true": (b"", b'{"format": true}\n', "results format True"),
    "episodes-zero-bytes": (b"", b"\0" * 100 + b"\n", "episodes.jsonl:1: not valid JSON"),
    "config-no-utf8": (b"\xff", b"", "config.json: not valid JSON"),
    "config-deep": (DEEP.encode(), b"", "config.json: not valid JSON"),
    "config-empty": (b" ", b"", "config.json: not valid JSON"),
    "config-odd": (b'{"format": 1, "config": 3}', b"", "config.json: unknown or missing field of RunRecord"),
}
RUN_READERS = {
    "compare": ["compare", "RUN"],
    "report": ["report", "RUN"],
    "inspect": ["inspect", "RUN"],
    "merge": ["merge", "OUT", "RUN"],
    "resume": ["eval", "--resume", "RUN"],
}


# --resume reads the options first, and those of a run with odd episodes are no run's here
@pytest.mark.parametrize(
    ("case", "reader"),
    [(case, reader) for case in RUNS for reader in RUN_READERS if reader != "resume" or RUNS[case][0]],
)
def test_runs_with_odd_bytes(case: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, episodes, expected = RUNS[case]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_bytes(config or json.dumps(CONFIG).encode())
    (tmp_path / "run/episodes.jsonl").write_bytes(episodes)
    places = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    check([places.get(word, word) for word in RUN_READERS[reader]], expected, tmp_path, capsys)


TWICE = {
    "compare": (["compare", "RUN", "RUN/../run"], "runs: expected each once"),
    "report": (["report", "RUN", "LINK"], "runs: expected each once"),
    "fit": (["tokenizer", "fit", "--data", "RUN", "LINK", "--output", "OUT"], "--data: expected each once"),
    "a-file-of-it": (
        ["tokenizer", "fit", "--data", "RUN/config.json", "RUN", "--output", "OUT"],
        "--data: expected each",
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_what_would_count_twice(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    command, expected = TWICE[case]
    places = {"RUN": "run", "LINK": "link", "OUT": "out"}
    words = [
        next((f"{tmp_path}/{word.replace(name, path)}" for name, path in places.items() if word.startswith(name)), word)
        for word in command
    ]
    check(words, expected, tmp_path, capsys)


CIRCLE = {  # a link to itself
    "merge": ["merge", "OUT", "LOOP"],
    "merge-into": ["merge", "LOOP"],
    "compare": ["compare", "LOOP"],
    "fit": ["tokenizer", "fit", "--data", "LOOP", "--output", "OUT"],
    "render": ["demos", "render", "--source", "LOOP"],
    "collect": ["demos", "collect", "--out", "LOOP", "--states-only"],
    "eval": ["eval", "--policy", "LOOP", "--output", "OUT"],
    "seal": ["checkpoint", "seal", "LOOP"],
}


@pytest.mark.parametrize("case", CIRCLE)
def test_links_that_lead_in_a_circle(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"LOOP": str(tmp_path / "loop"), "OUT": str(tmp_path / "out")}
    check([places.get(word, word) for word in CIRCLE[case]], "loop", tmp_path, capsys)


# environment variables

VARIABLES = [
    ("RSD_ENGINE", "zzz", "RSD_ENGINE='zzz': expected one of auto, eager, onnx, onnx-int8; set it anew, or unset it"),
    ("RSD_ENGINE", "cuda-graphs", "RSD_ENGINE='cuda-graphs': expected one of"),
    ("RSD_DEBUG", "yes", "RSD_DEBUG='yes': expected one of 0, 1"),
    ("RSD_ENGIN", "onnx", "RSD_ENGIN: no variable of this name is read; expected RSD_ENGINE"),
    ("WORLD_SIZE", "abc", "WORLD_SIZE='abc': expected a number of processes"),
    ("WORLD_SIZE", "0", "WORLD_SIZE='0': expected a number of processes"),
    ("WORLD_SIZE", "2,3", "WORLD_SIZE='2,3': expected a number of processes"),
    ("RANK", "-1", "RANK='-1': expected a number such as"),
    ("LOCAL_RANK", "abc", "LOCAL_RANK='abc': expected a number such as"),
    ("LOCAL_RANK", "\u0663", "expected a number such as"),
    ("MASTER_PORT", "99999", "MASTER_PORT='99999': expected a port"),
    ("OMP_NUM_THREADS", "x", "OMP_NUM_THREADS='x': expected a number of threads"),
    ("OMP_NUM_THREADS", "4,0", "OMP_NUM_THREADS='4,0': expected a number of threads"),
    ("NUMBA_NUM_THREADS", "1.5", "NUMBA_NUM_THREADS='1.5': expected a number of threads"),
    ("NUMBA_DISABLE_JIT", "x", "NUMBA_DISABLE_JIT='x': expected a number such as"),
    ("LP_NUM_THREADS", "many", "LP_NUM_THREADS='many': expected a number such as"),
]


@pytest.mark.parametrize(("name", "value", "expected"), VARIABLES)
def test_odd_variables_are_found_before_anything_begins(
    name: str, value: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv(name, value)
    for command in (["eval", "--output", tmp_path / "out"], ["compare", tmp_path], ["study", "serving"]):
        check(command, expected, tmp_path, capsys)
    assert dispatch(["--help"]) == 0


@pytest.mark.parametrize(("name", "value"), [("RSD_ENGINE", ""), ("OMP_NUM_THREADS", "4,2"), ("WORLD_SIZE", "2")])
def test_variables_that_can_be_meant(name: str, value: str) -> None:
    check_environment({name: value, "RSD_BROWSER": "required", "PATH": "x"})


# files of torch and numpy

PT: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "expected a file of torch.save, found an empty one"),
    "text": (b"hello", "not readable without unpickling"),
    "a-folder": (None, "expected a file of torch.save, found a folder"),
    "cut-off": (b"PK\x03\x04" + bytes(100), "not readable without unpickling"),
    "pickle": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "not readable without unpickling"),
}


@pytest.mark.parametrize("case", PT)
def test_files_of_torch(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = PT[case]
    path = tmp_path / "file.pt"
    path.mkdir() if content is None else path.write_bytes(content)
    command = ["study", "legacy", "--autoencoder", path, "--head", path, "--output", tmp_path / "out"]
    check(command, expected, tmp_path, capsys)


# values that cannot be meant together, or not at all

COMMANDS_LINE: dict[str, tuple[list[str], str]] = {
    "http": (["eval", "--policy", "http://127.0.0.1:8000", "--output", "OUT"], "a server's address ws://HOST:PORT"),
    "bench-suite": (["bench", "latency", "--suite", "libero", "--output", "OUT"], "found the unknown name 'libero'"),
    "bench-tasks": (["bench", "latency", "--num-tasks", "11", "--output", "OUT"], "--num-tasks 11: expected 1 to 10"),
    "levels": (["tokenizer", "fit", "--data", "x", "--tokenizer.levels", "1000", "--output", "OUT"], "levels and rho"),
    "rho": (["tokenizer", "fit", "--data", "x", "--tokenizer.levels", "60", "--tokenizer.rho", "7"], "levels and rho"),
    "pushes": (["demos", "collect", "--out", "OUT", "--noise.push-steps", "6", "3"], "--noise.push-steps with the"),
    "push-sizes": (["demos", "collect", "--out", "OUT", "--noise.push-size", "1", "0.4"], "--noise.push-size with the"),
    "seeds": (["expert", "run", "--seeds", "1", "1"], "--seeds: expected each once, found 1 twice in"),
    "drafter-delay": (["eval", "--decode", "l1", "--drafter-delay", "2", "--output", "OUT"], "unverified drafts with"),
    "motion": (
        ["eval", "--decode", "l1", "--task-suite", "libero_goal", "--motion", "destination", "--output", "OUT"],
        "expected something that can slide, found wooden_cabinet_1",
    ),
}


@pytest.mark.parametrize("case", COMMANDS_LINE)
def test_values_that_cannot_be_meant(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, expected = COMMANDS_LINE[case]
    check([str(tmp_path / "out") if word == "OUT" else word for word in command], expected, tmp_path, capsys)


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "figures"])
def test_a_run_does_not_come_among_other_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("somebody's")
    for more in ([], ["--overwrite"]):
        command = ["eval", "--decode", "l1", "--num-trials", "1", "--output", tmp_path, *more]
        check(command, f"expected a run, or an empty folder, found {name}", tmp_path, capsys)


def test_a_report_replaces_what_a_report_wrote_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = "results/libero_spatial_57M/h100/l1"
    for place in ("page.html", "figures/success.svg", "figures/success.pdf"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("somebody's")
        check(["report", run, "--output", tmp_path / "page.html"], f"{place}: exists already", tmp_path, capsys)
        (tmp_path / place).unlink()
    again = ["report", run, "--output", tmp_path / "page.html", "--overwrite"]
    (tmp_path / "figures/success.svg").mkdir()
    check(again, "figures/success.svg: expected a file, or nothing yet, found a folder", tmp_path, capsys)
    shutil.rmtree(tmp_path / "figures")
    (tmp_path / "figures").touch()
    check(again, "figures: expected a folder, or nothing yet, found a file", tmp_path, capsys)
    (tmp_path / "figures").unlink()
    (tmp_path / "page.html").write_text("somebody's")
    for more in (["--overwrite"], []):  # the second time it is its own
        assert dispatch(["report", run, "--videos", "none", "--output", str(tmp_path / "page.html"), *more]) == 0


# options that name places

ADDRESSES = ["ws://127.0.0.1:notaport", "ws://127.0.0.1:99999", "ws://127.0.0.1:-1", "ws://[::1", "ws://", "wss://:1"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_no_server(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--policy", address, "--output", tmp_path / "out"]
    check(command, "at ws://HOST:PORT, found none", tmp_path, capsys)


WRITERS = {
    "eval": ["eval", "--output"],
    "compare": ["eval", "--compare", "--output"],
    "merge": ["merge"],
    "report": ["report", ".", "--output"],
    "latency": ["bench", "latency", "--output"],
    "expert": ["expert", "run", "--video"],
    "fit": ["tokenizer", "fit", "--output"],
    "collect": ["demos", "collect", "--out"],
    "render": ["demos", "render", "--source", ".", "--out"],
    "train": ["train", "policy", "--output"],
    "calibrate": ["calibrate", "--output"],
    "legacy": ["study", "legacy", "--autoencoder", "x", "--head", "x", "--output"],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_outputs_that_cannot_be_written(writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("somebody's")
    end = ".mp4" if writer == "expert" else ""
    for place in (tmp_path / f"file/x{end}", tmp_path / f"file/x/y{end}", Path(f"/dev/null/x{end}")):
        check([*WRITERS[writer], place], "expected a path in a folder, found that", tmp_path, capsys)
    check([*WRITERS[writer], f"{tmp_path}/a\0b"], "expected text without the character NUL", tmp_path, capsys)
    if writer not in ("report", "latency", "expert"):
        check([*WRITERS[writer], tmp_path / "file"], "expected a folder, or nothing yet", tmp_path, capsys)
    if writer == "latency":
        check([*WRITERS[writer], tmp_path], "expected a file, or nothing yet, found a folder", tmp_path, capsys)
        check([*WRITERS[writer], "/dev/full"], "expected a file, or nothing yet, found a device", tmp_path, capsys)


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
def test_an_output_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        check(["eval", "--output", tmp_path / "out"], "not permitted to write to", tmp_path, capsys)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


# what no command forecasts


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], list[str]]]:
    """A command that raises what it is given."""

    def make(error: BaseException) -> list[str]:
        def run(self: Command, arguments: list[str], prog: str) -> int:
            raise error

        monkeypatch.setattr(Command, "run", run)
        return [next(iter(COMMANDS))]

    return make


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; choose another path"),
        (OSError("odd"), "OSError: odd; RSD_DEBUG=1 shows where"),
        (ValueError("a\nb"), "ValueError: a b; RSD_DEBUG=1 shows where"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "UnicodeDecodeError: 'utf-8' codec can't decode"),
        (BrokenPipeError(32, "Broken pipe"), "whoever read the output has closed it (broken pipe)"),
        (RsdError("found \x1b[31mred\x07"), "found ?[31mred?"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: Exception,
    expected: str,
    failing: Callable[[BaseException], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = failing(error)
    check(command, expected, tmp_path, capsys)
    monkeypatch.setenv("RSD_DEBUG", "1")
    with pytest.raises(type(error)):
        dispatch(command)


def test_a_mistake_of_the_program_keeps_its_traceback(failing: Callable[[BaseException], list[str]]) -> None:
    with pytest.raises(AssertionError, match="never"):
        dispatch(failing(AssertionError("never")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        (">/dev/full", "rsd: error: No space left on device; make room and run the same command again"),
        ("| true", "rsd: error: whoever read the output has closed it (broken pipe)"),
        (">&-", ""),
        (">/dev/full 2>/dev/full", ""),
    ],
)
def test_an_output_that_nobody_takes(redirection: str, expected: str) -> None:
    shell = f"sleep 0.1; {sys.executable} -m rsd --help {redirection}" if "|" not in redirection else ""
    # the reader is gone before anything is written
    shell = shell or f"(sleep 0.3; {sys.executable} -m rsd --help; echo status $? >&2) {redirection}; sleep 2"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, text=True, timeout=60)
    said = done.stderr.replace("status 2\n", "").strip()
    assert said == expected
    assert done.returncode == (0 if redirection == ">&-" else 2) or "status 2" in done.stderr
