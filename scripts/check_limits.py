#!/usr/bin/env python3
"""Holds the repository to its sizes: scripts/check_limits.py [ROOT] [NAME=CEILING ...]; exit status 1 beyond a ceiling.

A ceiling is what may not be passed; where it is not yet the goal it only ever goes down: lower it here when the script
says that there is room. NAME=CEILING tries another one, for example source=17000.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

SLACK = 0.02  # of a ceiling above its goal: so far below it what is measured may stay before that is an error, too


@dataclass(frozen=True)
class Limit:
    """A size of the repository. goal: what it is to be; ceiling: what it may be today."""

    name: str
    what: str
    goal: int
    ceiling: int


LIMITS = (
    Limit("readme", "lines of README.md", 130, 130),
    Limit("words", "words of README.md, CONTRIBUTING.md and docs/", 12_000, 12_000),
    Limit("source", "lines of Python in src/rsd", 17_000, 27_568),
    Limit("package", "largest package of src/rsd, per cent of its lines", 20, 20),
    Limit("file", "lines of the longest file in src, studies, scripts and tests", 500, 500),
)


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    limits = {limit.name: limit for limit in LIMITS}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            root = Path(argument)
        elif name in limits and value.isdecimal():
            limits[name] = replace(limits[name], ceiling=int(value))
        else:
            print(f"check_limits: {argument}: expected ROOT or one of {', '.join(limits)} = a number", file=sys.stderr)
            return 2
    if not (root / "README.md").is_file() or not (root / "src" / "rsd").is_dir():
        print(f"check_limits: {root}: expected README.md and src/rsd; name the repository's root", file=sys.stderr)
        return 2
    found, failed = measure(root), 0
    for name, limit in limits.items():
        value, where = found[name]
        verdict = "ok"
        if value > limit.ceiling:
            verdict = f"TOO MUCH, at most {limit.ceiling:,}"
        elif limit.ceiling > limit.goal and value < limit.ceiling * (1 - SLACK):
            lower = max(value, limit.goal)
            verdict = f"LESS THAN ITS CEILING {limit.ceiling:,}: lower that to {lower:,} in this script"
        elif limit.ceiling > limit.goal:
            verdict = f"ok today, at most {limit.ceiling:,}"
        failed += not verdict.startswith("ok")
        print(f"{limit.what}: {value:,}{where} (goal {limit.goal:,}): {verdict}")
    return int(failed > 0)


def measure(root: Path) -> dict[str, tuple[int, str]]:
    """By a limit's name: its value, and where it was found if that is not said by the limit."""
    documents = [root / "README.md", *root.glob("CONTRIBUTING.md"), *(root / "docs").rglob("*.md")]
    source = {path: lines(path) for path in (root / "src" / "rsd").rglob("*.py")}
    total, packages = sum(source.values()), dict[str, int]()
    for path, count in source.items():
        parts = path.relative_to(root / "src" / "rsd").parts
        if len(parts) > 1:
            packages[parts[0]] = packages.get(parts[0], 0) + count
    largest = max(packages, key=packages.__getitem__)
    folders = ("src", "studies", "scripts", "tests")
    files = {path: lines(path) for folder in folders for path in (root / folder).rglob("*.py")}
    longest = max(files, key=files.__getitem__)
    return {
        "readme": (lines(root / "README.md"), ""),
        "words": (sum(len(path.read_text().split()) for path in documents), ""),
        "source": (total, ""),
        "package": (-(-100 * packages[largest] // total), f", {largest}"),
        "file": (files[longest], f", {longest.relative_to(root)}"),
    }


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
