"""A study's raw results in the repository: one archive `NAME.tar.xz`, and a summary in plain JSON beside it.

    python -m studies.archive results/NAME

packs a folder and removes it. Whatever reads results finds what was in the folder by its former path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsd.evaluation.results import SUMMARY_FILE
from rsd.reporting.archive import SUFFIX, located
from rsd.types import RsdError


def read_json(path: Path) -> Any:
    """A JSON file of raw results, archived or not."""
    return json.loads(located(path).read_text())


def pack(folder: Path) -> Path:
    """folder -> its archive, the same bytes for the same content; the folder is removed. Returns the archive."""
    archive = folder.with_name(folder.name + SUFFIX)
    if archive.exists():
        raise RsdError(f"{archive}: exists already; unpack it into {folder} first, and move it away")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise RsdError(f"{folder}: expected a folder with raw results, found no file in it")
    with tarfile.open(archive, "w:xz", preset=9) as content:
        for path in files:
            entry = content.gettarinfo(path, str(path.relative_to(folder)))
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode = 0, 0, 0, "", "", 0o644
            with path.open("rb") as file:
                content.addfile(entry, file)
    summary = {
        "archive": archive.name,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "runs": {str(path.parent.relative_to(folder)): _run(path) for path in files if path.name == SUMMARY_FILE},
        "other_files": [str(path.relative_to(folder)) for path in files if not (path.parent / SUMMARY_FILE).is_file()],
    }
    folder.with_name(folder.name + ".json").write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(folder)
    return archive


def _run(path: Path) -> dict[str, Any]:
    """A run's summary without what is long or the same in every run: the checkpoint's provenance."""
    content = json.loads(path.read_text())
    content["policy"] = {name: value for name, value in content["policy"].items() if name != "provenance"}
    return {name: value for name, value in content.items() if name not in ("format", "tasks")}


def main(arguments: Sequence[str], prog: str) -> int:
    """Of the command line: every folder."""
    if not arguments:
        raise RsdError("expected folders with raw results, found none")
    for argument in arguments:
        print(pack(Path(argument)))
    return 0


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("archive")
