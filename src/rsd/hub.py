"""Directories that lie here or on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import rsd
from rsd.checks import RsdError, checked, shown, told
from rsd.types import LEROBOT

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LONGEST_PATH = 1000  # characters of one in a message
OWN_FOLDERS = ("checkpoints", "results", "runs", "data")  # what a path here begins with


def locate(path_or_hub_id: str | Path, kind: str, directory: str, files: Sequence[str]) -> Path:
    """A local directory as it is; otherwise `owner/name` on the hub, its files (patterns) downloaded to its cache.

    kind and directory word the error where it is neither.
    """
    name = shown(checked(str | Path, path_or_hub_id, kind), LONGEST_PATH)
    try:
        if (found := local(path_or_hub_id)) is not None:
            return found
        path = Path(path_or_hub_id)
        elsewhere = not path.exists() and HUB_ID.fullmatch(str(path_or_hub_id))
    except (OSError, ValueError, RuntimeError):  # a name that no file system takes; nobody's home
        elsewhere = None
    if "://" in str(path_or_hub_id):
        raise RsdError(f"{kind} {name}: expected {directory}, a hub id, or a server's address ws://HOST:PORT")
    if str(path_or_hub_id).startswith(LEROBOT):
        raise RsdError(f"{kind} {name}: expected {directory} or a hub id; LeRobot's are for rsd eval, serve, doctor")
    if not elsewhere:
        raise RsdError(f"{kind} {name}: expected {directory} or a hub id like owner/name")
    if path.parts[0] in OWN_FOLDERS or path.parent.is_dir():  # a slip in a path: nobody else has to know of it
        raise RsdError(f"{kind} {name}: expected {directory}, found none in {Path.cwd()}; name it by its whole path")
    return download(str(path_or_hub_id), kind, files)


def local(path_or_hub_id: str | Path) -> Path | None:
    """The directory itself; of the checkpoints that ship, also that of the source tree, from wherever one works."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir() and path_or_hub_id != "":
        return path
    shipped = Path(rsd.__file__).parents[2] / path
    return shipped if path.parts[:1] == ("checkpoints",) and shipped.is_dir() else None


def download(name: str, kind: str, files: Sequence[str]) -> Path:
    """`owner/name` on the hub, its files (patterns) in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many kinds: no such repo, no network, no access
        raise RsdError(f"{kind} {name!r}: no such directory, and the hub answered: {told(error)}") from error


def upload(save: Callable[[Path], None], repo_id: str, private: bool) -> None:
    """Put what `save` writes into a directory on the hub (needs a login)."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        except Exception as error:  # as in `download`
            expected = "not uploaded, expected a hub id like owner/name, and a login that may write there"
            raise RsdError(f"{shown(repo_id)}: {expected}; found: {told(error)}") from error
