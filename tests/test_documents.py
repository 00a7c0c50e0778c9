"""The tables of README.md and docs/results.md hold what the summaries beside the raw results say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rsd import former
from studies.permuted_page import ROWS, permuted_table

ROOT = Path(__file__).resolve().parent.parent
FORMER = {new: old for old, new in former.DECODERS.items()}  # in these raw results
# document, its section, the column of successes, the summary of the raw results, and the folder of the runs there
TABLES = {
    "readme": ("README.md", "What it gains", "stock libero_spatial", "libero_spatial_57M", "h100/"),
    "stock": ("docs/results.md", "Stock libero_spatial", "success [Wilson 95 %]", "libero_spatial_57M", "h100/"),
    "suites": ("docs/results.md", "Three more stock suites", "together", "suites", ""),
    "libero-pro": ("docs/results.md", "LIBERO-PRO", "together", "libero_pro", ""),
}


def rows(document: str, section: str) -> list[dict[str, str]]:
    """The rows of a section's first table by its header; the first column is `decoder`, without notes."""
    text = (ROOT / document).read_text()
    body = re.split(rf"^## {re.escape(section)}.*$", text, flags=re.MULTILINE)[1]
    table = re.search(r"^\|.*?(?=^[^|])", body, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *lines = (
        [cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table[0].strip().splitlines()
    )
    found = [dict(zip(["decoder", *header[1:]], cells, strict=True)) for cells in lines]
    return [{**row, "decoder": row["decoder"].split("`")[1]} for row in found]


def summary(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())["runs"]
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_successes_is_that_of_the_raw_results(name: str) -> None:
    document, section, column, raw, folder = TABLES[name]
    runs, table = summary(raw), rows(document, section)
    assert len(table) >= 4
    for row in table:
        success = runs[folder + FORMER.get(row["decoder"], row["decoder"])]["success"]
        share = 100 * success["successes"] / success["n"]
        interval = f"{share:.1f} % [{100 * success['low']:.1f}, {100 * success['high']:.1f}]"
        assert interval in row[column], (row, interval)
        if counted := re.match(r"(\d+)(?:/(\d+))? =", row[column]):
            assert (int(counted[1]), int(counted[2] or 500)) == (success["successes"], success["n"]), row


def test_the_table_of_the_permuted_scenes_is_made_from_the_raw_results() -> None:
    made = permuted_table(ROOT / "results" / "permuted_object")
    assert made in (ROOT / "docs" / "results.md").read_text()
    runs = {"l1": "l1", "drafter-only": "alone", "rsd-fused": "fused_blind", "rsd-skip": "skip_reset_3", "ar": "ar"}
    in_full = {cells[0]: cells[1] for cells in (line.strip("| ").split(" | ") for line in made.splitlines()[2:])}
    table = rows("README.md", "What it gains")
    assert [row["decoder"] for row in table] == list(runs)
    for row in table:
        assert re.sub(r" \(\w\)", "", row["permuted scenes"]) == in_full[ROWS[runs[row["decoder"]]]]
