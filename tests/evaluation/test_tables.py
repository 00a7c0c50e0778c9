"""No cell of a table is ever cut, however narrow the terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rsd.evaluation.tables import plural, print_table

WORD = st.text("abc_%[]/.-", min_size=1, max_size=30)


def drawn(width: int, *table: object) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(console, "title", *table)  # type: ignore[arg-type]
    return console.export_text()


@given(st.lists(st.lists(WORD, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(10, 120))
def test_every_cell_is_there_at_every_width(rows: list[list[str]], width: int) -> None:
    for blocks in ("columns", "rows"):
        text = drawn(width, ["", "one", "two"], rows, blocks)
        told = [row for row in rows if set(row[1:]) != {"-"}]  # a row with nothing to say may be left out
        assert all(cell in text for row in told for cell in row if cell != "-")
        assert "…" not in text


def test_what_does_not_fit_becomes_blocks() -> None:
    header, rows = ["", "first", "second"], [["success", "x" * 30, "y" * 30], ["speed", "-", "2x"]]
    assert "┃" in drawn(120, header, rows)
    narrow = drawn(60, header, rows).splitlines()
    first, second = f"  success  {'x' * 30}", f"  success  {'y' * 30}"
    assert narrow == ["title", "", "first", first, "", "second", second, "  speed    2x"]
    by_row = drawn(60, ["task", "won", "why"], [["a", "x" * 30, "y" * 30]], "rows").splitlines()
    assert by_row == ["title", "", "a", f"  won  {'x' * 30}", f"  why  {'y' * 30}"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 episodes"), (1, "1 episode"), (4275, "4,275 episodes")])
def test_plural(count: int, text: str) -> None:
    assert plural(count, "episode") == text
