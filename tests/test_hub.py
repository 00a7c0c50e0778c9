"""What is a path, and what may be asked of the hub."""

from pathlib import Path

import pytest

from rsd import hub
from rsd.checkpoint import locate_checkpoint
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for."""
    names: list[str] = []

    def download(name: str, kind: str, files: object) -> Path:
        names.append(name)
        return Path("downloaded")

    monkeypatch.setattr(hub, "download", download)
    return names


def test_the_shipped_checkpoints_are_found_from_anywhere(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = locate_checkpoint("checkpoints/libero")
    assert (found / "manifest.json").is_file()
    (tmp_path / "checkpoints" / "libero").mkdir(parents=True)  # what lies here comes first
    assert locate_checkpoint("checkpoints/libero") == Path("checkpoints/libero")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_checkpoint("~/checkpoints/libero") == tmp_path / "checkpoints" / "libero"
    assert asked == []


@pytest.mark.parametrize(
    "path",
    ["checkpoints/typo", "results/run", "here/typo", "./a/b", "../b", "/a/b", "~/a", "a/b/c", "name", "a/b/", "a\\b/c"],
)
def test_a_path_that_is_not_there_is_not_sent_to_the_hub(
    path: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for call in (locate_checkpoint, ActionTokenizer.from_pretrained):
        with pytest.raises(RsdError, match=r"expected a (checkpoint directory|directory with tokenizer)"):
            call(path)
    assert asked == []


def test_what_cannot_be_uploaded_is_a_line() -> None:
    with pytest.raises(RsdError, match=r"'not a hub id': not uploaded, expected a hub id like owner/name.*; found: "):
        hub.upload(lambda folder: None, "not a hub id", private=True)


def test_a_hub_id_is_asked_for(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint("some-body/a.policy_2") == Path("downloaded")
    assert asked == ["some-body/a.policy_2"]
