"""Directories that lie here or on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rsd.types import RsdError


def locate(path_or_hub_id: str | Path, kind: str, directory: str, files: Sequence[str]) -> Path:
    """A local directory as it is; otherwise `owner/name` on the hub, its files (patterns) downloaded to its cache.

    kind and directory word the error where it is neither.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise RsdError(f"{kind} {name!r}: expected {directory} or a hub id like owner/name")
    return download(name, kind, files)


def download(name: str, kind: str, files: Sequence[str]) -> Path:
    """`owner/name` on the hub, its files (patterns) in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many kinds: no such repo, no network, no access
        raise RsdError(f"{kind} {name!r}: no such directory, and the hub answered: {error}") from error


def upload(save: Callable[[Path], None], repo_id: str, private: bool) -> None:
    """Put what `save` writes into a directory on the hub (needs a login)."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
