"""LeRobot data sets of both layouts, written here as LeRobot 0.3 (v2.1) and 0.4 (v3.0) lay them out."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rsd.cli import dispatch
from rsd.data.demonstrations import action_episodes
from rsd.data.lerobot import located
from rsd.data.lerobot_libero import read_actions
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError
from studies.command import run_study

LENGTHS = (40, 25, 33, 52)


def bimanual(seed: int = 0) -> list[np.ndarray]:
    """Episodes [T, 14]: two arms of 6 joints (rad, beyond 1) with a gripper of 0 and 1 each at 6 and 13."""
    rng = np.random.default_rng(seed)
    episodes = []
    for length in LENGTHS:
        time = np.linspace(0, 1, length)[:, None]
        actions = 2 * np.sin(rng.normal(size=14) * 3 * time + rng.normal(size=14))
        for gripper in (6, 13):
            actions[:, gripper] = time[:, 0] > rng.uniform(0.2, 0.8)
        episodes.append(actions.astype(np.float32))
    return episodes


def table(actions: np.ndarray, episode: int, key: str, fixed: bool) -> pyarrow.Table:
    count, width = actions.shape
    flat = pyarrow.array(actions.ravel())
    if width == 1:
        column: Any = flat  # as LeRobot writes a vector of one
    elif fixed:
        column = pyarrow.FixedSizeListArray.from_arrays(flat, width)
    else:
        column = pyarrow.array(actions.tolist(), pyarrow.list_(pyarrow.float32()))
    columns = {
        key: column,
        "observation.state": pyarrow.array(np.zeros((count, 2)).tolist(), pyarrow.list_(pyarrow.float32(), 2)),
        "timestamp": pyarrow.array(np.arange(count, dtype=np.float32) / 50),
        "frame_index": pyarrow.array(np.arange(count)),
        "episode_index": pyarrow.array(np.full(count, episode)),
    }
    return pyarrow.table(columns)


def write(folder: Path, episodes: list[np.ndarray], version: str, key: str = "action", **changes: Any) -> Path:
    tables = [table(actions, i, key, version == "v3.0") for i, actions in enumerate(episodes)]
    chunk = folder / "data" / "chunk-000"
    chunk.mkdir(parents=True)
    if version == "v3.0":  # several episodes a file
        files = {"file-000": tables[:3], "file-001": tables[3:]}
        path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    else:
        files = {f"episode_{i:06d}": [each] for i, each in enumerate(tables)}
        path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    for name, parts in files.items():
        parquet.write_table(pyarrow.concat_tables(parts), chunk / f"{name}.parquet")
    info = {
        "codebase_version": version,
        "fps": 50,
        "total_episodes": len(episodes),
        "total_frames": sum(map(len, episodes)),
        "chunks_size": 1000,
        "data_path": path,
        "features": {
            key: {"dtype": "float32", "shape": [episodes[0].shape[1]], "names": None},
            "observation.state": {"dtype": "float32", "shape": [2], "names": None},
        },
        **changes,
    }
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("width", [14, 1])
def test_every_format_gives_the_same_episodes(version: str, width: int, tmp_path: Path) -> None:
    episodes = [actions[:, :width] for actions in bimanual()]
    folder = write(tmp_path / "aloha", episodes, version, key="actions" if version == "v2.0" else "action")
    assert located(folder) == located(f"lerobot:{folder}") == (folder, True)
    for found, expected in zip(read_actions(folder), episodes, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float32
    assert [episode.task for episode in action_episodes(folder)] == ["aloha"] * 4


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_tokenizer_is_fitted_on_two_arms_and_long_chunks(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "first", bimanual(), version)
    second = write(tmp_path / "second", bimanual(1), version)
    output = tmp_path / "tokenizer"
    command = f"tokenizer fit --data {first} {second} --output {output} --tokenizer.horizon 50 --tokenizer.limit 0"
    assert dispatch([*command.split(), "--tokenizer.binary", "6", "13"]) == 0
    said = capsys.readouterr().out
    assert "8 demonstrations, 300 chunks" in said
    assert "dimension 13 is binary: 0 (symbol 0) or 1 (symbol 1)" in said
    tokenizer = ActionTokenizer.load(output)
    assert (tokenizer.config.horizon, tokenizer.action_dim) == (50, 14)
    picture = tmp_path / "chunk.svg"
    command = f"tokenizer inspect --tokenizer {output} --data {first} {second} --output {picture}"
    assert dispatch(command.split()) == 0
    assert picture.stat().st_size > 10_000
    # grippers that are not named as such are motion, and no dimension need be binary
    command = f"tokenizer fit --data {first} --output {output} --overwrite --tokenizer.limit 0 --tokenizer.binary"
    assert dispatch(command.split()) == 0
    assert len(ActionTokenizer.load(output).low) == 14


def test_what_a_fit_needs_to_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "aloha", bimanual(), "v3.0")
    fit = f"tokenizer fit --data {folder} --output {tmp_path / 'out'}".split()
    assert dispatch(fit) == 2
    assert "within +-1 (--tokenizer.limit), found 2" in capsys.readouterr().err
    assert dispatch([*fit, "--tokenizer.limit", "3", "--tokenizer.binary", "5"]) == 2
    assert "dimension 5 to be binary and to hold two values, found" in capsys.readouterr().err
    other = write(tmp_path / "other", [actions[:, :7] for actions in bimanual()], "v2.1")
    assert dispatch(f"tokenizer fit --data {folder} {other}".split()) == 2
    assert "expected actions of one size, found 7 and 14 numbers" in capsys.readouterr().err
    assert run_study("tokenizers", f"--data {folder} --output {tmp_path / 'bench'}".split()) == 2
    assert "expected LIBERO's actions of 7 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, "format v2.0, v2.1, v3.0, found 'v1.6'"),
        ({"features": {"observation.state": {}}}, "expected the feature action, found observation.state"),
        ({"features": {"action": {"shape": [2, 7]}}}, r"a vector, found the shape \[2, 7\]"),
        ({"features": {"action": {"shape": [13]}}}, "expected 13 numbers in every action, found 14 in one"),
        ({"features": {"action": {"shape": [14], "dtype": "image"}}}, "to be of numbers, found the dtype 'image'"),
        ({"total_frames": 999}, "expected 999 frames as meta/info.json says, found 150"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match=message):
        read_actions(write(tmp_path, bimanual(), "v3.0", **changes))


def test_damaged_data_are_refused(tmp_path: Path) -> None:
    episodes = bimanual()
    file = Path("data/chunk-000/file-001.parquet")
    pointer = write(tmp_path / "pointer", episodes, "v3.0")
    (pointer / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RsdError, match=r"file-001\.parquet: expected a parquet file.*git lfs pull"):
        read_actions(pointer)
    twice = write(tmp_path / "twice", episodes, "v3.0", total_frames=202)
    (twice / "data/chunk-000/file-002.parquet").write_bytes((twice / file).read_bytes())
    with pytest.raises(RsdError, match=r"frames 0\.\.103 of episode 3, each once"):
        read_actions(twice)
    episodes[2][5, 3] = np.nan
    with pytest.raises(RsdError, match="NaN or infinity"):
        read_actions(write(tmp_path / "nan", episodes, "v2.1"))
    none = write(tmp_path / "none", episodes, "v2.1")
    for path in (none / "data").glob("*/*"):
        path.unlink()
    with pytest.raises(RsdError, match=r"expected data/chunk-\*/\*\.parquet, found none"):
        read_actions(none)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, bimanual(), "v3.0")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RsdError, match=r"rsd-vla\[lerobot-data\]"):
        read_actions(folder)
