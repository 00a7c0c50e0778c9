"""A cache of code is read only from where nobody else can have written."""

import os
from pathlib import Path

import pytest

from rsd.cache import private_folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's cache and a temporary folder."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return home / ".cache" / "rsd-vla", temporary / f"rsd-{os.getuid()}"


def test_the_users_own_cache_comes_first(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private_folder("numba")
    assert folder == places[0] / "numba" == private_folder("numba")
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(places[0].parents[1] / "other"))
    assert private_folder("numba") == places[0].parents[1] / "other" / "rsd-vla" / "numba"


def test_without_a_cache_the_temporary_folder_is_taken(places: tuple[Path, Path]) -> None:
    places[0].parent.touch()  # a file in the cache's place
    assert private_folder("numba") == places[1] / "numba"


@pytest.mark.parametrize("trap", ["open to all", "open to the group", "a link", "somebody else's"])
def test_a_folder_that_others_can_write_into_is_not_used(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trap: str
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    for place in places:
        if trap == "a link":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(planted)
        else:
            place.mkdir(parents=True)
            place.chmod({"open to all": 0o777, "open to the group": 0o770}.get(trap, 0o700))
    if trap == "somebody else's":
        for place in places:
            os.chown(place, 12345, 12345) if os.getuid() == 0 else pytest.skip("only root can give a folder away")
    folder = private_folder("numba")
    assert folder.parent == places[1].parent
    assert folder not in (places[1], planted)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(planted.iterdir())
    assert private_folder("numba") != folder  # and is no name that can be foretold
