from pathlib import Path

import pytest

from refusals import tree
from rsd.reporting.archive import located
from rsd.types import RsdError
from studies.archive import pack, read_json


def study(folder: Path) -> Path:
    (folder / "cpu" / "l1").mkdir(parents=True)
    (folder / "cpu" / "l1" / "summary.json").write_text('{"format": 1, "policy": {"provenance": 1, "engine": "onnx"}}')
    (folder / "cpu" / "l1" / "episodes.jsonl").write_text("{}\n")
    (folder / "latency.json").write_text('{"l1": [1.5]}')
    return folder


def test_an_archive_is_read_by_the_paths_of_its_folder(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    assert located(folder / "latency.json") == folder / "latency.json"
    archive = pack(folder)
    assert not folder.exists()
    assert read_json(folder / "latency.json") == {"l1": [1.5]}
    assert (located(folder / "cpu" / "l1") / "episodes.jsonl").read_text() == "{}\n"
    assert located(folder / "none") != folder / "none"
    assert not located(folder / "none").exists()
    assert located(tmp_path / "other" / "l1") == tmp_path / "other" / "l1"
    summary = read_json(tmp_path / "study.json")
    assert summary["runs"] == {"cpu/l1": {"policy": {"engine": "onnx"}}}
    assert summary["other_files"] == ["latency.json"]
    again = study(tmp_path / "again")
    assert pack(again).read_bytes() == archive.read_bytes()
    before = tree(tmp_path)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "more.json").write_text("{}")
    with pytest.raises(RsdError, match=r"again.tar.xz: exists already; unpack it"):
        pack(again)
    assert tree(tmp_path) == before | {"again": None, "again/more.json": b"{}"}


def test_what_is_no_archive_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged.tar.xz").write_bytes(b"not one")
    with pytest.raises(RsdError, match=r"damaged.tar.xz: cannot be unpacked"):
        located(tmp_path / "damaged" / "l1")
    content = pack(study(tmp_path / "flipped")).read_bytes()
    middle = len(content) // 3
    (tmp_path / "flipped.tar.xz").write_bytes(content[:middle] + b"\xff" * 8 + content[middle + 8 :])
    with pytest.raises(RsdError, match=r"flipped.tar.xz: cannot be unpacked"):
        located(tmp_path / "flipped" / "l1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RsdError, match="no file in it"):
        pack(tmp_path / "empty")
